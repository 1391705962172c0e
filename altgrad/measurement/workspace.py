"""`Workspace`: the memory that the row kernel computes in, used again from call to call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TEMPORARY_BYTES = 2**24
"""Memory that one call of the row kernel may take beside its arguments, whatever these are."""

_PER_FORMAT, _SHARED, _STACKED = 4, 10, 4  # float64 numbers for each element
_SHARING = 16  # float64 numbers for each element, to find its scale
_KEPT_SHAPES = 8


class Buffers(NamedTuple):
    """Uninitialised float64 tensors; what lies side by side serves an operation as one.

    Attributes:
        per_format: Four of (rows, formats, columns).
        shared: Ten of (rows, 1, columns).
        values: The first three of `shared`, (rows, 3, columns).
        sizes: The three of `shared` that follow, (rows, 3, columns).
        stacked: Four more of (rows, 1, columns).
        pairs: The first two and the last two of `stacked`, (rows, columns, 2).
    """

    per_format: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]
    values: Tensor
    sizes: Tensor
    stacked: tuple[Tensor, ...]
    pairs: tuple[Tensor, Tensor]


def columns_that_fit(formats: int, *, scale_per_element: bool = False) -> int:
    """Return how many elements one call of the kernel may measure within `TEMPORARY_BYTES`."""
    numbers = _PER_FORMAT * formats + _SHARED + _STACKED
    if scale_per_element:
        numbers += formats + _SHARING
    return max((TEMPORARY_BYTES - 2**16) // (8 * numbers + 1), 1)  # and a mask of one byte each


class Workspace:
    """A store of buffers of any shape: views of memory that only grows when more is needed."""

    def __init__(self) -> None:
        self._memory: dict[torch.device, Tensor] = {}
        self._buffers: dict[tuple[int, int, int, torch.device], Buffers] = {}

    @property
    def nbytes(self) -> int:
        """Return how many bytes of memory are kept, on all devices."""
        return sum(memory.nbytes for memory in self._memory.values())

    @torch.inference_mode(mode=False)  # what is made in that mode could not be written to later
    def buffers(self, rows: int, formats: int, columns: int, device: torch.device) -> Buffers:
        """Return buffers, which are valid until the next call."""
        key = rows, formats, columns, device
        if key not in self._buffers:
            if len(self._buffers) == _KEPT_SHAPES:
                self._buffers.clear()
            self._buffers[key] = self._cut(*key)
        return self._buffers[key]

    def _cut(self, rows: int, formats: int, columns: int, device: torch.device) -> Buffers:
        size = rows * columns
        needed = size * (_PER_FORMAT * formats + _SHARED + _STACKED)
        memory = self._memory.get(device)
        if memory is None or memory.numel() < needed:
            self._buffers = {key: kept for key, kept in self._buffers.items() if key[3] != device}
            memory = torch.empty(needed, dtype=torch.float64, device=device)
            self._memory[device] = memory
        per_format, shared, stack, _ = torch.split(
            memory,
            [
                _PER_FORMAT * formats * size,
                _SHARED * size,
                _STACKED * size,
                memory.numel() - needed,
            ],
        )
        values, sizes, others = torch.split(shared, [3 * size, 3 * size, (_SHARED - 6) * size])
        values, sizes = values.view(rows, 3, columns), sizes.view(rows, 3, columns)
        stacked = stack.view(rows, _STACKED, columns)
        buffers = Buffers(
            per_format=per_format.view(_PER_FORMAT, rows, formats, columns).unbind(),
            shared=(
                *torch.split(values, 1, dim=1),
                *torch.split(sizes, 1, dim=1),
                *others.view(_SHARED - 6, rows, 1, columns).unbind(),
            ),
            values=values,
            sizes=sizes,
            stacked=torch.split(stacked, 1, dim=1),
            pairs=(stacked[:, :2].transpose(1, 2), stacked[:, 2:].transpose(1, 2)),
        )
        for each in (*buffers.per_format, *buffers.shared):
            each.bits = each.view(torch.int64)  # type: ignore[attr-defined]
        return buffers
