"""`Settings`: invalid arguments raise an error, and presets replace defaults."""

import inspect
from typing import Any

import pytest

from altgrad import SamplingRule
from altgrad.output import check_layer_charts
from altgrad_lightning import PrecisionMonitor
from altgrad_lightning.settings import (
    PRESETS,
    Settings,
    apply_preset,
    check_formats,
)

SIGNATURE = inspect.signature(PrecisionMonitor)


def settings(**others: Any) -> Settings:
    names = inspect.signature(Settings).parameters
    chosen = {name: SIGNATURE.parameters[name].default for name in names}
    return Settings(**chosen | {"formats": check_formats("bf16")} | others)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0: expected 1 or more"),
        ({"scaling": "row"}, "scaling='row': expected"),
        ({"max_elements": 0}, "max_elements=0: expected"),
        ({"overhead_budget": 0.0}, "=0.0: expected a number between 0 and 1"),
        ({"twin_elements": -1}, "twin_elements=-1: expected"),
        ({"recipes": ["b16-sr"]}, "b16"),
    ],
    ids=str,
)
def test_an_invalid_value_raises_an_error(others: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**others)


def test_rules_are_accepted_unchecked_before_there_is_a_module() -> None:
    rules = (SamplingRule("no.such.layer", max_elements=10),)
    assert settings(sampling=rules).get_monitor_arguments()["sampling"] == rules


def test_an_empty_list_of_formats_raises_an_error() -> None:
    assert [format.name for format in check_formats(["fp16", "bf16"])] == ["fp16", "bf16"]
    with pytest.raises(ValueError, match=r"formats=\[\]: expected one or more formats"):
        check_formats([])


def test_patterns_are_copied() -> None:
    patterns = ["*.weight"]
    checked = check_layer_charts(patterns)
    patterns.clear()
    assert checked == ("*.weight",)


@pytest.mark.parametrize("wrong", ["*.weight", [1], True, 2.5])
def test_layer_charts_with_a_wrong_type_raises_an_error(wrong: Any) -> None:
    with pytest.raises(TypeError):
        check_layer_charts(wrong)


def defaults() -> dict[str, Any]:
    names = {name for preset in PRESETS.values() for name in preset}
    return {name: SIGNATURE.parameters[name].default for name in names}


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_preset_replaces_default_values(preset: str | None) -> None:
    changed = {} if preset is None else PRESETS[preset]
    assert apply_preset(preset, SIGNATURE, **defaults()) == defaults() | changed


def test_an_argument_takes_precedence_over_a_preset() -> None:
    chosen = apply_preset("full", SIGNATURE, **defaults() | {"layer_charts": 3})
    assert chosen == defaults() | PRESETS["full"] | {"layer_charts": 3}


def test_recipes_are_those_of_the_monitor() -> None:
    arguments = settings(recipes=["bf16-sr"], twin_elements=64).get_monitor_arguments()
    assert (arguments["recipes"], arguments["twin_elements"]) == (["bf16-sr"], 64)


def test_twins_of_the_economy_preset_are_those_that_are_named() -> None:
    assert apply_preset("economy", SIGNATURE, recipes=None)["recipes"] == ()
    assert apply_preset("economy", SIGNATURE, recipes="bf16-sr")["recipes"] == "bf16-sr"


@pytest.mark.parametrize(
    "key",
    ["progress_kept/bf16-sr", "frozen_frac/bf16-sr", "exp_avg_sq_ratio/bf16-sr", "drift/bf16-sr"],
)
def test_a_callback_may_read_a_figure_of_a_twin(key: str) -> None:
    settings(recipes=["bf16-sr"], callback_metrics=(key,))
    with pytest.raises(ValueError, match=rf"correct \['{key}'\]"):
        settings(recipes=["bf16"], callback_metrics=(key,))
    with pytest.raises(ValueError, match=rf"correct \['{key}'\]"):
        settings(recipes=(), callback_metrics=(key,))


def test_the_error_of_a_key_names_a_figure_of_a_twin() -> None:
    with pytest.raises(ValueError, match="'kept_update_ratio/bf16' or 'progress_kept/fp32'"):
        settings(recipes=["fp32"], callback_metrics=("kept_update_ratio/fp32",))
    with pytest.raises(ValueError, match=r"correct \['update_rms/fp32'\]"):
        settings(recipes=["fp32"], callback_metrics=("update_rms/fp32",))


@pytest.mark.default_twins
def test_a_format_of_a_rule_brings_its_recipes() -> None:
    rule = SamplingRule("no.such.layer", formats=["e5m2"])
    settings(sampling=(rule,), callback_metrics=("progress_kept/e5m2-sr",))
    with pytest.raises(ValueError, match="progress_kept/e5m2-sr"):
        settings(callback_metrics=("progress_kept/e5m2-sr",))
