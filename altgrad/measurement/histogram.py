"""`Histogram`: counts by powers of two, as plain numbers.

This file does not import torch, so that reports start fast. `figures` reads histograms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


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
