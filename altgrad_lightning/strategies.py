"""Decide which ranks of a Trainer observe, and which strategies cannot be observed.

- `is_idle` says whether a rank leaves observing to the first rank.
- `explain_refusal` says why steps of a strategy cannot be observed.

Nothing needs to be read before this file. `callback` uses `is_idle`, `session` `explain_refusal`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from altgrad.observation import is_sharded_module

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

REFUSED = {
    "DeepSpeedStrategy": "DeepSpeed steps flat copies of the parameters, which have no layers",
    "FSDPStrategy": "FSDP1 keeps the parameters as flat shards, which have no layers",
    "XLAStrategy": "XLA devices have no hooks around the optimizer step",
}
"""Why steps of a strategy cannot be observed, by the name of the strategy's class."""
REPLICATING = "DDPStrategy"
"""Name of the strategy with a replica of all parameters on each rank."""


def is_idle(trainer: Trainer, module: nn.Module) -> bool:
    """Return True if this rank leaves observing to the first rank, which has equal parameters.

    Args:
        trainer: The Trainer that trains.
        module: The module that is trained.
    """
    several, first = trainer.world_size > 1, trainer.is_global_zero
    return several and not first and not is_sharded_module(module)


def explain_refusal(trainer: Trainer) -> str | None:
    """Return why steps of the Trainer's strategy cannot be observed; None if they can be.

    A strategy is known by the names of its classes, because `lightning` and `pytorch_lightning`
    define each strategy twice.
    """
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
