"""Average figures, some of which may have no value."""

from __future__ import annotations

import math
from collections.abc import Iterable


def average_finite(values: Iterable[float]) -> float:
    """Return the mean of the finite values; NaN without finite values."""
    finite = [value for value in values if math.isfinite(value)]
    # Divided by a power of two first, so that a sum of large values does not overflow.
    exponent = len(finite).bit_length()
    total = math.fsum(math.ldexp(value, -exponent) for value in finite)
    return total / math.ldexp(len(finite), -exponent) if finite else math.nan
