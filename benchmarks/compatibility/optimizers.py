"""Rows of optimizers: each class of torch.optim and of the installed libraries."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.compatibility.trial import EXACT, NOT_RUN, Finding, Row, try_run
from tests.step_truth.designs import Design
from tests.step_truth.plain_modes import Sparse, batches
from tests.step_truth.recording import Entry, Journal

LIBRARIES = {
    "torch.optim": "torch",
    "torchao.optim": "torchao",
    "optimi": "torch-optimi",
    "bitsandbytes.optim": "bitsandbytes",
    "schedulefree": "schedulefree",
    "heavyball": "heavyball",
    "pytorch_optimizer": "pytorch-optimizer",
}
"""The modules whose optimizers are run, and the distribution that each is part of."""

RATE = 1e-3


class Net(nn.Module):
    """A net with matrices large enough that 8-bit optimizers pack their states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(4, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 2)
        )

    def forward(self, batch: Tensor) -> Tensor:
        return self.layers(batch)


class Way(NamedTuple):
    """A way to use an optimizer; a class is run in the first way in which it trains.

    Attributes:
        name: What is special about it, for the page.
        make: Function of the class and a model that returns the optimizer.
        net: Class of the model.
        steps: Number of steps.
        with_closure: If True, a closure computes gradients inside the step.
        with_graph: If True, gradients can be differentiated once more.
    """

    name: str
    make: Callable[[Any, nn.Module], Optimizer]
    net: type[nn.Module] = Net
    steps: int = 4
    with_closure: bool = False
    with_graph: bool = False


def make_with(**options: Any) -> Callable[[Any, nn.Module], Optimizer]:
    """Return a function that makes an optimizer of all parameters, with some options."""

    def make(kind: Any, net: nn.Module) -> Optimizer:
        return kind(net.parameters(), **options)

    return make


def make_for_matrices(kind: Any, net: nn.Module) -> Optimizer:
    return kind([p for p in net.parameters() if p.ndim == 2], lr=RATE)


def make_with_muon_groups(kind: Any, net: nn.Module) -> Optimizer:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    others = [p for p in net.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
    return kind(groups, lr=RATE)


def make_for_model(kind: Any, net: nn.Module) -> Optimizer:
    return kind(net, lr=RATE)


def make_around_adamw(kind: Any, net: nn.Module) -> Optimizer:
    return kind(AdamW(net.parameters(), lr=RATE))


make_plain = make_with(lr=RATE)
make_with_adamw_inside = make_with(base_optimizer=AdamW, lr=RATE)
WAYS = (
    Way("", make_plain),
    Way("", make_plain, steps=12),
    Way("", make_with()),
    Way("with momentum", make_with(lr=RATE, momentum=0.9)),
    Way("matrices alone", make_for_matrices),
    Way("with `use_muon` in its groups", make_with_muon_groups),
    Way("with a closure", make_plain, with_closure=True),
    Way("with a closure", make_plain, steps=12, with_closure=True),
    Way("with `create_graph=True`", make_plain, with_graph=True),
    Way("of sparse gradients", make_plain, Sparse),
    Way("", make_for_model),
    Way("around AdamW", make_around_adamw),
    Way("around AdamW, with a closure", make_around_adamw, with_closure=True),
    Way("around AdamW, with a closure", make_with_adamw_inside, with_closure=True),
)


def train_in(way: Way, kind: type[Optimizer], design: Design, _: Path) -> Journal:
    """Train for some steps, with clones around each."""
    net = way.net()
    journal = Journal(net)
    optimizer = way.make(kind, net)
    if hasattr(optimizer, "train"):  # optimizers without a schedule step in this mode alone
        optimizer.train()
    with torch.compiler.set_stance("force_eager"), design.watch(net, optimizer):
        for batch in batches(way.steps):
            step_between_clones(journal, net, optimizer, batch, way)
    return journal


def step_between_clones(
    journal: Journal, net: nn.Module, optimizer: Any, batch: Tensor, way: Way
) -> None:
    """Step, and note the weights and gradients that the step found, and the weights it left."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def compute_loss() -> Tensor:
        optimizer.zero_grad()
        return net(batch).square().mean() + net(batch).sum()

    def backward() -> Tensor:
        loss = compute_loss()
        loss.backward(create_graph=way.with_graph)
        found.update({} if found else journal.copy(net.parameters()))
        return loss

    if way.with_closure:
        optimizer.step(torch.enable_grad()(backward))
    elif hasattr(optimizer, "fused_backward"):  # it steps, and gradients are gone at once
        none = torch.zeros(0)
        found.update({name: (p.detach().clone(), none) for name, p in net.named_parameters()})
        optimizer.fused_backward(compute_loss(), RATE)
    else:
        backward()
        optimizer.step()
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    after = {n: p.detach().clone() for n, p in net.named_parameters() if id(p) in stepped}
    journal.steps.append({n: Entry(*found[n], after[n]) for n in found if n in after})


def try_class(kind: type[Optimizer], ways: tuple[Way, ...] = WAYS) -> Finding:
    """Run a class in the first way in which it trains, and say which.

    Args:
        kind: The class.
        ways: The ways to try, in this order.

    Returns:
        What came out; of the first way, if the class trains in none.
    """
    findings = []
    for way in ways:
        result, note = try_run(partial(train_in, way, kind))
        parts = [each for each in (way.name, note) if each]
        findings.append(Finding(result, ": ".join(parts) if result != EXACT else "; ".join(parts)))
        if result != NOT_RUN:
            return findings[-1]
    return findings[0]


def find_classes(module: Any) -> dict[str, type[Optimizer]]:
    """Return the optimizers that a module offers, by name."""
    return {
        name: kind
        for name, kind in sorted(vars(module).items())
        if inspect.isclass(kind)
        and issubclass(kind, Optimizer)
        and kind is not Optimizer
        and not inspect.isabstract(kind)
        and "Base" not in name
        and (name == "_AdamW" or not name.startswith("_"))  # torchao's stochastic rounding
    }


def list_library_rows(module: str, distribution: str) -> list[Row]:
    group = f"Optimizers of {module}"
    try:
        found = importlib.import_module(module)
    except ImportError:
        reason = Finding(NOT_RUN, f"{distribution} is not installed")
        return [Row(group, "all", lambda: reason)]
    return [
        Row(group, f"`{name}`", partial(try_class, kind))
        for name, kind in find_classes(found).items()
    ]


def list_rows() -> list[Row]:
    return [row for each in LIBRARIES.items() for row in list_library_rows(*each)]
