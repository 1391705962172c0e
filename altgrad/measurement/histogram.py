"""`Histogram`: counts by powers of two, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Histogram(NamedTuple):
    """How many elements lie in each octave; the first bin and the last have no end.

    Attributes:
        first: log2 of where the first bin begins; bin k is from 2**(first + k) to twice that.
        counts: Of each bin; of a model estimated from samples, and no whole numbers.
    """

    first: int
    counts: Sequence[float]
