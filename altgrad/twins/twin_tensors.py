"""`TwinTensors`: the weights of a twin's sample, now and at earlier times, in flat tensors.

A *twin* is a sample of the layers that is stepped and stored as a recipe says. A *window* is the
time since the last observed step, one whose figures are recorded: figures are about the whole time
of a twin, its window, or its last step. `layout` says where each layer lies in the tensors.

Read `sample` first; `element_scales` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from altgrad.measurement.twin_sums import TwinStack


@dataclass(eq=False)
class TwinTensors:
    """The weights of a twin at several times, and which have moved: flat tensors, (elements).

    A *twin* is a sample of the layers that is stepped as a recipe says.

    The weights at all four times have the dtype of the twin.

    Attributes:
        weights: The weights now.
        before: The weights before the last step.
        window: The weights when the window of their layer began, which is the time since the last
            observed step that reported the layer.
        start: The weights when the twin began.
        moved_in_window: bool; True if a step in the window moved the element.
        moved: bool; True if a step before the window moved the element.
        lost: The rounding errors that Kahan summation keeps, bfloat16. Empty without it.
    """

    weights: Tensor
    before: Tensor
    window: Tensor
    start: Tensor
    moved_in_window: Tensor
    moved: Tensor
    lost: Tensor

    @classmethod
    def start_at(cls, weights: Tensor, *, keeps_lost: bool = False) -> TwinTensors:
        """Return tensors for a twin that starts now, so that its earlier weights equal those now.

        A *twin* is a sample of the layers that is stepped as a recipe says. Its weights before the
        last step, at the start of the window and at its own start are kept. No element has moved.

        Args:
            weights: The weights, floating-point (elements). The tensor itself becomes `weights`.
            keeps_lost: If True, there is room for the rounding errors of Kahan summation.
        """
        none_moved = torch.zeros_like(weights, dtype=torch.bool)
        lost = torch.zeros_like(weights, dtype=torch.bfloat16)
        return cls(
            weights=weights,
            before=weights.clone(),
            window=weights.clone(),
            start=weights.clone(),
            moved_in_window=none_moved,
            moved=none_moved.clone(),
            lost=lost if keeps_lost else lost[:0],
        )

    def rearrange(self, sources: Tensor, fresh: TwinTensors) -> TwinTensors:
        """Return tensors with the elements in another order, and with new ones among them.

        Args:
            sources: The position of each element in these tensors, int64 (elements); −1 for new
                elements.
            fresh: Tensors in the other order, from which the new elements are taken.
        """
        is_new = sources < 0
        each = {
            field.name: torch.where(is_new, new, old[sources]) if len(new) else new
            for field in fields(self)
            for old, new in [(getattr(self, field.name), getattr(fresh, field.name))]
            if len(old) or not len(new)
        }
        return replace(fresh, **each)

    def begin_step(self) -> None:
        """Copy the weights to `before`; called just before a step."""
        self.before.copy_(self.weights)

    def end_step(self) -> None:
        """Set `moved_in_window` for the weights that a step has moved; called just after it."""
        self.moved_in_window.logical_or_(self.weights != self.before)

    def replace_step(self, weights: Tensor, moved_in_window: Tensor) -> None:
        """Replace the weights after a twin's last step, and note anew which of them it has moved.

        A *twin* is a sample of the layers that is stepped as a recipe says. This is how
        it takes over the training's weights where its own step cannot reach them.

        Args:
            weights: The weights that the step has to end at, (elements).
            moved_in_window: bool (elements), True for weights that earlier steps had moved since
                the last observed step, one whose figures are recorded.
        """
        self.weights.copy_(weights)
        self.moved_in_window.copy_(moved_in_window)
        self.end_step()

    def begin_window(self, shown: Tensor) -> None:
        """Begin another window, at the end of a step whose figures are recorded.

        A *window* is the time between two such steps. The attribute `window` becomes the weights
        now; `moved` gets the flags of `moved_in_window`, which begin anew.

        Args:
            shown: bool (elements), False for layers whose figures this step does not report. The
                window of these goes on.
        """
        self.moved.logical_or_(self.moved_in_window & shown)
        self.moved_in_window.logical_and_(~shown)
        self.window = torch.where(shown, self.weights, self.window)

    def replace_weights(self, weights: Tensor) -> None:
        """Replace the weights of a twin after something other than a step changed the training's.

        A *twin* is a sample of the layers that is stepped as a recipe says. Earlier weights are
        shifted by the change, so that it does not count as a movement. Where the shift is not
        finite, since the weight is or was NaN or infinite, the element starts anew: its earlier
        weights become the weight now, and nothing has moved.

        Args:
            weights: The weights, in the dtype of the twin, (elements).
        """
        # Where nothing changed, NaN and inf must stay as they are: inf − inf is NaN.
        stays = (weights == self.weights) | (weights.isnan() & self.weights.isnan())
        begins = ~stays & ~(weights.isfinite() & self.weights.isfinite())
        for earlier in (self.before, self.window, self.start):
            # In float64, so that a weight that has not moved begins exactly at the new one.
            shifted = weights.double() - (self.weights.double() - earlier.double())
            shifted = torch.where(begins, weights.double(), shifted)
            earlier.copy_(torch.where(stays, earlier.double(), shifted))
        for moved in (self.moved_in_window, self.moved):
            moved.logical_and_(~begins)
        self.weights.copy_(weights)

    def stack(self, rows: Tensor, states: Mapping[str, Tensor]) -> TwinStack:
        """Return the tensors as matrices with a row for each layer.

        Args:
            rows: Positions of the elements in the flat tensors, int64 (layers, width).
            states: States of the optimizer by name, flat tensors of the same length.
        """
        return TwinStack(
            start=self.start[rows],
            window=self.window[rows],
            before=self.before[rows],
            now=self.weights[rows],
            moved_in_window=self.moved_in_window[rows],
            moved=(self.moved | self.moved_in_window)[rows],
            states={name: state[rows] for name, state in states.items()},
        )

    def nbytes(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the tensors by name."""
        return {field.name: getattr(self, field.name).clone() for field in fields(self)}
