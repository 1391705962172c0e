"""`RunFile`: write the figures of one observed step after another to a run file.

A run file stays readable if the process is killed or the disk is full: whole lines are appended
without a buffer, and a failed write is undone. A lock of the module `locks` gives a run file one
writer at a time. A file that is deleted in mid-run is written anew: see `file_names`.

Read `RunFile.create`, `RunFile.append`, then `RunFile.resume`. The module `reading` comes next.
"""

from __future__ import annotations

import itertools
import json
import numbers
import os
import uuid
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from altgrad._version import __version__
from altgrad.measurement.histogram import Histogram
from altgrad.report.records.columns import Columns
from altgrad.report.records.fields import HISTOGRAM, LARGEST
from altgrad.report.records.file_names import has_name, is_deleted, map_content
from altgrad.report.records.kinds import FieldError
from altgrad.report.records.lines import format_step, tabulate
from altgrad.report.records.locks import WriterLock, take_lock
from altgrad.report.records.reading import read_header
from altgrad.report.records.schema import Header, LayerInfo, Predecessor, layers_as_json
from altgrad.report.records.verdict_lines import runs_as_json

if TYPE_CHECKING:
    from altgrad.measurement.step_record import StepRecord
    from altgrad.report.judging.verdicts import RunAdvice

_MOST_DECLARED = 64  # as many columns are remembered; a run has a few
_CHUNK = 2**16  # bytes that are searched at once for the end of the last whole line


