"""`Arena`: copies lie side by side, and layers measured together equal layers measured alone."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altgrad import UpdateMonitor, measure
from altgrad.distributed.peers import Alone
from altgrad.measurement.chunks import Sample
from altgrad.measurement.ever_moved import EverMovedStore
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.monitor.arena import Arena
from altgrad.monitor.scale_state import ScaleState
from altgrad.observation.snapshots import Copies, Request
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.scale_groups import Amaxes
from tests.counting import instructions
from tests.monitor.watching import (
    FORMATS,
    assert_equal_figures,
    net,
    sharing_out,
    train,
    watched,
)

KINDS = 1 + len(FORMATS)


class Lying:
    """An arena with its measurer, scales and flags."""

    def __init__(self, scaling: Any = "tensor", elements: int = 100_000) -> None:
        with sharing_out(elements):
            self.measurer = Measurer(FormatSet(FORMATS, scaling))
        self.scale_state = ScaleState(self.measurer.formats)
        self.samples: dict[str, Sample] = {}
        self.told: list[str] = []
        self.ever_moved = EverMovedStore(self.told.append)
        self.arena = Arena(self.measurer, self.scale_state, self.ever_moved, self.samples)

    def lay_out(self, *requests: Request) -> dict[str, Copies | None]:
        measured = {r.name: r.parameter for r in requests if r.parameter.dtype in INPUT_DTYPES}
        self.scale_state.ensure_amax(measured, Alone())
        given = self.arena.lay_out(requests)
        return {request.name: each for request, each in zip(requests, given, strict=True)}

    def take_scales(self, parameters: dict[str, Tensor]) -> None:
        """Take each amax now, due or not."""
        self.scale_state.load_state_dict(self.scale_state.state_dict() | {"steps_left": 0})
        assert self.scale_state.prepare(lambda: parameters, Alone())
        self.arena.scales_changed()

    @property
    def names(self) -> list[list[str]]:
        return [[place.name for place in segment.places] for segment in self.arena.segments]

    @property
    def flags(self) -> dict[str, Tensor]:
        return dict(self.arena.flags())

    def restore(self, **histories: Tensor) -> None:
        for segment in self.arena.segments:
            for place in segment.places:
                if place.name in histories:
                    segment.write_flags(place, histories[place.name])


def asked(
    name: str,
    parameter: Tensor,
    gradient_dtype: torch.dtype | None = None,
    indices: Tensor | None = None,
) -> Request:
    return Request(name, parameter, gradient_dtype or parameter.dtype, indices)


def bits(elements: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(KINDS, elements, generator=generator) < 0.5


def a_step(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Make before, after and gradient of a step."""
    generator = torch.Generator().manual_seed(seed)
    before, update, gradient = torch.randn(3, *shape, generator=generator)
    return before, before + update * 1e-2, gradient


def fill(copies: Copies, step: tuple[Tensor, Tensor, Tensor]) -> None:
    before, after, gradient = step
    for memory, part in zip(copies, (before, gradient, after), strict=True):
        memory.copy_(part)


def test_layers_lie_side_by_side_in_separate_memory() -> None:
    lying, shapes = Lying(), {"matrix": (5, 7), "vector": (100,), "scalar": (), "none": (0, 3)}
    copies = lying.lay_out(*(asked(name, torch.ones(shape)) for name, shape in shapes.items()))
    assert [*copies] == [*shapes]
    for number, (name, each) in enumerate(copies.items()):
        for offset, memory in enumerate(each):
            assert memory.shape == shapes[name]
            memory.fill_(10 * number + offset)
    for number, each in enumerate(copies.values()):
        for offset, memory in enumerate(each):
            assert (memory == 10 * number + offset).all()
    (segment,) = lying.arena.segments
    assert lying.names == [[*shapes]]
    assert len(segment.before) == 1 + 2 + 1 + 0  # as few rows of 64 elements as possible
    assert segment.before.isfinite().sum() == 35 + 100 + 1  # all other positions have no element


def test_layers_that_cannot_be_measured_together_get_no_memory() -> None:
    lying = Lying(elements=190)  # two rows, of 64 elements each
    nothing = torch.zeros(0, dtype=torch.int64)
    lying.samples["no sample"] = Sample(torch.Size((300,)), nothing)
    copies = lying.lay_out(
        asked("large", torch.ones(129)),
        asked("complex", torch.ones(3, dtype=torch.complex64)),
        asked("int", torch.ones(3, dtype=torch.int64)),
        asked("fits", torch.ones(128)),
        asked("gradient", torch.ones(3), torch.complex64),
        asked("no sample", torch.ones(300), indices=nothing),
    )
    assert [name for name, each in copies.items() if each is not None] == ["fits"]
    assert copies["fits"].before.shape == (128,)
    assert lying.names == [["fits"]]
    assert set(lying.lay_out(asked("large", torch.ones(129))).values()) == {None}
    assert lying.names == []


