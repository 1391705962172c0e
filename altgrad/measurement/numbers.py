"""`Numbers`: the type of all that is on the host. What is a tensor on a device is NumPy there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
"""Sums, maxima or figures on the host."""
