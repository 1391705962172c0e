"""Packed lines: what is torn, damaged, missing or hostile loses one step, or is one sentence."""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from altgrad.report import Row, RunFile, RunFileError, RunReport, read
from altgrad.report.records.columns import Bins, Columns
from altgrad.report.records.packing import pack_numbers
from altgrad.report.records.steps import StepRows, WrittenStep, decode_steps, group_rows
from tests.report.records.damage import run_command, show
from tests.report.records.recording import written
from tests.report.records.schema_2 import write_schema_2


def split_last_line(path: Path) -> tuple[bytes, bytes]:
    """Return what stands before the last line of a file, and that line."""
    content = path.read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    return content[:start], content[start:]


def test_a_last_step_that_is_torn_at_any_byte_is_lost_alone(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    before, line = split_last_line(path)
    for size in range(1, len(line) - 1):
        path.write_bytes(before + line[:size])
        run = read(path)
        assert run.steps == (0, 1), size
        assert run.notes == ["altgrad.jsonl: line 5, the last, is incomplete and was skipped"]
    for content in (before + line, before + line[:-1]):  # whole, also without its line feed
        path.write_bytes(content)
        assert (read(path).steps, read(path).notes) == ((0, 1, 2), [])


@pytest.mark.parametrize("size", [1, 150, 400, -2])
def test_a_run_resumed_behind_a_torn_step_goes_on(tmp_path, records, header, size: int) -> None:
    path = written(tmp_path, header, records)
    before, line = split_last_line(path)
    path.write_bytes(before + line[:size])
    with RunFile.resume(path, 2, header) as file:
        for step in (2, 3):
            file.append(step, records[2], skipped={})
    run = read(path)
    assert (run.steps, run.notes, len(run.rows)) == ((0, 1, 2, 3), [], 4 * 7)
    assert not math.isnan(run.series("update_rms", "0.weight")[3])


def test_a_damaged_middle_line_is_one_sentence_that_names_it(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    lines = path.read_bytes().split(b"\n")
    for number in (3, 4):  # behind the header and the columns
        for place in range(0, len(lines[number - 1]), 7):
            damaged = bytearray(lines[number - 1])
            damaged[place] ^= 0x80
            path.write_bytes(b"\n".join([*lines[: number - 1], damaged, *lines[number:]]))
            with pytest.raises(RunFileError, match=f"file is damaged, line {number} is invalid"):
                read(path)
    path.write_bytes(b"\n".join([*lines[:2], *lines[3:]]))  # a line that the sentence says to drop
    assert read(path).steps == (1, 2)
    path.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    with pytest.raises(RunFileError, match=r"line 2 .*expected columns that a line above declares"):
        read(path)


def write_hostile(path: Path, meaning: Columns, numbers: Sequence[float], **about: Any) -> None:
    """Write a file with one step, whose check sum is right."""
    header = path.read_bytes().split(b"\n")[0]
    packed = pack_numbers(np.array(numbers, np.float64), np.zeros(len(numbers), np.bool_))
    line: dict[str, Any] = {
        "step": 3,
        "elements": 5,
        "own_seconds": None,
        "training_seconds": 0.5,
        "skipped": {},
        "columns": 0,
        "crc32": zlib.crc32(packed),
    } | about
    text = json.dumps(line).encode()
    path.write_bytes(header + b"\n" + meaning.as_line(0) + text + b"\0" + packed + b"\n")


PLAIN = Columns(("a", None), ("stall_frac/bf16", "update_rms"), ("stall_frac/bf16",), False)
BINNED = Columns((None,), ("update_rms",), (), True, {"ulps": Bins(0, 2)})


def test_numbers_at_their_bounds_are_read(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records[:1])
    write_hostile(path, PLAIN, [0.0, 1.0, -math.inf, 1e300, 0.0, math.inf])
    first, model = read(path).rows
    assert (dict(first.figures), dict(first.errors)) == (
        {"stall_frac/bf16": 0.0, "update_rms": -math.inf},
        {"stall_frac/bf16": 0.0},
    )
    assert (model.elements, model.training_seconds, model.layer) == (5, 0.5, None)
    write_hostile(path, BINNED, [1.0, math.nan, 0.0, 1e30])
    (row,) = read(path).rows
    assert row.histograms["ulps"].counts == pytest.approx((0.0, 1e30))


@pytest.mark.parametrize(
    ("columns", "numbers"),
    [
        (PLAIN, [1.5, 1, 0, 0, 0, 0]),
        (PLAIN, [-0.5, 1, 0, 0, 0, 0]),
        (PLAIN, [0, 0, 0, 0, -1, 0]),
        (PLAIN, [0, 0, 0, 0, 0]),
        (PLAIN, [0, 0, 0, 0, 0, 0, 0]),
        (BINNED, [0, -1, 0, 0]),
        (BINNED, [0, 0, -1, 0]),
        (BINNED, [0, 0, math.nan, 0]),
        (BINNED, [0, 0, math.inf, 0]),
    ],
)
def test_a_number_out_of_bounds_is_one_sentence(
    tmp_path, records, header, columns: Columns, numbers: list[float]
) -> None:
    path = written(tmp_path, header, records[:1])
    write_hostile(path, columns, numbers)
    run = read(path)  # numbers are read when they are needed
    with pytest.raises(RunFileError, match=r"line 3 is invalid \([^\n]+\)$"):
        list(run.rows)
    for command in (("report", path), ("report", path, "--json=-"), ("compare", path, path)):
        code, out, err = run_command(*command)
        assert (code, out) == (2, "")
        assert err.startswith(f"{path}: file is damaged or was replaced, line 3 is invalid (")
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("step", bad) for bad in (-1, 2**63, 1.5, None, "0", True)),
        *(("elements", bad) for bad in (-1, None, 1.5)),
        *(("own_seconds", bad) for bad in ("x", 1e13, [])),
        *(("skipped", bad) for bad in (None, {"a": -1})),
        *(("columns", bad) for bad in (-1, 1, None, {})),
        *(("crc32", bad) for bad in (-1, 2**32, None)),
    ],
)
def test_a_bad_value_before_the_numbers_is_one_sentence(
    tmp_path, records, header, key: str, value: Any
) -> None:
    path = written(tmp_path, header, records[:1])
    write_hostile(path, PLAIN, [0.0] * 6, **{key: value})
    with pytest.raises(RunFileError, match=rf"line 3 is invalid \(\['{key}'\].*: expected "):
        read(path)


