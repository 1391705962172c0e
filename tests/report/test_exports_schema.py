"""The keys of the JSON: held fixed by committed examples, counted, and documented."""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from altgrad.report import Comparison, Verdict
from altgrad.report.exports import JSON_SCHEMA, comparison_as_csv
from tests.report.json_examples import FOLDER, make_report, make_values

VALUES = make_values()
DOCUMENTED = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
NAMES = {"gain", "head", "e5m2", "bf16", "altgrad", "inf"}
"""Keys that are names of layers, recipes, packages and reasons."""


def outline(value: Any) -> Any:
    """Return a JSON value with the name of its type in place of each text and number."""
    if isinstance(value, dict):
        return {key: outline(each) for key, each in value.items()}
    if isinstance(value, list):
        return [outline(each) for each in value]
    return "number" if isinstance(value, (int, float)) else type(value).__name__


@pytest.mark.parametrize("kind", VALUES)
def test_keys_and_types_are_those_of_the_committed_example(kind: str) -> None:
    example = json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8"))
    # Where a change is meant: python -m tests.report.json_examples; see JSON_SCHEMA.
    assert outline(VALUES[kind]) == outline(example)
    assert [*VALUES[kind]][:2] == ["schema", "kind"]
    assert (example["schema"], example["kind"]) == (JSON_SCHEMA, kind) == (1, kind)


def list_keys(value: Any) -> Iterator[str]:
    for key, each in value.items() if isinstance(value, dict) else ():
        if key not in NAMES and "/" not in key:
            yield key
        if key not in ("figures", "errors", "intervals", "mean_differences"):  # by metric
            yield from list_keys(each)


@pytest.mark.parametrize("kind", VALUES)
def test_each_key_is_documented(kind: str) -> None:
    linked = (Path(__file__).parents[2] / "docs" / "run-file.md").read_text()
    words = {*re.findall(r"`(\w+)`", DOCUMENTED + linked)}
    assert {*list_keys(VALUES[kind])} - words == set()


def test_each_verdict_is_documented() -> None:
    assert all(f"`{name}`" in DOCUMENTED for name in Verdict.__members__)


def test_counts_have_every_verdict_and_the_sum_of_all_layers() -> None:
    counts = VALUES["report"]["counts"]
    assert [*counts["e5m2"]] == [*Verdict.__members__]
    assert {name: n for name, n in counts["e5m2"].items() if n} == {"FROZEN": 1, "STORES_FINE": 1}
    assert {name: n for name, n in counts["bf16"].items() if n} == {"STORES_FINE": 2}


def test_a_comparison_names_the_verdicts_that_differ() -> None:
    value = VALUES["comparison"]
    assert (value["compared"], value["differing"]) == (4, 1)
    gain = value["layers"]["gain"]["e5m2"]
    assert gain == {
        "a": {"verdict": "FROZEN", "kept": 0.0},
        "b": {"verdict": "STORES_FINE", "kept": 1.0},
        "differs": True,
    }
    assert next(iter(value["layers"])) == "gain"
    assert value["twins"]["figures"]["progress_kept/e5m2"]["difference"] == 0.0
    assert value["means"]["kept_update_ratio/bf16"] == {"a": 1.0, "b": 1.0, "difference": 0.0}


def test_the_csv_of_a_comparison_has_a_line_for_each_layer_and_recipe() -> None:
    text = comparison_as_csv(Comparison((make_report(), make_report(frozen=0.0))))
    rows = [*csv.DictReader(io.StringIO(text))]
    assert [row["differs"] for row in rows] == ["True", "False", "False", "False"]
    assert rows[0]["layer"] == "gain"
    assert (rows[0]["verdict_a"], rows[0]["kept_a"]) == ("frozen", "0.0")
    assert (rows[0]["verdict_b"], rows[0]["kept_b"]) == ("fine", "1.0")
