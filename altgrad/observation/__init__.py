"""What an optimizer step did, as it happened.

`observer` puts together when a step begins and ends (`step_hooks`), what is copied of it
(`snapshots`), what the parameters are called (`parameter_names`), what of a sharded one lies here
(`dtensor`), which optimizers can be observed (`optimizers`) and what a GradScaler skips
(`grad_scaler`), and shows each `step`. `rules` say which layers are observed, and how; `stored`
knows which weights a recipe keeps on the grid of a format.
"""

from altgrad.observation.dtensor import is_sharded_module
from altgrad.observation.observer import SkipReason, StepObserver
from altgrad.observation.step import OptimizerStep

__all__ = ["OptimizerStep", "SkipReason", "StepObserver", "is_sharded_module"]
