"""`CallbackMetrics`: pass figures of the model to callbacks such as EarlyStopping, on every rank.

EarlyStopping, ModelCheckpoint and callbacks like them read `Trainer.callback_metrics` on each rank,
and must find the same numbers on all ranks, to come to the same decision. Under DDP the first rank
alone observes.

`callback` calls `CallbackMetrics.pass_on` at the end of each batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from altgrad_lightning.steps import is_due

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


class CallbackMetrics:
    """A writer of figures of the model to `Trainer.callback_metrics`, equal on all ranks.

    Of each figure the last finite value stays. Several ranks get the figures of the first rank by
    an all-reduce, after each batch that is due and has stepped an optimizer.

    Args:
        keys: Keys of figures, such as ``"kept_update_ratio/bf16"``. Callbacks find them as
            ``altgrad/{key}``.
        every: Interval between due batches, whose steps are observed; 0 for no due batches.
        trainer: The Trainer that is about to train.
    """

    def __init__(self, keys: Sequence[str], every: int, trainer: Trainer) -> None:
        self._keys = tuple(keys)
        self._every = every
        self._waits = True  # for the first observed step, as the first rank said last
        self._global_step = trainer.global_step

    def pass_on(
        self, trainer: Trainer, figures: Mapping[str, float] | None, *, waits: bool
    ) -> None:
        """Write the figures of the first rank to `Trainer.callback_metrics`, at the end of a batch.

        Args:
            trainer: The Trainer.
            figures: The latest figures of the model on this rank; None without figures.
            waits: True if this rank observes, and has observed no step yet.
        """
        has_stepped = trainer.global_step != self._global_step
        self._global_step = trainer.global_step
        # A format that only a rule names has no figure in a step without the layers of the rule.
        numbers = [(figures or {}).get(key, math.nan) for key in self._keys]
        if trainer.world_size > 1:
            # Every rank comes to the same answer here, or some would wait for others.
            if not has_stepped or not (self._waits or is_due(trainer, self._every)):
                return
            waits_first, *numbers = _share([float(waits), *numbers], trainer)
            self._waits = bool(waits_first)
        for key, number in zip(self._keys, numbers, strict=True):
            value = torch.tensor(number, dtype=torch.float32, device="cpu")
            if value.isfinite():  # of float64 layers, a figure may exceed float32
                trainer.callback_metrics[f"altgrad/{key}"] = value


def _share(numbers: Sequence[float], trainer: Trainer) -> list[float]:
    """Return the numbers of the first rank on every rank, by an all-reduce."""
    # A sum in which the other ranks add 0: the one collective that each strategy offers for
    # tensors. float32 is known to all devices; a NaN stays one.
    mine = numbers if trainer.is_global_zero else [0.0] * len(numbers)
    device = trainer.strategy.root_device
    tensor = torch.tensor(mine, dtype=torch.float32, device=device)
    total: torch.Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")
    return total.tolist()
