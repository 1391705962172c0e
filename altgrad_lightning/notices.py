"""`Notices`: warn the user of the callback, once for each notice.

This file stands alone. `session` and `callback` give the notices.
"""

from __future__ import annotations

import warnings


class Notices:
    """The notices of a `PrecisionMonitor` to its user.

    A copy or pickle remembers the notices given before, and does not repeat them.
    """

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn(self, notice: str) -> None:
        """Warn ``PrecisionMonitor {notice}``, unless the same notice was given before."""
        if notice not in self._given:
            self._given.add(notice)
            warnings.warn(f"PrecisionMonitor {notice}", stacklevel=2)
