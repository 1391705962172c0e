"""`Histogram`: counts by octave, that is by power of two, as plain numbers.

`kernel` counts, and `figures` returns histograms. This file does not import torch, so that reports
start fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

OCTAVES = 64
"""Number of bins of a histogram, one for each power of two.

The first bin also counts all smaller values, the last bin all larger ones.
"""
FIRST_STEPS_OCTAVE = -32
"""Exponent of the first bin of the histogram ``"steps"``: abs(update) / spacing of the format.

Bins reach from 2**-32 to 2**32. An update is below half of a spacing, 2**-1, if it stalls.
"""
FIRST_WEIGHTS_OCTAVE = -48
"""Exponent of the first bin of the histogram ``"weights"``: abs(weight).

Bins reach from 2**-48 to 2**16, and so contain the ranges of the FP8 formats e4m3fn and e5m2.
"""


class Histogram(NamedTuple):
    """A number of elements for each octave of a magnitude, from a power of two up to the next.

    Attributes:
        first: Exponent of the first bin. Bin k counts magnitudes from 2**(first + k) up to twice
            that, the end excluded. The first bin also counts all smaller ones, the last bin all
            larger ones.
        counts: Number of elements in each of 64 bins. Those of a sampled layer are elements of the
            sample. Those of a model with sampled layers are estimates for all elements, and not
            whole numbers.
    """

    first: int
    counts: Sequence[float]
