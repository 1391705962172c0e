"""Copies of weights and gradients around an optimizer step, in memory that is used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from altgrad.observation.dtensor import (
    is_unreduced,
    local_gradient_of,
    local_of,
    unreduced_message,
)

Elements: TypeAlias = Callable[[str, Tensor], Tensor | None]
"""From a parameter's name and the parameter to the flat indices to copy, into what lies here of a
sharded one; None copies all."""

Chosen: TypeAlias = dict[Tensor, tuple[torch.Size, Tensor | None]]
"""What an `Elements` returned for each parameter of that shape, for all who show the same."""


class Copies(NamedTuple):
    """Memory for what is copied of one parameter: of its shape, or one place for each index."""

    before: Tensor
    gradient: Tensor
    after: Tensor


Memory: TypeAlias = Callable[[str, Tensor, Tensor, Tensor | None], Copies | None]
"""From a parameter's name, itself, its gradient and the indices to copy, to where they are copied;
None leaves it to the snapshots. Asked again when the parameter has changed its shape."""

WHOLE_UP_TO = 2048
"""Up to this size a parameter is copied whole: to choose elements would take longer."""
# Up to this size copies may stay on an accelerator: those of a thousand parameters are 128 MiB.
_SMALL = 2**14


@dataclass(eq=False, slots=True)
class Snapshot:
    """One parameter just before it is stepped: itself, and what was copied of it."""

    name: str
    parameter: Tensor
    rests: bool  # its learning rate is 0
    indices: Tensor | None
    shape: torch.Size  # of the parameter
    before: Tensor
    gradient: Tensor
    after: Tensor | None  # None where the parameter's own memory is shown

    def fits(self, gradient: Tensor) -> bool:
        """Whether the parameter and its gradient can still be copied into it."""
        parameter = self.parameter
        return (
            self.shape == parameter.shape
            and self.before.dtype == parameter.dtype
            and self.before.device == parameter.device
            and self.gradient.dtype == gradient.dtype
        )

    def nbytes(self) -> int:
        """The memory that observing this parameter takes while it is stepped."""
        after = 0 if self.after is None else self.after.nbytes
        return self.before.nbytes + self.gradient.nbytes + after


def weights_after(snapshots: Sequence[Snapshot]) -> list[Tensor]:
    """The weights of each as they are now: in its memory, or the parameter's own."""
    copies: list[Tensor] = []
    sources: list[Tensor] = []
    for each in snapshots:
        if each.indices is not None:
            torch.take(local_of(each.parameter), each.indices, out=each.after)
        elif each.after is not None:
            copies.append(each.after)
            sources.append(local_of(each.parameter))
    _copy_all(copies, sources)
    return [
        local_of(each.parameter).detach() if each.after is None else each.after
        for each in snapshots
    ]


