"""A plan in the terminal at 80 columns, and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from altgrad.report import Run, judge_run
from altgrad.report.judging.decimals import format_kept
from altgrad.report.plan_code import write_plan_code
from altgrad.report.plan_table import list_notes, plan_as_json, print_plan, write_result
from altgrad.report.planning import Plan, make_plan
from tests.report.planned_runs import record


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return record(tmp_path_factory.mktemp("run"), ["bf16", "bf16-true", "bf16-true-fused"])


@pytest.fixture(scope="module")
def plan(run: Run) -> Plan:
    return make_plan(run, judge_run(run), 0.6)


def show(run: Run, plan: Plan, most: int | None = None, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_plan(run, plan, console, most)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_says_memory_progress_and_each_layer(run: Run, plan: Plan) -> None:
    text = show(run, plan)
    lines = text.splitlines()
    code = write_plan_code(run, plan).splitlines()
    assert all(len(line) <= 80 for line in lines if line not in code)
    words = " ".join(text.split())
    assert "the budget is 60 % of it" in words
    assert f"keeps {format_kept(plan.kept)} of the progress" in words
    for name, recipe in plan.chosen.items():
        assert any(line.split()[:2] == [name, recipe] for line in lines), name
    assert lines[-len(code) :] == code
    assert "�" not in text


def test_the_largest_layers_come_first_and_the_others_are_counted(run: Run, plan: Plan) -> None:
    text = show(run, plan, 2)
    assert "And 8 smaller layers; --layers 0 shows all." in text
    table = [line.split()[0] for line in text.splitlines() if line.startswith(("blocks", "head"))]
    assert {*table[:2]} == {"blocks.0.0.weight", "blocks.1.0.weight"}


def test_a_plan_says_what_was_not_tested_and_left_out(run: Run, plan: Plan) -> None:
    notes = " ".join(list_notes(plan))
    assert "is an assumption" in notes
    assert "bf16-true-fused (it replaces the optimizer of all layers)" in notes
    assert "by their number of weights" not in notes
    assert "by their number of weights" in " ".join(list_notes(replace(plan, by_movement=False)))


def test_a_narrow_terminal_shortens_names_of_layers(run: Run, plan: Plan) -> None:
    long = [
        each._replace(layer=f"transformer.decoder.layers.{n}.attention.{each.layer}")
        for n, each in enumerate(plan.layers)
    ]
    text = show(run, replace(plan, layers=long), width=60)
    table = [line for line in text.splitlines() if "…" in line]
    assert len(table) == len(long)
    assert all(len(line) <= 60 for line in table)


def test_json_has_the_plan_with_stable_keys(run: Run, plan: Plan) -> None:
    value = json.loads(json.dumps(plan_as_json(run, plan), allow_nan=False))
    assert [*value] == [
        *("schema", "kind", "path", "created", "versions", "budget", "bytes", "fp32_bytes"),
        *("progress_kept", "weighted_by", "layers", "left_out", "notes", "code"),
    ]
    assert value["weighted_by"] == "movement"
    assert {name: each["recipe"] for name, each in value["layers"].items()} == plan.chosen
    assert sum(each["bytes"] for each in value["layers"].values()) == pytest.approx(value["bytes"])
    verdicts = {each["verdict"] for each in value["layers"].values()}
    assert None in verdicts
    assert verdicts <= {None, "STORES_FINE", "WATCH", "UNCERTAIN"}
    assert [*value["left_out"]] == ["bf16-true-fused"]


def test_one_layer_in_float32_stays_so(plan: Plan) -> None:
    one = replace(plan, layers=[replace_option(plan)])
    assert "1 of 1 layer stays in float32" in write_result(one)


def replace_option(plan: Plan):
    return next(each for each in plan.layers if each.option.recipe == "fp32")
