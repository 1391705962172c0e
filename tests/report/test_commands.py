"""`altgrad report` and `altgrad compare`: their outputs and their errors."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from altgrad.report import Comparison, RunReport, confirmation_page, find_confirmation, page, read
from altgrad.report.comparison_page import comparison_page
from altgrad.report.exports import comparison_as_csv, comparison_as_json
from tests.command_line import altgrad
from tests.report.confirming import write_trained
from tests.report.runs import write_run


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "file or folder is missing"),
        ("", "empty"),
        ('{"loss": 1}\n', "expected a run file of AltGrad"),
        ('{"altgrad": 1, "form', "damaged"),
        ('{"altgrad": 99}\n', "newer AltGrad"),
    ],
)
def test_an_unreadable_file_gives_one_line_on_stderr(
    tmp_path: Path, command: str, content: str | None, message: str
) -> None:
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_text(content)
    failed = altgrad(command, *[path] * (2 if command == "compare" else 1))
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith(f"{path}: ")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--html", "--json", "--csv"])
def test_a_file_that_cannot_be_written_is_said_before_the_report(
    run: Path, tmp_path: Path, option: str
) -> None:
    for path, problem in (
        (tmp_path / "missing" / "page", f"the folder {tmp_path / 'missing'} is missing"),
        (tmp_path, "this is a folder"),
    ):
        for more in ((), ("--force",)):
            failed = altgrad("report", run, option, path, *more)
            assert (failed.returncode, failed.stdout) == (2, "")
            assert failed.stderr.startswith(f"{path}: file cannot be written: {problem}; ")
            assert failed.stderr.count("\n") == 1


def test_files_are_written_in_addition_to_the_terminal_and_each_is_named(
    run: Path, tmp_path: Path
) -> None:
    html, csv = (tmp_path / f"a.name.of.some.length.{kind}" for kind in ("html", "csv"))
    shown = altgrad("report", run, "--html", html, "--csv", csv, columns=40)
    assert shown.returncode == 0, shown.stderr
    assert "Share kept" in shown.stdout
    assert shown.stdout.splitlines()[-2:] == [f"Written: {html}", f"Written: {csv}"]
    assert html.read_text() == page(RunReport.from_run(read(run)))
    assert csv.read_text() == altgrad("report", run, "--csv", "-").stdout


def test_layers_limits_the_rows_of_a_table(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, ["matrix"], ["gain"])

    def shown(*arguments: object) -> str:
        return " ".join(altgrad(*arguments).stdout.split())

    assert "Share kept by a sample, least of 4 layers:" in shown("report", run, "--layers", 1)
    assert "Share kept by a sample:" in shown("report", run, "--layers", 0)
    assert "the 3 of 4 that differ most" in shown("compare", run, other, "--layers", 3)
    assert "Verdict and share kept, by layer and recipe: all" in shown(
        "compare", run, other, "--layers", 0
    )
    refused = altgrad("report", run, "--layers", -1)
    assert (refused.returncode, refused.stdout) == (2, "")


def test_names_that_utf_8_cannot_hold_are_escaped_in_json_and_csv(tmp_path: Path) -> None:
    run = write_run(tmp_path, ["a\ud800"], ["b\U0001f600"])
    for option in ("--json", "--csv"):
        path = tmp_path / "out"
        written = altgrad("report", run, option, path)
        assert written.returncode == 0, written.stderr
        assert "a\\ud800" in path.read_text(encoding="utf-8")
        assert "b\U0001f600" in path.read_text(encoding="utf-8")
        path.unlink()
    layers = json.loads(altgrad("report", run, "--json", "-").stdout)["layers"]
    assert {*layers} == {"a\ud800", "b\U0001f600"}


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such a name")
def test_a_folder_whose_name_is_not_utf_8_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 [red]\x1b[31m")
    write_run(folder)
    outputs = [f"--{kind}={folder / kind}" for kind in ("html", "json", "csv")]
    shown = altgrad("report", folder, *outputs)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == f"Written: {tmp_path}/caf� [red]�[31m/csv"
    assert (folder / "html").read_text(encoding="utf-8").count("caf� [red]�[31m") == 2
    assert "caf\\udce9 [red]\\u001b" in (folder / "json").read_text(encoding="utf-8")


@pytest.mark.skipif(os.name != "posix", reason="Windows has other kinds of files")
def test_pipes_devices_and_odd_paths_give_one_line_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for pipe in (tmp_path / "pipe", tmp_path / "folder" / "altgrad.jsonl"):
        os.mkfifo(pipe)
    for command in (
        *(["report", tmp_path / "pipe"], ["report", tmp_path / "folder"], ["report", "x" * 999]),
        *(["compare", "/dev/zero", "/dev/zero"], ["report", tmp_path / "\x1b[31m\n"]),
    ):
        failed = altgrad(*command)
        assert (failed.returncode, failed.stdout) == (2, ""), command
        assert failed.stderr.endswith("\n")
        assert failed.stderr[:-1].isprintable()


# --- what one run predicted


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the files of a run that predicts bf16-true, and of one that is stored so."""
    folder = tmp_path_factory.mktemp("runs")
    fp32 = write_trained(folder / "fp32", recipes=["bf16", "bf16-true"])
    return fp32, write_trained(folder / "bf16", torch.bfloat16)


