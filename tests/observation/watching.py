"""Small runs for a `StepObserver`, and helpers to compare their steps."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad import OptimizerStep
from altgrad.observation.snapshots import Snapshot

RATE = 0.5
NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")
INF = float("inf")


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def training(kind: type[Optimizer] = SGD, **options) -> tuple[nn.Module, Optimizer]:
    model = make_model()
    return model, kind(model.parameters(), **{"lr": RATE, **options})


def set_gradients(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def clone_weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def clone_gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def clone(step: OptimizerStep) -> OptimizerStep:
    fields = ("before", "gradients", "after")
    return replace(step, **{f: tuple(t.clone() for t in getattr(step, f)) for f in fields})


class Kept(list):
    """A callback that keeps a copy of each step."""

    def __call__(self, step: OptimizerStep) -> None:
        self.append(clone(step))


class Held:
    """Weak references to copies, which count the copies that are still alive."""

    def __init__(self) -> None:
        self._references: list[weakref.ref] = []

    def note(self, step: OptimizerStep) -> None:
        self._references += [weakref.ref(t) for t in (*step.before, *step.gradients)]

    def note_taken(self, taken: list[Snapshot]) -> list[Snapshot]:
        for each in taken:
            self._references += [weakref.ref(each.before), weakref.ref(each.gradient)]
        return taken

    def count(self) -> int:
        assert self._references
        return len({id(t) for reference in self._references if (t := reference()) is not None})


def assert_exact(
    step: OptimizerStep, model: nn.Module, optimizer: Optimizer, index: int, seed: int
) -> None:
    """Assert that a step shows the gradients of a seed and the current weights."""
    twin = make_model()
    set_gradients(twin, seed)
    assert step.names == NAMES
    assert equal(step.gradients, clone_gradients(twin))
    assert equal(step.after, clone_weights(model))
    assert step.optimizer is optimizer
    assert step.index == index
    assert step.found_inf is None


def hook_count(optimizer: Optimizer) -> int:
    # torch has no public names for its hooks: torch/optim/optimizer.py.
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


@contextmanager
def counted_operations() -> Iterator[list[str]]:
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Count():
        yield names


def scaled_step(scaler: GradScaler, model: nn.Module, optimizer: Optimizer, factor: float) -> None:
    """Make a step under a GradScaler, with gradients that are `factor` times its scale."""
    scaler.scale(torch.ones(()))  # GradScaler makes its scale on first use
    for p in model.parameters():
        p.grad = torch.full_like(p, factor * scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()


def raises(*_: object) -> None:
    raise ArithmeticError("of the user")
