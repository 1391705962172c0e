"""`Twins` in random runs: layers come and go, weights are written to, and runs are resumed."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from altgrad import UpdateMonitor
from altgrad.twins.self_check import Check
from tests.twins.accumulating import LOW, RANDOM
from tests.twins.twinning import one_thread

on_one_thread = one_thread()

STEPS = 40
RECIPES = ["bf16", "bf16-sr", "bf16-true", "e4m3fn-kahan", LOW, RANDOM]
SHAPES = [(33, 40), (7,), (64,), (65,), (200, 3), (1,), (), (5, 12), (63,), (8, 3, 3, 3)]
OPTIMIZERS = [
    ("AdamW", {}),
    ("AdamW", {"fused": True}),
    ("Adam", {"amsgrad": True, "foreach": True}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"momentum": 0.5, "centered": True}),
    ("RAdam", {"foreach": True}),
    ("Adamax", {}),
    ("Adadelta", {"foreach": True}),
    ("ASGD", {"t0": 5}),
    ("Rprop", {}),
]


@dataclass
class Run:
    """A run whose events follow from a seed alone, so that a second one equals it."""

    seed: int
    recipes: list[Any] = field(default_factory=lambda: RECIPES)
    stop: int | None = None  # the step before which the run is saved and resumed

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.dtype = self.random.choice([torch.float32, torch.bfloat16, torch.float16])
        self.name, self.flags = self.random.choice(OPTIMIZERS)
        if self.name == "ASGD":  # load_state_dict of torch rounds its numbers to the weights' dtype
            self.dtype = torch.float32
        self.cut = self.random.randint(2, len(SHAPES) - 3)
        self.interval = self.random.choice([1, 3, 5])
        self.notices: list[str] = []
        self.records: list[Any] = []
        self.frozen: set[int] = set()
        self.added = False
        self.begin()
        for index in range(STEPS):
            if index == self.stop:
                self.resume(index)
            self.step(index)

    def begin(self, first: int = 0) -> None:
        torch.manual_seed(self.seed)
        self.layers = nn.ParameterList(
            nn.Parameter((torch.randn(shape) * 0.1).to(self.dtype)) for shape in SHAPES
        )
        groups = [
            {"params": self.layers[: self.cut]},
            {"params": self.layers[self.cut : -2], "lr": 3e-3},
        ]
        self.optimizer: Optimizer = getattr(torch.optim, self.name)(groups, 1e-3, **self.flags)
        if self.added:
            self.add_group()
        self.monitor = UpdateMonitor(
            self.layers,
            self.records.append,
            formats=["e4m3fn"],
            recipes=self.recipes,
            every_n_steps=lambda index: (index + first) % self.interval == 0,
            strict=True,
            warn=self.notices.append,
        )

    def add_group(self) -> None:
        self.optimizer.add_param_group({"params": self.layers[-2:], "lr": 2e-3})
        self.added = True

    def resume(self, index: int) -> None:
        parts = self.layers, self.optimizer, self.monitor
        saved = copy.deepcopy([part.state_dict() for part in parts])
        self.monitor.detach()
        self.begin(index)
        for part, state in zip((self.layers, self.optimizer), saved, strict=False):
            part.load_state_dict(state)
        self.monitor.load_state_dict(saved[2])

    def step(self, index: int) -> None:
        if index in (0, self.stop):
            self.monitor.attach(self.optimizer)
        layers = range(len(SHAPES))
        if self.random.random() < 0.3:
            self.frozen ^= {self.random.choice(layers)}
        if self.random.random() < 0.3:
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.97
        if index == 15:
            self.add_group()
        self.write(self.layers[self.random.choice(layers)], self.random.random())
        generator = torch.Generator().manual_seed(index)
        for number, layer in enumerate(self.layers):
            gradient = (torch.randn(layer.shape, generator=generator) * 0.1).to(self.dtype)
            layer.grad = None if number in self.frozen else gradient
            if self.seed % 2 and number not in self.frozen:
                layer.grad = None
                for _ in range(1 + (index + number) % 3):
                    layer.backward(gradient)
        self.optimizer.step()

    def write(self, layer: nn.Parameter, chance: float) -> None:
        """Write to a layer, or to some elements of it, in some of the steps."""
        with torch.no_grad():
            if chance < 0.08:
                layer.mul_(0.9)
            elif chance < 0.15:
                layer.view(-1)[:3].fill_(0.01)

    def figures(self) -> dict[str, float]:
        layers = self.records[-1].layers
        return {f"{n} {key}": layers[n][key] for n in layers for key in layers[n].twin_keys}


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)  # float16 ends in NaN


def check_seed(seed: int) -> None:
    plain, whole = Run(seed, recipes=[]), Run(seed)
    resumed = Run(seed, stop=random.Random(seed).randint(3, 30))
    for run in (whole, resumed):
        assert all(map(equal, plain.layers, run.layers))
        assert {*run.monitor.twins.checks.values()} == {Check.EQUAL}
        assert not [notice for notice in run.notices if "twin" in notice]
    assert resumed.monitor.twins.resynchronised == whole.monitor.twins.resynchronised
    assert resumed.figures() == pytest.approx(whole.figures(), rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("seed", range(2))
def test_some_random_runs_equal_their_reference_and_continue_exactly(seed: int) -> None:
    check_seed(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 30))
def test_random_runs_equal_their_reference_and_continue_exactly(seed: int) -> None:
    check_seed(seed)