class RunFile:
    """A run file that is open for writing, as `create` and `resume` return it.

    `append` hands its lines to the operating system before it returns. A killed process loses at
    most the line that was being written. No other writer gets the file until `close`, or until
    nothing refers to this object any more.

    If the file is deleted or replaced meanwhile, the next line brings all lines back: into a file
    of the same name, or the next free name if another file has it. If it is moved, lines go on in
    the moved file. Either gives a warning, once.

    Attributes:
        path: Path of the file.
    """

    def __init__(self, path: Path, lock: WriterLock) -> None:
        self._has_warned = False  # of a file that lost its name
        self._declared: dict[Columns, int] = {}  # numbers of columns that this object has declared
        self._open(path, lock)

    def _open(self, path: Path, lock: WriterLock) -> None:
        try:
            # Mode a (O_APPEND): even a writer without the lock could not overwrite lines.
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except BaseException:
            lock.release()
            raise
        # If nobody closes, as where a training raises: when the object or the process ends.
        self.path, self._lock = path, lock
        self._place = path.absolute()  # the current folder may change
        self._finish = weakref.finalize(self, _close, self._file, lock)
        # A file system without lasting numbers of files cannot tell whether a file is deleted.
        self._is_tracked = has_name(self._file, self._place)

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        header: Header | Mapping[str, Any],
        *,
        predecessor: Predecessor | tuple[str | os.PathLike[str], int] | None = None,
    ) -> RunFile:
        """Create a run file with a header.

        The name is ``altgrad.jsonl``, or the first free name of ``altgrad-2.jsonl``,
        ``altgrad-3.jsonl`` and so on. Existing files are never changed.

        Args:
            folder: Folder of the file; it is created if it is missing.
            header: Formats, layers, scaling and recipes, as `UpdateMonitor.run_header` returns
                them. Versions, time and predecessor are added.
            predecessor: Pair of the file of the run that this run continues, and the number of the
                first step that this run does again. None for a new run.

        Returns:
            The open file.

        Raises:
            TypeError: The header differs from the return value of `UpdateMonitor.run_header`, or
                the step of the predecessor is no whole number.
            ValueError: The step of the predecessor is out of range.
            OSError: The file cannot be created or written; then no file is left.
        """
        folder = Path(folder)
        if predecessor is not None:
            before_step = _check_whole("predecessor[1]", predecessor[1])
            predecessor = Predecessor(_make_relative(Path(predecessor[0]), folder), before_step)
        header = _parse_header(header)
        header = replace(
            header,
            versions={"altgrad": __version__, **header.versions},
            created=header.created or datetime.now(timezone.utc).isoformat(timespec="seconds"),
            predecessor=predecessor,
        )
        line = _format_line(header.as_json())  # an error here must leave no empty file
        return cls(*_claim_first_free(folder, memoryview(line)))

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], before_step: int, header: Header | Mapping[str, Any]
    ) -> RunFile:
        """Open a run file to continue it; readers then ignore its lines from `before_step` on.

        If formats, scaling, layers, recipes or how the run is stored differ from the file's, it is
        left unchanged. A new file is then created in the same folder, with `path` as its
        predecessor. The same is done, with a warning, if another writer has the file open.

        Args:
            path: Run file of the run that is resumed.
            before_step: Number of the first step that the resumed run will write.
            header: Formats, layers, scaling and recipes, as `UpdateMonitor.run_header` returns
                them.

        Returns:
            The open file: `path`, or the new file.

        Raises:
            TypeError: The header differs from the return value of `UpdateMonitor.run_header`, or
                `before_step` is no whole number.
            ValueError: `before_step` is out of range.
            RunFileError: `path` is missing, damaged, or a file of another kind.
            OSError: The file cannot be written.
        """
        path, header = Path(path), _parse_header(header)
        before_step = _check_whole("before_step", before_step)
        if not read_header(path).is_like(header):
            return cls.create(path.parent, header, predecessor=(path, before_step))
        lock = take_lock(path)
        if lock is None:
            warnings.warn(
                f"RunFile: {path} is being written by another run, or by a RunFile of this process "
                "that is not closed. This run goes on in a new file of the same folder.",
                stacklevel=2,
            )
            return cls.create(path.parent, header, predecessor=(path, before_step))
        file = cls(path, lock)
        try:
            file._drop_torn_line()
            file._write(_format_line({"resumed": {"before_step": before_step}}))
        except OSError:
            file.close()
            raise
        return file

    def append(
        self,
        step: int,
        record: StepRecord,
        *,
        skipped: Mapping[str, int],
        weights: Histogram | None = None,
    ) -> None:
        """Write one observed step.

        Args:
            step: Number of the step.
            record: Figures of the step, of each layer and of the model.
            skipped: Number of steps so far that moved no weight, by reason.
            weights: Histogram of log2(abs(weight)) over the model; None writes no histogram of
                weights.

        Raises:
            OSError: The step cannot be written; then the file has no part of it.
            TypeError: The step or a number of skipped steps is no whole number.
            ValueError: The file is closed, or a number is out of range.
        """
        step = _check_whole("step", step)
        skipped = _check_counts(skipped)
        if weights is not None:
            _check_histogram("weights", weights)
        numbers = tabulate(record, weights)
        number = self._declared.get(numbers.columns)
        if number is not None:
            self._write(format_step(step, record, skipped, number, numbers))
            return
        if len(self._declared) >= _MOST_DECLARED:
            self._declared.clear()  # the numbers from 0 on get a new meaning
        number = len(self._declared)
        line = format_step(step, record, skipped, number, numbers)
        self._write(numbers.columns.as_line(number) + line)
        self._declared[numbers.columns] = number

    def add_layers(self, layers: Mapping[str, LayerInfo]) -> None:
        """Write a line that describes layers which are missing in the header.

        The line must stand before the first figures of these layers.

        Args:
            layers: The descriptions by name of the layer.

        Raises:
            OSError: The description cannot be written; then the file has no part of it.
            ValueError: The file is closed.
        """
        self._write(_format_line({"layers": layers_as_json(layers)}))

    def add_verdicts(self, step: int, runs: Mapping[str, RunAdvice]) -> None:
        """Write a line with the verdicts on the run after a step, of which the last counts.

        Args:
            step: Number of the last step that the verdicts know.
            runs: Verdicts on the run by recipe, as `altgrad.report.Assessment.runs`.

        Raises:
            OSError: The line cannot be written; then the file has no part of it.
            TypeError: The step is no whole number.
            ValueError: The file is closed, or the step is out of range.
        """
        step = _check_whole("step", step)
        self._write(_format_line({"step": step, "verdicts": runs_as_json(runs)}))

    def add_unobserved(
        self, steps: int, skipped: Mapping[str, int], every_n_steps: int | None = None
    ) -> None:
        """Write a line on the steps of a run that ends without an observed step.

        Args:
            steps: Number of steps that the run made.
            skipped: Number of steps that were looked at and moved no weight, by reason.
            every_n_steps: Number of steps from one observed step to the next, 0 for no step; None
                if unknown.

        Raises:
            OSError: The line cannot be written; then the file has no part of it.
            TypeError: A number is no whole number.
            ValueError: The file is closed, or a number is out of range.
        """
        value = {
            "steps": _check_whole("steps", steps),
            "skipped": _check_counts(skipped),
            "every_n_steps": every_n_steps
            if every_n_steps is None
            else _check_whole("every_n_steps", every_n_steps),
        }
        self._write(_format_line({"unobserved": value}))

    def close(self) -> None:
        """Close the file, and release its lock for other writers."""
        self._finish()

    def __enter__(self) -> RunFile:  # noqa: PYI034 - typing has Self only from Python 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_torn_line(self) -> None:
        """Cut off an incomplete last line and move to the end of the file."""
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(end - _CHUNK, 0)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            end = start if newline < 0 else start + newline + 1
            if newline >= 0:
                break
        self._file.truncate(end)

    def _write(self, lines: bytes) -> None:
        notice = None
        if self._is_tracked and not has_name(self._file, self._place):
            notice = self._find_new_place()
        self._write_lines(lines)
        if notice is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"RunFile: {notice}", stacklevel=2)

    def _find_new_place(self) -> str:
        """Write all lines into a new file if the file is deleted; return a notice."""
        before = self.path
        if not is_deleted(self._file, self._place):
            return (
                f"{before} was moved while it is being written. Lines go on in the moved file; "
                "give its new path to altgrad report."
            )
        content, finish = map_content(self._file), self._finish
        self._lock.release()  # or the name would not be free
        self._open(*_claim_first_free(self._place.parent, content))
        finish()
        return (
            f"{before} was deleted or replaced while it is being written. All its lines are in "
            f"{self.path} now; keep the file until the run has ended."
        )

    def _write_lines(self, lines: bytes) -> None:
        start = self._file.seek(0, os.SEEK_END)
        try:
            _write_all(self._file, memoryview(lines))
        except BaseException:  # also Ctrl-C: no line may follow a torn one
            try:
                self._file.truncate(start)  # a full disk can shrink a file
            except OSError:
                self.close()
            raise


