"""`PrecisionMonitor`: arguments, presets, and the errors of invalid arguments."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from altgrad import FloatFormat, SamplingRule, UpdateMonitor
from altgrad.report import read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, batches, fit, logged, trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": []}, r"formats=\[\]: expected one or more"),
        ({"formats": ["bf17"]}, "nearest: bf16"),
        ({"formats": [FloatFormat("bf16", 2, 1, 1), "bf16"]}, "two different formats are named"),
        ({"every_n_steps": 0}, "every_n_steps=0: expected 1 or more"),
        ({"layer_charts": -1}, "layer_charts=-1: expected 0 or more"),
        ({"scaling": "row"}, "scaling='row': expected"),
        ({"name": ""}, "name='': expected a name"),
    ],
    ids=str,
)
def test_an_invalid_argument_raises_an_error_at_construction(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionMonitor(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 2.5}, "every_n_steps=2.5: expected int"),
        ({"layer_charts": True}, "layer_charts=True: expected the number of layers"),
        ({"name": 3}, "name=3: expected a string"),
    ],
    ids=str,
)
def test_an_argument_with_a_wrong_type_raises_an_error(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PrecisionMonitor(**arguments)


def test_a_custom_format_is_judged_unscaled(tmp_path: Path) -> None:
    monitor = PrecisionMonitor([FloatFormat("mine", 3, 2, 3)], scaling=None)
    fit(tmp_path, monitor)
    assert not math.isnan(monitor.latest["layers.0.weight"]["stall_frac/mine"])


class Wide(Net):
    """A net whose `layers.0.weight` has more elements than a sample has by default."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.insert(0, nn.Linear(8, 800))
        self.layers[1] = nn.Linear(800, 8)


@pytest.mark.parametrize(
    ("arguments", "elements", "charted", "histograms"),
    [
        ({}, 4096, 8, False),
        ({"preset": "standard"}, 4096, 8, False),
        ({"preset": "economy"}, 256, 4, False),
        ({"preset": "economy", "max_elements": 300}, 300, 4, False),
        ({"preset": "full"}, 6400, 8, True),  # at most 16 layers, and the net has 8
        ({"preset": "full", "layer_charts": 3}, 6400, 3, True),
    ],
    ids=str,
)
def test_a_preset_replaces_arguments_at_their_defaults(
    tmp_path: Path, arguments: Any, elements: int, charted: int, histograms: bool
) -> None:
    monitor = PrecisionMonitor(every_n_steps=1, charts="all", **arguments)
    run = trainer(tmp_path, monitor)
    run.fit(Wide(), batches(1))
    assert monitor.latest["layers.0.weight"].elements == elements
    tags = logged(run.logger.log_dir)
    assert len([tag for tag in tags if tag.startswith("altgrad/stall_frac/bf16/")]) == charted
    events = EventAccumulator(run.logger.log_dir, size_guidance={"histograms": 1}).Reload()
    assert bool(events.Tags()["histograms"]) == histograms


@pytest.mark.parametrize(("arguments", "budget"), [({}, None), ({"preset": "economy"}, 0.01)])
def test_the_economy_preset_limits_the_overhead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, budget: float | None
) -> None:
    budgets: list[float | None] = []

    class Recorded(UpdateMonitor):
        def __init__(self, *others: Any, **options: Any) -> None:
            budgets.append(options["overhead_budget"])
            super().__init__(*others, **options)

    monkeypatch.setattr("altgrad_lightning.session.UpdateMonitor", Recorded)
    fit(tmp_path, PrecisionMonitor(every_n_steps=1, **arguments), steps=1)
    assert budgets == [budget]


def test_an_unknown_preset_raises_an_error() -> None:
    with pytest.raises(ValueError, match="preset='fast': expected one of 'economy', 'standard'"):
        PrecisionMonitor(preset="fast")


def test_layers_are_charted_by_pattern(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(layer_charts=["layers.0.*"]))
    layers = {tag.rsplit("/")[-1] for tag in logged(run.logger.log_dir) if tag.count("/") == 3}
    assert layers == {"layers.0.weight", "layers.0.bias"}
    for wrong in ("layers.0.*", [1]):
        with pytest.raises(TypeError, match="expected the number of layers, or a list of patterns"):
            PrecisionMonitor(layer_charts=wrong)


@pytest.mark.parametrize(
    ("arguments", "recipes"),
    [
        ({"recipes": ()}, []),
        ({"recipes": "bf16-sr"}, ["bf16-sr"]),
        ({"recipes": ["fp32", "bf16"]}, ["fp32", "bf16"]),
        ({"recipes": ["bf16"], "preset": "economy"}, ["bf16"]),
        ({"preset": "economy"}, []),
    ],
    ids=str,
)
def test_the_twins_of_a_run_are_those_of_its_recipes(
    tmp_path: Path, arguments: Any, recipes: list[str]
) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=2, charts="all", **arguments)
    run = fit(tmp_path, monitor)
    assert [*monitor.latest_model.recipes] == recipes
    written = read(monitor.path)
    assert [*written.recipes] == recipes
    assert [*written.rows[-1].twins] == recipes
    tags = logged(run.logger.log_dir)
    kept = {f"altgrad/progress_kept/{name}" for name in recipes}
    assert {tag for tag in tags if "progress_kept" in tag and tag.count("/") == 2} == kept | {
        f"altgrad/window_{tag.removeprefix('altgrad/')}" for tag in kept
    }
    assert all(len(tags[tag]) == 3 for tag in kept)
    of_layers = {tag.split("/")[2] for tag in tags if re.match(r"altgrad/frozen_frac/\S+/", tag)}
    assert of_layers == {*recipes}


def test_twins_step_as_many_elements_as_asked(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(
        "bf16",
        recipes=["fp32"],
        twin_elements=32,
        sampling=[SamplingRule("layers.1.*", twin_elements=0)],
    )
    fit(tmp_path, monitor)
    assert monitor.latest["layers.0.weight"].moved_elements == 32
    assert monitor.latest["layers.0.bias"].moved_elements == 8
    assert monitor.latest["layers.1.weight"].recipes == ()
