"""`Arena`: copies side by side, and layers measured together as if each were alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altgrad import UpdateMonitor, measure
from altgrad.measurement.chunks import Sample
from altgrad.measurement.ever_moved import EverMovedOfLayers
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.monitor.arena import Arena
from altgrad.monitor.scale_state import ScaleState
from altgrad.observation.snapshots import Copies
from altgrad.quantization.format_set import FormatSet
from tests.monitor.watching import (
    FORMATS,
    assert_equal_figures,
    net,
    sharing_out,
    train,
    watched,
)


class Lying:
    """An arena with what it asks."""

    def __init__(self, scaling: Any = "tensor", elements: int = 100_000) -> None:
        with sharing_out(elements):
            self.measurer = Measurer(FormatSet(FORMATS, scaling))
        self.scale_state = ScaleState(self.measurer.formats)
        self.samples: dict[str, Sample] = {}
        ever_moved = EverMovedOfLayers(pytest.fail)
        self.arena = Arena(self.measurer, self.scale_state, ever_moved, self.samples)

    def place(
        self, name: str, parameter: Tensor, gradient: Tensor | None = None, indices: Any = None
    ) -> Copies | None:
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        return self.arena.place(name, parameter, gradient, indices)

    @property
    def names(self) -> list[list[str | None]]:
        return [segment.names for segment in self.arena.segments]


def a_step(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Before, after and gradient."""
    generator = torch.Generator().manual_seed(seed)
    before, update, gradient = torch.randn(3, *shape, generator=generator)
    return before, before + update * 1e-2, gradient


def test_parameters_lie_side_by_side_each_in_memory_of_its_own() -> None:
    lying, shapes = Lying(), {"matrix": (5, 7), "vector": (100,), "scalar": (), "none": (0, 3)}
    copies = {name: lying.place(name, torch.ones(shape)) for name, shape in shapes.items()}
    for number, (name, each) in enumerate(copies.items()):
        for offset, memory in enumerate(each):
            assert memory.shape == shapes[name]
            memory.fill_(10 * number + offset)
    for number, each in enumerate(copies.values()):
        for offset, memory in enumerate(each):
            assert (memory == 10 * number + offset).all()
    (segment,) = lying.arena.segments
    assert segment.names == [*shapes]
    assert segment.rows == 1 + 2 + 1 + 0  # of 64 elements
    assert segment.before.isfinite().sum() == 35 + 100 + 1  # elsewhere there is no element


def test_asked_again_a_parameter_lies_where_it_lay() -> None:
    lying = Lying()
    lying.place("gone", torch.ones(70))
    first = lying.place("w", torch.ones(70))
    lying.place("gone", torch.ones(70).double())
    again = lying.place("w", torch.ones(7, 10))
    assert [each.data_ptr() for each in again] == [each.data_ptr() for each in first]
    assert lying.names == [[None, "w"], ["gone"]]


def test_what_cannot_be_measured_together_does_not_lie_there() -> None:
    lying = Lying(elements=190)  # two rows, of 64 elements each
    assert lying.place("large", torch.ones(129)) is None
    assert lying.place("complex", torch.ones(3, dtype=torch.complex64)) is None
    assert lying.place("int", torch.ones(3, dtype=torch.int64)) is None
    assert lying.place("gradient", torch.ones(3), torch.ones(3, dtype=torch.complex64)) is None
    assert lying.place("no sample", torch.ones(300), indices=torch.zeros(0).long()) is None
    assert lying.names == []
    assert lying.place("fits", torch.ones(128)) is not None


def test_what_is_stored_otherwise_or_finds_no_room_begins_a_segment() -> None:
    lying = Lying(elements=128)
    for name, dtype, gradient in [
        ("a", torch.float32, torch.float32),
        ("b", torch.bfloat16, torch.bfloat16),
        ("c", torch.float32, torch.float64),
        ("d", torch.float32, torch.float32),
        ("e", torch.float32, torch.float32),
    ]:
        copies = lying.place(name, torch.ones(9, dtype=dtype), torch.ones(9, dtype=gradient))
        assert [each.dtype for each in copies] == [dtype, gradient, dtype]
    assert lying.names == [["a", "d"], ["b"], ["c"], ["e"]]


