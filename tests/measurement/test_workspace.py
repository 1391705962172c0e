"""`Workspace`: buffers that do not overlap, in memory that is reused and grows."""

import weakref

import pytest
import torch
from torch import Tensor

from altgrad.measurement.workspace import (
    BATCH_BYTES,
    CHUNK_BYTES,
    Buffers,
    Workspace,
    compute_capacity,
)

CPU, META = torch.device("cpu"), torch.device("meta")


def list_buffers(buffers: Buffers) -> list[Tensor]:
    return [*buffers.per_format, *buffers.shared, *buffers.stacked]


def memory_size(buffers: Buffers) -> int:
    """Return the size of the memory behind buffers, in bytes."""
    return buffers.values.untyped_storage().nbytes()


def address_range(buffers: Buffers) -> tuple[int, int]:
    """Return the first and the last address at which a buffer begins."""
    pointers = [each.data_ptr() for each in list_buffers(buffers) if each.numel()]
    return min(pointers), max(pointers)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (2, 0, 4), (1, 4, 100)], ids=str)
def test_buffers_of_one_call_do_not_overlap(shape: tuple[int, int, int]) -> None:
    rows, formats, columns = shape
    buffers = Workspace().buffers(rows, formats, columns, CPU)
    counts = [len(each) for each in (buffers.per_format, buffers.shared, buffers.stacked)]
    assert counts == [4, 10, 4]
    assert {each.shape for each in buffers.per_format} == {(rows, formats, columns)}
    assert {each.shape for each in (*buffers.shared, *buffers.stacked)} == {(rows, 1, columns)}
    assert {each.dtype for each in list_buffers(buffers)} == {torch.float64}
    for number, each in enumerate(list_buffers(buffers)):
        each.fill_(number)
    for number, each in enumerate(list_buffers(buffers)):
        assert (each == number).all(), number


def test_adjacent_buffers_are_views_of_one_tensor() -> None:
    buffers = Workspace().buffers(3, 2, 5, CPU)
    for number, each in enumerate((*buffers.shared, *buffers.stacked)):
        each.copy_(torch.arange(15.0).view(3, 1, 5) + 100 * number)
    first, last = buffers.shared[:3], buffers.shared[3:6]
    assert torch.equal(buffers.values, torch.cat(first, dim=1))
    assert torch.equal(buffers.sizes, torch.cat(last, dim=1))
    pairs = [torch.cat(pair, dim=1) for pair in (buffers.stacked[:2], buffers.stacked[2:])]
    for found, pair in zip(buffers.pairs, pairs, strict=True):
        assert found.shape == (3, 5, 2)
        assert torch.equal(found, pair.transpose(1, 2))


def test_buffers_have_a_view_as_integers() -> None:
    buffers = Workspace().buffers(2, 1, 3, CPU)
    for each in (*buffers.per_format, *buffers.shared):
        each.fill_(1.0)
        assert each.bits.dtype is torch.int64
        assert (each.bits == 1023 << 52).all()


def test_a_known_shape_returns_the_same_buffers() -> None:
    workspace = Workspace()
    large = workspace.buffers(2, 3, 40, CPU)
    small = workspace.buffers(1, 3, 10, CPU)
    assert workspace.buffers(2, 3, 40, CPU) is large
    assert workspace.buffers(1, 3, 10, CPU) is small
    assert address_range(small)[0] == address_range(large)[0]
    assert address_range(small)[1] < address_range(large)[1]


def test_a_larger_shape_allocates_new_memory_for_all_shapes() -> None:
    workspace = Workspace()
    small = workspace.buffers(1, 1, 3, CPU)
    large = workspace.buffers(4, 2, 50, CPU)
    again = workspace.buffers(1, 1, 3, CPU)
    assert again is not small
    low, high = address_range(large)
    assert low <= address_range(again)[0] <= address_range(again)[1] <= high
    assert workspace.buffers(4, 2, 50, CPU) is large


def test_each_device_has_separate_memory() -> None:
    workspace = Workspace()
    here, there = workspace.buffers(1, 1, 3, CPU), workspace.buffers(1, 1, 3, META)
    assert {each.device for each in list_buffers(here)} == {CPU}
    assert {each.device for each in list_buffers(there)} == {META}
    workspace.buffers(1, 1, 300, META)
    assert workspace.buffers(1, 1, 3, CPU) is here
    assert workspace.buffers(1, 1, 3, META) is not there


def test_only_a_few_shapes_are_kept() -> None:
    workspace = Workspace()
    kept = []
    for columns in (1000, *range(1, 100)):
        buffers = workspace.buffers(1, 1, columns, CPU)
        kept.append(weakref.ref(buffers.values))
        assert sum(each() is not None for each in kept) <= 8
        assert memory_size(buffers) == 8 * 18 * 1000  # the memory of the largest shape


def test_buffers_from_inference_mode_are_writable_outside() -> None:
    workspace = Workspace()
    with torch.inference_mode():
        workspace.buffers(1, 1, 3, CPU)
        buffers = workspace.buffers(1, 2, 4, CPU)
    for each in (*list_buffers(buffers), buffers.values, buffers.sizes, *buffers.pairs):
        each.zero_()
        assert not each.is_inference()


@pytest.mark.parametrize("memory", [CHUNK_BYTES, BATCH_BYTES])
@pytest.mark.parametrize("scale_per_element", [False, True])
@pytest.mark.parametrize("formats", [0, 1, 4, 17, 40])
def test_the_capacity_fills_the_allowed_memory(
    formats: int, scale_per_element: bool, memory: int
) -> None:
    columns = compute_capacity(memory, formats, scale_per_element=scale_per_element)
    workspace = Workspace()
    taken = memory_size(workspace.buffers(1, formats, columns, META))
    taken += columns  # the mask takes one byte for each element
    if scale_per_element:
        taken += 8 * columns * (formats + 16)
    assert 0.99 * memory < taken < memory


def test_the_capacity_is_at_least_one_element() -> None:
    assert compute_capacity(CHUNK_BYTES, 10**7) == 1
