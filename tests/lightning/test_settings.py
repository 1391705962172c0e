"""`Settings`: invalid arguments raise an error, and presets replace defaults."""

import inspect
from typing import Any

import pytest

from altgrad import SamplingRule
from altgrad_lightning import PrecisionMonitor
from altgrad_lightning.settings import (
    PRESETS,
    Settings,
    apply_preset,
    check_formats,
    check_layer_charts,
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
