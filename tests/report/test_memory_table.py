"""The memory of recipes: in the terminal at 80 columns, and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from altgrad.report import Run, RunReport, page, print_report
from altgrad.report.exports import as_json
from altgrad.report.memory import measure_memory
from altgrad.report.memory_table import memory_as_json, print_memory, tabulate_memory
from tests.report.planned_runs import record


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipes = ["bf16-true", "bf16-kahan", "e4m3fn"]
    return record(tmp_path_factory.mktemp("run"), recipes, steps=11)


def show(run: Run, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_memory(RunReport.from_run(run), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_has_a_row_for_each_recipe(run: Run) -> None:
    lines = show(run).splitlines()
    assert all(len(line) <= 80 for line in lines)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("bf", "e4"))}
    assert rows["bf16-true"][-2:] == ["50", "%"]
    # 2 bytes for the weight, 8 for the moments, and 2 for the rounding error; counters are few.
    assert rows["bf16-kahan"][0] == "2.00"
    assert rows["bf16-kahan"][2] == "2.00"
    assert rows["bf16-kahan"][-2:] == ["0", "%"]
    assert rows["e4m3fn"][-2:] == ["25", "%"]


def test_the_report_has_the_table_in_the_terminal_on_the_page_and_in_json(run: Run) -> None:
    report = RunReport.from_run(run)
    console = Console(file=io.StringIO(), width=80)
    print_report(report, console)
    assert show(run) in console.file.getvalue()  # type: ignore[attr-defined]
    html = page(report)
    assert '<table id="memory">' in html
    assert "<td>e4m3fn</td>" in html.split('<table id="memory">')[1].split("</table>")[0]
    assert as_json(report)["memory"] == memory_as_json(run)


def test_layers_without_a_step_are_counted_apart(run: Run) -> None:
    unused = {"head.bias": replace(run.layers["head.bias"], states=None)}
    text = " ".join(show(replace(run, layers=run.layers | unused)).split())
    assert "Not counted: 1 layer without a step." in text


def test_parts_that_no_recipe_has_are_no_columns(run: Run) -> None:
    assert "master copy" not in show(run)
    few = {name: each for name, each in run.recipes.items() if name != "bf16-kahan"}
    headings, _ = tabulate_memory(measure_memory(run.layers, few))
    assert headings == ["recipe", "weights", "states", "bytes/weight", "in all", "saves"]


def test_an_older_run_file_has_unknown_memory_and_says_why(run: Run) -> None:
    older = replace(run, layers={n: replace(e, states=None) for n, e in run.layers.items()})
    text = show(older)
    assert "The optimizer states are unknown" in " ".join(text.split())
    assert "bf16-kahan" not in text
    assert '<table id="memory">' not in page(RunReport.from_run(older))
    assert show(replace(run, recipes={})) == ""


def test_json_has_bytes_and_shares_of_each_recipe(run: Run) -> None:
    value = json.loads(json.dumps(memory_as_json(run), allow_nan=False))
    found = value["recipes"]["bf16-kahan"]
    assert found["bytes"] == {
        "weights": 2 * value["parameters"],
        "states": pytest.approx(8 * value["parameters"] + 4 * len(run.layers)),
        "compensation": 2 * value["parameters"],
        "master": 0,
        "total": pytest.approx(value["fp32_bytes"]),
    }
    assert found["saved_share"] == pytest.approx(0)
    older = replace(run, layers={n: replace(e, states=None) for n, e in run.layers.items()})
    unknown = memory_as_json(older)
    assert unknown["fp32_bytes"] is None
    assert unknown["recipes"]["e4m3fn"]["saved_share"] is None
    nothing = {"parameters": None, "fp32_bytes": None, "recipes": {}}
    assert memory_as_json(replace(run, recipes={})) == nothing
