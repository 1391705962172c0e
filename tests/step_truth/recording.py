"""The truth about a step: optimizers that write down what they find, apply and leave.

Nothing here uses hooks or AltGrad. A recording optimizer evaluates the closure by itself, copies
weights and gradients, lets its base class step without a closure, and copies the weights again.
Where the base class must have the closure (LBFGS, `needs_closure`), it copies when that returns.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Entry(NamedTuple):
    before: Tensor
    gradient: Tensor
    after: Tensor


Step = dict[str, Entry]


class Journal:
    """A journal of all steps in a run by recording optimizers, in their order in time."""

    def __init__(self, module: nn.Module) -> None:
        # The names are read before a wrapper can change them.
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.steps: list[Step] = []

    def optimizer(self, kind: type[torch.optim.Optimizer], *args: Any, **kwargs: Any) -> Any:
        """Return a recording optimizer of this kind."""
        recorder = _recording(kind)(*args, **kwargs)
        recorder.journal = self
        return recorder

    def copy(self, parameters: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            self.names[p]: (p.detach().clone(), p.grad.detach().to_dense().clone())
            for p in parameters
            if p.grad is not None and p in self.names
        }


def _recording(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    # The step of the base class without the hooks that torch puts around it once the class has
    # been used: only the row of the nested steps is to call hooks twice.
    base_step = kind.step.__wrapped__ if getattr(kind.step, "hooked", False) else kind.step

    class Recording(kind):
        journal: Journal

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            parameters = [p for group in self.param_groups for p in group["params"]]
            found: dict[str, tuple[Tensor, Tensor]] = {}

            def find() -> Any:
                loss = None
                if closure is not None:
                    with torch.enable_grad():
                        loss = closure()
                if not found:
                    found.update(self.journal.copy(parameters))
                return loss

            if kind is torch.optim.LBFGS or getattr(kind, "needs_closure", False):
                loss = base_step(self, find)
            else:
                loss = find()
                base_step(self)
            self.write_down(parameters, found)
            return loss

        def write_down(
            self, parameters: list[Tensor], found: dict[str, tuple[Tensor, Tensor]]
        ) -> None:
            left = self.journal.copy(parameters)
            # A fused optimizer under a GradScaler unscales the gradients by itself, in place.
            unscaled = left if getattr(self, "grad_scale", None) is not None else found
            skipped = getattr(self, "found_inf", None)
            if skipped is not None and skipped.item():
                return
            step = {
                name: Entry(found[name][0], unscaled[name][1], left[name][0])
                for name in found
                if self.get_learning_rate(name) != 0
            }
            if step:
                self.journal.steps.append(step)

        def get_learning_rate(self, name: str) -> Any:
            return next(
                group.get("lr")
                for group in self.param_groups
                for p in group["params"]
                if self.journal.names.get(p) == name
            )

    return Recording


def difference(seen: list[Step], true: list[Step]) -> str | None:
    """Describe the first difference; None if all steps are equal, bit for bit."""
    for number, (mine, theirs) in enumerate(zip(seen, true, strict=False)):
        if set(mine) != set(theirs):
            return f"step {number}: {sorted(mine)} instead of {sorted(theirs)}"
        for name, entry in theirs.items():
            for what, a, b in zip(Entry._fields, mine[name], entry, strict=True):
                if a.dtype != b.dtype or not torch.equal(a, b):
                    return f"step {number}: {what} of {name} differs"
    if len(seen) != len(true):
        return f"{len(seen)} steps instead of {len(true)}"
    return None
