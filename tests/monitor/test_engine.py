"""`Engine`: layers are measured together, alone or not at all."""

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad import StepRecord, measure
from altgrad.distributed.peers import Alone, StepSums
from altgrad.distributed.shards import Part
from altgrad.measurement.chunks import Sample
from altgrad.measurement.ever_moved import EverMovedStore
from altgrad.measurement.figures import tensor_figures, vector_figures
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.step_record import step_record
from altgrad.monitor.elements import sample_elements
from altgrad.monitor.engine import Engine
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.sharding import Sharding
from altgrad.observation import OptimizerStep, StepOutcome
from altgrad.observation.snapshots import Copies, Request
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.scale_groups import Amaxes
from tests.counting import host_copies
from tests.monitor.watching import (
    FORMATS,
    assert_equal_figures,
    sharing_out,
    train,
    watched,
)

ALONE = Alone()
SECONDS = (1.0, 2.0)
Step = tuple[Tensor, Tensor, Tensor]
"""Before, after and gradient of one layer."""


class Run:
    """An engine with artificial steps, which are copied and measured as in a run."""

    def __init__(
        self,
        *names: str,
        elements: int = 640,
        max_elements: int | None = None,
        scaling: Any = "tensor",
    ) -> None:
        with sharing_out(elements):
            measurer = Measurer(FormatSet(FORMATS, scaling))
        self.settings = LayerSettings(
            names,
            [],
            measurer.formats,
            measurer.formats.formats,
            every_n_steps=1,
            max_elements=max_elements,
            seed=0,
        )
        self.scale_state = ScaleState(measurer.formats)
        self.ever_moved = EverMovedStore(pytest.fail)
        self.sharding = Sharding()
        self.engine = Engine(
            measurer, self.settings, self.scale_state, self.ever_moved, self.sharding
        )
        self.alone: list[int] = []  # number of elements of each layer measured alone
        self.together: list[int] = []  # number of layers of each call
        self._laid_out: dict[Optimizer, dict[str, tuple[Request, Copies | None]]] = {}

    def optimizer(self) -> Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)

    def lay_out(self, optimizer: Optimizer, **parts: Step) -> dict[str, Copies | None]:
        """Request memory for all layers of an optimizer, as snapshots do."""
        requests = [
            Request(name, before, gradient.dtype, self.engine.choose_elements(name, before))
            for name, (before, _, gradient) in parts.items()
        ]
        given = self.engine.assign_memory(optimizer)(requests)
        pairs = zip(requests, given, strict=True)
        self._laid_out[optimizer] = {each.name: (each, copies) for each, copies in pairs}
        return {name: copies for name, (_, copies) in self._laid_out[optimizer].items()}

    def sums(
        self, optimizer: Optimizer, *, resting: Sequence[str] = (), inf: Any = None, **parts: Step
    ) -> StepSums:
        """Copy the chosen elements of each layer to its memory, and measure."""
        if not {*parts} <= {*self._laid_out.get(optimizer, ())}:
            self.lay_out(optimizer, **parts)
        copied: list[list[Tensor]] = []
        for name, (before, after, gradient) in parts.items():
            request, given = self._laid_out[optimizer][name]
            part = [
                each.clone() if request.indices is None else each.flatten()[request.indices]
                for each in (before, gradient, after)
            ]
            if given is not None:
                part = [memory.copy_(each) for memory, each in zip(given, part, strict=True)]
            copied.append(part)
        before, gradients, after = zip(*copied, strict=True)
        step = OptimizerStep(
            tuple(parts), before, gradients, after, optimizer, 0, inf, frozenset(resting)
        )
        with self.counting():
            return self.engine.measure(StepOutcome(optimizer, 0, step), SECONDS)

    def step(self, optimizer: Optimizer, **parts: Step) -> StepRecord | None:
        sums = ALONE.combine(optimizer, 0, self.sums(optimizer, **parts))
        if not sums.names:
            return None
        judged = self.settings.judged(sums.names)
        return step_record(FORMATS, judged, sums.vectors, 0, sums.seconds)

    def take_scales(self, **parts: Step) -> None:
        """Take each amax now, due or not."""
        self.scale_state.load_state_dict(self.scale_state.state_dict() | {"steps_left": 0})
        before = {name: each[0] for name, each in parts.items()}
        assert self.scale_state.prepare(lambda: before, ALONE)
        self.engine.scales_changed()

    @property
    def flags(self) -> dict[str, Tensor]:
        return dict(self.engine.flags())

    def counting(self) -> Any:
        tensor, batch = Measurer.measure_tensor, Measurer.measure_batch

        def measure_tensor(measurer: Measurer, before: Tensor, *others: Any) -> Tensor:
            self.alone.append(before.numel())
            return tensor(measurer, before, *others)

        def measure_batch(measurer: Measurer, layers: Any) -> Tensor:
            rows = batch(measurer, layers)
            self.together.append(len(rows))
            return rows

        return mock.patch.multiple(
            Measurer, measure_tensor=measure_tensor, measure_batch=measure_batch
        )


