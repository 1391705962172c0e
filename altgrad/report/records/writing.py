"""`RunFile`: write a run file, step by step, so that what is written stays readable."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from altgrad._version import __version__
from altgrad.measurement.histogram import Histogram
from altgrad.report.records.lines import lines_of
from altgrad.report.records.reading import read_header
from altgrad.report.records.schema import Header, Predecessor

if TYPE_CHECKING:
    from altgrad.measurement.step_record import StepRecord

_CHUNK = 2**16


class RunFile:
    """A run file that is open to be written, made by `create` or `resume`.

    What is appended is handed to the operating system before `append` returns: a process that is
    killed loses at most the line that it was writing.

    Attributes:
        path: Of the file.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        header: Header | Mapping[str, Any],
        *,
        predecessor: Predecessor | tuple[str | os.PathLike[str], int] | None = None,
    ) -> RunFile:
        """A new file in a folder, which is made if need be; one that is there is left alone.

        Args:
            folder: Where: ``altgrad.jsonl``, or the first of ``altgrad-2.jsonl``, … that is free.
            header: Formats, layers and scaling, as `UpdateMonitor.run_header` returns them; the
                rest is added.
            predecessor: The file of the run that this one goes on from, and the step from which
                on it does.

        Raises:
            TypeError: The header is not what `UpdateMonitor.run_header` returns.
            OSError: It cannot be made.
        """
        folder = Path(folder)
        if predecessor is not None:
            predecessor = Predecessor(_relative(Path(predecessor[0]), folder), predecessor[1])
        header = _parsed(header)
        header = replace(
            header,
            versions={"altgrad": __version__, **header.versions},
            created=header.created or datetime.now(timezone.utc).isoformat(timespec="seconds"),
            predecessor=predecessor,
        )
        line = _line(header.as_json())  # before there is a file, or an empty one would be left
        folder.mkdir(parents=True, exist_ok=True)
        file = cls(*_first_free(folder))
        try:
            file._write(line)
        except OSError:
            file.close()
            file.path.unlink()
            raise
        return file

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], before_step: int, header: Header | Mapping[str, Any]
    ) -> RunFile:
        """Go on with a file: what it says of steps from `before_step` on is superseded.

        Where the run is another one now (formats, scaling or layers differ), the file is left alone
        and a new one beside it names it as its predecessor.

        Raises:
            TypeError: As `create`.
            RunFileError: It is none.
            OSError: It cannot be written.
        """
        path, header = Path(path), _parsed(header)
        if not read_header(path).is_like(header):
            return cls.create(path.parent, header, predecessor=(path, before_step))
        file = cls(path, path.open("r+b", buffering=0))
        try:
            file._drop_torn_line()
            file._write(_line({"resumed": {"before_step": before_step}}))
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
        """Write the lines of one observed step.

        Args:
            step: Under which number.
            record: What was observed.
            skipped: How many steps were none so far, by reason.
            weights: How many weights of the model lie in each octave, where that was counted.

        Raises:
            OSError: It cannot be written; nothing of the step is then in the file.
            ValueError: The file is closed.
        """
        self._write(lines_of(step, record, skipped, weights))

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def __enter__(self) -> RunFile:  # noqa: PYI034 - typing has Self only from Python 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_torn_line(self) -> None:
        """So that what follows begins on a line of its own."""
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(end - _CHUNK, 0)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            end = start if newline < 0 else start + newline + 1
            if newline >= 0:
                break
        self._file.truncate(end)
        self._file.seek(end)

    def _write(self, text: str) -> None:
        # A lone surrogate, which a name may hold, is then what JSON calls it.
        rest = memoryview(text.encode("utf-8", "backslashreplace"))
        start = self._file.tell()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(start)  # a full disk has room for that
            self._file.seek(start)
            raise


def _parsed(header: Header | Mapping[str, Any]) -> Header:
    if isinstance(header, Header):
        return header
    try:
        return Header.from_json(header)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TypeError(
            f"header={str(header)[:60]}: expected what UpdateMonitor.run_header() returns, with "
            f"formats, scaling and layers; {type(error).__name__}: {error}"
        ) from error


def _first_free(folder: Path) -> tuple[Path, BinaryIO]:
    for number in itertools.count(1):
        path = folder / ("altgrad.jsonl" if number == 1 else f"altgrad-{number}.jsonl")
        try:
            return path, path.open("xb", buffering=0)
        except FileExistsError:
            continue
    raise AssertionError


def _relative(path: Path, folder: Path) -> Path:
    """So that both can be moved together."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve()))
    except ValueError:  # on another drive
        return path.resolve()


def _line(value: Mapping[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
