"""Read a run file, and the files of the runs it continues, into a `Run`.

`read` is the entry. `_read_file` parses one file, and `_read_predecessors` follows the names of
earlier files. The module `run` comes next: it holds the result.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from altgrad.measurement.histogram import Histogram
from altgrad.report.records.run import FloatsByKey, Row, Run
from altgrad.report.records.schema import (
    SCHEMA,
    FormatInfo,
    Header,
    LayerInfo,
    RunFileError,
    number_from_json,
    numbers_from_json,
)

_NAME = re.compile(r"altgrad(?:-(\d+))?\.jsonl")
_RENAMED_METRICS = {"zero_update_frac": "ulp_zero_frac"}
"""Metric names in older run files, with the names of today; a file with both has equal figures."""
_PARSE_ERRORS = (AttributeError, KeyError, OverflowError, TypeError, ValueError)


@dataclass
class _File:
    """A parsed run file."""

    path: Path
    header: Header
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(path: str | os.PathLike[str]) -> Run:
    """Read a run file and its predecessors.

    An incomplete last line is skipped, and rows that a resumed run superseded are left out. A
    missing or damaged predecessor is left out, too. `Run.notes` has a sentence about each.

    Args:
        path: A run file, or a folder. In a folder with several run files the newest one is read.

    Returns:
        The run.

    Raises:
        RunFileError: The file is missing, empty, damaged, of another kind, or written by a newer
            AltGrad.
    """
    path = Path(path)
    others: list[Path] = []
    if path.is_dir():
        *others, path = _list_run_files(path)
    last = _read_file(path)
    files = [last]
    if others:
        names = ", ".join(other.name for other in others)
        last.notes.insert(
            0, f"{path.name} is read, the newest run file in its folder (the others: {names})"
        )
    _read_predecessors(files)
    # Of formats and layers with the same name, that of the latest file counts.
    formats: dict[str, FormatInfo] = {}
    layers: dict[str, LayerInfo] = {}
    for each in files:
        formats = {**each.header.formats, **formats}
        layers = {**each.header.layers, **layers}
    return Run(
        path=path,
        formats={**last.header.formats, **formats},
        scaling=last.header.scaling,
        layers={**last.header.layers, **layers},
        rows=[row for each in reversed(files) for row in each.rows],
        notes=[note for each in files for note in each.notes],
        predecessors=[each.path for each in files[1:]],
        versions=last.header.versions,
        created=last.header.created,
    )


def read_header(path: Path) -> Header:
    """Read the first line of a run file.

    Returns:
        The header.

    Raises:
        RunFileError: The file is missing, empty, of another kind, or written by a newer AltGrad.
    """
    return _parse_header(path, next(_read_lines(path), (1, b""))[1])


def is_run_file_name(name: str) -> bool:
    """Return True for ``altgrad.jsonl``, ``altgrad-2.jsonl`` and so on."""
    return _NAME.fullmatch(name) is not None


def _list_run_files(folder: Path) -> list[Path]:
    """Return the run files in a folder, the newest one last; there is at least one."""
    found = {path: match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    if not found:
        below = sorted(folder.glob("*/altgrad.jsonl"))
        remedy = f"; read {below[-1].parent}, which has one" if below else ""
        raise RunFileError(f"{folder}: expected altgrad.jsonl in this folder{remedy}")
    return sorted(found, key=lambda path: int(found[path][1] or 1))


def _read_predecessors(files: list[_File]) -> None:
    """Append the files of earlier runs to `files`, the latest run first."""
    last, before_step = files[0], None
    while last.header.predecessor is not None:
        path = last.path.parent / last.header.predecessor.path
        step = last.header.predecessor.before_step
        before_step = step if before_step is None else min(step, before_step)
        if any(path.resolve() == each.path.resolve() for each in files):
            files[0].notes.append(f"predecessors form a circle: {last.path} names {path}")
            return
        try:
            last = _read_file(path)
        except RunFileError as error:
            files[0].notes.append(f"steps before {step} are missing: {error}")
            return
        last.rows = [row for row in last.rows if row.step < before_step]
        files.append(last)


def _read_file(path: Path) -> _File:
    lines = _read_lines(path)
    file = _File(path, _parse_header(path, next(lines, (1, b""))[1]))
    positions_by_keys: dict[tuple[str, ...], dict[str, int]] = {}
    torn: int | None = None
    for number, line in lines:
        if torn is not None:  # only the last line can be torn by a killed process
            raise _make_damage_error(path, torn)
        try:
            value = json.loads(line)
        except ValueError:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            torn = number
            continue
        try:
            if "resumed" in value:
                _drop_superseded_rows(file, int(value["resumed"]["before_step"]))
            else:
                file.rows.append(_parse_row(value, positions_by_keys))
        except _PARSE_ERRORS:
            raise _make_damage_error(path, number) from None
    if torn is not None:
        file.notes.append(f"{path.name}: line {torn}, the last, is incomplete and was skipped")
    return file


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers, which begin at 1."""
    try:
        with path.open("rb") as file:
            yield from enumerate(file, start=1)
    except FileNotFoundError:
        raise RunFileError(
            f"{path}: file or folder is missing; expected a run file of AltGrad"
        ) from None
    except OSError as error:
        raise RunFileError(f"{path}: file cannot be read ({error.strerror})") from None


