"""Compute on the host with tensors of devices that lack float64, such as Apple's MPS.

Exact rounding, and the sums from which figures follow, need float64. The CPU and CUDA have it, and
all operations that this project uses; other devices lack some. Elements of tensors on such a device
are gathered there and copied to the host. The CPU computes with the copies, so that results are
those of a run on the CPU, bit for bit.

`arguments` and `ops` come next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

EXACT = frozenset({"cpu", "cuda", "meta"})
"""Types of devices with float64 and all operations. Tensors on ``meta`` have shapes alone."""

_HOST = torch.device("cpu")  # named because the user may have set another default device
_P = ParamSpec("_P")
_T = TypeVar("_T")


def find_exact_device(device: torch.device) -> torch.device:
    """Return the device on which tensors of a device are computed with: the same, or the CPU.

    Args:
        device: The device of the tensors.
    """
    return device if device.type in EXACT else _HOST


def gather(source: Tensor, indices: Tensor, out: Tensor | None = None) -> Tensor:
    """Gather elements of a tensor by their indices in row-major order, on its own device.

    Args:
        source: The tensor, any dtype, shape and strides.
        indices: Indices into the flattened tensor, int64 (elements), on the same device.
        out: The tensor to write to, with the dtype of `source`, (elements). None for a new one.

    Returns:
        The elements, with the dtype of `source`, (elements).
    """
    if source.device.type in EXACT:
        # `take` reads flat indices for any strides, without a flattened copy:
        # https://docs.pytorch.org/docs/stable/generated/torch.take.html
        return torch.take(source, indices, out=out)
    return torch.index_select(source.reshape(-1), 0, indices, out=out)


class Gathered:
    """A collector of sampled elements that copies them to the device that computes with them.

    `take` gathers elements of one tensor. On a device without float64 they stay there, until
    `bring` copies all of them to the host by one transfer.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []  # elements, and their place on the host

    def take(self, source: Tensor, indices: Tensor, place: Tensor) -> None:
        """Gather elements: into `place` if it is on the same device, or else for `bring`.

        Args:
            source: The tensor, any dtype, shape and strides.
            indices: Indices into the flattened tensor, int64 (elements), on its device.
            place: The tensor to write to, with the dtype of `source`, (elements), on its device or
                on the host if that lacks float64.
        """
        if source.device.type in EXACT:
            torch.take(source, indices, out=place)
        else:
            self._waiting.append((gather(source, indices), place))

    def bring(self) -> None:
        """Copy the elements that `take` has left on their devices to their places on the host."""
        if self._waiting:
            copies = copy_to_host([elements for elements, _ in self._waiting])
            for copy, (_, place) in zip(copies, self._waiting, strict=True):
                place.copy_(copy)
            self._waiting.clear()


def gather_all(
    sources: Sequence[Tensor], indices: Sequence[Tensor], places: Sequence[Tensor]
) -> None:
    """Gather elements of many tensors, each into a tensor on the device that computes with them.

    Elements on a device without float64 come to the host by one transfer for the whole device.

    Args:
        sources: The tensors, any dtypes, shapes and strides.
        indices: For each, indices into the flattened tensor, int64 (elements), on its device.
        places: For each, the tensor to write to, with its dtype, (elements), on its device or on
            the host if that lacks float64.
    """
    gathered = Gathered()
    for each in zip(sources, indices, places, strict=True):
        gathered.take(*each)
    gathered.bring()


def move_to_exact_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host if their device lacks float64, all of one device by one transfer.

    Args:
        tensors: Tensors of any dtypes, shapes and devices.

    Returns:
        Each tensor itself, or a contiguous copy on the CPU with its dtype and shape.
    """
    moved = [*tensors]
    away = [number for number, each in enumerate(moved) if each.device.type not in EXACT]
    for number, copy in zip(away, copy_to_host([moved[k] for k in away]), strict=True):
        moved[number] = copy
    return moved


def copy_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to the host, all of one device by one transfer.

    Args:
        tensors: Tensors of any dtypes, shapes, strides and devices.

    Returns:
        For each tensor a contiguous one on the CPU, with its dtype and shape. A contiguous tensor
        on the CPU is returned as it is.
    """
    copied = [each.contiguous() for each in tensors]
    for device in dict.fromkeys(each.device for each in tensors if each.device != _HOST):
        numbers = [number for number, each in enumerate(tensors) if each.device == device]
        # Wide dtypes first: a view as a wide dtype has to begin at a multiple of its size.
        numbers.sort(key=lambda number: tensors[number].element_size(), reverse=True)
        flat = [copied[number].view(-1).view(torch.uint8) for number in numbers]
        parts = torch.split(torch.cat(flat).to(_HOST), [*map(len, flat)])
        for number, part in zip(numbers, parts, strict=True):
            copied[number] = part.view(tensors[number].dtype).view(tensors[number].shape)
    return copied


@contextmanager
def editing_on_exact_device(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor to write to: the tensor itself, or a copy on the host if it lacks float64.

    What is written to the copy is copied back to the tensor at the end.

    Args:
        tensor: The tensor, any dtype and shape; it needs no gradient.

    Returns:
        A context manager that yields the tensor or the copy.
    """
    if tensor.device.type in EXACT:
        yield tensor
        return
    copy = tensor.to(_HOST)
    yield copy
    tensor.copy_(copy)


def on_exact_device(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make a function of tensors compute on the host for those whose device lacks float64.

    Gradients pass through the copies.

    Args:
        function: Function of tensors. It returns a tensor, or values without tensors. If it has an
            argument `out`, that is given by name.

    Returns:
        The function. Its result is on the device of the first tensor that lacks float64.
    """

    @wraps(function)
    def compute(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        values: tuple[Any, ...] = (*args, *kwargs.values())
        for value in values:
            if isinstance(value, Tensor) and value.device.type not in EXACT:
                result: _T = _compute_on_host(function, value.device, args, kwargs)
                return result
        return function(*args, **kwargs)

    return compute


def _compute_on_host(
    function: Callable[..., Any],
    device: torch.device,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call a function with copies of its tensors on the host, and return its result on a device."""
    out = kwargs.get("out")
    on_host = {name: _to_host(value) for name, value in kwargs.items()}
    result = function(*map(_to_host, args), **on_host)
    if isinstance(out, Tensor):
        return out.copy_(result)
    return result.to(device) if isinstance(result, Tensor) else result


def _to_host(value: Any) -> Any:
    return value.to(_HOST) if isinstance(value, Tensor) else value
