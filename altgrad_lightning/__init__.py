"""AltGrad for Lightning: add `PrecisionMonitor` to the Trainer's callbacks."""

from altgrad_lightning.callback import PrecisionMonitor

__all__ = ["PrecisionMonitor"]
