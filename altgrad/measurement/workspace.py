"""`Workspace`: the memory in which the kernel computes, reused from call to call.

Without it, dozens of temporary tensors would be allocated in a step, each with a number for every
element and format. The kernel writes to buffers of the workspace instead. They take at most 64 MiB
on each device, for a model of any size.

Read `columns` first; `kernel` comes next and says what each buffer holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 2**24
"""Maximum memory of the kernel for a chunk of a large tensor, beside its arguments, in bytes.

A CPU is fastest with chunks that fit into its cache.
"""
BATCH_BYTES = 2**26
"""Maximum memory of buffers for a batch of small layers, in bytes. Sums of rows are not included.

An accelerator is fastest with few calls of the kernel: a call has some 140 operations, whatever the
number of elements. On a CPU with 32 MiB of cache, one call for 170,000 elements takes an eighth
longer than three calls for a third of them.
"""

# Number of buffers of each kind. A buffer has a float64 number for each element; those of the first
# kind have one for each element and format.
_PER_FORMAT, _SHARED, _STACKED = 4, 10, 4
_SHARING = 16  # further float64 numbers for each element, if each has a scale of its own
_KEPT_SHAPES = 8  # a model has few shapes of batches and chunks; views of more are not kept


class Buffers(NamedTuple):
    """A set of uninitialised float64 tensors in which `kernel` computes the sums of a step.

    `values`, `sizes` and `pairs` are views of neighbouring buffers, so that one operation can serve
    several. The names in this drawing are those of local variables of `kernel`::

        shared    w  v  t | size  s  gradient | update  no_value  no_weight  pair_least
                  values  |      sizes        |
        stacked   has_weight  pair | d  d_cubed
                     pairs[0]      |  pairs[1]

    Attributes:
        per_format: Four buffers (rows, formats, elements).
        shared: Ten buffers (rows, 1, elements).
        values: View of the first three buffers of `shared`, (rows, 3, elements).
        sizes: View of the next three buffers of `shared`, (rows, 3, elements).
        stacked: Four more buffers (rows, 1, elements).
        pairs: Views of the first two and of the last two buffers of `stacked`, (rows, elements, 2)
            each.
    """

    per_format: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]
    values: Tensor
    sizes: Tensor
    stacked: tuple[Tensor, ...]
    pairs: tuple[Tensor, Tensor]


def compute_capacity(memory: int, formats: int, *, scale_per_element: bool = False) -> int:
    """Return how many elements one call of `row_sums`, the measuring kernel, can take.

    Args:
        memory: Memory that the call may take, in bytes.
        formats: Number of formats.
        scale_per_element: True if elements of a row have different scales, by which formats divide
            them, which takes more memory.
    """
    numbers = _PER_FORMAT * formats + _SHARED + _STACKED
    if scale_per_element:
        numbers += formats + _SHARING
    # 2**16 bytes are for results, and one byte for each element is for a bool mask.
    return max((memory - 2**16) // (8 * numbers + 1), 1)


class Workspace:
    """A store of buffers of any shape, which are views of one block of memory on each device."""

    def __init__(self) -> None:
        self._memory: dict[torch.device, Tensor] = {}
        self._buffers: dict[tuple[int, int, int, torch.device], Buffers] = {}

    @property
    def nbytes(self) -> int:
        """The size of the memory that is kept on all devices, in bytes."""
        return sum(memory.nbytes for memory in self._memory.values())

    # Tensors made in inference mode could not be written to outside of it:
    # https://docs.pytorch.org/docs/stable/notes/autograd.html#inference-mode
    @torch.inference_mode(mode=False)
    def buffers(self, rows: int, formats: int, elements: int, device: torch.device) -> Buffers:
        """Return float64 buffers of a shape; the next call may reuse their memory, for any shape.

        Args:
            rows: Number of rows.
            formats: Number of formats.
            elements: Number of elements in a row.
            device: Device of the buffers.
        """
        key = rows, formats, elements, device
        if key not in self._buffers:
            if len(self._buffers) == _KEPT_SHAPES:
                self._buffers.clear()
            self._buffers[key] = self._cut(*key)
        return self._buffers[key]

    def _cut(self, rows: int, formats: int, elements: int, device: torch.device) -> Buffers:
        """Return buffers as views of the memory of a device, which grows if it is too small."""
        size = rows * elements
        needed = size * (_PER_FORMAT * formats + _SHARED + _STACKED)
        memory = self._memory.get(device)
        if memory is None or memory.numel() < needed:
            # The old memory is freed only once no buffers are views of it.
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
        values, sizes = values.view(rows, 3, elements), sizes.view(rows, 3, elements)
        stacked = stack.view(rows, _STACKED, elements)
        buffers = Buffers(
            per_format=per_format.view(_PER_FORMAT, rows, formats, elements).unbind(),
            shared=(
                *torch.split(values, 1, dim=1),
                *torch.split(sizes, 1, dim=1),
                *others.view(_SHARED - 6, rows, 1, elements).unbind(),
            ),
            values=values,
            sizes=sizes,
            stacked=torch.split(stacked, 1, dim=1),
            pairs=(stacked[:, :2].transpose(1, 2), stacked[:, 2:].transpose(1, 2)),
        )
        # The same memory as int64. `quantization.grids.view_bits` reads this attribute: a new view
        # for each of its many calls would take longer than the operation on it.
        for each in (*buffers.per_format, *buffers.shared):
            each.bits = each.view(torch.int64)  # type: ignore[attr-defined]
        return buffers
