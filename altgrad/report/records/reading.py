"""`read`: from a run file, and those of the runs before it, to a `Run`."""

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
"""Names in older run files, and the names of today: a key of both has one value."""
_OTHER_KIND = (AttributeError, KeyError, OverflowError, TypeError, ValueError)


@dataclass
class _File:
    """One file, read."""

    path: Path
    header: Header
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(path: str | os.PathLike[str]) -> Run:
    """What a run file says, with what those say that it goes on from.

    A torn last line is skipped. Rows that a resumed run superseded are left out. Where a file that
    it goes on from is missing or damaged, what there is stands without it. `Run.notes` tells.

    Args:
        path: A run file, or a folder that holds one or more: the one made last is read.

    Raises:
        RunFileError: It is missing, empty, none at all, damaged, or written by a newer AltGrad.
    """
    path = Path(path)
    others: list[Path] = []
    if path.is_dir():
        *others, path = _files_in(path)
    last = _read_file(path)
    files = [last]
    if others:
        names = ", ".join(other.name for other in others)
        last.notes.insert(0, f"{path.name} is read, of several runs in its folder ({names})")
    _follow(files)
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
    """The first line.

    Raises:
        RunFileError: As `read`.
    """
    return _header(path, next(_lines(path), (1, b""))[1])


def _files_in(folder: Path) -> list[Path]:
    """At least one, the one made last at the end."""
    found = {path: match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    if not found:
        below = sorted(folder.glob("*/altgrad.jsonl"))
        hint = f"; {below[-1].parent} has one" if below else ""
        raise RunFileError(f"{folder}: there is no altgrad.jsonl in this folder{hint}")
    return sorted(found, key=lambda path: int(found[path][1] or 1))


def _follow(files: list[_File]) -> None:
    """Add the files of the runs before, the last one first."""
    last, before_step = files[0], None
    while last.header.predecessor is not None:
        path = last.path.parent / last.header.predecessor.path
        step = last.header.predecessor.before_step
        before_step = step if before_step is None else min(step, before_step)
        if any(path.resolve() == each.path.resolve() for each in files):
            files[0].notes.append(f"{last.path} names {path} as its predecessor, in a circle")
            return
        try:
            last = _read_file(path)
        except RunFileError as error:
            files[0].notes.append(f"steps before {step} are missing: {error}")
            return
        last.rows = [row for row in last.rows if row.step < before_step]
        files.append(last)


def _read_file(path: Path) -> _File:
    lines = _lines(path)
    file = _File(path, _header(path, next(lines, (1, b""))[1]))
    keys: dict[tuple[str, ...], dict[str, int]] = {}
    torn: int | None = None
    for number, line in lines:
        if torn is not None:
            raise _damaged(path, torn)
        try:
            value = json.loads(line)
        except ValueError:  # which one of Unicode is, too
            torn = number
            continue
        try:
            if "resumed" in value:
                _supersede(file, int(value["resumed"]["before_step"]))
            else:
                file.rows.append(_row(value, keys))
        except _OTHER_KIND:
            raise _damaged(path, number) from None
    if torn is not None:
        file.notes.append(f"{path.name}: line {torn}, the last, is torn and skipped")
    return file


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """With their numbers from 1."""
    try:
        with path.open("rb") as file:
            yield from enumerate(file, start=1)
    except FileNotFoundError:
        raise RunFileError(f"{path}: there is no such file or folder") from None
    except OSError as error:
        raise RunFileError(f"{path}: it cannot be read ({error.strerror})") from None


def _header(path: Path, line: bytes) -> Header:
    if not line.strip():
        raise RunFileError(f"{path}: it is empty")
    try:
        value = json.loads(line)
        schema = value["altgrad"]
    except _OTHER_KIND:
        if line.startswith(b'{"altgrad"'):
            raise RunFileError(f"{path}: it is damaged, its first line is torn") from None
        raise RunFileError(f"{path}: it is no run file of AltGrad") from None
    if isinstance(schema, int) and schema > SCHEMA:
        raise RunFileError(
            f"{path}: a newer AltGrad wrote it (schema {schema}, this one reads up to {SCHEMA}); "
            "pip install --upgrade altgrad"
        )
    try:
        return Header.from_json(value)
    except KeyError as error:
        raise RunFileError(f"{path}: it is damaged, its first line lacks {error}") from None
    except _OTHER_KIND as error:
        raise RunFileError(
            f"{path}: it is damaged, its first line is none that AltGrad writes ({error})"
        ) from None


def _damaged(path: Path, line: int) -> RunFileError:
    return RunFileError(
        f"{path}: it is damaged, line {line} is none that AltGrad writes; without that line the "
        "rest can be read"
    )


def _supersede(file: _File, before_step: int) -> None:
    kept = [row for row in file.rows if row.step < before_step]
    if dropped := len(file.rows) - len(kept):
        file.notes.append(
            f"{file.path.name}: resumed before step {before_step}, {dropped} lines are superseded"
        )
    file.rows = kept


def _row(value: Mapping[str, Any], keys: dict[tuple[str, ...], dict[str, int]]) -> Row:
    layer = value["layer"]
    if not (layer is None or isinstance(layer, str)):
        raise TypeError(layer)

    def by_key(numbers: Mapping[str, object]) -> FloatsByKey:
        names = tuple(numbers)
        if names not in keys:
            keys[names] = {_RENAMED_METRICS.get(n, n): place for place, n in enumerate(names)}
        positions = keys[names]
        return FloatsByKey(positions, numbers_from_json([*numbers.values()]))

    step, figures = int(value["step"]), by_key(value["figures"])
    errors = by_key(value.get("errors", {}))
    if "elements" not in value:
        return Row(step, layer, figures, errors)
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
