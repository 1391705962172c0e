"""What a device without float64 gets; tests/devices runs all of it on such a device."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from altgrad.quantization import devices
from altgrad.quantization.devices import (
    Gathered,
    copy_to_host,
    editing_on_exact_device,
    find_exact_device,
    gather,
    gather_all,
    move_to_exact_device,
    on_exact_device,
)


@pytest.mark.parametrize("name", ["cpu", "cuda:1", "meta"])
def test_a_device_with_float64_computes_itself(name: str) -> None:
    assert find_exact_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize("name", ["mps", "xpu:1", "xla", "hpu"])
def test_the_host_computes_for_any_other_device(name: str) -> None:
    with torch.device("meta"):  # the default device of the user changes nothing
        assert find_exact_device(torch.device(name)) == torch.device("cpu")


@pytest.mark.parametrize("exact", [{"cpu"}, {"cuda"}], ids=["take", "without take"])
def test_elements_are_gathered_in_row_major_order(exact: set[str]) -> None:
    values = torch.arange(24.0).view(2, 3, 4)
    indices = torch.tensor([23, 0, 5, 5])
    with mock.patch.object(devices, "EXACT", exact):
        for source in (values, values.contiguous().permute(2, 0, 1), values[:, 1:]):
            small = indices % source.numel()
            expected = [source.flatten().tolist()[each] for each in small.tolist()]
            out = torch.empty(4)
            assert gather(source, small, out=out) is out
            assert out.tolist() == gather(source, small).tolist() == expected


def test_tensors_of_many_dtypes_are_copied_as_they_are() -> None:
    tensors = [
        torch.arange(6, dtype=torch.uint8).view(2, 3).t(),
        torch.tensor([1.5, -0.0, torch.nan]),
        torch.tensor(3, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.bfloat16),
        torch.tensor([True, False]),
    ]
    # The device "meta" stands for one from which values are copied: `to` gives them here.
    for copied in (copy_to_host(tensors), copy_all_from_elsewhere(tensors)):
        for one, other in zip(copied, tensors, strict=True):
            assert (one.dtype, one.shape, one.is_contiguous()) == (other.dtype, other.shape, True)
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def copy_all_from_elsewhere(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors to the host as if it were another device than the one they are on."""
    with mock.patch.object(devices, "_HOST", torch.device("cpu", 0)):  # differs from "cpu"
        return copy_to_host(tensors)


def test_tensors_of_an_exact_device_stay_as_they_are() -> None:
    tensors = [torch.zeros(3, 2).t(), torch.zeros(2, device="meta")]
    assert all(map(lambda a, b: a is b, move_to_exact_device(tensors), tensors))
    with editing_on_exact_device(tensors[0]) as edited:
        assert edited is tensors[0]


def test_a_function_without_tensors_of_other_devices_is_called_as_it_is() -> None:
    @on_exact_device
    def pair(x: Tensor, other: int = 0) -> tuple[Tensor, int]:
        """Return both."""
        return x, other

    x = torch.zeros(2)
    assert pair(x, other=3)[0] is x
    assert pair(x, 4)[1] == 4
    assert pair.__doc__ == "Return both."


@pytest.mark.parametrize("exact", [{"cpu"}, {"cuda"}], ids=["in place", "waiting"])
def test_elements_go_to_their_places(exact: set[str]) -> None:
    sources = [torch.arange(6.0).view(2, 3).t(), torch.arange(4).to(torch.bfloat16)]
    indices = [torch.tensor([1, 4]), torch.tensor([3])]
    flat = torch.zeros(4)
    places = [flat[1:3], torch.zeros(1, dtype=torch.bfloat16)]
    with mock.patch.object(devices, "EXACT", exact):
        gather_all(sources, indices, places)
        assert (flat.tolist(), places[1].tolist()) == ([0, 3, 2, 0], [3])
        gathered = Gathered()
        gathered.take(sources[0], indices[0], flat[:2])
        has_waited = flat.tolist() == [0, 3, 2, 0]
        gathered.bring()
        gathered.bring()
    assert has_waited is (exact == {"cuda"})
    assert flat.tolist() == [3, 2, 2, 0]