def part(*shape: int, seed: int = 0) -> Step:
    """Make updates of all sizes, of which any format keeps some and loses some."""
    generator = torch.Generator().manual_seed(seed)
    before, direction, gradient = torch.randn(3, *shape, generator=generator)
    size = 2.0 ** torch.randint(-12, 1, shape, generator=generator)
    return before, before + size * direction, gradient


def test_small_layers_are_measured_together_and_large_layers_alone() -> None:
    run = Run("a", "b", "fits", "large")
    parts = {
        "a": part(20),
        "b": part(30, 10),
        "fits": part(640, seed=1),
        "large": part(641, seed=2),
    }
    record = run.step(run.optimizer(), **parts)
    assert run.together == [2, 1]  # a second call for the layer that does not fit
    assert run.alone == [641]
    assert set(record.layers) == set(parts)
    for name, each in parts.items():
        assert_equal_figures(record.layers[name], measure(*each, FORMATS))


def test_layers_with_a_dtype_that_is_not_measured_are_left_out() -> None:
    run, before = Run("w", "waves", "odd", "large", max_elements=1000), torch.ones(3)
    waves = torch.ones(3, dtype=torch.complex64)
    parts = {
        "w": part(20),
        "waves": (waves, waves, waves),
        "odd": (before, before * 2, waves),
        "large": (waves.repeat(2000),) * 3,
    }
    record = run.step(run.optimizer(), **parts)
    assert set(record.layers) == {"w"}
    assert (run.together, run.alone) == ([1], [])
    assert run.engine.choose_elements("large", parts["large"][0]) is None
    assert run.step(run.optimizer(), waves=parts["waves"]) is None


def test_absent_layers_are_not_in_the_result() -> None:
    run = Run("a", "b", "large")
    optimizer, parts = run.optimizer(), {"a": part(20), "b": part(30, seed=1), "large": part(700)}
    run.step(optimizer, **parts)
    record = run.step(optimizer, b=parts["b"])
    assert set(record.layers) == {"b"}
    assert_equal_figures(record.model, measure(*parts["b"], FORMATS))
    again = run.step(optimizer, **parts)
    assert set(again.layers) == set(parts)
    assert_equal_figures(again.layers["a"], measure(*parts["a"], FORMATS), ("never_moved_frac",))


def test_a_step_does_not_change_flags_of_absent_layers() -> None:
    """Flags stay also if a new scale would have kept the last update, which is still in memory."""
    run = Run("a", "b")
    optimizer, parts = run.optimizer(), {"a": part(60), "b": part(60, seed=1)}
    run.take_scales(a=[1024 * each for each in parts["a"]], b=parts["b"])
    run.step(optimizer, **parts)
    expected = run.flags["a"].clone()
    run.take_scales(**parts)
    run.step(optimizer, b=parts["b"])
    assert torch.equal(run.flags["a"], expected)
    run.step(optimizer, **parts)
    assert not torch.equal(run.flags["a"], expected)


