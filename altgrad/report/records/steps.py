"""Observed steps of a run file, which are decoded when their numbers are needed.

`PackedStep` is a line of packed numbers that stays in the file, and `WrittenStep` the lines of a
step of schemas 1 and 2, in memory. Either gives a `StepTable`, a matrix, or rows.

Read `rows` and `columns` first; `run` comes next.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from altgrad.measurement.histogram import Histogram
from altgrad.measurement.numbers import Numbers
from altgrad.report.records.columns import ROUNDED, Columns
from altgrad.report.records.fields import COUNT
from altgrad.report.records.floats import FloatsByKey
from altgrad.report.records.packing import ABSENT, unpack_numbers
from altgrad.report.records.raw_lines import open_file
from altgrad.report.records.rows import Row
from altgrad.report.records.schema import RunFileError


@dataclass(frozen=True, eq=False)
class StepTable:
    """The numbers of an observed step, decoded.

    Attributes:
        step: Number of the step.
        columns: The meaning of the numbers.
        numbers: Figures and errors, float64 (columns, layers); NaN where there is none.
        is_absent: True where a layer lacks a number that others have, bool (columns, layers).
    """

    step: int
    columns: Columns
    numbers: Numbers
    is_absent: NDArray[np.bool_]

    def find_figures(self, key: str) -> tuple[Numbers, NDArray[np.bool_]]:
        """Return a figure of all layers, and which of them have it.

        Args:
            key: Key of the figure, such as ``"update_rms"``.

        Returns:
            The figures, float64 (layers), and flags, bool (layers).
        """
        place = self.columns.figure_places.get(key)
        if place is None:
            count = len(self.columns.layers)
            return np.full(count, np.nan), np.zeros(count, np.bool_)
        return self.numbers[place], ~self.is_absent[place]

    def list_numbers(self, row: int) -> tuple[FloatsByKey, FloatsByKey, float]:
        """Return the figures, the standard errors and the number of moved elements of a layer.

        Args:
            row: The row of the layer, or of the model.

        Returns:
            Figures and errors by key, without those that the layer lacks; the number of elements
            that float32 has moved, NaN without twins.
        """
        numbers, is_absent = self.numbers[:, row], self.is_absent[:, row]
        figures, errors = _find_layout(self.columns, is_absent.tobytes())
        moved = float(numbers[-1]) if self.columns.moved_elements else np.nan
        return (
            FloatsByKey(figures[0], numbers[figures[1]].tolist()),
            FloatsByKey(errors[0], numbers[errors[1]].tolist()),
            moved,
        )


_Layout = tuple[Mapping[str, int], NDArray[np.intp]]


@functools.lru_cache(maxsize=1024)
def _find_layout(columns: Columns, is_absent: bytes) -> tuple[_Layout, _Layout]:
    """Return positions by key, and columns, of the figures and of the errors that a layer has."""
    is_here = ~np.frombuffer(is_absent, np.bool_)
    return (
        _select(columns.figure_places, is_here),
        _select(columns.error_places, is_here),
    )


def _select(places: Mapping[str, int], is_here: NDArray[np.bool_]) -> _Layout:
    here = {key: place for key, place in places.items() if is_here[place]}
    return dict(zip(here, range(len(here)), strict=True)), np.array([*here.values()], np.intp)


@dataclass(frozen=True, eq=False, slots=True)
class PackedStep:
    """An observed step whose numbers stay in the file until they are needed.

    Attributes:
        step: Number of the step.
        columns: The meaning of the numbers.
        elements: Number of measured elements of the model.
        own_seconds: Host time in seconds to observe the previous observed step.
        training_seconds: Mean time in seconds of a training step without the observation.
        skipped: Number of steps so far that moved no weight, by reason.
        path: Path of the file.
        line: Number of the line in the file.
        start: Place of the packed numbers in the file, in bytes.
        size: Number of packed bytes.
    """

    step: int
    columns: Columns
    elements: int
    own_seconds: float
    training_seconds: float
    skipped: Mapping[str, int]
    path: Path
    line: int
    start: int
    size: int

    lines = 1
    """Number of lines in the file."""

    @property
    def layers(self) -> Sequence[str | None]:
        """Names of the layers in the order of the rows; None for the model."""
        return self.columns.layers

    @property
    def histograms(self) -> Collection[str]:
        """Keys of the histograms of the model."""
        return self.columns.histograms.keys()

    @property
    def figure_keys(self) -> Collection[str]:
        """Keys of the figures that any layer or the model has."""
        return self.columns.figure_places.keys()

    def decode(self, file: BinaryIO | None = None) -> StepTable:
        """Return the numbers of the step.

        Args:
            file: The file, if it is open.

        Raises:
            RunFileError: The file is missing or has changed since it was read, or a number is out
                of bounds.
        """
        return self._split(self._unpack(file))

    def list_rows(self, file: BinaryIO | None = None) -> list[Row]:
        """Return a row for each layer and one for the model.

        Args:
            file: The file, if it is open.

        Raises:
            RunFileError: The file is missing or has changed since it was read, or a number is out
                of bounds.
        """
        unpacked = self._unpack(file)
        table, found = self._split(unpacked), []
        for row, layer in enumerate(self.columns.layers):
            figures, errors, moved = table.list_numbers(row)
            own = self._model_fields(unpacked[0]) if layer is None else {}
            found.append(Row(self.step, layer, figures, errors, moved_elements=moved, **own))
        return found

    def find_histograms(self) -> dict[str, Histogram]:
        """Return the histograms of the model, by key."""
        return self._make_histograms(self._unpack(None)[0])

    def _unpack(self, file: BinaryIO | None) -> tuple[Numbers, NDArray[np.uint8]]:
        if file is None:
            with open_file(self.path) as opened:
                return self._unpack(opened)
        try:
            file.seek(self.start)
            numbers, codes = unpack_numbers(file.read(self.size), self.columns.count)
            self._check(numbers)
        except OSError as error:
            raise RunFileError(f"{self.path}: file cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise RunFileError(
                f"{self.path}: file is damaged or was replaced, line {self.line} is invalid "
                f"({error})"
            ) from None
        return numbers, codes

    def _check(self, numbers: Numbers) -> None:
        """Raise ValueError if a number is out of bounds."""
        columns = self.columns
        matrix = numbers[: columns.cells].reshape(columns.width, len(columns.layers))
        least, most = columns.bounds
        if ((matrix < least[:, None]) | (matrix > most[:, None])).any():  # NaN is neither
            raise ValueError("a figure or error is out of bounds")
        counts = numbers[columns.cells :]
        if not ((counts >= COUNT.least) & (counts <= ROUNDED * COUNT.most)).all():
            raise ValueError("a count of a histogram is out of bounds")

    def _split(self, unpacked: tuple[Numbers, NDArray[np.uint8]]) -> StepTable:
        cells, shape = self.columns.cells, (self.columns.width, len(self.columns.layers))
        numbers, codes = unpacked[0][:cells], unpacked[1][:cells]
        is_absent = codes.reshape(shape) == ABSENT
        return StepTable(self.step, self.columns, numbers.reshape(shape), is_absent)

    def _model_fields(self, numbers: Numbers) -> dict[str, Any]:
        return {
            "elements": self.elements,
            "own_seconds": self.own_seconds,
            "training_seconds": self.training_seconds,
            "skipped": self.skipped,
            "histograms": self._make_histograms(numbers),
        }

    def _make_histograms(self, numbers: Numbers) -> dict[str, Histogram]:
        found, start = {}, self.columns.cells
        for key, each in self.columns.histograms.items():
            found[key] = Histogram(each.first, tuple(numbers[start : start + each.bins].tolist()))
            start += each.bins
        return found


@dataclass(eq=False, slots=True)
class WrittenStep:
    """An observed step of a file of schema 1 or 2: rows in memory.

    Attributes:
        rows: A row for each layer; the last one may be that of the model.
    """

    rows: list[Row] = field(default_factory=list)

    def takes(self, row: Row) -> bool:
        """Return True if a row belongs to the same observed step."""
        return not self.rows or (
            row.step == self.step
            and self.rows[-1].layer is not None
            and all(row.layer != each.layer for each in self.rows)
        )

    @property
    def step(self) -> int:
        """Number of the step."""
        return self.rows[0].step

    @property
    def lines(self) -> int:
        """Number of lines in the file."""
        return len(self.rows)

    @property
    def layers(self) -> Sequence[str | None]:
        """Names of the layers in the order of the rows; None for the model."""
        return [row.layer for row in self.rows]

    @property
    def own_seconds(self) -> float:
        """Host time in seconds to observe the previous observed step; NaN if unknown."""
        return self.rows[-1].own_seconds

    @property
    def training_seconds(self) -> float:
        """Mean time in seconds of a training step without the observation; NaN if unknown."""
        return self.rows[-1].training_seconds

    @property
    def skipped(self) -> Mapping[str, int]:
        """Number of steps so far that moved no weight, by reason."""
        return self.rows[-1].skipped

    @property
    def histograms(self) -> Collection[str]:
        """Keys of the histograms of the model."""
        return self.rows[-1].histograms.keys()

    @property
    def figure_keys(self) -> Collection[str]:
        """Keys of the figures that any layer or the model has."""
        return dict.fromkeys(key for row in self.rows for key in row.figures)

    def decode(self, file: BinaryIO | None = None) -> StepTable:  # noqa: ARG002 - as PackedStep
        """Return the numbers of the step."""
        keys = tuple((row.layer, (*row.figures,), (*row.errors,)) for row in self.rows)
        columns, places = _find_columns(keys)
        numbers = np.full((columns.width, len(self.rows)), np.nan)
        is_absent = np.ones(numbers.shape, np.bool_)
        for index, (row, own) in enumerate(zip(self.rows, places, strict=True)):
            numbers[own, index] = [*row.figures.values(), *row.errors.values(), row.moved_elements]
            is_absent[own, index] = False
        return StepTable(self.step, columns, numbers, is_absent)

    def list_rows(self, file: BinaryIO | None = None) -> list[Row]:  # noqa: ARG002
        """Return the rows."""
        return self.rows

    def find_histograms(self) -> Mapping[str, Histogram]:
        """Return the histograms of the model, by key."""
        return self.rows[-1].histograms


ObservedStep = PackedStep | WrittenStep
"""An observed step, from which rows or a table are made when they are needed."""

_Keys = tuple[tuple[str | None, tuple[str, ...], tuple[str, ...]], ...]


@functools.lru_cache(maxsize=64)
def _find_columns(keys: _Keys) -> tuple[Columns, list[list[int]]]:
    """Return columns for rows with these layers and keys, and the columns of each row."""
    columns = Columns(
        tuple(layer for layer, _, _ in keys),
        tuple(dict.fromkeys(key for _, figures, _ in keys for key in figures)),
        tuple(dict.fromkeys(key for _, _, errors in keys for key in errors)),
        moved_elements=True,
    )
    figure_places, error_places = columns.figure_places, columns.error_places
    last = columns.width - 1
    places = [
        [*(figure_places[k] for k in figures), *(error_places[k] for k in errors), last]
        for _, figures, errors in keys
    ]
    return columns, places


def group_rows(rows: Iterable[Row]) -> list[WrittenStep]:
    """Return the observed steps to which rows belong, in their order."""
    steps: list[WrittenStep] = []
    for row in rows:
        if not steps or not steps[-1].takes(row):
            steps.append(WrittenStep())
        steps[-1].rows.append(row)
    return steps


def _open_files(steps: Iterable[ObservedStep]) -> Iterator[tuple[ObservedStep, BinaryIO | None]]:
    """Yield steps with their open files, each of which is opened once for steps in a row."""
    with ExitStack() as stack:
        path: Path | None = None
        file: BinaryIO | None = None
        for step in steps:
            if isinstance(step, PackedStep) and step.path != path:
                stack.close()
                path, file = step.path, stack.enter_context(open_file(step.path))
            yield step, file


def decode_steps(steps: Iterable[ObservedStep]) -> Iterator[StepTable]:
    """Yield the numbers of one observed step after the other.

    Raises:
        RunFileError: A file is missing or has changed since it was read, or a number is out of
            bounds.
    """
    for step, file in _open_files(steps):
        yield step.decode(file)


class StepRows(Sequence[Row]):
    """The rows of observed steps, which are read from the file when they are needed.

    Args:
        steps: The steps.
    """

    def __init__(self, steps: Sequence[ObservedStep]) -> None:
        self.steps = steps
        self._ends = [*itertools.accumulate(len(step.layers) for step in steps)]
        self._latest: tuple[int, Sequence[Row]] = (-1, ())  # the last step of which a row was read

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Row]:
        for step, file in _open_files(self.steps):
            yield from step.list_rows(file)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = operator.index(index) + (len(self) if index < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(f"index={index}: expected a row from 0 to {len(self) - 1:,}")
        step = bisect.bisect_right(self._ends, place)
        if step != self._latest[0]:
            self._latest = step, self.steps[step].list_rows()
        return self._latest[1][place - self._ends[step]]  # counted from the end
