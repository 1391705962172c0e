"""Every named format as a test parameter; the quick suite uses the most informative ones."""

import pytest

from altgrad.quantization import FORMATS
from tests import oracles

QUICK = {"bf16", "fp16", "e4m3fn", "e5m2", "e2m1", "e0m7", "e7m0"}
"""Formats of 16, 8 and 4 bits, with and without inf and NaN, and the ends of E + M = 7."""

EVERY_FORMAT = [
    pytest.param(format, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for name, format in FORMATS.items()
]
WITH_ML_DTYPE = [
    param for param in EVERY_FORMAT if oracles.ml_dtypes_of(param.values[0]) is not None
]
