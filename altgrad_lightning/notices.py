"""`Notices`: what the callback warns of, each message once."""

from __future__ import annotations

import warnings


class Notices:
    """Warnings of `PrecisionMonitor`; a message that was said before is not repeated.

    A copy or pickle remembers what was said.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, message: str) -> None:
        """Warn ``PrecisionMonitor {message}``, unless that was said before."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"PrecisionMonitor {message}", stacklevel=2)
