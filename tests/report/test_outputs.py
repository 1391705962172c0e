"""Files that a command may write: new ones and reports, and neither inputs nor other files."""

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from altgrad.report import RunFile
from altgrad.report.outputs import find_obstacle, find_refusal
from altgrad.report.records.reading import read_header
from tests.command_line import altgrad
from tests.report.confirming import write_trained
from tests.report.runs import write_run

OPTIONS = ("--html", "--json", "--csv")
ALIASES: dict[str, Callable[[Path, Path], object]] = {
    "hard link": lambda alias, path: alias.hardlink_to(path),
    "symbolic link": lambda alias, path: alias.symlink_to(path),
    "way around": lambda alias, path: None,
}


def report_onto(output: Path, run: Path, *options: str, kind: str = "--json") -> tuple[int, str]:
    result = altgrad("report", run, kind, output, *options)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stderr


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_run_file_is_no_output(tmp_path: Path, kind: str) -> None:
    path = write_run(tmp_path)
    content = path.read_bytes()
    result = altgrad("report", tmp_path, kind, path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"{path}: expected another file than the run file that is read; choose one\n"
    )
    assert path.read_bytes() == content


@pytest.mark.parametrize("alias", ALIASES)
def test_a_run_file_is_no_output_under_another_name(tmp_path: Path, alias: str) -> None:
    path = write_run(tmp_path / "run")
    content = path.read_bytes()
    other = tmp_path / "run" / ".." / "run" / path.name
    if alias != "way around":
        other = tmp_path / "verdicts.json"
        ALIASES[alias](other, path)
    assert "the run file that is read" in (find_obstacle([other], [path]) or "")
    assert report_onto(other, path)[0] == 2
    assert path.read_bytes() == content


def test_a_run_file_in_other_case_is_no_output_where_case_is_ignored(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    stat = os.stat

    def stat_without_case(name: object, **options: bool) -> os.stat_result:
        return stat(Path(str(name).replace("ALTGRAD.JSONL", "altgrad.jsonl")), **options)

    with mock.patch("os.stat", stat_without_case):
        refusal = find_obstacle([tmp_path / "ALTGRAD.JSONL"], [path])
    assert "the run file that is read" in (refusal or "")


def test_the_file_of_an_earlier_run_is_no_output(tmp_path: Path) -> None:
    earlier = write_run(tmp_path / "a")
    header = read_header(earlier)
    RunFile.create(tmp_path / "b", header, predecessor=(earlier, 10)).close()
    content = earlier.read_bytes()
    code, message = report_onto(earlier, tmp_path / "b", kind="--csv")
    assert (code, "the run file that is read" in message) == (2, True)
    assert earlier.read_bytes() == content


def test_other_files_are_no_outputs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    foreign = {
        "notes.txt": b"my notes",
        "loss.csv": b"layer,loss\n1,2\n",
        "page.html": b"<!DOCTYPE html>\n<title>Mine: AltGrad</title>",
        "model.json": b'{"path": "/", "created": 3}',
        "other.json": b'{"predicting": "/", "real": 3}',
        "steps.csv": b"layer,step,frozen_frac\n1,2,3\n",
        "other.jsonl": run.read_bytes(),
        "weights.pt": bytes(range(256)),
    }
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
        assert "got another file" in (find_refusal([tmp_path / name]) or "")
    code, message = report_onto(tmp_path / "notes.txt", run)
    assert (code, message.count("\n")) == (2, 1)
    assert (tmp_path / "notes.txt").read_bytes() == b"my notes"


def test_the_name_of_a_run_file_is_no_output(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    code, message = report_onto(tmp_path / "altgrad-2.jsonl", run)
    assert (code, "got the name of a run file" in message) == (2, True)
    assert [*tmp_path.iterdir()] == [run]


def test_reports_are_replaced_by_reports(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    files = [tmp_path / f"verdicts{option}" for option in OPTIONS]
    arguments = [each for pair in zip(OPTIONS, files, strict=True) for each in pair]
    for _ in range(2):
        assert altgrad("report", run, *arguments).returncode == 0
    assert find_refusal(files[::-1]) is None
    assert report_onto(files[0], run, kind="--csv")[0] == 0


def test_the_figures_of_a_prediction_are_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    fp32 = write_trained(tmp_path / "fp32", recipes="bf16-true", steps=6)
    low = write_trained(tmp_path / "bf16", torch.bfloat16, steps=6)
    files = [tmp_path / f"figures{option}" for option in OPTIONS]
    arguments = [each for pair in zip(OPTIONS, files, strict=True) for each in pair]
    for _ in range(2):
        assert altgrad("compare", fp32, low, *arguments).returncode == 0
    assert find_refusal(files[::-1]) is None
    for path in (fp32, low):
        refused = altgrad("compare", fp32, low, "--json", path)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "another file than the run file that is read" in refused.stderr


def test_new_empty_and_special_files_are_outputs(tmp_path: Path) -> None:
    empty, fifo = tmp_path / "empty", tmp_path / "fifo"
    empty.touch()
    os.mkfifo(fifo)
    paths = [tmp_path / "new", empty, fifo, Path(os.devnull)]
    assert find_refusal(paths) is None


def test_one_file_holds_one_output(tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "out"
    result = altgrad("report", run, "--json", output, "--csv", tmp_path / "run" / ".." / "OUT")
    assert result.returncode == 2
    assert "got the same file twice" in result.stderr
    assert not output.exists()


def test_force_replaces_any_file_but_the_one_that_is_read(tmp_path: Path) -> None:
    run, notes = write_run(tmp_path / "run"), tmp_path / "notes.txt"
    notes.write_text("mine")
    assert report_onto(notes, run, "--force") == (0, "")
    assert notes.read_text().startswith('{\n "schema": 1,\n "kind": "report",')
    content = run.read_bytes()
    code, message = report_onto(run, run, "--force")
    assert (code, "the run file that is read" in message) == (2, True)
    assert run.read_bytes() == content


def test_a_file_that_cannot_be_read_is_no_output(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refusal = find_refusal([loop])
    assert "a file that cannot be read (Too many levels of symbolic links)" in (refusal or "")


# --- files that cannot be written


def test_a_missing_folder_a_file_as_a_folder_and_a_folder_are_obstacles(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, problem in (
        (tmp_path / "missing" / "x.json", f"the folder {tmp_path / 'missing'} is missing"),
        (tmp_path / "file" / "x.json", f"{tmp_path / 'file'} is a file and no folder"),
        (tmp_path, "this is a folder"),
        (tmp_path / ("x" * 999), "File name too long"),
    ):
        found = find_obstacle([tmp_path / "new.json", path]) or ""
        assert found.startswith(f"{path}: file cannot be written: {problem}; ")
    assert find_obstacle([tmp_path / "new", tmp_path / "file", Path(os.devnull)]) is None


def test_permissions_are_obstacles(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    # The user root may write everywhere, so that the system's answer is replaced.
    with mock.patch("os.access", return_value=False):
        assert "no permission to write; choose another file" in (find_obstacle([file]) or "")
        found = find_obstacle([tmp_path / "new"]) or ""
        assert f"no permission to write in {tmp_path}; choose another folder" in found