def test_a_sample_that_is_measured_alone_stands_for_the_whole() -> None:
    run, whole = Run("w", elements=640, max_elements=1000), part(50, 100)
    record = run.step(run.optimizer(), w=whole)
    assert run.alone == [1000]
    figures = record.layers["w"]
    assert (figures.elements, figures.population) == (1000, 5000)
    indices = sample_elements("w", (50, 100), 1000)
    chosen = [each.flatten()[indices] for each in whole]
    row = Measurer(FormatSet(FORMATS)).measure_tensor(
        *chosen, Amaxes.from_groups(whole[0].abs().max().view(1))
    )
    expected = {
        key: value
        for key, value in tensor_figures(FORMATS, row).items()
        if key.startswith(("stall_frac", "grid_error", "visible_frac", "update_rms"))
    }
    assert len(expected) > 8
    assert_equal_figures(figures, expected)


def test_scales_are_kept_from_step_to_step() -> None:
    run = Run("small", "large")
    optimizer, parts = run.optimizer(), {"small": part(50), "large": part(700)}
    run.step(optimizer, **parts)
    grown = {name: tuple(4 * each for each in step) for name, step in parts.items()}

    def expected(name: str, amax: float) -> dict[str, float]:
        row = Measurer(FormatSet(FORMATS)).measure_tensor(
            *grown[name], Amaxes.from_groups(torch.tensor([amax]))
        )
        return dict(tensor_figures(FORMATS, row))

    amax = {name: step[0].abs().max().item() for name, step in parts.items()}
    record = run.step(optimizer, **grown)
    for name, size in amax.items():
        assert_equal_figures(record.layers[name], expected(name, size), ("never_moved_frac",))
    run.take_scales(**grown)
    record = run.step(optimizer, **grown)
    for name, size in amax.items():
        assert_equal_figures(record.layers[name], expected(name, 4 * size), ("never_moved_frac",))


def test_flags_outlive_the_optimizers() -> None:
    """Flags of layers measured together and of layers measured alone are kept."""
    run = Run("small", "large")
    parts = {"small": part(50), "large": part(700)}
    one, two, three = run.optimizer(), run.optimizer(), run.optimizer()
    first = run.step(one, **parts)
    assert [*run.flags] == ["small"]
    run.engine.free_arenas()
    assert run.flags == {}
    still = {name: (step[1], step[1], step[2]) for name, step in parts.items()}
    record = run.step(two, **still)
    for name in parts:
        for format in FORMATS:
            key = f"never_moved_frac/{format}"
            assert 0 < record.layers[name][key] == first.layers[name][key] < 1
    run.engine.free_arenas()
    run.ever_moved.load_state_dict({}, {})
    assert math.isnan(run.step(three, small=still["small"]).model[key])


def test_each_optimizer_has_separate_memory() -> None:
    run, one, two = Run("w"), *(Run("w").optimizer() for _ in range(2))
    first, other = (run.lay_out(each, w=part(20))["w"] for each in (one, two))
    first.before.fill_(1.0)
    other.before.fill_(2.0)
    assert (first.before == 1.0).all()
    assert [*dict(run.engine.flags())] == ["w"]
    again = run.lay_out(one, w=part(20))["w"]
    assert (other.before == 2.0).all()  # not changed by the layout of another optimizer
    assert again.before.isnan().all()


# --- the result of a step