def test_another_dtype_or_a_full_segment_begins_a_new_segment() -> None:
    lying = Lying(elements=128)
    stored = {
        "a": (torch.float32, torch.float32),
        "b": (torch.bfloat16, torch.bfloat16),
        "c": (torch.float32, torch.float64),
        "d": (torch.float32, torch.float32),
        "e": (torch.float32, torch.float32),
    }
    copies = lying.lay_out(
        *(asked(name, torch.ones(9, dtype=own), other) for name, (own, other) in stored.items())
    )
    for name, (own, gradient) in stored.items():
        assert [each.dtype for each in copies[name]] == [own, gradient, own]
    assert lying.names == [["a", "d"], ["b"], ["c"], ["e"]]


def test_laying_out_is_linear_in_the_number_of_layers() -> None:
    """Each layer has a segment of its own, which no other layer looks at."""

    def lay_out(count: int) -> int:
        lying = Lying(elements=64)
        requests = [asked(f"p{k}", torch.ones(64)) for k in range(count)]
        return instructions(lambda: lying.lay_out(*requests))

    assert lay_out(200) < 4.1 * lay_out(50)


def test_flags_are_returned_as_they_were_written() -> None:
    lying, sizes = Lying(), {"a": 200, "b": 64, "c": 1}
    lying.lay_out(*(asked(name, torch.ones(elements)) for name, elements in sizes.items()))
    histories = {name: bits(elements, seed=elements) for name, elements in sizes.items()}
    lying.restore(**histories)
    assert lying.flags.keys() == histories.keys()
    assert all(torch.equal(lying.flags[name], each) for name, each in histories.items())


# --- a new layout


def test_flags_survive_a_new_layout_unless_the_layer_changed() -> None:
    lying = Lying()
    before = lying.lay_out(*(asked(name, torch.ones(10)) for name in ("gone", "w", "shorter")))
    before["w"].before.fill_(1.0)
    lying.restore(gone=bits(10, 1), w=bits(10, 2), shorter=bits(10, 3))
    after = lying.lay_out(
        asked("new", torch.ones(70)),
        asked("shorter", torch.ones(9)),
        asked("w", torch.ones(2, 5).double()),
    )
    assert lying.names == [["new", "shorter"], ["w"]]
    assert after["w"].before.isnan().all()  # nothing has been copied to it
    assert torch.equal(lying.flags["w"], bits(10, 2))
    assert not lying.flags["new"].any()
    assert not lying.flags["shorter"].any()
    assert lying.told == [
        "has never_moved_frac of shorter begin anew: it has 9 measured elements, and had 10"
    ]
    assert torch.equal(lying.ever_moved.take("gone", KINDS, 10), bits(10, 1))


def test_flags_are_restored_if_a_layer_comes_back() -> None:
    lying = Lying()
    lying.lay_out(asked("w", torch.ones(10)), asked("b", torch.ones(3)))
    lying.restore(w=bits(10))
    lying.lay_out(asked("b", torch.ones(3)))
    lying.lay_out(asked("b", torch.ones(3)), asked("w", torch.ones(10)))
    assert torch.equal(lying.flags["w"], bits(10))


def test_leave_frees_memory_and_keeps_flags() -> None:
    lying = Lying()
    lying.lay_out(asked("w", torch.ones(10)))
    lying.restore(w=bits(10))
    lying.arena.free()
    assert (lying.arena.segments, lying.flags) == ([], {})
    assert torch.equal(lying.ever_moved.take("w", KINDS, 10), bits(10))


def test_a_new_layout_keeps_the_scales() -> None:
    """The amax of a layer is taken again only if its shape has changed."""
    lying, (before, after, gradient) = Lying(), a_step(9, 20)
    lying.lay_out(asked("same", before), asked("reshaped", before))
    steps = {"same": (16 * before, 16 * after, gradient)}
    steps["reshaped"] = tuple(each.view(20, 9) for each in steps["same"])
    copies = lying.lay_out(*(asked(name, step[0]) for name, step in steps.items()))
    for name, step in steps.items():
        fill(copies[name], step)
    (segment,) = lying.arena.segments
    rows = lying.measurer.measure_batch(segment.batch)
    largest = before.abs().max().view(1)
    for row, step, amax in zip(rows, steps.values(), (largest, 16 * largest), strict=True):
        alone = Measurer(FormatSet(FORMATS)).measure_tensor(*step, Amaxes.from_groups(amax))
        assert_equal_figures(tensor_figures(FORMATS, row), dict(tensor_figures(FORMATS, alone)))
    assert not torch.equal(rows[0], rows[1])


# --- batches


@pytest.mark.parametrize("scaling", [None, "tensor", "channel", ("block", 8)], ids=str)
def test_a_batch_equals_each_layer_measured_alone(scaling: Any) -> None:
    lying = Lying(scaling)
    steps = {"a": a_step(9, 20), "b": a_step(70, seed=1), "c": a_step(3, 5, seed=2)}
    copies = lying.lay_out(*(asked(name, step[0]) for name, step in steps.items()))
    for name, step in steps.items():
        fill(copies[name], step)
    (segment,) = lying.arena.segments
    for factor in (1.0, 64.0):
        if lying.measurer.formats.needs_amax:
            lying.take_scales({name: factor * step[0] for name, step in steps.items()})
        rows = lying.measurer.measure_batch(segment.batch)
        for row, step in zip(rows, steps.values(), strict=True):
            amax = (factor * step[0]).abs()
            amax = amax.flatten(1).amax(1) if scaling == "channel" and amax.dim() > 1 else amax
            amax = amax if scaling == "channel" else amax.amax().view(1)
            alone = Measurer(FormatSet(FORMATS, scaling)).measure_tensor(
                *step, Amaxes.from_groups(amax)
            )
            expected = dict(tensor_figures(FORMATS, alone))
            assert_equal_figures(tensor_figures(FORMATS, row), expected, ("never_moved_frac",))


