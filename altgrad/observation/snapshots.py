"""Copy weights and gradients just before an optimizer step, into memory that is reused.

A `Snapshot` holds the copies of one parameter. `Snapshots` makes them for all parameters of one
optimizer. It chooses the elements to copy once, assigns memory when parameters change, and copies
at each observed step. `read_weights_after` reads the weights when the step has ended.

Read `dtensor` first, which finds the local shard of each tensor; `step` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from altgrad.observation.dtensor import get_local_gradients, to_local_tensor, to_local_tensors
from altgrad.quantization.devices import gather

Elements: TypeAlias = Callable[[str, Tensor], Tensor | None]
"""A function that takes name and parameter, and returns the elements to copy.

The result is indices into the flattened local shard, int64 (elements); None for every element."""

Chosen: TypeAlias = MutableMapping[Tensor, tuple[str, torch.Size, Tensor | None]]
"""For each parameter, the name and shape that an `Elements` was called with, and its result.

The function is called again if the name or the shape has changed.
"""


class Copies(NamedTuple):
    """The memory for the copies of one parameter's weights and gradient around a step.

    Each tensor has the shape of the local shard, or (elements) if only some elements are copied.

    Attributes:
        before: The weights before the step, with the dtype of the parameter.
        gradient: The gradient, with its own dtype.
        after: The weights after the step, with the dtype of the parameter.
    """

    before: Tensor
    gradient: Tensor
    after: Tensor


class Request(NamedTuple):
    """A request for memory, to hold copies of one parameter's weights and gradient around a step.

    Attributes:
        name: The name of the parameter.
        parameter: The parameter, which may be a DTensor.
        gradient_dtype: The dtype of the gradient.
        indices: Elements to copy, as indices into the flattened local shard, int64 (elements). None
            for every element.
    """

    name: str
    parameter: Tensor
    gradient_dtype: torch.dtype
    indices: Tensor | None


Memory: TypeAlias = Callable[[Sequence[Request]], Sequence[Copies | None]]
"""A function that takes the requests for all parameters, and returns the memory for each.

It returns None for a parameter whose memory `Snapshots` is to allocate. The function is called
again, for all parameters, when a parameter is new or has changed its name, shape, dtype or device.
Memory that it returned earlier is no longer used after that."""

SMALL = 2**14
"""Largest size of a parameter whose copies keep their memory between steps on an accelerator.

