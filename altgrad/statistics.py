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
    return tuple(f"{name}[{bin}]" for bin in range(OCTAVES))


# An element that is not finite in one of the three tensors is in the first two sums only.
SUMS = (
    "elements",
    "nonfinite",
    "weight_sq",
    "nonzero_weights",
    "update_sq",
    "update_4th",
    "moved",  # update ≠ 0
    "ulps",
    "gradients",  # elements that have one
    "gradient_sq",
    "nonzero_gradients",
    "unmoved",  # of those with a gradient ≠ 0
    # Over weights ≠ 0, for the correlation with the stiffness, which they alone have:
    "paired_gradients",
    "paired_gradient_abs",
    "paired_gradient_sq",
    *_octaves("ulps"),  # of those that moved
)
MAXIMA = ("ulps", "paired_gradient_abs", "minus_paired_gradient_abs")

FORMAT_SUMS = (
    # Over weights ≠ 0:
    "stiffness",
    # Over weights ≠ 0 that have a gradient:
    "paired_stiffness",
    "paired_stiffness_sq",
    "stiffness_gradient",
    "gradient_per_stiffness",
    "gradient_below_stiffness",
    # Over all weights:
    "grid_error",
    "grid_error_sq",
    "on_grid",
    "underflow",
    "saturated",
    "subnormal",
    # What-if, over updates ≠ 0 of weights that are stored finer than the format:
    "judged",
    "judged_sq",
    "stalled",
    "visible",
    "kept",  # Σ effective · update
    "lost_sq",  # Σ (effective − update)²
    "kept_sq",  # Σ (effective · update)²; this and the next are for the standard error
    "kept_update_cubed",  # Σ effective · update³
    "judged_4th",
    "stochastic_move",
    "stochastic_variance",
    *_octaves("steps"),
)
FORMAT_MAXIMA = (
    "grid_error",
    "minus_grid_error",
    "stiffness",
    "minus_stiffness",
    "paired_stiffness",
    "minus_paired_stiffness",
)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Sums and maxima of one parameter's step, for itself and for each format.

    Those of two parts of a parameter, of two layers, ranks or steps merge into those of the whole,
    so that every metric can be taken of any of them. Counts below 2**53 and maxima are exact.

    Attributes:
        formats: Names of the formats, in the order of their sums.
        sums: float64; the SUMS of the parameter, then the FORMAT_SUMS of each format.
        maxima: float64; the MAXIMA, then the FORMAT_MAXIMA; −inf where there was no element.
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

    def weighted(self, factor: float) -> LayerStatistics:
        """As if each element were `factor` elements: a sample, weighted to its parameter."""
        return LayerStatistics(self.formats, self.sums * factor, self.maxima)


def sum_count(formats: int) -> int:
    """Length of the vector of sums for so many formats."""
    return len(SUMS) + formats * len(FORMAT_SUMS)


def max_count(formats: int) -> int:
    """Length of the vector of maxima for so many formats."""
    return len(MAXIMA) + formats * len(FORMAT_MAXIMA)
