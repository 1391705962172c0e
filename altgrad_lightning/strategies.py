"""Decide which ranks of a Trainer observe optimizer steps, and which strategies are refused.

- `is_idle` is True if a rank leaves observing to the first rank.
- `explain_refusal` returns why steps of a strategy cannot be observed.
- `explain_no_storage` returns why weights under a strategy cannot be stored in a format.

Nothing needs to be read before this file. `callback` uses `is_idle`, `session` `explain_refusal`,
and `store_as` `explain_no_storage`.
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
"""By name of the class of a strategy, why its optimizer steps cannot be observed."""
REPLICATING = "DDPStrategy"
"""Name of the class of Lightning's strategy with a replica of all parameters on each rank."""


def is_idle(trainer: Trainer, module: nn.Module) -> bool:
    """Return True if this rank lets the first rank, whose parameters are equal, observe the steps.

    Args:
        trainer: The Trainer that trains.
        module: The module that is trained.
    """
    several, first = trainer.world_size > 1, trainer.is_global_zero
    return several and not first and not is_sharded_module(module)


def explain_refusal(trainer: Trainer) -> str | None:
    """Return why steps of the Trainer's strategy cannot be observed; None if they can be."""
    reason = _explain_refused(trainer)
    if reason is None and not is_sharded_module(trainer.lightning_module):
        reason = _explain_unknown(trainer)
    return reason and f"{reason}; use ModelParallelStrategy with fully_shard, or DDP"


def explain_no_storage(trainer: Trainer) -> str | None:
    """Return why weights under the Trainer's strategy cannot be stored in a number format.

    The result is None if they can be.
    """
    reason = _explain_refused(trainer)
    if reason is None and is_sharded_module(trainer.lightning_module):
        reason = "the parameters are sharded, and the scale of a shard is not that of its layer"
    reason = reason or _explain_unknown(trainer)
    return reason and f"{reason}; use DDP, or one device"


def _explain_refused(trainer: Trainer) -> str | None:
    """Return why a strategy is refused whatever the module; None if it is not.

    Strategies are compared by class names, because `lightning` and `pytorch_lightning` each define
    the same classes.
    """
    kinds = (kind.__name__ for kind in type(trainer.strategy).__mro__)
    return next((f"{REFUSED[kind]} ({kind})" for kind in kinds if kind in REFUSED), None)


def _explain_unknown(trainer: Trainer) -> str | None:
    """Return why a rank may lack some of the parameters; None if each rank has all of them."""
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    if trainer.world_size == 1 or REPLICATING in kinds:
        return None
    return (
        f"{kinds[0]} has {trainer.world_size} processes, and whether each has all of the "
        "parameters is not known"
    )