def test_absent_layers_hold_no_elements() -> None:
    lying, steps = Lying(), {"a": a_step(70), "b": a_step(5, seed=1), "c": a_step(64, seed=2)}
    copies = lying.lay_out(*(asked(name, step[0]) for name, step in steps.items()))
    for name, step in steps.items():
        fill(copies[name], step)
    (segment,) = lying.arena.segments
    whole = lying.measurer.measure_batch(segment.batch)
    assert segment.empty_absent({*steps}) == ["a", "b", "c"]
    assert torch.equal(lying.measurer.measure_batch(segment.batch), whole)
    done = copy.deepcopy(lying.flags)
    assert segment.empty_absent({"b", "another"}) == [None, "b", None]
    assert torch.equal(copies["b"].before, steps["b"][0])
    assert copies["a"].before.isnan().all()
    assert copies["c"].before.isnan().all()
    rows = lying.measurer.measure_batch(segment.batch)
    assert torch.equal(rows[1], whole[1])
    assert tensor_figures(FORMATS, rows[1]).elements == 5
    assert all(torch.equal(lying.flags[name], each) for name, each in done.items())


def test_a_sample_is_flat_and_stands_for_the_whole_layer() -> None:
    lying, (before, after, gradient) = Lying("channel"), a_step(30, 20)
    indices = torch.tensor([3, 70, 71, 599])
    lying.samples["w"] = Sample(before.shape, indices)
    copies = lying.lay_out(asked("w", before, indices=indices))["w"]
    for memory, part in zip(copies, (before, gradient, after), strict=True):
        assert memory.shape == (4,)
        memory.copy_(part.flatten()[indices])
    (segment,) = lying.arena.segments
    (row,) = lying.measurer.measure_batch(segment.batch)
    figures = tensor_figures(FORMATS, row)
    assert (figures.elements, figures.population) == (4, 600)
    # Each element has the scale of its channel: rows 0, 3, 3 and 29.
    rows = [part[[0, 3, 29]] for part in (before, after, gradient)]
    amax = rows[0].abs().amax(1)
    padded = [torch.full((3, 2), math.nan) for _ in rows]
    for pad, part in zip(padded, (before, after, gradient), strict=True):
        chosen = part.flatten()[indices]
        pad[0, 0], pad[1], pad[2, 0] = chosen[0], chosen[1:3], chosen[3]
    alone = Measurer(FormatSet(FORMATS, "channel")).measure_tensor(
        *padded, Amaxes.from_groups(amax)
    )
    expected = tensor_figures(FORMATS, alone)
    for key in ("stall_frac/e4m3fn", "stall_frac/e2m1", "grid_error_mean/e4m3fn"):
        assert figures[key] == pytest.approx(expected[key], rel=1e-12), key


# --- in a monitor


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
@pytest.mark.parametrize("capacity", [64, 640, 10_000])
def test_figures_do_not_depend_on_which_layers_are_measured_together(
    capacity: int, scaling: str
) -> None:
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


def test_two_thousand_layers_are_measured() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2000)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with UpdateMonitor(model, formats="bf16", strict=True).attach(optimizer) as monitor:
        for parameter in model:
            parameter.grad = torch.ones(3)
        optimizer.step()
    assert len(monitor.latest.layers) == 2000
    assert monitor.latest.model.population == 6000


def test_a_replaced_parameter_gets_a_new_place() -> None:
    model = net()
    optimizer, _, records = watched(model, warn=(said := []).append)
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
    assert said == [
        "has never_moved_frac of 4.weight begin anew: it has 224 measured elements, and had 320",
        "has never_moved_frac of 4.bias begin anew: it has 7 measured elements, and had 10",
    ]


def test_layers_that_swap_names_swap_figures() -> None:
    model = nn.ParameterDict({"a": torch.randn(70), "b": torch.randn(70)})
    optimizer, _, records = watched(model)
    for gradient in (0.0, 1.0):
        if gradient:
            model["a"], model["b"] = model["b"], model["a"]
            model["c"] = nn.Parameter(
                torch.randn(3)
            )  # a new name makes the observer read all names again
            optimizer.param_groups[0]["params"] = [*model.parameters()]
            optimizer.named = dict(model.named_parameters())
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        model["a"].grad = torch.zeros(70)
        optimizer.step()
        assert records[-1].layers["a"]["gradient_rms"] == 0
        assert records[-1].layers["b"]["gradient_rms"] > 0


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
