"""What an optimizer step did, as it happened; torch only."""

from altgrad.observation.observer import SkipReason, StepObserver
from altgrad.observation.optimizer_step import OptimizerStep

__all__ = ["OptimizerStep", "SkipReason", "StepObserver"]
