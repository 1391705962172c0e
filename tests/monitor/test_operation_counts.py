"""Cost of observing in operations and memory, for a GPT of 10.1 M parameters."""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from altgrad import DEFAULT_FORMATS, UpdateMonitor
from altgrad.measurement.kernel import Rows
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.workspace import BATCH_BYTES, CHUNK_BYTES
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling
from benchmarks.gpt import Gpt, train
from tests.counting import Memory, Operations, host_copies, operations

FORMATS = ("e4m3fn", "e5m2", "fp16", "bf16")


@pytest.fixture(scope="module")
def model() -> Gpt:
    torch.manual_seed(0)
    return Gpt()


@contextlib.contextmanager
def watching(model: Gpt, **settings: Any) -> Iterator[tuple[torch.optim.Optimizer, UpdateMonitor]]:
    """Yield the optimizer, and the monitor after two observed steps: all memory is laid out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 1e-9  # so that no weight exceeds its scale
    with UpdateMonitor(model, strict=True, **settings).attach(optimizer) as monitor:
        train(model, optimizer, 2)
        assert monitor.state_dict()["scales"]["exceeded"] == []
        yield optimizer, monitor


@pytest.fixture
def watched(model: Gpt):
    with watching(model, formats=FORMATS) as both:
        yield both


def steps(model: Gpt, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    return lambda: train(model, optimizer)


def test_the_model_has_the_size_that_the_budget_assumes(model: Gpt) -> None:
    assert len([*model.parameters()]) == 100
    assert 10.0e6 < sum(parameter.numel() for parameter in model.parameters()) < 10.2e6


SETTINGS = {
    "UpdateMonitor": {},
    "PrecisionMonitor": {"formats": DEFAULT_FORMATS, "max_elements": 4096},
    "four formats": {"formats": FORMATS, "max_elements": 4096},
}
"""Arguments of `UpdateMonitor` that are default there, or in PrecisionMonitor."""


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_observed_step_makes_at_most_300_operations_and_one_host_copy(
    model: Gpt, settings: dict[str, Any]
) -> None:
    with watching(model, **settings) as (optimizer, monitor):
        operations_seen = Operations()
        with host_copies() as copies, operations_seen.counting():
            train(model, optimizer)
        index = monitor.latest.index
        figures = dict(monitor.latest.model)
    with host_copies() as training_copies:
        alone = operations(steps(model, optimizer))
    assert monitor.latest.index == index == 2
    assert any(value > 0 for value in figures.values())
    added = operations_seen.counts - alone
    assert 200 < added.total() <= 300
    assert (len(copies) - len(training_copies), copies.count("cpu")) == (1, 1)
    assert not operations_seen.after_copy
    # One for each large layer and quantity; small layers are copied together.
    assert added["aten.take.out"] == 3 * 34
    assert added["aten._foreach_copy_.default"] == 2


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
    assert 2**17 < memory_for(Measurer(FormatSet(formats)), step) <= CHUNK_BYTES


@pytest.mark.parametrize("scaling", ["tensor", "channel", ("block", 32)])
@pytest.mark.parametrize("formats", [["mxfp8_e4m3", "nvfp4"], ["nvfp4", *FORMATS]])
@pytest.mark.parametrize("shape", [(1_000_000,), (1_000_000, 2), (100, 20_000)])
def test_measuring_with_block_scales_takes_at_most_16_mib(
    formats: list[str], scaling: Scaling, shape: tuple[int, ...]
) -> None:
    step = [torch.randn(shape) for _ in range(3)]
    measurer = Measurer(FormatSet(formats, scaling))
    amax = measurer.take_amaxes(*step[:2])
    assert memory_for(measurer, [*step, amax]) <= CHUNK_BYTES


def test_measuring_many_layers_together_takes_at_most_80_mib() -> None:
    """Buffers take at most 64 MiB, and the sums of all rows come on top."""
    measurer = Measurer(FormatSet(FORMATS))
    layers = measurer.batch_capacity // 4096
    rows = Rows(*torch.randn(3, layers * 64, 1, 64))
    batch = measurer.prepare_batch(
        rows,
        torch.arange(layers).repeat_interleave(64),
        torch.tensor([[4096.0, 4096.0, 0.0]] * layers, dtype=torch.float64),
        torch.ones(1, len(FORMATS), 1, dtype=torch.float64),
        None,
    )
    with Memory() as memory:
        measurer.measure_batch(batch)
    assert 0.95 * BATCH_BYTES < memory.peak <= 1.25 * BATCH_BYTES


def memory_for(measurer: Measurer, arguments: list[torch.Tensor]) -> int:
    with Memory() as memory:
        measurer.measure_tensor(*arguments)
    return memory.peak
