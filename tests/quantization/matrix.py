"""Every named format as a parameter of a test, those that say most in the quick suite."""

import pytest

from altgrad.quantization import FORMATS
from tests import oracles

QUICK = {"bf16", "fp16", "e4m3fn", "e5m2", "e2m1", "e0m7", "e7m0"}
"""16, 8 and 4 bits, with and without inf and NaN, and both ends of the family E + M = 7."""

EVERY_FORMAT = [
    pytest.param(format, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for name, format in FORMATS.items()
]
WITH_ML_DTYPE = [
    param for param in EVERY_FORMAT if oracles.ml_dtypes_of(param.values[0]) is not None
]
