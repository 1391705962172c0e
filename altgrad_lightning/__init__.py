"""AltGrad for Lightning: add `PrecisionMonitor` to the Trainer's callbacks."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from altgrad_lightning.callback import PrecisionMonitor

__all__ = ["PrecisionMonitor"]

if not TYPE_CHECKING:  # or mypy would take every name for Any

    def __getattr__(name: str) -> object:
        """Import `PrecisionMonitor` when it is first used, and Lightning with it (PEP 562)."""
        if name != "PrecisionMonitor":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from altgrad_lightning.callback import PrecisionMonitor

        return PrecisionMonitor

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