def test_errors_and_skipped_steps_give_sums_without_layers() -> None:
    run = Run("w")
    optimizer = run.optimizer()
    error = ZeroDivisionError("before it was copied")
    for outcome in (
        StepOutcome(optimizer, 3, skipped="learning rate 0"),
        StepOutcome(optimizer, 3, error=error),
        StepOutcome(optimizer, 3, skipped="inf", error=error),
    ):
        sums = run.engine.measure(outcome, SECONDS)
        assert (sums.skipped, sums.error) == (outcome.skipped, outcome.error)
        assert (sums.names, sums.present, sums.found_inf) == ((), (), False)
        assert sums.vectors.size == 0
        assert sums.seconds == SECONDS


def test_an_error_of_the_measurement_is_returned() -> None:
    run = Run("small", "large")
    parts = {"small": part(20), "large": part(700)}
    for name in ("measure_batch", "measure_tensor"):
        optimizer, error = run.optimizer(), MemoryError(name)
        run.lay_out(optimizer, **parts)
        counting = mock.patch.object(Measurer, name, side_effect=error)
        with mock.patch.object(run, "counting", lambda counting=counting: counting):
            sums = run.sums(optimizer, **parts)
        assert sums.error is error
        assert (sums.names, sums.present) == ((), ())
        with pytest.raises(MemoryError, match=name):
            ALONE.combine(optimizer, 0, sums)
        assert {*run.step(optimizer, **parts).layers} == {
            *parts
        }  # an error does not affect the next step


def test_each_row_belongs_to_the_layer_at_its_position() -> None:
    run = Run("large", "a", "b", "left out")
    run.settings.leave_out(["left out"])
    parts = {"large": part(700), "a": part(20), "b": part(30), "left out": part(9)}
    sums = run.sums(run.optimizer(), **parts)
    assert [*sums.present] == ["large", "a", "b"]
    assert {*sums.names} == {"large", "a", "b"}
    assert (len(sums.vectors), sums.vectors.dtype) == (len(sums.names), np.float64)
    assert (sums.seconds, sums.error, sums.skipped) == (SECONDS, None, None)
    for name, row in zip(sums.names, sums.vectors, strict=True):
        assert_equal_figures(vector_figures(FORMATS, row), measure(*parts[name], FORMATS))


def test_layers_with_learning_rate_0_are_left_out_of_the_sums() -> None:
    """A second layer is stepped and cannot be measured: numbers are equal, names are not."""
    run = Run("w", "still", "waves")
    waves = torch.ones(3, dtype=torch.complex64)
    parts = {"w": part(20), "still": part(30), "waves": (waves, waves, waves)}
    sums = run.sums(run.optimizer(), resting=["still"], **parts)
    assert [*sums.present] == ["w"]  # measured layers only
    combined = ALONE.combine(run.optimizer(), 0, sums)
    assert [*combined.names] == ["w"]
    assert len(combined.vectors) == 1


