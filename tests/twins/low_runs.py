"""Runs in low precision that record themselves, and step a whole copy in float32.

Layers have at most 256 elements, so that the sample of a twin is the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.twins.twinning import Watched

SHAPES = {"wide": (4, 64), "gain": (128,), "bias": (64,)}
EVERY = 5


class RoundingAdamW(torch.optim.AdamW):
    """AdamW that computes in float32, and rounds weights in bfloat16 at random."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                wide, gradient = p.float(), p.grad.float()
                mean = 0.9 * state["exp_avg"].float() + 0.1 * gradient
                square = 0.99 * state["exp_avg_sq"].float() + 0.01 * gradient.square()
                state["exp_avg"].copy_(mean)
                state["exp_avg_sq"].copy_(square)
                wide = wide - group["lr"] * mean / (square.sqrt() + 1e-6)
                if p.dtype == torch.bfloat16:
                    bits = wide.view(torch.int32)
                    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32)
                    wide = ((bits + noise) & -65536).view(torch.float32)
                p.copy_(wide)


class KahanSGD(torch.optim.SGD):
    """SGD that keeps the rounding error of each weight, and adds it to the next update."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                lost = self.state[p].setdefault("lost", torch.zeros_like(p))
                update = lost - group["lr"] * p.grad
                before = p.clone()
                p.add_(update)
                lost.copy_(update - (p - before))


class NormalisedSGD(torch.optim.SGD):
    """SGD that divides by the norm of the whole gradient, so that a sample steps otherwise."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.float().norm().clamp_min(1e-6) * group["lr"])


class Run:
    """A training on random gradients, with its weights before and after each step."""

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        make: Callable[[list[Tensor]], Optimizer] | None = None,
        fp32: Callable[[list[Tensor]], Optimizer] | None = None,
    ) -> None:
        random = torch.Generator().manual_seed(0)
        self.net = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(shape, generator=random).to(dtype))
                for name, shape in SHAPES.items()
            }
        )
        make = make or make_adamw
        self.optimizer = make([*self.net.values()])
        self.index = 0
        self.start: dict[str, Tensor] = {}
        self.make32 = fp32 or make

    def begin(self) -> None:
        """Make the copy in float32 of the weights as they are now."""
        self.start = {name: each.detach().double() for name, each in self.net.items()}
        self.high = {name: nn.Parameter(each.float()) for name, each in self.start.items()}
        self.optimizer32 = self.make32([*self.high.values()])
        self.flags = {
            name: torch.zeros(4, *SHAPES[name], dtype=torch.bool) for name in SHAPES
        }  # moved and moved in float32, in all and in the window
        self.window: dict[str, tuple[Tensor, Tensor]] = {}
        self.tried = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}

    def train(self, steps: int) -> None:
        for _ in range(steps):
            if self.index % EVERY == 0:  # the step before was observed
                self.open_window()
            for number, (name, each) in enumerate(self.net.items()):
                random = torch.Generator().manual_seed(100 * self.index + number)
                gradient = torch.randn(each.shape, generator=random) + 0.5
                gradient[torch.rand(each.shape, generator=random) < 0.1] = 0
                each.grad = (gradient * 10.0 ** (self.index / -10)).to(each.dtype)
                self.high[name].grad = each.grad.float()
                self.tried[name] |= each.grad != 0
            before = [each.detach().clone() for each in self.pairs()]
            self.optimizer.step()
            self.optimizer32.step()
            moved = [now != earlier for now, earlier in zip(self.pairs(), before, strict=True)]
            for number, name in enumerate(SHAPES):
                pair = torch.stack(moved[2 * number : 2 * number + 2])
                self.flags[name] |= pair.repeat(2, *[1] * len(SHAPES[name]))
            self.index += 1

    def pairs(self) -> list[Tensor]:
        return [each for name in SHAPES for each in (self.net[name], self.high[name])]

    def open_window(self) -> None:
        for name in SHAPES:
            self.flags[name][2:] = False
            self.tried[name][:] = False

    def figures(self, name: str) -> dict[str, float]:
        now, high = self.net[name].detach().double(), self.high[name].detach().double()
        finite = now.isfinite()  # AdamW divides 0 by 0 in fp16, where its eps is 0
        now, high, start = now[finite], high[finite], self.start[name][finite]
        way, way32 = now - start, high - start
        moved, moved32, lately, lately32 = (each[finite] for each in self.flags[name])
        found = {
            "progress_kept": ((way * way32).sum() / way32.square().sum()),
            "drift": (now - high).norm() / way32.norm(),
            "moved_rms": way32.square().mean().sqrt(),
            "frozen_frac": (moved32 & ~moved).sum() / moved32.sum(),
            "still_frac": (lately32 & ~lately).sum() / lately32.sum(),
            "decay_projection": ((now - high) * high).sum() / high.square().sum(),
            "moved_since_start_frac": (way != 0).double().mean(),
        }
        states, states32 = self.optimizer.state, self.optimizer32.state
        for key, own in states[self.net[name]].items():
            if own.numel() > 1 and key in states32[self.high[name]]:
                own32 = states32[self.high[name]][key].double()
                ratios = (own.double() / own32)[(own32 != 0) & finite]
                found[f"{key}_ratio"] = ratios.median() if ratios.numel() else torch.nan
        return {key: float(value) for key, value in found.items()}


def make_adamw(parameters: list[Tensor]) -> Optimizer:
    return torch.optim.AdamW(parameters, 3e-3, weight_decay=0.1)


def watch(run: Run, **settings: Any) -> Watched:
    watched = Watched(run.net, run.optimizer, every_n_steps=EVERY, **settings)
    run.begin()
    return watched


def assert_now_is(run: Run, watched: Watched) -> None:
    """Compare the last record with what the run recorded of itself."""
    assert watched.records[-1].index == run.index - 1
    for name in SHAPES:
        figures = watched.records[-1].layers[name]
        for key, expected in run.figures(name).items():
            assert figures[f"{key}/now"] == pytest.approx(expected, rel=1e-6, abs=1e-9), key


OPTIMIZERS = {
    "AdamW": make_adamw,
    "foreach": lambda each: torch.optim.AdamW(each, 3e-3, weight_decay=0.1, foreach=True),
    "fused": lambda each: torch.optim.AdamW(each, 3e-3, fused=True),
    "SGD": lambda each: torch.optim.SGD(each, 1e-2, momentum=0.9),
    "kahan": lambda each: KahanSGD(each, 1e-3),
    "rounding": lambda each: RoundingAdamW(each, 1e-3),
}