def test_what_elements_have_done_is_given_back_as_it_was_restored() -> None:
    lying = Lying()
    for name, elements in (("a", 200), ("b", 64), ("c", 1)):
        lying.place(name, torch.ones(elements))
    (segment,) = lying.arena.segments
    bits = {
        place.name: torch.rand(1 + len(FORMATS), place.elements) < 0.5 for place in segment.places
    }
    for place in segment.places:
        segment.restore(place, bits[place.name])
    found = dict(lying.arena.ever_moved())
    assert found.keys() == bits.keys()
    assert all(torch.equal(found[name], bits[name]) for name in bits)


def test_what_elements_have_done_goes_with_them_and_is_not_left_to_the_next() -> None:
    lying = Lying()
    lying.place("w", torch.ones(10)).before.fill_(1.0)
    (segment,) = lying.arena.segments
    bits = torch.rand(1 + len(FORMATS), 10) < 0.5
    segment.restore(segment.places[0], bits)
    lying.place("w", torch.ones(2, 5).double())
    assert lying.names == [[None], ["w"]]
    assert torch.equal(dict(lying.arena.ever_moved())["w"], bits)
    assert segment.before.isnan().all()
    lying.place("next", torch.ones(12))
    assert lying.names == [["next"], ["w"]]  # in a room of as many rows
    assert not dict(lying.arena.ever_moved())["next"].any()


def test_what_has_another_number_of_elements_has_done_nothing() -> None:
    lying = Lying()
    lying.place("w", torch.ones(10))
    (segment,) = lying.arena.segments
    segment.restore(segment.places[0], torch.ones(1 + len(FORMATS), 10, dtype=torch.bool))
    lying.place("w", torch.ones(11))
    ((name, ever),) = lying.arena.ever_moved()
    assert (name, ever.shape, ever.any().item()) == ("w", (1 + len(FORMATS), 11), False)


@pytest.mark.parametrize("scaling", [None, "tensor", "channel", ("block", 8)], ids=str)
def test_a_batch_is_each_layer_alone_under_the_scales_that_now_hold(scaling: Any) -> None:
    lying = Lying(scaling)
    steps = {"a": a_step(9, 20), "b": a_step(70, seed=1), "c": a_step(3, 5, seed=2)}
    for name, (before, after, gradient) in steps.items():
        copies = lying.place(name, before, gradient)
        for memory, part in zip(copies, (before, gradient, after), strict=True):
            memory.copy_(part)
    (segment,) = lying.arena.segments
    batch = lying.arena.batch_of(segment)
    assert lying.arena.batch_of(segment) is batch
    for factor in (1.0, 64.0):
        lying.scale_state._steps_left = 0
        lying.scale_state.refresh({name: factor * step[0] for name, step in steps.items()})
        lying.arena.scales_changed()
        rows = lying.measurer.measure_batch(lying.arena.batch_of(segment))
        for row, step in zip(rows, steps.values(), strict=True):
            amax = (factor * step[0]).abs()
            amax = amax.flatten(1).amax(1) if scaling == "channel" and amax.dim() > 1 else amax
            amax = amax if scaling == "channel" else amax.amax().view(1)
            alone = Measurer(FormatSet(FORMATS, scaling)).measure_tensor(*step, amax)
            expected = dict(tensor_figures(FORMATS, alone))
            assert_equal_figures(tensor_figures(FORMATS, row), expected, ("never_moved_frac",))


def test_a_sample_lies_in_one_dimension_and_stands_for_the_whole() -> None:
    lying, (before, after, gradient) = Lying("channel"), a_step(30, 20)
    indices = torch.tensor([3, 70, 71, 599])
    lying.samples["w"] = Sample(before.shape, indices)
    copies = lying.place("w", before, gradient, indices)
    for memory, part in zip(copies, (before, gradient, after), strict=True):
        assert memory.shape == (4,)
        memory.copy_(part.flatten()[indices])
    (segment,) = lying.arena.segments
    (row,) = lying.measurer.measure_batch(lying.arena.batch_of(segment))
    figures = tensor_figures(FORMATS, row)
    assert (figures.elements, figures.population) == (4, 600)
    # Each element under the scale of its own channel: rows 0, 3, 3 and 29.
    rows = [part[[0, 3, 29]] for part in (before, after, gradient)]
    amax = rows[0].abs().amax(1)
    padded = [torch.full((3, 2), math.nan) for _ in rows]
    for pad, part in zip(padded, (before, after, gradient), strict=True):
        chosen = part.flatten()[indices]
        pad[0, 0], pad[1], pad[2, 0] = chosen[0], chosen[1:3], chosen[3]
    alone = Measurer(FormatSet(FORMATS, "channel")).measure_tensor(*padded, amax)
    expected = tensor_figures(FORMATS, alone)
    for key in ("stall_frac/e4m3fn", "stall_frac/e2m1", "grid_error_mean/e4m3fn"):
        assert figures[key] == pytest.approx(expected[key], rel=1e-12), key