def _parse_header(path: Path, line: bytes) -> Header:
    if not line.strip():
        raise RunFileError(f"{path}: file is empty; expected a run file of AltGrad")
    try:
        value = json.loads(line)
        schema = value["altgrad"]
    except _PARSE_ERRORS:
        if line.startswith(b'{"altgrad"'):
            raise RunFileError(f"{path}: file is damaged, line 1 is incomplete") from None
        raise RunFileError(f"{path}: expected a run file of AltGrad, got another file") from None
    if isinstance(schema, int) and schema > SCHEMA:
        raise RunFileError(
            f"{path}: file of a newer AltGrad, schema {schema}; expected schema {SCHEMA}; "
            "run pip install --upgrade altgrad"
        )
    try:
        return Header.from_json(value)
    except KeyError as error:
        raise RunFileError(f"{path}: file is damaged, line 1 lacks {error}") from None
    except _PARSE_ERRORS as error:
        raise RunFileError(f"{path}: file is damaged, line 1 is invalid ({error})") from None


def _make_damage_error(path: Path, line: int) -> RunFileError:
    return RunFileError(
        f"{path}: file is damaged, line {line} is invalid; delete that line to read the rest"
    )


def _drop_superseded_rows(file: _File, before_step: int) -> None:
    kept = [row for row in file.rows if row.step < before_step]
    if dropped := len(file.rows) - len(kept):
        file.notes.append(
            f"{file.path.name}: resumed before step {before_step}, {dropped} lines are superseded"
        )
    file.rows = kept


def _parse_row(
    value: Mapping[str, Any], positions_by_keys: dict[tuple[str, ...], dict[str, int]]
) -> Row:
    """Return the row of one line; rows with equal keys share a table in `positions_by_keys`."""
    layer = value["layer"]
    if not (layer is None or isinstance(layer, str)):
        raise TypeError(layer)

    def parse_floats(numbers: Mapping[str, object]) -> FloatsByKey:
        keys = tuple(numbers)
        if keys not in positions_by_keys:
            renamed = [_RENAMED_METRICS.get(key, key) for key in keys]
            positions_by_keys[keys] = {key: position for position, key in enumerate(renamed)}
        return FloatsByKey(positions_by_keys[keys], numbers_from_json([*numbers.values()]))

    step, figures = int(value["step"]), parse_floats(value["figures"])
    errors = parse_floats(value.get("errors", {}))
    if "elements" not in value:
        return Row(step, layer, figures, errors)  # only the model's line has more keys
    return Row(
        step,
        layer,
        figures,
        errors,
        elements=int(value["elements"]),
        own_seconds=number_from_json(value["own_seconds"]),
        training_seconds=number_from_json(value["training_seconds"]),
        skipped={str(reason): int(count) for reason, count in value["skipped"].items()},
        histograms={
            str(key): Histogram(int(each["first"]), tuple(numbers_from_json(each["counts"])))
            for key, each in value["histograms"].items()
        },
    )