@pytest.mark.parametrize("inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("names", [["small"], ["large"], ["small", "large", "b"]])
def test_all_rows_are_copied_to_the_host_at_once(inf: float | None, names: list[str]) -> None:
    """The flag of a fused optimizer's inf gradients is part of the same copy."""
    run = Run("small", "large", "b")
    parts = {"small": part(20), "large": part(700), "b": part(64, seed=1)}
    parts = {name: parts[name] for name in names}
    optimizer, found = run.optimizer(), None if inf is None else torch.tensor([inf])
    run.sums(optimizer, **parts)
    with host_copies() as copies:
        sums = run.sums(optimizer, inf=found, **parts)
    assert copies.count("cpu") == len(copies) == 1
    assert sums.found_inf is bool(inf)
    assert [*sums.names] == sorted(names, key=lambda name: name == "large")
    for name, row in zip(sums.names, sums.vectors, strict=True):
        figures = vector_figures(FORMATS, row)
        assert_equal_figures(figures, measure(*parts[name], FORMATS), ("never_moved_frac",))


@pytest.mark.parametrize("inf", [0.0, 1.0])
def test_found_inf_is_reported_when_no_layer_can_be_measured(inf: float) -> None:
    run, waves = Run("waves"), torch.ones(3, dtype=torch.complex64)
    sums = run.sums(run.optimizer(), inf=torch.tensor(inf), waves=(waves, waves, waves))
    assert sums.error is None
    assert ([*sums.names], sums.found_inf) == ([], bool(inf))
    assert sums.vectors.size == 0


# --- copied elements


def test_small_layers_are_copied_whole_and_large_layers_are_sampled() -> None:
    run = Run("small", "large", max_elements=100)
    assert run.engine.choose_elements("small", torch.ones(2048)) is None
    chosen = run.engine.choose_elements("large", torch.ones(2049))
    assert torch.equal(chosen, sample_elements("large", (2049,), 100))
    assert len(chosen) == 100


def test_disabled_layers_are_not_copied() -> None:
    run = Run("a", "b", max_elements=100)
    run.settings.leave_out(["a"])
    assert run.engine.choose_elements("a", torch.ones(9)).tolist() == []
    assert run.lay_out(run.optimizer(), a=part(9))["a"] is None


def test_a_sharded_layer_is_a_sample_of_the_whole_layer() -> None:
    class Shared(Alone):
        def part(self, name: str, indices: Tensor | None) -> Part:
            return Part(torch.tensor([4, 6, 7]), torch.tensor([0, 2, 3]), torch.tensor([1, 2, 3]))

    run, step, optimizer = Run("w", scaling="channel"), part(3, 3), Run("w").optimizer()
    run.sharding.peers = Shared()
    chosen = run.engine.choose_elements("w", step[0])
    assert chosen.tolist() == [0, 2, 3]
    requests = [Request("w", step[0], step[2].dtype, chosen)]
    (copies,) = run.engine.assign_memory(optimizer)(requests)
    here = [each.flatten()[[4, 6, 7]] for each in step]
    for memory, each in zip(copies, (here[0], here[2], here[1]), strict=True):
        memory.copy_(each)
    made = OptimizerStep(
        ("w",), (copies.before,), (copies.gradient,), (copies.after,), optimizer, 0
    )
    sums = run.engine.measure(StepOutcome(optimizer, 0, made), SECONDS)
    figures = vector_figures(FORMATS, sums.vectors[0])
    assert (figures.elements, figures.population) == (3, 9)
    sample, amax = Sample(step[0].shape, torch.tensor([4, 6, 7])), step[0].abs().amax(1)
    measurer = Measurer(FormatSet(FORMATS, "channel"))
    row = measurer.measure_tensor(
        *here, Amaxes.from_groups(amax), sample=sample
    )  # each element has the scale of its channel
    assert_equal_figures(figures, dict(tensor_figures(FORMATS, row)), ("never_moved_frac",))


# --- in a monitor


def test_a_sample_may_exceed_the_capacity_of_one_call() -> None:
    """It is measured in pieces, none of which tears a block apart, and stands for the whole.

    Each sampled element stands for 8 or 32, a power of two, and rows hold whole blocks: then no
    share of the model is rounded, in whichever order its layers are added up.
    """

    def wide_net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(192, 480), nn.LayerNorm(480), nn.Linear(480, 48)
        )

    for formats, scaling in [(FORMATS, "channel"), (("mxfp4", "nvfp4", "e4m3fn"), ("block", 24))]:
        settings = {"formats": formats, "scaling": scaling, "max_elements": 2880}
        model, twin = wide_net(), wide_net()
        with sharing_out(500):
            optimizer, _, records = watched(model, **settings)
            train(model, optimizer, 2)
        other, _, expected = watched(twin, **settings)
        train(twin, other, 2)
        for record, same in zip(records, expected, strict=True):
            for name, population in (("1.weight", 92_160), ("3.weight", 23_040)):
                assert_equal_figures(record.layers[name], dict(same.layers[name]))
                assert record.layers[name].population == population
                assert record.layers[name].elements == 2880
            assert_equal_figures(record.model, dict(same.model))