# --- in a monitor


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
@pytest.mark.parametrize("capacity", [64, 640, 10_000])
def test_it_does_not_matter_which_layers_are_measured_together(capacity: int, scaling: str) -> None:
    model = net()
    with sharing_out(capacity):
        optimizer, _, records = watched(model, scaling=scaling)
        train(model, optimizer, 2)
    twin = net()
    other, _, expected = watched(twin, scaling=scaling)
    train(twin, other, 2)
    for record, same in zip(records, expected, strict=True):
        assert set(record.layers) == set(same.layers)
        for name, figures in same.layers.items():
            assert_equal_figures(record.layers[name], dict(figures))
        assert_equal_figures(record.model, dict(same.model))


def test_two_thousand_layers() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2000)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with UpdateMonitor(model, formats="bf16", strict=True).attach(optimizer) as monitor:
        for parameter in model:
            parameter.grad = torch.ones(3)
        optimizer.step()
    assert len(monitor.latest.layers) == 2000
    assert monitor.latest.model.population == 6000


def test_a_parameter_that_is_replaced_finds_a_new_place() -> None:
    model = net()
    optimizer, _, records = watched(model)
    train(model, optimizer)
    model[4] = nn.Linear(32, 7)
    optimizer.named = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [*model.parameters()]
    train(model, optimizer, 2)
    for record, step in zip(records, optimizer.steps, strict=True):
        assert set(record.layers) == set(step)
    assert records[2].layers["4.weight"].population == 7 * 32
    assert_equal_figures(
        records[1].layers["4.weight"],
        measure(*optimizer.steps[1]["4.weight"], FORMATS),
        ("never_moved_frac",),
    )


def test_names_that_change_places_take_their_figures_along() -> None:
    model = nn.ParameterDict({"a": torch.randn(70), "b": torch.randn(70)})
    optimizer, _, records = watched(model)
    for gradient in (0.0, 1.0):
        if gradient:
            model["a"], model["b"] = model["b"], model["a"]
            model["c"] = nn.Parameter(torch.randn(3))  # which makes the observer look again
            optimizer.param_groups[0]["params"] = [*model.parameters()]
            optimizer.named = dict(model.named_parameters())
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        model["a"].grad = torch.zeros(70)
        optimizer.step()
        assert records[-1].layers["a"]["gradient_rms"] == 0
        assert records[-1].layers["b"]["gradient_rms"] > 0


@pytest.mark.parametrize("scaling", ["tensor", "channel", ("block", 8)])
def test_a_parameter_may_change_its_shape_and_dtype_again_and_again(scaling: Any) -> None:
    model = nn.Linear(8, 8, bias=False)
    optimizer, monitor, records = watched(model, scaling=scaling)
    optimizer.named = dict(model.named_parameters())
    for shape, dtype in [((8, 8), torch.float32), ((4, 24), torch.float64)] * 20:
        model.weight.data = torch.randn(shape, dtype=dtype)
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        expected = measure(*optimizer.steps[-1]["weight"], FORMATS, scaling)
        assert_equal_figures(records[-1].layers["weight"], expected, ("never_moved_frac",))
    (arena,) = monitor._measuring._arenas.values()
    assert sum(segment.rows for segment in arena.segments) == 3


@pytest.mark.parametrize("capacity", [64, 100_000])
def test_the_first_observed_step_may_be_in_inference_mode(capacity: int) -> None:
    model = nn.Linear(20, 20, bias=False)
    with sharing_out(capacity):
        optimizer, _monitor, records = watched(model)
        for _ in range(3):
            model.weight.grad = torch.ones_like(model.weight)
            with torch.inference_mode(mode=len(records) < 2):
                optimizer.step()
    assert [record.index for record in records] == [0, 1, 2]
