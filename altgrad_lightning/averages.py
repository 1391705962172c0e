"""Find the averages of the weights that a Trainer keeps, such as those of its callbacks.

Lightning's `WeightAveraging` and `EMAWeightAveraging` (2.6 and later) keep an `AveragedModel` of
torch, as a callback or a module of the user's may.

Nothing needs to be read before this file. `session` uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def find_averages(trainer: Trainer, module: nn.Module) -> dict[str, AveragedModel]:
    """Find each `AveragedModel` that is an attribute of a callback, or a part of the module.

    Args:
        trainer: The Trainer that trains.
        module: The module that is trained.

    Returns:
        The averages by a name for each: ``average``, then ``average_2`` and so on.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    held = [value for each in callbacks for value in getattr(each, "__dict__", {}).values()]
    found = [each for each in (*held, *module.modules()) if isinstance(each, AveragedModel)]
    unique = dict.fromkeys(found)
    return {
        "average" if number == 1 else f"average_{number}": each
        for number, each in enumerate(unique, 1)
    }
