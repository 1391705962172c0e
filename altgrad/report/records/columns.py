"""`Columns`: which numbers of an observed step are which, as a line of the run file declares it.

An observed step is a matrix with a row for each layer, the last one for the model, and a column for
each figure and standard error. The histograms of the model follow. A run declares columns once, and
again only for steps with others.

Read `packing` first, which packs the numbers of a step. `lines` comes next.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from altgrad.report.records.fields import COLUMNS_LINE, ERROR, MOVED_ELEMENTS, find_kind

ROUNDED = 1 + 2**-27
"""Largest factor by which packing changes a number."""


@dataclass(frozen=True)
class Bins:
    """The bins of a histogram of the model.

    Attributes:
        first: Exponent of the first bin.
        bins: Number of bins.
    """

    first: int
    bins: int


@dataclass(frozen=True, eq=False)
class Columns:
    """The meaning of the numbers of an observed step, by their places.

    Attributes:
        layers: Name of the layer of each row; None for the model.
        figures: Keys of the columns with figures.
        errors: Keys of the columns with standard errors, which follow.
        moved_elements: True if a last column has the number of elements that float32 has moved.
        histograms: The histograms that follow the matrix, by key.
    """

    layers: tuple[str | None, ...]
    figures: tuple[str, ...]
    errors: tuple[str, ...]
    moved_elements: bool
    histograms: Mapping[str, Bins] = field(default_factory=dict)

    @functools.cached_property
    def width(self) -> int:
        """Number of columns."""
        return len(self.figures) + len(self.errors) + self.moved_elements

    @functools.cached_property
    def cells(self) -> int:
        """Number of numbers in the matrix."""
        return len(self.layers) * self.width

    @functools.cached_property
    def count(self) -> int:
        """Number of numbers in a step, those of the histograms included."""
        return self.cells + sum(each.bins for each in self.histograms.values())

    @functools.cached_property
    def rows(self) -> dict[str | None, int]:
        """The row of each layer, by name; None for the model."""
        return {layer: row for row, layer in enumerate(self.layers)}

    @functools.cached_property
    def figure_places(self) -> dict[str, int]:
        """The column of each figure, by key."""
        return {key: place for place, key in enumerate(self.figures)}

    @functools.cached_property
    def error_places(self) -> dict[str, int]:
        """The column of each standard error, by key."""
        return {key: place for place, key in enumerate(self.errors, len(self.figures))}

    @functools.cached_property
    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The least and the largest number that each column allows, float64 (columns)."""
        kinds = [*map(find_kind, self.figures), *(ERROR for _ in self.errors)]
        kinds += [MOVED_ELEMENTS] * self.moved_elements
        # Shares of 1 are exact. Other numbers at their bound may have been rounded up.
        most = [ROUNDED * kind.most if kind.most > 1 else kind.most for kind in kinds]
        return np.array([kind.least for kind in kinds]), np.array(most)

    def as_line(self, number: int) -> bytes:
        """Return the line that declares these columns under a number."""
        value = {
            "number": number,
            "layers": self.layers,
            "figures": self.figures,
            "errors": self.errors,
            "moved_elements": self.moved_elements,
            "histograms": {
                k: {"first": b.first, "bins": b.bins} for k, b in self.histograms.items()
            },
        }
        text = json.dumps({"columns": value}, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "backslashreplace") + b"\n"

    @classmethod
    def from_json(cls, value: object) -> tuple[int, Columns]:
        """Read the line that declares columns.

        Args:
            value: The line, as JSON has it.

        Returns:
            The number under which columns are declared, and the columns.

        Raises:
            FieldError: A key is missing, or a value is invalid.
        """
        known = COLUMNS_LINE.parse(value)["columns"]
        known["histograms"] = {key: Bins(**each) for key, each in known["histograms"].items()}
        return known.pop("number"), cls(**known)
