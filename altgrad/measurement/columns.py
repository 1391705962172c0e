"""`LayerStatistics`: what one parameter did in one step, as sums and maxima that merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OCTAVES = 64
"""Bins of a histogram of powers of two, the first and the last without an end."""
FIRST_STEPS_OCTAVE = -32
"""Exponent of the first bin of abs(update) / stiffness; that of ULPs begins at 0."""


def _octaves(name: str) -> tuple[str, ...]:
    """All but the first, which holds the rest of those that moved."""
    return tuple(f"{name}[{bin}]" for bin in range(1, OCTAVES))


# What the row kernel sums, in its order: first plain sums, then sums of squares. An element that is
# not finite in one of the three tensors is in none of them.
ROW_SUMS = (
    "finite",
    "nonzero_weights",
    "moved",  # update ≠ 0
    "ever_moved",  # in this observed step or one before it, where the elements are tracked
    "ulps",
    "gradients",  # elements that have one
    "nonzero_gradients",
    "moved_with_gradient",  # of those with a gradient ≠ 0
    "paired_gradient_abs",  # over weights ≠ 0, for the correlation with the stiffness
)
ROW_SQUARES = ("weight_sq", "update_sq", "update_4th", "gradient_sq", "paired_gradient_sq")
ROW_MAXIMA = ("ulps", "paired_gradient_abs")
ROW_MINIMA = ("paired_gradient_abs",)

FORMAT_ROW_SUMS = (
    # Over weights ≠ 0:
    "stiffness",
    "stiffness_gradient",
    "gradient_per_stiffness",
    "gradient_below_stiffness",
    # Over all weights:
    "grid_error",
    "off_grid",
    "stored_nonzero",
    "stored_normal",
    "saturated",
    # What-if, over updates ≠ 0 of weights that are stored finer than the format:
    "visible",
    "effective",  # effective update ≠ 0
    "ever_effective",
    "kept",  # Σ effective · update
    "kept_update_cubed",  # Σ effective · update³; this and the next are for the standard error
    "stochastic_move",
    "stochastic_variance",
)
FORMAT_ROW_SQUARES = (
    "stiffness_sq",
    "grid_error_sq",
    "kept_sq",  # Σ (effective · update)²
    "lost_sq",  # Σ (effective − update)²
)
FORMAT_ROW_MAXIMA = ("grid_error", "stiffness")
FORMAT_ROW_MINIMA = FORMAT_ROW_MAXIMA
WHAT_IF = (*FORMAT_ROW_SUMS[FORMAT_ROW_SUMS.index("visible") :], "kept_sq", "lost_sq")
"""Nothing where updates that stalled could not be seen."""
JUDGED = {
    "judged": "moved",
    "ever_judged": "ever_moved",
    "judged_sq": "update_sq",
    "judged_4th": "update_4th",
}
"""Sums of the parameter over the updates of which a format was judged, by name."""

SUMS = (
    "population",  # elements that those measured stand for: all of the parameter's
    "elements",  # that were measured
    *(*ROW_SUMS, *ROW_SQUARES),
    *_octaves("ulps"),  # of those that moved
)
POPULATION, ELEMENTS = 0, 1
"""Positions in SUMS."""
FORMAT_SUMS = (*FORMAT_ROW_SUMS, *FORMAT_ROW_SQUARES, *JUDGED, *_octaves("steps"))
MAXIMA = (*ROW_MAXIMA, *(f"minus_{name}" for name in ROW_MINIMA))
FORMAT_MAXIMA = (*FORMAT_ROW_MAXIMA, *(f"minus_{name}" for name in FORMAT_ROW_MINIMA))


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums and maxima of one parameter's step, for itself and for each format.

    Those of two parts of a parameter, of two layers, ranks or steps merge into those of the whole,
    so that every metric can be taken of any of them. Counts below 2**53 and maxima are exact.

    Attributes:
        formats: Names of the formats, in the order of their sums.
        sums: float64; the SUMS of the parameter, then the FORMAT_SUMS of each format.
        maxima: float64; the MAXIMA, then the FORMAT_MAXIMA; 0 or −inf where there was no element.
    """

    formats: tuple[str, ...]
    sums: Tensor
    maxima: Tensor

    def __post_init__(self) -> None:
        expected = (sum_count(len(self.formats)),), (max_count(len(self.formats)),)
        shapes = tuple(self.sums.shape), tuple(self.maxima.shape)
        if shapes != expected:
            raise ValueError(
                f"sums and maxima of {len(self.formats)} formats have shapes {shapes[0]} and "
                f"{shapes[1]}; expected {expected[0]} and {expected[1]}"
            )

    @classmethod
    def empty(cls, formats: Sequence[str], device: torch.device | None = None) -> LayerStatistics:
        """Those of no element, with which every merge gives the other."""
        return cls(
            formats=tuple(formats),
            sums=torch.zeros(sum_count(len(formats)), dtype=torch.float64, device=device),
            maxima=torch.full(
                (max_count(len(formats)),), -torch.inf, dtype=torch.float64, device=device
            ),
        )

    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """Those of both together.

        Raises:
            ValueError: They are of different formats.
        """
        if self.formats != other.formats:
            raise ValueError(f"statistics of {self.formats} do not merge with {other.formats}")
        return LayerStatistics(
            self.formats, self.sums + other.sums, torch.maximum(self.maxima, other.maxima)
        )

    def weighted(self) -> LayerStatistics:
        """As if the elements measured were all that they stand for; no change if they are.

        Before layers merge: else one of a million weights would count as much as one of a
        thousand of which as many were sampled.
        """
        population, elements = self.sums[0], self.sums[1]
        factor = torch.where(elements > 0, population / elements, 1.0)
        sums = self.sums * factor
        sums[0] = population
        return LayerStatistics(self.formats, sums, self.maxima)


def pack(statistics: Sequence[LayerStatistics]) -> tuple[Tensor, Tensor]:
    """All of them in one vector of sums and one of maxima, to be reduced over ranks at once."""
    if not statistics:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    return torch.cat([s.sums for s in statistics]), torch.cat([s.maxima for s in statistics])


def unpack(
    sums: Tensor, maxima: Tensor, formats: Sequence[Sequence[str]]
) -> tuple[LayerStatistics, ...]:
    """The reverse of `pack`, given the formats of each.

    Raises:
        ValueError: The vectors are not of the length that these formats make.
    """
    counts = [len(names) for names in formats]
    lengths = [sum_count(count) for count in counts], [max_count(count) for count in counts]
    if (sums.numel(), maxima.numel()) != (sum(lengths[0]), sum(lengths[1])):
        raise ValueError(
            f"sums and maxima of {len(counts)} layers have {sums.numel()} and {maxima.numel()} "
            f"elements; expected {sum(lengths[0])} and {sum(lengths[1])}"
        )
    parts = zip(
        formats, torch.split(sums, lengths[0]), torch.split(maxima, lengths[1]), strict=True
    )
    return tuple(LayerStatistics(tuple(names), *vectors) for names, *vectors in parts)


def sum_count(formats: int) -> int:
    """Length of the vector of sums for so many formats."""
    return len(SUMS) + formats * len(FORMAT_SUMS)


def max_count(formats: int) -> int:
    """Length of the vector of maxima for so many formats."""
    return len(MAXIMA) + formats * len(FORMAT_MAXIMA)
