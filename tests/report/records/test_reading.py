"""Reading run files, with their predecessors, and the errors of unreadable files."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from altgrad import __version__
from altgrad.report import RunFile, RunFileError, RunReport, read
from altgrad.report.exports import as_json
from altgrad.report.records import reading
from tests.report.records.recording import assert_same, read_strict_lines, record_run, written
from tests.report.records.schema_2 import write_schema_2


def test_all_figures_of_all_steps_are_read(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records))
    assert run.path == tmp_path / "altgrad.jsonl"
    assert (run.formats, run.layers, run.scaling) == (header.formats, header.layers, "tensor")
    assert run.versions == {"altgrad": __version__, "torch": "2.0"}
    assert run.created.startswith("20")
    assert (run.steps, run.notes, run.predecessors) == ((0, 1, 2), [], [])
    assert [(row.step, row.layer) for row in run.rows] == [
        (step, name) for step in range(3) for name in (*records[0].layers, None)
    ]
    for row in run.rows:
        record = records[row.step]
        figures = record.model if row.layer is None else record.layers[row.layer]
        assert list(row.figures) == list(figures)
        for key, value in figures.items():
            assert_same(row.figures[key], value)


@pytest.mark.parametrize("left", [1, 10, 200, 900])
def test_an_incomplete_last_line_is_skipped_with_a_note(
    tmp_path, records, header, left: int
) -> None:
    path = written(tmp_path, header, records)
    content = path.read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    path.write_bytes(content[: last + left])
    run = read(path)
    assert run.notes == ["altgrad.jsonl: line 5, the last, is incomplete and was skipped"]
    assert len(run.rows) == 14
    RunFile.resume(path, 2, header).close()
    assert read(path).steps == (0, 1)
    assert read(path).notes == []
    read_strict_lines(path)


def test_unknown_keys_are_ignored(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    path.write_bytes(path.read_bytes().replace(b'{"step":', b'{"mood":"good","step":'))
    assert read(path).steps == (0, 1, 2)


def test_metrics_in_older_files_get_their_new_names(tmp_path, records, header) -> None:
    path = write_schema_2(tmp_path, header, records)
    today = [repr(row.figures) for row in read(path).rows]  # in a repr, NaN equals NaN
    path.write_text(path.read_text().replace('"ulp_zero_frac":', '"zero_update_frac":'))
    assert "zero_update_frac" in path.read_text()
    assert [repr(row.figures) for row in read(path).rows] == today


def test_a_run_that_was_begun_before_twins_had_a_metric_is_read(tmp_path) -> None:
    """Its first lines lack `moved_rms`, which the lines after the update have."""
    header, records = record_run(formats=["bf16"], recipes=["bf16", "bf16-true"])
    path = write_schema_2(tmp_path, header, records)
    key, other = "moved_rms/bf16", "progress_kept/bf16"
    today, kept = read(path).series(key), read(path).series(other)
    lines = path.read_text().splitlines(keepends=True)
    old = 1 + 2 * (1 + len(records[0].layers))  # the header and two steps
    lines[:old] = [re.sub(r'"moved_rms/[^,]+,', "", line) for line in lines[:old]]
    path.write_text("".join(lines))
    run = read(path)
    assert run.notes == []
    assert run.series(key) == {2: today[2]}
    assert run.series(other) == kept
    assert run.to_pandas()[key].isna().sum() == old - 1
    twins = as_json(RunReport.from_run(run))["twins"]["model"]
    assert twins["bf16"]["figures"]["moved_rms"] == today[2]
    path.write_text("".join(lines[:old]))
    twins = as_json(RunReport.from_run(read(path)))["twins"]["model"]
    assert "moved_rms" not in twins["bf16"]["figures"]
    assert twins["bf16"]["figures"]["progress_kept"] == kept[1]


# --- resumed


def test_a_run_resumed_elsewhere_names_its_predecessor(tmp_path, records, header) -> None:
    first = written(tmp_path / "version_0", header, records)  # steps 0, 1, 2
    second = written(tmp_path / "version_1", header, records, [2, 3, 4], predecessor=(first, 2))
    third = written(tmp_path / "version_2", header, records, [1, 5], predecessor=(second, 4))
    run = read(third)
    assert run.steps == (0, 1, 2, 3, 5)
    assert [(row.step, row.layer) for row in run.rows if row.layer is None] == [
        *((step, None) for step in (0, 1, 2, 3, 1, 5))
    ]
    assert [path.resolve() for path in run.predecessors] == [second, first]
    assert run.notes == []
    fourth = written(tmp_path / "version_3", header, records, [1, 2], predecessor=(third, 1))
    assert read(fourth).steps == (0, 1, 2)  # only step 0 of the first file
    (tmp_path / "version_0").parent.rename(tmp_path.parent / (tmp_path.name + "moved"))
    moved = tmp_path.parent / (tmp_path.name + "moved") / "version_3"
    assert read(moved).steps == (0, 1, 2)


@pytest.mark.parametrize("fate", ["missing", "damaged", "foreign", "folder", "pipe", "loop"])
def test_a_run_without_its_predecessor_is_read_with_a_note(
    tmp_path, records, header, fate: str
) -> None:
    first = written(tmp_path / "one", header, records)
    second = written(tmp_path / "two", header, records, [2, 3], predecessor=(first, 2))
    if fate in ("damaged", "foreign"):
        first.write_text(
            "{}\n" if fate == "foreign" else first.read_text("latin-1").replace("step", "stop")
        )
    else:
        first.unlink()
    if fate == "folder":
        first.mkdir()
    elif fate == "pipe":
        os.mkfifo(first)
    elif fate == "loop":
        first.symlink_to(first)
    run = read(second)
    assert (run.steps, run.predecessors) == ((2, 3), [])
    (note,) = run.notes
    assert note.startswith("steps before 2 are missing: ")
    assert "one/altgrad.jsonl" in note


@pytest.mark.parametrize(
    "path", ["a\0b", "\ud800", "/dev/zero", "x" * 5000, "", ".", "\x1b[31m\n", "/proc/self/mem"]
)
def test_any_path_of_a_predecessor_gives_one_note(tmp_path, records, header, path: str) -> None:
    good = written(tmp_path, header, records)
    first, rest = good.read_bytes().split(b"\n", 1)
    line = json.loads(first) | {"predecessor": {"path": path, "before_step": 2}}
    good.write_bytes(json.dumps(line).encode() + b"\n" + rest)
    run = read(good)
    assert run.steps == (0, 1, 2)
    (note,) = run.notes
    assert note.startswith("steps before 2 are missing: ")
    assert note.isprintable()


def test_predecessors_in_a_circle_end_with_a_note(tmp_path, records, header) -> None:
    path = tmp_path / "altgrad.jsonl"
    written(tmp_path, header, records, predecessor=(path, 2))
    other = written(tmp_path / "other", header, records, [3], predecessor=(path, 3))
    for start, steps, before in ((path, (0, 1, 2), []), (other, (0, 1, 2, 3), [path])):
        run = read(start)
        assert run.steps == steps
        assert [each.resolve() for each in run.predecessors] == before
        assert "predecessors form a circle" in run.notes[0]


# --- unreadable files


def test_an_unreadable_file_is_an_error_with_a_reason_in_one_sentence(
    tmp_path, records, header
) -> None:
    good = written(tmp_path / "good", header, records).read_bytes()
    first, second, rest = good.split(b"\n", 2)
    (tmp_path / "folder").mkdir()
    cases = {
        "missing": (None, "file or folder is missing"),
        "empty": (b"", "file is empty"),
        "foreign": (b'{"loss": 1}\n', "expected a run file of AltGrad"),
        "list": (b"[1]\n", "expected a run file of AltGrad"),
        "text": (b"epoch,loss\n1,2\n", "expected a run file of AltGrad"),
        "binary": (b"\x89PNG\r\n\x1a\n\xff\x00", "expected a run file of AltGrad"),
        "torn at once": (first[:200], "file is damaged, line 1 is incomplete"),
        "bare": (
            b'{"altgrad": 1}\n',
            "file is damaged, line 1 is invalid (expected",
        ),
        "number": (
            b'{"altgrad": 1, "scaling": null, "formats": 5}\n',
            "file is damaged, line 1 is invalid",
        ),
        "hole": (first + b"\n" + second[:99] + b"\n" + rest, "file is damaged, line 2 is invalid"),
        "binary hole": (first + b"\n\xff\xfe\n" + rest, "file is damaged, line 2 is invalid"),
        "other line": (first + b'\n{"step": 3}\n' + rest, "file is damaged, line 2 is invalid"),
        "number line": (first + b"\n3\n" + rest, "file is damaged, line 2 is invalid"),
        "word": (good.replace(b"null", b'"none"'), "file is damaged, "),
        "deep header": (b'{"altgrad":' + b"[" * 10**5, "file is damaged, line 1 is incomplete"),
        "deep line": (
            first + b"\n" + b'{"a":' * 10**5 + b"\n" + rest,
            "file is damaged, line 2 is invalid",
        ),
        "long number": (
            first + b'\n{"step": ' + b"9" * 5000 + b"}\n" + rest,
            "file is damaged, line 2 is invalid",
        ),
        "newer": (good.replace(b'"altgrad": 3', b'"altgrad": 4'), "file of a newer AltGrad"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RunFileError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: {reason}"), message
        assert "\n" not in message
    with pytest.raises(RunFileError, match=r"schema 4; expected schema 3; .*--upgrade"):
        read(tmp_path / "newer")
    with pytest.raises(RunFileError, match=r"expected altgrad\.jsonl in this folder$"):
        read(tmp_path / "folder")
    with pytest.raises(
        RunFileError, match=r"expected altgrad\.jsonl in this folder; read .*good, which"
    ):
        read(tmp_path)
    assert isinstance(caught.value, ValueError)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_without_read_permission_is_an_error(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    path.chmod(0)
    with pytest.raises(RunFileError, match="cannot be read"):
        read(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
@pytest.mark.parametrize("mode", [0o000, 0o100, 0o400])
def test_a_folder_without_permission_is_an_error(tmp_path, records, header, mode: int) -> None:
    folder = tmp_path / "run"
    path = written(folder, header, records)
    folder.chmod(mode)
    try:
        if mode == 0o100:  # its files can be read, but not listed
            assert read(path).steps == (0, 1, 2)
        else:
            with pytest.raises(RunFileError, match="cannot be read"):
                read(path)
        with pytest.raises(RunFileError, match="cannot be read"):
            read(folder)
    finally:
        folder.chmod(0o700)


# --- beside the run that writes


def test_a_file_that_grows_while_it_is_read_is_not_damaged(
    tmp_path, records, header, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, header, records)
    content = path.read_bytes()
    cut = len(content) - 300  # in the middle of the last line
    path.write_bytes(content[:cut])
    parse = json.loads

    def write_on(line: bytes) -> Any:
        with path.open("ab") as file:
            file.write(content[cut : cut + 10])
        return parse(line)

    monkeypatch.setattr(reading.json, "loads", write_on)
    run = read(path)
    assert len(run.rows) == 14
    assert run.notes == ["altgrad.jsonl: line 5, the last, is incomplete and was skipped"]


def test_a_file_that_is_damaged_for_a_moment_is_read_again(
    tmp_path, records, header, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, header, records)
    content = path.read_bytes()
    first = content.index(b"\n") + 1
    path.write_bytes(content[:first] + b"{torn" + content[first:])  # a reader mixes two moments
    tries: list[Path] = []
    parse = json.loads

    def mend(line: bytes) -> Any:
        if line.startswith(b"{torn"):
            tries.append(path)
            path.write_bytes(content)
        return parse(line)

    monkeypatch.setattr(reading.json, "loads", mend)
    assert (read(path).steps, tries) == ((0, 1, 2), [path])
