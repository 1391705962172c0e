"""Cost of observing in operations and memory, for a GPT of 10.1 M parameters and four formats."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch

from altgrad import UpdateMonitor
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.workspace import TEMPORARY_BYTES
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling
from benchmarks.gpt import Gpt, train
from tests.counting import Memory, host_copies, operations, operations_here_and_there

FORMATS = ("e4m3fn", "e5m2", "fp16", "bf16")


@pytest.fixture(scope="module")
def model() -> Gpt:
    torch.manual_seed(0)
    return Gpt()


@pytest.fixture
def watched(model: Gpt):
    """Return the optimizer, and the monitor after two observed steps: all memory is laid out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 1e-9  # so that no weight exceeds its scale
    with UpdateMonitor(model, formats=FORMATS, strict=True).attach(optimizer) as monitor:
        train(model, optimizer, 2)
        assert monitor.state_dict()["scales"]["exceeded"] == []
        yield optimizer, monitor


def steps(model: Gpt, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    return lambda: train(model, optimizer)


def test_the_model_has_the_size_that_the_budget_assumes(model: Gpt) -> None:
    assert len([*model.parameters()]) == 100
    assert 10.0e6 < sum(parameter.numel() for parameter in model.parameters()) < 10.2e6


def test_an_observed_step_makes_at_most_250_operations_and_one_host_copy(model, watched) -> None:
    optimizer, monitor = watched
    with host_copies() as copies:
        observed, on_host = operations_here_and_there(steps(model, optimizer))
    index = monitor.latest.index
    monitor.detach()
    with host_copies() as training_copies:
        alone = operations(steps(model, optimizer))
    assert monitor.latest.index == index == 2
    assert observed.total() - alone.total() <= 250
    assert (len(copies) - len(training_copies), copies.count("cpu")) == (1, 1)
    assert not on_host  # figures are read with NumPy
    # One for each large layer and quantity; small layers are copied together.
    assert (observed - alone)["aten.take.out"] == 3 * 34
    assert (observed - alone)["aten._foreach_copy_.default"] == 2


def test_a_step_that_is_not_observed_makes_no_operations(model: Gpt) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    alone = operations(steps(model, optimizer))
    asked: list[int] = []

    def never(index: int) -> bool:
        asked.append(index)
        return False

    with UpdateMonitor(model, formats=FORMATS, every_n_steps=never).attach(optimizer):
        watched = operations(steps(model, optimizer))
    assert watched == alone
    assert asked == [0]


def test_scales_are_taken_again_after_a_hundred_steps(model, watched) -> None:
    """Taking scales costs one operation for each layer, and some for all."""
    optimizer, monitor = watched
    state = copy.deepcopy(monitor.state_dict())
    assert state["scales"]["steps_left"] == 98
    state["scales"]["steps_left"] = 2
    monitor.detach()
    monitor.load_state_dict(state)
    monitor.attach(optimizer)
    train(model, optimizer)  # all scales are taken
    usual = operations(steps(model, optimizer)).total()
    assert monitor.state_dict()["scales"]["steps_left"] == 0
    with host_copies() as copies:
        refreshing = operations(steps(model, optimizer))
    assert refreshing["aten.aminmax.default"] == 100
    assert refreshing.total() - usual <= 500
    assert monitor.state_dict()["scales"]["steps_left"] == 99
    # Two copies: the figures, and whether an amax is 0 or not finite.
    assert (copies.count("cpu"), copies.count("tolist")) == (1, 1)


def test_no_random_number_is_drawn(model, watched) -> None:
    optimizer, monitor = watched
    monitor.detach()
    torch.manual_seed(1)
    train(model, optimizer, 2)
    expected = torch.get_rng_state()
    monitor.attach(optimizer)
    torch.manual_seed(1)
    train(model, optimizer, 2)
    assert torch.equal(torch.get_rng_state(), expected)


def test_memory_does_not_grow_from_step_to_step(model, watched) -> None:
    optimizer, _ = watched

    def alive() -> int:
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        dense = [
            each for each in tensors if each.layout == torch.strided
        ]  # other layouts have no storage
        # Views share a storage; torch has no public name for the identity of a storage.
        return len({each.untyped_storage()._cdata for each in dense})

    train(model, optimizer)
    before = alive()
    train(model, optimizer, 3)
    assert alive() <= before


@pytest.mark.parametrize("formats", [["e4m3fn"], FORMATS])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("count", [1_000, 70_000, 1_000_000, 6_000_000])
def test_measuring_takes_at_most_16_mib_whatever_the_size(
    formats: list[str], count: int, contiguous: bool
) -> None:
    step = [torch.randn(2, count) for _ in range(3)]
    step = [each.T if not contiguous else each.view(-1) for each in step]
    assert 2**17 < memory_for(Measurer(FormatSet(formats)), step) <= TEMPORARY_BYTES


@pytest.mark.parametrize("scaling", ["tensor", "channel", ("block", 32)])
@pytest.mark.parametrize("formats", [["mxfp8_e4m3", "nvfp4"], ["nvfp4", *FORMATS]])
@pytest.mark.parametrize("shape", [(1_000_000,), (1_000_000, 2), (100, 20_000)])
def test_measuring_with_block_scales_takes_at_most_16_mib(
    formats: list[str], scaling: Scaling, shape: tuple[int, ...]
) -> None:
    step = [torch.randn(shape) for _ in range(3)]
    measurer = Measurer(FormatSet(formats, scaling))
    amax = measurer.take_amax(*step[:2])
    assert memory_for(measurer, [*step, amax]) <= TEMPORARY_BYTES


def memory_for(measurer: Measurer, arguments: list[torch.Tensor]) -> int:
    with Memory() as memory:
        measurer.measure_tensor(*arguments)
    return memory.peak
