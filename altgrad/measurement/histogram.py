"""`Histogram`: counts by powers of two, as plain numbers.

This file does not import torch, so that reports start fast. `figures` reads histograms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

OCTAVES = 64
"""Number of bins of a histogram by powers of two; the first and the last bin are open."""
FIRST_STEPS_OCTAVE = -32
"""Exponent of the first bin of abs(update) / stiffness; the histogram of ULPs begins at 0."""
FIRST_WEIGHTS_OCTAVE = -48
"""Exponent of the first bin of abs(weight): 2**-48 to 2**16 holds the ranges of narrow formats."""


class Histogram(NamedTuple):
    """A number of elements for each octave; the first and the last bin are open.

    Attributes:
        first: Exponent of the first bin. Bin k holds magnitudes from 2**(first + k) up to twice
            that, the end excluded.
        counts: Number of elements in each bin. Counts that are estimated from samples are not
            whole numbers.
    """

    first: int
    counts: Sequence[float]
