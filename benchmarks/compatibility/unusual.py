"""Rows of steps that are not those of an attached optimizer, or not its steps alone."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from benchmarks.compatibility.trial import Row, make_rows
from tests.step_truth.designs import Design
from tests.step_truth.modes import Run
from tests.step_truth.plain_modes import batches, compute_loss, network
from tests.step_truth.recording import Entry, Journal

STEPS = 4
GROUP = "Steps that the attached optimizer does not make"


def run_loop(prepare: Callable[[Any, Any, Any], Callable[[], object]]) -> Run:
    """Return a run that calls something after each step of the attached optimizer.

    Args:
        prepare: Function of the journal, the model and the optimizer, called before `attach`, that
            returns what to call after each step.
    """

    def run(design: Design, _: Path) -> Journal:
        net = network()
        journal = Journal(net)
        optimizer = journal.optimizer(SGD, net.parameters(), lr=0.01)
        call = prepare(journal, net, optimizer)
        with design.watch(net, optimizer):
            for batch in batches(STEPS):
                optimizer.zero_grad()
                compute_loss(net, batch).backward()
                optimizer.step()
                call()
        return journal

    return run


def add_second(journal: Journal, net: nn.Module, _: Optimizer) -> Callable[[], object]:
    return journal.optimizer(AdamW, net[0].parameters(), lr=0.01).step


def step_compiled(journal: Journal, net: nn.Module, _: Optimizer) -> Callable[[], object]:
    second = journal.optimizer(AdamW, net[0].parameters(), lr=0.01)
    return torch.compile(second.step, backend="eager")


def clamp_weights(_: Journal, net: nn.Module, __: Optimizer) -> Callable[[], object]:
    @torch.no_grad()
    def clamp() -> None:
        for parameter in net.parameters():
            parameter.clamp_(-0.3, 0.3)

    return clamp


def swap_average(_: Journal, net: nn.Module, __: Optimizer) -> Callable[[], object]:
    """Evaluate with averaged weights, and put those of the training back."""
    average = AveragedModel(net)

    @torch.no_grad()
    def swap() -> None:
        average.update_parameters(net)
        own = [p.clone() for p in net.parameters()]
        for parameter, other in zip(net.parameters(), average.parameters(), strict=True):
            parameter.copy_(other)
        for parameter, other in zip(net.parameters(), own, strict=True):
            parameter.copy_(other)

    return swap


def load_state(_: Journal, net: nn.Module, optimizer: Optimizer) -> Callable[[], object]:
    def load() -> None:
        net.load_state_dict({n: each.clone() for n, each in net.state_dict().items()})
        optimizer.load_state_dict(optimizer.state_dict())

    return load


def step_in_backward(design: Design, _: Path) -> Journal:
    """Step by optimizers that torch calls inside the backward pass; attach another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its package uses TorchScript
        # torch has no public name for it: torch/distributed/optim/apply_optimizer_in_backward.py
        from torch.distributed.optim import _apply_optimizer_in_backward

    def make(net: nn.Module) -> Optimizer:
        _apply_optimizer_in_backward(SGD, net.parameters(), {"lr": 0.01})
        return AdamW(net.parameters())

    return train_in_backward(make, design)


def release_gradients(design: Design, _: Path) -> Journal:
    """Step by optimi inside the backward pass, which releases each gradient."""
    optimi = importlib.import_module("optimi")

    def make(net: nn.Module) -> Optimizer:
        optimizer = optimi.AdamW(net.parameters(), lr=0.01, gradient_release=True)
        optimi.prepare_for_gradient_release(net, optimizer, ignore_existing_hooks=True)
        return optimizer

    return train_in_backward(make, design)


def train_in_backward(make: Callable[[nn.Module], Optimizer], design: Design) -> Journal:
    """Train with clones when a gradient is there, and of the weights after the backward pass."""
    net = network()
    journal = Journal(net)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: found.update(journal.copy([p])))
    optimizer = make(net)  # its hooks come after these
    with design.watch(net, optimizer):
        for batch in batches(STEPS):
            found.clear()
            compute_loss(net, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            after = {name: p.detach().clone() for name, p in net.named_parameters()}
            journal.steps += [{name: Entry(*each, after[name])} for name, each in found.items()]
    return journal


def list_rows() -> list[Row]:
    runs: dict[str, Run] = {
        "a second optimizer, not attached": run_loop(add_second),
        "a second optimizer, its step compiled": run_loop(step_compiled),
        "weights clamped between steps": run_loop(clamp_weights),
        "averaged weights swapped in and out": run_loop(swap_average),
        "states loaded between steps": run_loop(load_state),
        "`_apply_optimizer_in_backward`, not attached": step_in_backward,
        "gradient release of optimi": release_gradients,
    }
    return make_rows(GROUP, runs)
