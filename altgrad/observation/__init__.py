"""Observe the steps of a torch optimizer: weights before and after, and the gradients applied.

Read the files in the order in which a step passes through them:

1. `optimizers`: find the real optimizer under a wrapper, and refuse what cannot be observed.
2. `step_hooks`: learn when a step begins, when its gradients are final, and when it ends.
3. `dtensor`: find the local shard of a sharded parameter.
4. `readable`: leave out parameters of a class that lacks what reading them needs.
5. `parameter_names`: give each parameter the name that its user wrote.
6. `snapshots`: copy weights and gradients before the step, into memory that is reused.
7. `step`: read the weights after the step, and describe it as a `StepOutcome`.
8. `grad_scaler`: notice the steps that a GradScaler skips.
9. `attachments`: keep all hooks of one observer, and remove them together.
10. `observer`: put all of these together in `StepObserver`.

Five files stand beside them. `rules` says which layers are observed, and how. `stored` records
which weights a recipe keeps in a low-precision format. `other_steps` finds optimizers that step the
same weights and are not observed. `weight_sample` and `bypass_reason` find weights that moved
although no step was seen, and the reason.
"""

from altgrad.observation.dtensor import is_sharded_module
from altgrad.observation.observer import StepObserver
from altgrad.observation.step import OptimizerStep, SkipReason, StepOutcome

__all__ = ["OptimizerStep", "SkipReason", "StepObserver", "StepOutcome", "is_sharded_module"]
