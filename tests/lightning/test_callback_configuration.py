"""`PrecisionMonitor`: its arguments and presets, and what is wrong with them at construction."""

import math
from pathlib import Path
from typing import Any

import pytest

from altgrad import FloatFormat
from altgrad_lightning import PrecisionMonitor
from altgrad_lightning.callback import PRESETS
from tests.lightning.runs import fit, logged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": []}, r"formats=\[\]: expected one or more"),
        ({"formats": ["bf17"]}, "nearest: bf16"),
        ({"formats": [FloatFormat("bf16", 2, 1, 1), "bf16"]}, "two different formats are named"),
        ({"every_n_steps": 0}, "every_n_steps=0: expected 1 or more"),
        ({"layer_charts": -1}, "layer_charts=-1: expected 0 or more"),
        ({"scaling": "row"}, "scaling='row': expected"),
    ],
    ids=str,
)
def test_wrong_configuration_fails_at_construction(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionMonitor(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 2.5}, "every_n_steps=2.5: expected int"),
        ({"layer_charts": True}, "layer_charts=True: expected how many layers"),
    ],
    ids=str,
)
def test_a_count_that_is_no_int(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PrecisionMonitor(**arguments)


def test_a_format_of_ones_own_and_unscaled(tmp_path: Path) -> None:
    monitor = PrecisionMonitor([FloatFormat("mine", 3, 2, 3)], scaling=None)
    fit(tmp_path, monitor)
    assert not math.isnan(monitor.latest["layers.0.weight"]["stall_frac/mine"])


def test_presets_are_named_sets_of_arguments() -> None:
    economy = PrecisionMonitor(preset="economy")
    assert economy._settings["max_elements"] == PRESETS["economy"]["max_elements"] == 256
    assert economy._settings["overhead_budget"] == 0.01
    assert economy._output_settings.layer_charts == 4
    full = PrecisionMonitor(preset="full", layer_charts=3)
    assert full._settings["max_elements"] is None
    assert full._output_settings[:2] == (3, True)
    standard = PrecisionMonitor(preset="standard")
    assert standard._settings == PrecisionMonitor()._settings
    assert standard._output_settings == PrecisionMonitor()._output_settings
    with pytest.raises(ValueError, match="preset='fast': expected one of 'economy', 'standard'"):
        PrecisionMonitor(preset="fast")


def test_layers_to_chart_by_name(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(layer_charts=["layers.0.*"]))
    layers = {tag.rsplit("/")[-1] for tag in logged(run.logger.log_dir) if tag.count("/") == 3}
    assert layers == {"layers.0.weight", "layers.0.bias"}
    for wrong in ("layers.0.*", [1]):
        with pytest.raises(TypeError, match="expected how many layers, or a list of patterns"):
            PrecisionMonitor(layer_charts=wrong)
