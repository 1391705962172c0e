"""`Notices`: warn the user of a `PrecisionMonitor`, once in a training for each sentence.

Nothing needs to be read before this file. `session` and `callback` give the notices.
"""

from __future__ import annotations

import warnings


class Notices:
    """A giver of warnings by a `PrecisionMonitor`, which gives each only once in a training."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def warn(self, notice: str) -> None:
        """Warn the user with ``PrecisionMonitor {notice}``, unless the notice was given before."""
        if notice not in self._given:
            self._given.add(notice)
            # Python remembers in this variable which warnings it has shown, and would not show them
            # again in a later training: https://docs.python.org/3/library/warnings.html
            globals().get("__warningregistry__", {}).clear()
            warnings.warn(f"PrecisionMonitor {notice}", stacklevel=1)
