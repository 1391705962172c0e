"""Read a run file, and the files of the earlier runs that it continues, into a `Run`.

`read` is the public function. `_parse_file` parses a file by the kinds that `fields` declares, and
`_read_predecessors` follows the references to earlier files.

The module `run` comes next, which defines the result.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from altgrad._messages import format_count
from altgrad.measurement.histogram import Histogram
from altgrad.report.records.columns import Columns
from altgrad.report.records.fields import (
    LAYER_LINE,
    LAYERS_LINE,
    MODEL_LINE,
    RESUMED_LINE,
    SCHEMA,
    STEP_LINE,
    UNOBSERVED_LINE,
    VERDICTS_LINE,
    VERSION,
)
from altgrad.report.records.kinds import FieldError, check_object, parse_below, shorten
from altgrad.report.records.packing import PACKED
from altgrad.report.records.raw_lines import read_raw_lines
from altgrad.report.records.rows import Row
from altgrad.report.records.run import Run
from altgrad.report.records.schema import (
    FormatInfo,
    Header,
    LayerInfo,
    RecipeInfo,
    RunFileError,
    Unobserved,
    make_layers,
)
from altgrad.report.records.steps import ObservedStep, PackedStep, StepRows, WrittenStep

_NAME = re.compile(r"altgrad(?:-(\d+))?\.jsonl")
_MOST_TRIES = 3
_NOT_JSON = (ValueError, RecursionError)
"""Errors of `json.loads`: RecursionError for deep nesting, otherwise ValueError or a subclass."""


@dataclass
class _File:
    """A parsed run file.

    Attributes:
        path: Path of the file.
        header: The first line.
        steps: The observed steps, without those that a resumed run replaced.
        columns: The meanings of packed numbers, by the number under which a line declares them.
        verdicts: Verdicts on the run after a step, each a pair of the step and the verdicts by
            recipe, without those of steps that a resumed run replaced.
        unobserved: What a run without an observed step wrote at its end.
        notes: Sentences for the user, such as on a skipped line.
    """

    path: Path
    header: Header
    steps: list[ObservedStep] = field(default_factory=list)
    columns: dict[int, Columns] = field(default_factory=dict)
    verdicts: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    unobserved: Unobserved | None = None
    notes: list[str] = field(default_factory=list)


def read(path: str | os.PathLike[str]) -> Run:
    """Read a run file, and its predecessors: the files of earlier runs that the run continues.

    An incomplete last line is skipped, and so are lines of steps that a resumed run did again. A
    missing or damaged predecessor is left out, too. `Run.notes` has a sentence about each omission.

    Args:
        path: A run file, or a folder. In a folder with several run files the newest one is read.

    Returns:
        The run: what the files say. Packed numbers are read from the file when they are needed, so
        that it must stay where it is.

    Raises:
        RunFileError: The file is missing, empty, damaged, of another kind, or written by a newer
            AltGrad.
    """
    path = Path(path)
    others: list[Path] = []
    if _is_folder(path):
        *others, path = _list_run_files(path)
    last = _read_file(path)
    files = [last]
    if others:
        names = ", ".join(other.name for other in others)
        last.notes.insert(
            0, f"{path.name} is read, the newest run file in its folder (the others: {names})"
        )
    _read_predecessors(files)
    # Of formats, layers and recipes with the same name, that of the latest file counts.
    formats: dict[str, FormatInfo] = {}
    layers: dict[str, LayerInfo] = {}
    recipes: dict[str, RecipeInfo] = {}
    for each in files:
        formats = {**each.header.formats, **formats}
        layers = {**each.header.layers, **layers}
        recipes = {**each.header.recipes, **recipes}
    return Run(
        path=path,
        formats={**last.header.formats, **formats},
        scaling=last.header.scaling,
        layers={**last.header.layers, **layers},
        rows=StepRows([step for each in reversed(files) for step in each.steps]),
        notes=[note for each in files for note in each.notes],
        predecessors=[each.path for each in files[1:]],
        versions=last.header.versions,
        created=last.header.created,
        loggers=last.header.loggers,
        recipes={**last.header.recipes, **recipes},
        now=last.header.now,
        optimizers=last.header.optimizers,
        verdicts=next((each.verdicts[-1][1] for each in files if each.verdicts), {}),
        unobserved=last.unobserved,
    )


def read_header(path: Path) -> Header:
    """Read the first line of a run file.

    Returns:
        The header: the formats, layers and settings of the run.

    Raises:
        RunFileError: The file is missing, empty, of another kind, or written by a newer AltGrad.
    """
    return _parse_header(path, next(read_raw_lines(path), (1, b""))[1])


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # reading the path as a file says why
        return False


def is_run_file_name(name: str) -> bool:
    """Return True for ``altgrad.jsonl``, ``altgrad-2.jsonl`` and so on."""
    return _NAME.fullmatch(name) is not None


def _list_run_files(folder: Path) -> list[Path]:
    """Return the run files in a folder, the newest file last; without any, raise RunFileError."""
    try:
        paths = [*folder.iterdir()]
    except OSError as error:
        raise RunFileError(f"{folder}: folder cannot be read ({error.strerror})") from None
    found = {path: match for path in paths if (match := _NAME.fullmatch(path.name))}
    if not found:
        below = sorted(folder.glob("*/altgrad.jsonl"))
        remedy = f"; read {below[-1].parent}, which has one" if below else ""
        raise RunFileError(f"{folder}: expected altgrad.jsonl in this folder{remedy}")
    return sorted(found, key=lambda path: int(found[path][1] or 1))


def _read_predecessors(files: list[_File]) -> None:
    """Read the files of the earlier runs that a run continues, and append them to `files`.

    At the call, `files` has the file of the last run alone; of the earlier ones the latest comes
    first. A file that cannot be read ends the list, and the notes of the first file say so.
    """
    last, before_step = files[0], None
    known = {_find_identity(last.path)}
    while last.header.predecessor is not None:
        path = last.path.parent / last.header.predecessor.path
        step = last.header.predecessor.before_step
        before_step = step if before_step is None else min(step, before_step)
        try:
            if (identity := _find_identity(path)) in known:
                files[0].notes.append(f"predecessors form a circle: {last.path} names {path}")
                return
            last = _read_file(path)
        except RunFileError as error:
            files[0].notes.append(f"steps before {step} are missing: {error}")
            return
        known.add(identity)
        _keep_steps_before(last, before_step)
        files.append(last)


def _find_identity(path: Path) -> tuple[int, int] | None:
    """Return numbers that identify a file under any path; None if the file cannot be found."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _find_version(path: Path) -> tuple[int, int] | None:
    """Return numbers that change if a file is written; None if the file cannot be found."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def _read_file(path: Path) -> _File:
    """Read a file; read it again if it looks damaged because a run was writing it meanwhile."""
    for _ in range(_MOST_TRIES - 1):
        before = _find_version(path)
        try:
            return _parse_file(path)
        except RunFileError:
            if _find_version(path) == before:
                raise
    return _parse_file(path)


def _parse_file(path: Path) -> _File:
    lines = read_raw_lines(path)
    _, first = next(lines, (1, b""))
    file, start = _File(path, _parse_header(path, first)), len(first)
    torn: tuple[int, str] | None = None
    for number, line in lines:
        if torn is not None:  # only the last line can be torn by a killed process
            raise _make_damage_error(path, *torn)
        try:
            problem = _parse_line(file, number, line, start)
        except FieldError as error:
            raise _make_damage_error(path, number, str(error)) from None
        if problem is not None:
            torn = number, problem
        start += len(line)
    if torn is not None:
        file.notes.append(f"{path.name}: line {torn[0]}, the last, is incomplete and was skipped")
    return file


def _parse_line(file: _File, number: int, line: bytes, start: int) -> str | None:
    """Add what a line says to a parsed file.

    Args:
        file: The file so far.
        number: Number of the line.
        line: The line.
        start: Place of the line in the file, in bytes.

    Returns:
        None; what was expected if the line may have been torn by a killed process.

    Raises:
        FieldError: The line is whole, and a value is invalid.
    """
    text, packed_mark, packed = line.partition(PACKED)
    packed = packed.removesuffix(b"\n")
    try:
        value = check_object(json.loads(text))
    except _NOT_JSON as error:
        if isinstance(error, FieldError):
            raise
        return "expected JSON"
    if not packed_mark and "crc32" not in value:
        _add_line(file, value)
        return None
    known = STEP_LINE.parse(value)
    if zlib.crc32(packed) != known.pop("crc32"):
        return "expected packed numbers with the sum in crc32"
    columns = file.columns.get(declared := known.pop("columns"))
    if columns is None:
        raise FieldError("columns that a line above declares", declared, ("columns",))
    place = start + len(text) + len(packed_mark)
    file.steps.append(
        PackedStep(
            **known,
            columns=columns,
            path=file.path.absolute(),
            line=number,
            start=place,
            size=len(packed),
        )
    )
    return None


def _parse_header(path: Path, line: bytes) -> Header:
    if not line.strip():
        raise RunFileError(f"{path}: file is empty; expected a run file of AltGrad")
    try:
        value = json.loads(line)
        schema = value["altgrad"]
    except (*_NOT_JSON, KeyError, TypeError):
        if line.startswith(b'{"altgrad"'):
            raise RunFileError(f"{path}: file is damaged, line 1 is incomplete") from None
        raise RunFileError(f"{path}: expected a run file of AltGrad, got another file") from None
    if isinstance(schema, int) and schema > SCHEMA:
        raise RunFileError(
            f"{path}: file of a newer AltGrad, schema {shorten(schema)}; expected schema {SCHEMA}; "
            "run pip install --upgrade altgrad"
        )
    try:
        parse_below("altgrad", VERSION, schema)
        return Header.from_json(value)
    except FieldError as error:
        raise RunFileError(f"{path}: file is damaged, line 1 is invalid ({error})") from None


def _make_damage_error(path: Path, line: int, problem: str) -> RunFileError:
    return RunFileError(
        f"{path}: file is damaged, line {line} is invalid ({problem}); delete that line to read "
        "the rest"
    )


def _add_line(file: _File, value: Mapping[str, Any]) -> None:
    """Apply one line to a parsed file: add what it has, or drop what was replaced.

    The line of a resumed run says from which step on the lines before it are replaced.
    """
    if "resumed" in value:
        _drop_superseded_lines(file, RESUMED_LINE.parse(value)["resumed"]["before_step"])
    elif "layers" in value:  # those that appeared in mid-run
        layers = make_layers(LAYERS_LINE.parse(value)["layers"])
        file.header = replace(file.header, layers={**file.header.layers, **layers})
    elif "verdicts" in value:
        parsed = VERDICTS_LINE.parse(value)
        file.verdicts.append((parsed["step"], parsed["verdicts"]))
    elif "unobserved" in value:
        file.unobserved = Unobserved(**UNOBSERVED_LINE.parse(value)["unobserved"])
    elif "columns" in value:
        declared, columns = Columns.from_json(value)
        file.columns[declared] = columns
    elif "elements" in value:  # only the model's line has more keys
        _add_row(file, _make_model_row(MODEL_LINE.parse(value)))
    else:
        _add_row(file, Row(**LAYER_LINE.parse(value)))


def _add_row(file: _File, row: Row) -> None:
    """Add a row of a file of schema 1 or 2 to its step."""
    last = file.steps[-1] if file.steps else None
    if not isinstance(last, WrittenStep) or not last.takes(row):
        last = WrittenStep()
        file.steps.append(last)
    last.rows.append(row)


def _drop_superseded_lines(file: _File, before_step: int) -> None:
    count = _count_lines(file)
    _keep_steps_before(file, before_step)
    if dropped := count - _count_lines(file):
        file.notes.append(
            f"{file.path.name}: resumed before step {before_step}, which supersedes "
            f"{format_count(dropped, 'line')}"
        )


def _count_lines(file: _File) -> int:
    return sum(step.lines for step in file.steps)


def _keep_steps_before(file: _File, before_step: int) -> None:
    file.steps = [step for step in file.steps if step.step < before_step]
    file.verdicts = [each for each in file.verdicts if each[0] < before_step]


def _make_model_row(fields: Mapping[str, Any]) -> Row:
    histograms = {key: Histogram(**each) for key, each in fields["histograms"].items()}
    return Row(**{**fields, "histograms": histograms})