The size is in elements. The two copies of a thousand such parameters in float32 take 128 MiB.
"""


@dataclass(eq=False, slots=True)
class Snapshot:
    """A parameter just before its step, with copies of its weights and gradient.

    Attributes:
        name: The name of the parameter.
        parameter: The parameter.
        rests: True if its learning rate is 0.
        indices: Copied elements, as indices into the flattened local shard, int64 (elements). None
            for every element.
        shape: Shape of the parameter when its memory was assigned.
        before: The weights before the step, with the dtype of the parameter.
        gradient: The gradient, with its own dtype.
        after: Memory for the weights after the step. None if these are not copied, but read from
            the parameter.
        is_lent: True if the memory comes from a `Memory` function.
        is_temporary: True if the memory is allocated at each step, and empty between steps.
    """

    name: str
    parameter: Tensor
    rests: bool
    indices: Tensor | None
    shape: torch.Size
    before: Tensor
    gradient: Tensor
    after: Tensor | None
    is_lent: bool = False
    is_temporary: bool = False

    def fits(self, name: str, gradient: Tensor) -> bool:
        """Return True if the copies can be made in this memory again, in place.

        The parameter must have the name, shape, dtype and device, and its gradient the dtype, for
        which the memory was allocated.

        Args:
            name: The name of the parameter now.
            gradient: The gradient of the local shard now.
        """
        # Each of these may change in the same Parameter object: `Module.to` sets its `.data`.
        parameter = self.parameter
        return (
            self.name == name
            and self.shape == parameter.shape
            and self.before.dtype == parameter.dtype
            and self.before.device == parameter.device
            and self.gradient.dtype == gradient.dtype
        )

    def nbytes(self) -> int:
        """Return the memory that the copies take during a step, in bytes."""
        after = 0 if self.after is None else self.after.nbytes
        return self.before.nbytes + self.gradient.nbytes + after


def read_weights_after(snapshots: Sequence[Snapshot]) -> list[Tensor]:
    """Return the current weights of each parameter, at the end of a step.

    Args:
        snapshots: The copies from before the step.

    Returns:
        For each snapshot its tensor `after`, into which the current weights are copied. If `after`
        is None, the local shard of the parameter itself, detached.
    """
    current = to_local_tensors(each.parameter for each in snapshots)
    copies: list[Tensor] = []
    sources: list[Tensor] = []
    for each, local in zip(snapshots, current, strict=True):
        if each.indices is not None:
            gather(local, each.indices, out=each.after)
        elif each.after is not None:
            copies.append(each.after)
            sources.append(local)
    _copy_all(copies, sources)
    return [
        local.detach() if each.after is None else each.after
        for each, local in zip(snapshots, current, strict=True)
    ]


class Snapshots:
    """A store of the copies of one optimizer's parameters, with the memory for these copies.

    On a CPU all memory is reused, because touching new memory takes longer than copying into it. On
    an accelerator only the memory of small and of sampled parameters is reused. Memory for large
    parameters that are copied as a whole is allocated at each step, after the backward pass. If it
    were kept, it would add to the peak of memory that activations cause.

    Args:
        elements: Function that returns the elements of a parameter to copy. If None, every element
            is copied.
        chosen: Mapping in which the results of `elements` are kept. If None, a new one is made.
        memory: Function that provides memory for the copies. If None, this object allocates all.

    Attributes:
        peak_bytes: Largest amount of memory that the copies have taken, in bytes.
    """

    def __init__(
        self,
        elements: Elements | None,
        chosen: Chosen | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.peak_bytes = 0
        self._memory = memory
        self._elements = elements
        self._chosen: Chosen = {} if chosen is None else chosen
        self._kept: dict[Tensor, Snapshot] = {}
        self._kept_bytes = 0

    # Memory allocated in inference mode could not be written to outside of it:
    # https://docs.pytorch.org/docs/stable/notes/autograd.html#inference-mode
    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def take(
        self,
        parameters: Sequence[tuple[str, Tensor, bool]],
        grad_scale: Tensor | None = None,
        left_out: Collection[str] = (),
    ) -> list[Snapshot]:
        """Copy the parameters that have a gradient, and their gradients divided by `grad_scale`.

        Args:
            parameters: For each parameter its name, the parameter itself, and True if its learning
                rate is 0. Those that `altgrad.observation.dtensor.find_unreduced` returns must be
                in `left_out`.
            grad_scale: Loss scale by which the gradients are still multiplied, a tensor with one
                element; None if they are unscaled.
            left_out: Names of parameters that are not copied in this step. The memory for their
                copies is kept for later steps.

        Returns:
            A snapshot for each parameter that was copied, in the order of `parameters`.
        """
        present = [p for p in parameters if p[1].grad is not None and p[0] not in left_out]
        weights = to_local_tensors(parameter for _, parameter, _ in present)
        gradients = get_local_gradients(parameter for _, parameter, _ in present)
        if not self._has_memory_for(parameters, present, gradients):
            self._assign_memory(parameters, present, gradients)
        snapshots: list[Snapshot] = []
        copies: list[Tensor] = []
        sources: list[Tensor] = []
        temporary_bytes = 0
        for (_, parameter, rests), local, gradient in zip(present, weights, gradients, strict=True):
            snapshot = self._kept[parameter]
            if snapshot.is_temporary:
                memory = _allocate(local, gradient, None)
                snapshot = replace(snapshot, before=memory.before, gradient=memory.gradient)
                temporary_bytes += snapshot.nbytes()
            snapshot.rests = rests
            snapshots.append(snapshot)
            if snapshot.indices is None:
                copies += (snapshot.before, snapshot.gradient)
                sources += (local, gradient)
            else:
                gather(local, snapshot.indices, out=snapshot.before)
                gather(gradient, snapshot.indices, out=snapshot.gradient)
        _copy_all(copies, sources)
        if grad_scale is not None:
            for snapshot in snapshots:
                # The fused optimizers divide, so that division gives the same bits. Multiplying by
                # 1/scale would round twice: aten/src/ATen/native/cuda/fused_adam_utils.cuh
                snapshot.gradient.div_(to_local_tensor(grad_scale).to(snapshot.gradient.device))
        self.peak_bytes = max(self.peak_bytes, self._kept_bytes + temporary_bytes)
        return snapshots

    def clear(self) -> None:
        """Free the memory of the copies.

        The elements to copy remain: the next `take` assigns memory again, and copies the same
        elements as before.
        """
        self._kept.clear()
        self._kept_bytes = 0

    def _has_memory_for(
        self,
        parameters: Sequence[tuple[str, Tensor, bool]],
        present: Sequence[tuple[str, Tensor, bool]],
        gradients: Sequence[Tensor],
    ) -> bool:
        kept = self._kept
        if len(kept) > len(parameters):  # some are gone, and `_kept` would keep them alive
            return False
        each = zip(present, gradients, strict=True)
        return all(
            parameter in kept and kept[parameter].fits(name, gradient)
            for (name, parameter, _), gradient in each
        )

    def _assign_memory(
        self,
        parameters: Sequence[tuple[str, Tensor, bool]],
        present: Sequence[tuple[str, Tensor, bool]],
        gradients: Sequence[Tensor],
    ) -> None:
        """Assign memory for the copies of this step, and keep that of unchanged parameters.

        Memory for all parameters is requested at once, so that a `Memory` function can place it
        side by side. Parameters without a gradient are included, since they may get one later. The
        experts of a mixture, for example, get their first gradients at different steps, and each
        time all memory would be assigned again.

        Args:
            parameters: For each parameter its name, the parameter itself, and True if its learning
                rate is 0.
            present: The entries of `parameters` that are copied in this step.
            gradients: The local gradient of each entry of `present`.
        """
        names = {parameter: name for name, parameter, _ in parameters}
        earlier = {**self._kept}
        # For each parameter, a tensor with the dtype of its gradient: an earlier copy of it, the
        # gradient itself, or, as a guess, the parameter.
        likes = {
            parameter: each.gradient
            for parameter, each in earlier.items()
            if parameter in names and each.fits(names[parameter], each.gradient)
        }
        likes |= {p: gradient for (_, p, _), gradient in zip(present, gradients, strict=True)}
        if self._memory is not None:
            likes |= {p: to_local_tensor(p) for p in names if p not in likes and _may_step(p)}
        needed = {*earlier, *(parameter for _, parameter, _ in present)}
        requests = [  # in the order of `parameters`, in which records list the layers
            Request(name, p, likes[p].dtype, self._choose_indices(name, p))
            for p, name in names.items()
            if p in likes
        ]
        lent = self._memory(requests) if self._memory else [None] * len(requests)
        self._kept.clear()
        for request, copies in zip(requests, lent, strict=True):
            parameter, gradient = request.parameter, likes[request.parameter]
            old = earlier.get(parameter)
            if copies is None and parameter not in needed:
                continue
            is_own = copies is None and old is not None and not old.is_lent
            if old is not None and is_own and old.fits(request.name, gradient):
                self._kept[parameter] = old
            else:
                self._kept[parameter] = _make_snapshot(request, copies, gradient)
        self._kept_bytes = sum(each.nbytes() for each in self._kept.values())

    def _choose_indices(self, name: str, parameter: Tensor) -> Tensor | None:
        """Return the indices of elements to copy, the same at each call; None for every element."""
        if self._elements is None:
            return None
        chosen = self._chosen.get(parameter)
        if chosen is None or chosen[:2] != (name, parameter.shape):
            indices = self._elements(name, parameter)
            if indices is not None:
                _check_indices(indices, name, parameter)
            self._chosen[parameter] = chosen = name, parameter.shape, indices
        return None if chosen[2] is None else chosen[2].to(parameter.device)


def _make_snapshot(request: Request, copies: Copies | None, gradient: Tensor) -> Snapshot:
    """Return a `Snapshot` of one parameter: memory for its weights and gradient around each step.

    Args:
        request: The parameter, its name, and which of its elements to copy.
        copies: The memory to use; None to allocate memory. Large parameters on an accelerator then
            get their memory anew at each step.
        gradient: The gradient of the local shard, or a tensor of its dtype.

    Returns:
        The snapshot, into which nothing has been copied yet.
    """
    name, parameter, _, indices = request
    local = to_local_tensor(parameter)
    is_temporary = copies is None and indices is None and _is_large_on_accelerator(parameter)
    if is_temporary:  # empty until `Snapshots.take` allocates the memory of a step
        memory = Copies(local.new_empty(0), gradient.new_empty(0), local)
    else:
        memory = copies or _allocate(local, gradient, indices)
    return Snapshot(
        name=name,
        parameter=parameter,
        rests=False,
        indices=indices,
        shape=parameter.shape,
        before=memory.before,
        gradient=memory.gradient,
        after=None if memory.after is local else memory.after,
        is_lent=copies is not None,
        is_temporary=is_temporary,
    )


def _may_step(parameter: Tensor) -> bool:
    return parameter.requires_grad and not is_lazy(parameter)


def _is_large_on_accelerator(parameter: Tensor) -> bool:
    return parameter.device.type != "cpu" and parameter.numel() > SMALL


def _allocate(local: Tensor, gradient: Tensor, indices: Tensor | None) -> Copies:
    """Return memory for copies of a parameter's weights and gradient around a step.

    The copies are of all elements, or of those at `indices`. Copies of all elements have the
    strides of their sources. Their `after` is `local` itself: the weights after the step are read
    from there.
    """
    if indices is None:  # with equal strides, a copy is one pass over contiguous memory
        return Copies(torch.empty_like(local), torch.empty_like(gradient), local)
    before, after = local.new_empty((2, *indices.shape)).unbind()
    return Copies(before, gradient.new_empty(indices.shape), after)


def _copy_all(copies: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its copy, in one call.

    A loop of `copy_` takes twice as long for a thousand small tensors.
    """
    if copies:
        # torch has no public name for this operation, which its own optimizers call:
        # torch/optim/asgd.py.
        torch._foreach_copy_(copies, sources)


def _check_indices(indices: Tensor, name: str, parameter: Tensor) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
        raise TypeError(
            f"elements({name!r})={indices!r}: expected a one-dimensional int64 tensor of flat "
            "indices or None"
        )
    count = to_local_tensor(parameter.detach()).numel()
    valid = (indices >= 0) & (indices < count)
    if not valid.all():
        raise ValueError(
            f"elements({name!r}): the index {indices[~valid][0].item()} is out of range; expected "
            f"0 <= index < {count}, the number of elements"
        )
