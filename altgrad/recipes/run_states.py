"""`RunStates`: find the layers whose optimizer states something other than a step has changed.

A checkpoint that is loaded in mid-run, a warm restart, or a reset of the first moment changes the
states of the *run's* optimizer, that of the training, between two steps. Twins, which step a sample
with states of their own, then take these states over. Only identities of tensors and the numbers of
writes that torch counts are compared, so that an ordinary step costs no operation.

Read `run_weights` first; `fused_sgd` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from altgrad.recipes.layer_plan import Stepped
from altgrad.recipes.writes import count_writes


class RunStates:
    """A record of the writes to optimizer states that torch has counted so far, by layer."""

    def __init__(self) -> None:
        self._marks: dict[str, tuple[object, ...]] = {}

    def remember(self, optimizer: Optimizer, stepped: Sequence[Stepped]) -> None:
        """Attribute all writes so far to the optimizer; called at the end of its step.

        Args:
            optimizer: The run's optimizer.
            stepped: The layers that the optimizer steps.
        """
        state = optimizer.state
        self._marks = {each.name: _mark(state.get(each.parameter)) for each in stepped}

    def find_changed(self, optimizer: Optimizer, stepped: Sequence[Stepped]) -> set[str]:
        """Return the layers whose states were written to or replaced since `remember`.

        Args:
            optimizer: The run's optimizer.
            stepped: The layers that the optimizer is about to step.

        Returns:
            Names of the layers; a layer that `remember` did not get is not among them.
        """
        state, marks = optimizer.state, self._marks
        return {
            each.name
            for each in stepped
            if each.name in marks and marks[each.name] != _mark(state.get(each.parameter))
        }


def _mark(state: Mapping[str, Any] | None) -> tuple[object, ...]:
    """Return identities of a layer's state and its tensors, the writes to each, and its numbers."""
    if not state:
        return ()
    values = state.values()  # once per layer and step: one pass each is faster than a helper
    tensors = [each for each in values if isinstance(each, Tensor)]
    numbers = [each for each in values if isinstance(each, (int, float))]
    return (id(state), *map(id, tensors), *map(count_writes, tensors), *numbers)