class Snapshots:
    """Takes them; keeps their memory, and which elements of which parameter to copy.

    On a CPU all memory is used again: to touch new memory takes longer than to copy into it. On an
    accelerator only that of small and of sampled parameters is; that of whole large ones is
    allocated for each step, after its backward pass, so as not to be there with the activations.

    Args:
        elements: Which elements of each large parameter to copy; None copies all of all.
        chosen: What `elements` has returned.
        memory: Where to copy them.
        asks_of_all: Whether `elements` is asked about small parameters, too.
    """

    def __init__(
        self,
        elements: Elements | None,
        chosen: Chosen | None = None,
        memory: Memory | None = None,
        *,
        asks_of_all: bool = False,
    ) -> None:
        self._asks_of_all = asks_of_all
        self.peak_bytes = 0
        self._memory = memory
        self._elements = elements
        self._chosen: Chosen = {} if chosen is None else chosen
        self._kept: dict[Tensor, Snapshot] = {}
        self._kept_bytes = 0

    @torch.inference_mode(mode=False)  # what is made in that mode could not be written to later
    @torch.no_grad()
    def take(
        self,
        parameters: Sequence[tuple[str, Tensor, bool]],
        grad_scale: Tensor | None = None,
    ) -> list[Snapshot]:
        """Copy those that have a gradient, and the gradients, dense and divided by `grad_scale`.

        Args:
            parameters: Name and parameter of each, and whether its learning rate is 0.
            grad_scale: What the gradients are still multiplied by; None if they are not.
        """
        snapshots: list[Snapshot] = []
        copies: list[Tensor] = []
        sources: list[Tensor] = []
        for name, parameter, rests in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if is_unreduced(parameter):
                raise ValueError(
                    f"{unreduced_message(name, parameter)}, or leave {name} out of what is observed"
                )
            gradient = local_gradient_of(parameter, gradient)
            if gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            here = local_of(parameter)
            snapshot = self._memory_for(name, parameter, gradient)
            snapshot.rests = rests
            snapshots.append(snapshot)
            if snapshot.indices is None:
                copies += (snapshot.before, snapshot.gradient)
                sources += (here, gradient)
            else:
                torch.take(here, snapshot.indices, out=snapshot.before)
                torch.take(gradient, snapshot.indices, out=snapshot.gradient)
        _copy_all(copies, sources)
        if grad_scale is not None:
            for snapshot in snapshots:
                # A division, as in the fused optimizers: a product with 1/scale rounds twice.
                snapshot.gradient.div_(local_of(grad_scale).to(snapshot.gradient.device))
        self._forget_all_but(parameters)
        passing = sum(each.nbytes() for each in snapshots if each.parameter not in self._kept)
        self.peak_bytes = max(self.peak_bytes, self._kept_bytes + passing)
        return snapshots

    def clear(self) -> None:
        """Let go of the memory; the choice of elements stays."""
        self._kept.clear()
        self._kept_bytes = 0

    def _forget_all_but(self, parameters: Sequence[tuple[str, Tensor, bool]]) -> None:
        """Parameters may be replaced, again and again."""
        if len(self._kept) > len(parameters):
            current = {parameter for _, parameter, _ in parameters}
            for parameter in [each for each in self._kept if each not in current]:
                self._kept_bytes -= self._kept.pop(parameter).nbytes()

    def _memory_for(self, name: str, parameter: Tensor, gradient: Tensor) -> Snapshot:
        kept = self._kept.get(parameter)
        if kept is not None:
            if kept.name == name and kept.fits(gradient):
                return kept
            self._kept_bytes -= kept.nbytes()
            del self._kept[parameter]
        indices = self._indices_of(name, parameter)
        given = self._memory and self._memory(name, parameter, gradient, indices)
        here = local_of(parameter)
        own = given or Copies(
            before=_empty_like(here, indices),
            gradient=_empty_like(gradient, indices),
            after=parameter if indices is None else _empty_like(here, indices),
        )
        snapshot = Snapshot(
            name=name,
            parameter=parameter,
            rests=False,
            indices=indices,
            shape=parameter.shape,
            before=own.before,
            gradient=own.gradient,
            after=None if own.after is parameter else own.after,
        )
        on_cpu = parameter.device.type == "cpu"
        if given or on_cpu or indices is not None or parameter.numel() <= _SMALL:
            self._kept[parameter] = snapshot
            self._kept_bytes += snapshot.nbytes()
        return snapshot

    def _indices_of(self, name: str, parameter: Tensor) -> Tensor | None:
        """Chosen once, so that every step shows the same elements."""
        if self._elements is None:
            return None
        if parameter.numel() <= WHOLE_UP_TO and not self._asks_of_all:
            return None
        shape, indices = self._chosen.get(parameter, (None, None))
        if shape != parameter.shape:
            indices = self._elements(name, parameter)
            if indices is not None:
                _check_indices(indices, name, parameter)
                indices = indices.to(parameter.device)
            self._chosen[parameter] = parameter.shape, indices
        return indices


def _empty_like(tensor: Tensor, indices: Tensor | None) -> Tensor:
    """Memory for a copy of it: with its strides, or with one place for each index."""
    return torch.empty_like(tensor) if indices is None else tensor.new_empty(indices.shape)


def _copy_all(copies: list[Tensor], sources: list[Tensor]) -> None:
    """`copy_`, in one call: a loop takes twice the time for a thousand small tensors.

    torch has no public name for it.
    """
    if copies:
        torch._foreach_copy_(copies, sources)


def _check_indices(indices: Tensor, name: str, parameter: Tensor) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
        raise TypeError(
            f"elements of {name}: expected a one-dimensional int64 tensor of flat indices or "
            f"None, not {indices!r}"
        )
    elements = local_of(parameter.detach()).numel()
    inside = (indices >= 0) & (indices < elements)
    if not inside.all():
        raise ValueError(
            f"elements of {name}: {indices[~inside][0].item()} is no flat index of its "
            f"{elements} elements"
        )
