"""What an optimizer step did, as it happened; torch only."""

from altgrad.observation.observer import SkipReason, StepObserver
from altgrad.observation.step import OptimizerStep

__all__ = ["OptimizerStep", "SkipReason", "StepObserver"]