def test_a_prediction_is_shown_beside_what_happened(runs: tuple[Path, Path]) -> None:
    for order in (runs, runs[::-1]):
        shown = altgrad("compare", *order, columns=100)
        assert shown.returncode == 0, shown.stderr
        lines = shown.stdout.splitlines()
        assert lines[:2] == [f"A predicts: {runs[0]}", f"B is real: {runs[1]}"]
        assert "bf16-true: what A predicts, and what really happens in B, at step 19" in lines
        (gain,) = (line.split() for line in lines if line.startswith("1.weight "))
        assert gain[1:4] == ["1.00", "1.00", "0.00"]
        assert ("the runs were given in the other order" in shown.stdout) is (order != runs)
    one = altgrad("compare", *runs, "--layers", 1).stdout
    assert "The 1 of 6 layers that differ most:" in one


def test_a_prediction_is_written_to_files_as_a_report_is(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    confirmation = find_confirmation(*map(read, runs))
    assert confirmation is not None
    html, table = tmp_path / "page.html", tmp_path / "figures.csv"
    shown = altgrad("compare", *runs, "--html", html, "--csv", table)
    assert shown.stdout.splitlines()[-2:] == [f"Written: {html}", f"Written: {table}"]
    assert html.read_text() == confirmation_page(confirmation)
    only = altgrad("compare", *runs, "--csv")
    assert only.stdout == table.read_text()
    value = json.loads(altgrad("compare", *runs, "--json").stdout)
    assert [value["predicting"], value["real"]] == [*map(str, runs)]
    assert value["frozen"]["both"] >= 1
    failed = altgrad("compare", *runs, "--json", tmp_path / "missing" / "x")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert "file cannot be written" in failed.stderr
    table.write_text("mine")
    refused = altgrad("compare", *runs, "--csv", table)
    assert (refused.returncode, table.read_text()) == (2, "mine")
    assert altgrad("compare", *runs, "--csv", table, "--force").returncode == 0
    assert table.read_text() == only.stdout


def test_a_recipe_can_be_named_and_a_wrong_one_is_one_line(runs: tuple[Path, Path]) -> None:
    named = altgrad("compare", *runs, "--recipe", "bf16", columns=100).stdout
    assert "bf16: what A predicts, and what really happens in B" in named
    for arguments, message in (
        ((*runs, "--recipe", "x"), "--recipe=x: expected a recipe that one of the runs predicts"),
        ((runs[0], runs[0], "--recipe", "bf16"), "expected a run with figures of itself"),
    ):
        failed = altgrad("compare", *arguments)
        assert (failed.returncode, failed.stdout) == (2, "")
        assert message in failed.stderr
        assert failed.stderr.count("\n") == 1


def test_runs_of_which_none_predicts_the_other_are_compared_by_verdicts(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    shown = altgrad("compare", runs[0], runs[0], columns=100).stdout
    assert "Differing verdicts: 0 of" in shown
    assert "The model: samples stored by recipes, at step 19" in shown
    assert "frozen_frac/bf16-true" in shown
    files = [tmp_path / f"out.{kind}" for kind in ("html", "json", "csv")]
    options = [f"--{file.suffix[1:]}={file}" for file in files]
    for _ in range(2):  # they are reports, and are replaced
        written = altgrad("compare", runs[0], runs[0], *options)
        assert (written.returncode, written.stderr) == (0, "")
    comparison = Comparison((RunReport.from_run(read(runs[0])),) * 2)
    assert files[0].read_text() == comparison_page(comparison)
    assert json.loads(files[1].read_text()) == comparison_as_json(comparison)
    assert files[2].read_text() == comparison_as_csv(comparison)
    only = altgrad("compare", runs[0], runs[0], "--json")
    assert (only.returncode, only.stdout) == (0, files[1].read_text())
