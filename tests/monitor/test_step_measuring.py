"""`StepMeasuring`: which layers are measured together, which alone and which not at all."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from altgrad import StepRecord, measure
from altgrad.measurement.ever_moved import EverMovedOfLayers
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.monitor.elements import sample_elements
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.step_measuring import StepMeasuring
from altgrad.observation import OptimizerStep
from altgrad.observation.snapshots import WHOLE_UP_TO
from altgrad.quantization.format_set import FormatSet
from tests.monitor.watching import (
    FORMATS,
    assert_equal_figures,
    sharing_out,
    train,
    watched,
)

Part = tuple[Tensor, Tensor, Tensor]
"""Before, after and gradient of one parameter."""


class Run:
    """Steps that a test makes up, copied and measured as in a run."""

    def __init__(self, *names: str, elements: int = 640, max_elements: int | None = None) -> None:
        with sharing_out(elements):
            measurer = Measurer(FormatSet(FORMATS))
        settings = LayerSettings(
            names,
            [],
            measurer.formats,
            measurer.formats.formats,
            every_n_steps=1,
            max_elements=max_elements,
            seed=0,
        )
        self.scale_state = ScaleState(measurer.formats)
        self.ever_moved = EverMovedOfLayers(pytest.fail)
        self.measuring = StepMeasuring(measurer, settings, self.scale_state, self.ever_moved)
        self.alone: list[int] = []  # elements of those that were measured alone
        self.together: list[int] = []  # layers that were measured at once
        self.places: dict[tuple[torch.optim.Optimizer, str], Any] = {}

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)

    def step(self, optimizer: torch.optim.Optimizer, **parts: Part) -> StepRecord | None:
        """Copy each part to its place, which is asked for once, as snapshots do, and measure."""
        copied: list[list[Tensor]] = []
        for name, (before, after, gradient) in parts.items():
            if (optimizer, name) not in self.places:
                is_large = before.numel() > WHOLE_UP_TO
                indices = self.measuring.elements(name, before) if is_large else None
                given = self.measuring.memory(optimizer)(name, before, gradient, indices)
                self.places[optimizer, name] = indices, given
            indices, given = self.places[optimizer, name]
            part = [
                each.clone() if indices is None else each.flatten()[indices]
                for each in (before, gradient, after)
            ]
            if given is not None:
                part = [memory.copy_(each) for memory, each in zip(given, part, strict=True)]
            copied.append(part)
        before, gradients, after = zip(*copied, strict=True)
        step = OptimizerStep(tuple(parts), before, gradients, after, optimizer, 0)
        with self.counting():
            vectors = self.measuring.vectors_of(step, {name: p[0] for name, p in parts.items()})
        return vectors.record(0, (0.0, 0.0), None)[0]

    def counting(self) -> Any:
        tensor, batch = Measurer.measure_tensor, Measurer.measure_batch

        def measure_tensor(measurer: Measurer, before: Tensor, *others: Any) -> Tensor:
            self.alone.append(before.numel())
            return tensor(measurer, before, *others)

        def measure_batch(measurer: Measurer, layers: Any) -> Tensor:
            self.together.append(len(layers.layers.counted))
            return batch(measurer, layers)

        return mock.patch.multiple(
            Measurer, measure_tensor=measure_tensor, measure_batch=measure_batch
        )


def part(*shape: int, seed: int = 0) -> Part:
    """Of updates of all sizes: some are lost and some arrive in any format."""
    generator = torch.Generator().manual_seed(seed)
    before, direction, gradient = torch.randn(3, *shape, generator=generator)
    size = 2.0 ** torch.randint(-12, 1, shape, generator=generator)
    return before, before + size * direction, gradient


def test_layers_are_measured_together_if_they_fit_and_alone_if_they_do_not() -> None:
    run = Run("a", "b", "fits", "large")
    parts = {
        "a": part(20),
        "b": part(30, 10),
        "fits": part(640, seed=1),
        "large": part(641, seed=2),
    }
    record = run.step(run.optimizer(), **parts)
    assert run.together == [2, 1]  # one after the other, where there is no room for all
    assert run.alone == [641]
    assert set(record.layers) == set(parts)
    for name, each in parts.items():
        assert_equal_figures(record.layers[name], measure(*each, FORMATS))


def test_layers_of_a_dtype_that_is_not_measured_are_left_out() -> None:
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
    assert run.measuring.elements("large", parts["large"][0]) is None
    assert run.step(run.optimizer(), waves=parts["waves"]) is None


def test_a_layer_that_took_no_part_in_a_step_is_not_in_it() -> None:
    run = Run("a", "b", "large")
    optimizer, parts = run.optimizer(), {"a": part(20), "b": part(30, seed=1), "large": part(700)}
    run.step(optimizer, **parts)
    record = run.step(optimizer, b=parts["b"])
    assert set(record.layers) == {"b"}
    assert_equal_figures(record.model, measure(*parts["b"], FORMATS))
    again = run.step(optimizer, **parts)
    assert set(again.layers) == set(parts)
    assert_equal_figures(again.layers["a"], measure(*parts["a"], FORMATS), ("never_moved_frac",))


def test_a_layer_that_took_no_part_in_a_step_has_done_nothing_in_it() -> None:
    """Also where its last update, which still lies there, would have arrived under a new scale."""
    run = Run("a", "b")
    optimizer, parts = run.optimizer(), {"a": part(60), "b": part(60, seed=1)}
    run.scale_state.refresh({"a": 1024 * parts["a"][0], "b": parts["b"][0]})
    run.step(optimizer, **parts)
    expected = dict(run.measuring.ever_moved_in_arenas())["a"].clone()
    run.scale_state._steps_left = 0
    run.scale_state.refresh({name: each[0] for name, each in parts.items()})
    run.measuring.scales_changed()
    run.step(optimizer, b=parts["b"])
    assert torch.equal(dict(run.measuring.ever_moved_in_arenas())["a"], expected)
    run.step(optimizer, **parts)
    assert not torch.equal(dict(run.measuring.ever_moved_in_arenas())["a"], expected)


def test_a_sample_that_is_measured_alone_stands_for_the_whole() -> None:
    run, whole = Run("w", elements=640, max_elements=1000), part(50, 100)
    record = run.step(run.optimizer(), w=whole)
    assert run.alone == [1000]
    figures = record.layers["w"]
    assert (figures.elements, figures.population) == (1000, 5000)
    indices = sample_elements("w", (50, 100), 1000)
    chosen = [each.flatten()[indices] for each in whole]
    row = Measurer(FormatSet(FORMATS)).measure_tensor(*chosen, whole[0].abs().max().view(1))
    expected = {
        key: value
        for key, value in tensor_figures(FORMATS, row).items()
        if key.startswith(("stall_frac", "grid_error", "visible_frac", "update_rms"))
    }
    assert len(expected) > 8
    assert_equal_figures(figures, expected)


def test_scales_are_those_that_were_taken_and_not_those_of_each_step() -> None:
    run = Run("small", "large")
    optimizer, parts = run.optimizer(), {"small": part(50), "large": part(700)}
    run.step(optimizer, **parts)
    grown = {name: tuple(4 * each for each in step) for name, step in parts.items()}

    def expected(name: str, amax: float) -> dict[str, float]:
        row = Measurer(FormatSet(FORMATS)).measure_tensor(*grown[name], torch.tensor([amax]))
        return dict(tensor_figures(FORMATS, row))

    amax = {name: step[0].abs().max().item() for name, step in parts.items()}
    record = run.step(optimizer, **grown)
    for name, size in amax.items():
        assert_equal_figures(record.layers[name], expected(name, size), ("never_moved_frac",))
    run.scale_state.refresh({name: step[0] for name, step in grown.items()})
    run.measuring.scales_changed()
    record = run.step(optimizer, **grown)
    for name, size in amax.items():
        assert_equal_figures(record.layers[name], expected(name, 4 * size), ("never_moved_frac",))


def test_what_elements_have_done_is_known_after_their_optimizers() -> None:
    """Both of layers that lie side by side and of those that are measured alone."""
    run = Run("small", "large")
    parts = {"small": part(50), "large": part(700)}
    one, two, three = run.optimizer(), run.optimizer(), run.optimizer()
    first = run.step(one, **parts)
    assert [name for name, _ in run.measuring.ever_moved_in_arenas()] == ["small"]
    run.measuring.leave_arenas()
    assert [*run.measuring.ever_moved_in_arenas()] == []
    still = {name: (step[1], step[1], step[2]) for name, step in parts.items()}
    record = run.step(two, **still)
    for name in parts:
        for format in FORMATS:
            key = f"never_moved_frac/{format}"
            assert 0 < record.layers[name][key] == first.layers[name][key] < 1
    run.measuring.clear_arenas()
    assert math.isnan(run.step(three, small=still["small"]).model[key])


def test_each_optimizer_has_memory_of_its_own() -> None:
    run, (before, _, gradient) = Run("w"), part(20)
    one, two = run.optimizer(), run.optimizer()
    first, same, other = (
        run.measuring.memory(each)("w", before, gradient, None) for each in (one, one, two)
    )
    assert first.before.data_ptr() == same.before.data_ptr()
    assert first.before.untyped_storage()._cdata != other.before.untyped_storage()._cdata


# --- in a monitor


def test_a_sample_may_be_larger_than_what_is_measured_at_once() -> None:
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
