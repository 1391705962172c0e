"""Faults of which another process tells the user."""

from __future__ import annotations


class FaultElsewhereError(RuntimeError):
    """Another process has failed to observe, and says so; here it is only to be heeded."""
