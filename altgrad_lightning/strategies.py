"""Which processes of a Trainer observe, and which strategies cannot be observed at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from altgrad.observation import is_sharded_module

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

REFUSED = {
    "DeepSpeedStrategy": "DeepSpeed steps flat copies of the parameters, which have no layers",
    "FSDPStrategy": "FSDP1 keeps the parameters as flat shards, which have no layers",
    "XLAStrategy": "it steps on devices of XLA, which have no hooks around the step",
}
"""Why the steps of a strategy cannot be observed, by the name of its class."""
REPLICATING = "DDPStrategy"
"""The strategy whose processes each have all of the parameters."""


def is_idle(trainer: Trainer, module: nn.Module) -> bool:
    """Return True if another process observes, which has all of the parameters as this one has."""
    several, first = trainer.world_size > 1, trainer.is_global_zero
    return several and not first and not is_sharded_module(module)


def refused_strategy(trainer: Trainer) -> str | None:
    """Return why the steps of the Trainer's strategy cannot be observed; None if they can."""
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    for kind in kinds:
        if kind in REFUSED:
            return f"{REFUSED[kind]} ({kind}); use ModelParallelStrategy with fully_shard, or DDP"
    module = trainer.lightning_module
    if trainer.world_size == 1 or REPLICATING in kinds or is_sharded_module(module):
        return None
    return (
        f"{kinds[0]} has {trainer.world_size} processes, and whether each has all of the "
        "parameters is not known; use DDP, or ModelParallelStrategy with fully_shard"
    )
