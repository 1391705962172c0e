"""`Numbers`: the type of sums, maxima and figures on the host, a NumPy array of float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
"""Sums, maxima or figures (values of metrics) on the host, float64 of any shape."""
