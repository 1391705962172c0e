"""The command `altgrad plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import altgrad
from tests.report.planned_runs import record
from tests.report.runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("run"), ["bf16", "bf16-true"], steps=20).path


def test_a_plan_is_printed_and_written_as_json(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    done = altgrad("plan", run.parent, "--budget", 0.7, "--json", path, "--layers", 1)
    assert done.returncode == 0, done.stderr
    assert "The plan takes" in done.stdout
    assert "smaller layers" in done.stdout
    assert f"Written: {path}" in done.stdout
    value = json.loads(path.read_text())
    assert value["bytes"] <= 0.7 * value["fp32_bytes"]
    again = altgrad("plan", run, "--budget", 0.7, "--json", path)
    assert again.returncode == 0, "a plan may be replaced"
    alone = altgrad("plan", run, "--budget", 0.7, "--json")
    assert json.loads(alone.stdout) == value


def test_a_budget_that_cannot_be_met_gives_one_line_on_stderr(run: Path) -> None:
    done = altgrad("plan", run, "--budget", 0.1)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("budget=0.1: expected at least 0.")


def test_a_run_without_sizes_of_states_says_what_to_do(tmp_path: Path) -> None:
    done = altgrad("plan", write_run(tmp_path), "--budget", 0.6)
    assert done.returncode == 2
    assert "optimizer states" in done.stderr
    assert "altgrad.watch" in done.stderr


def test_the_help_names_the_budget() -> None:
    done = altgrad("plan", "--help")
    assert done.returncode == 0
    assert "--budget" in done.stdout