def test_a_file_without_layers_or_figures_is_shown(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records[:1])
    for columns in (Columns((), (), (), False), Columns((None,), (), (), False), PLAIN):
        write_hostile(path, columns, [0.0] * columns.count)
        show(read(path))


# --- where the file is not what it was


@pytest.mark.parametrize(
    ("lose", "reason"),
    [
        (Path.unlink, "file or folder is missing"),
        (lambda path: path.write_bytes(b"mine\n"), "file is damaged or was replaced, line 3"),
        (lambda path: shutil.rmtree(path.parent), "file or folder is missing"),
    ],
)
def test_a_file_that_is_gone_when_numbers_are_needed_is_one_sentence(
    tmp_path, records, header, lose: Callable[[Path], Any], reason: str
) -> None:
    path = written(tmp_path / "run", header, records)
    run = read(path)
    lose(path)
    assert run.steps == (0, 1, 2)
    with pytest.raises(RunFileError, match=reason):
        RunReport.from_run(run)


def test_a_run_is_read_from_any_current_folder(tmp_path, records, header, monkeypatch) -> None:
    written(tmp_path, header, records)
    monkeypatch.chdir(tmp_path)
    run = read("altgrad.jsonl")
    monkeypatch.chdir("/")
    assert len([*run.rows]) == 3 * 7


def test_what_a_run_appends_meanwhile_is_left_alone(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    run = read(path)
    with RunFile.resume(path, 3, header) as file:
        file.append(3, records[0], skipped={})
    assert len([*run.rows]) == 3 * 7


# --- rows


def test_rows_are_those_of_all_steps_in_order(tmp_path, records, header) -> None:
    rows = read(written(tmp_path, header, records)).rows
    assert isinstance(rows, StepRows)
    each = [(row.step, row.layer) for row in rows]
    assert each == [(step, layer) for step in range(3) for layer in (*header.layers, None)]
    assert [(rows[k].step, rows[k].layer) for k in range(len(rows))] == each
    assert [(row.step, row.layer) for row in rows[-5:2:-4]] == each[-5:2:-4]
    assert (rows[-1].step, rows[-1].layer) == each[-1]
    for place in (21, -22):
        with pytest.raises(IndexError, match="expected a row from 0 to 20"):
            rows[place]
    assert len(StepRows([])) == 0


def test_rows_of_a_step_end_with_that_of_the_model() -> None:
    def row(step: int, layer: str | None) -> Row:
        return Row(step, layer, {}, {})

    steps = [
        [row(0, "a"), row(0, None)],
        [row(0, "a"), row(0, "b")],  # a second optimizer, without a row of the model
        [row(0, "a")],
        [row(1, "b"), row(1, None)],
    ]
    assert [step.rows for step in group_rows([r for step in steps for r in step])] == steps


def test_a_table_has_the_numbers_of_its_rows(tmp_path, records, header) -> None:
    new = read(written(tmp_path / "new", header, records)).observed
    old = read(write_schema_2(tmp_path / "old", header, records)).observed
    assert isinstance(old[0], WrittenStep)
    for one, other in zip(decode_steps(new), decode_steps(old), strict=True):
        assert (one.step, one.columns.layers) == (other.step, other.columns.layers)
        for key in other.columns.figures:
            (figures, is_here), (expected, was_here) = (
                one.find_figures(key),
                other.find_figures(key),
            )
            assert is_here.tolist() == was_here.tolist()
            assert figures.tolist() == pytest.approx(expected.tolist(), rel=6e-8, nan_ok=True)
        assert not one.find_figures("unknown")[1].any()
