"""`altgrad report` and `altgrad compare`: their outputs and their errors."""

import json
import os
import sys
from pathlib import Path

import pytest

from altgrad.report import RunReport, page, read
from tests.command_line import altgrad
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


def test_an_unwritable_output_gives_one_line_on_stderr(run: Path, tmp_path: Path) -> None:
    failed = altgrad("report", run, "--html", tmp_path / "missing" / "page.html")
    assert failed.returncode == 2
    assert failed.stderr.strip().endswith(
        "page.html: file cannot be written (No such file or directory)"
    )


def test_files_are_written_in_addition_to_the_terminal_and_each_is_named(
    run: Path, tmp_path: Path
) -> None:
    html, csv = (tmp_path / f"a.name.of.some.length.{kind}" for kind in ("html", "csv"))
    shown = altgrad("report", run, "--html", html, "--csv", csv, columns=40)
    assert shown.returncode == 0, shown.stderr
    assert "If the weights were stored in" in shown.stdout
    assert shown.stdout.splitlines()[-2:] == [f"Written: {html}", f"Written: {csv}"]
    assert html.read_text() == page(RunReport.from_run(read(run)))
    assert csv.read_text() == altgrad("report", run, "--csv", "-").stdout


def test_layers_limits_the_rows_of_a_table(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, ["matrix"], ["gain"])

    def shown(*arguments: object) -> str:
        return " ".join(altgrad(*arguments).stdout.split())

    assert "The 1 of 4 layers that keep least:" in shown("report", run, "--layers", 1)
    assert "the 3 of 4 that differ most" in shown("compare", run, other, "--layers", 3)
    assert "Verdicts and kept_update_ratio: all" in shown("compare", run, other, "--layers", 0)
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