def _close(file: BinaryIO, lock: WriterLock) -> None:
    file.close()
    lock.release()


def _parse_header(header: Header | Mapping[str, Any]) -> Header:
    """Return a header, given as such or as JSON values; raise TypeError if it is invalid."""
    try:
        return Header.from_json(header.as_json() if isinstance(header, Header) else header)
    except ValueError as error:
        raise TypeError(
            f"header={str(header)[:60]}: expected the return value of UpdateMonitor.run_header(), "
            f"with formats, scaling and layers; {error}"
        ) from error


def _check_whole(name: str, value: object) -> int:
    """Return a number as an int; raise an error unless it is whole and within 0 and 2**63 - 1."""
    # NumPy's integers are Integral, too; tensors are not.
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(
            f"{name}={str(value)[:60]}: expected a whole number, got {type(value).__name__}; "
            "pass an int"
        )
    number = int(value)
    if not 0 <= number <= LARGEST:
        # Python refuses to write numbers of more than 4,300 digits.
        shown = number if abs(number) < 10**60 else "…"
        raise ValueError(f"{name}={shown}: expected a number from 0 to 2**63 - 1")
    return number


def _check_counts(skipped: Mapping[str, int]) -> dict[str, int]:
    """Return numbers of skipped steps as ints, by reason; raise an error unless all are whole."""
    return {
        str(reason): _check_whole(f"skipped[{str(reason)!r}]", count)
        for reason, count in skipped.items()
    }


def _check_histogram(name: str, histogram: Histogram) -> None:
    """Raise ValueError if a reader would reject the histogram."""
    try:
        HISTOGRAM.parse({"first": histogram.first, "counts": [*histogram.counts]})
    except FieldError as error:
        raise ValueError(f"{name}{error}") from None


def _claim_first_free(folder: Path, content: memoryview) -> tuple[Path, WriterLock]:
    """Create a run file with the first free name in a folder, and return its path and lock."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder / ("altgrad.jsonl" if number == 1 else f"altgrad-{number}.jsonl")
        if os.path.lexists(path) or (lock := take_lock(path)) is None:
            continue
        try:
            is_new = _create_file(path, content)
        except BaseException:
            lock.release()
            raise
        if is_new:
            return path, lock
        lock.release()
    raise AssertionError


def _create_file(path: Path, content: memoryview) -> bool:
    """Create a file with the given content, which is complete when the name of the file appears.

    A reader therefore finds no run file without a header. On file systems without hard links, the
    content is written after the name appears.

    Returns:
        True; False if the path exists, because another process has just created the file.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    _write_new_file(draft, content)
    try:
        os.link(draft, path)  # fails if the path exists, as renaming does not
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        return _write_new_file(path, content)
    finally:
        draft.unlink()
    return True


def _write_new_file(path: Path, content: memoryview) -> bool:
    """Create a file with the given content, and delete the file if writing fails.

    Returns:
        True; False if the path exists.
    """
    try:
        file = path.open("xb", buffering=0)
    except FileExistsError:
        return False
    try:
        with file:
            _write_all(file, content)
    except BaseException:
        path.unlink()
        raise
    return True


def _write_all(file: BinaryIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]


def _make_relative(path: Path, folder: Path) -> Path:
    """Return `path` relative to `folder`, so that file and folder can be moved together."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve()))
    except ValueError:  # Windows: the paths are on different drives
        return path.resolve()


def _format_line(value: Mapping[str, object]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # UTF-8 has no lone surrogates. A name may hold one, and backslashreplace writes it as
    # \udXXX, the escape of JSON.
    return text.encode("utf-8", "backslashreplace") + b"\n"
