"""Compare what twins of sharded layers predict with runs that really store weights in bf16.

    python -m benchmarks.twin_ranks            # two minutes, from the root of the repository

A perceptron is trained in fp32 on one process. Then one, two and four processes fine-tune it under
`fully_shard` twice: in fp32 with twins of bf16-true, and really after ``model.to(torch.bfloat16)``.
The table shows predicted / real for each layer; real figures are computed from all elements. The
last column is how far the figures of several processes are from those of one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from altgrad import UpdateMonitor
from benchmarks.paired import print_environment, print_table
from tests.processes import Processes

STEPS, LR, RECIPE = 200, 1e-4, "bf16-true"
METRICS = ("frozen_frac", "progress_kept", "exp_avg_sq_ratio")


class Run(NamedTuple):
    """A fine-tuned net: its weights before and after, and what a monitor says of each layer."""

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    moved: dict[str, Tensor]
    states: dict[str, Tensor]
    figures: dict[str, dict[str, float]]


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(96, 192), nn.ReLU(), nn.LayerNorm(192), nn.Linear(192, 96), nn.Linear(96, 10)
    )


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> Any:
    """Train on classes that a formula draws, and yield after each step."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 96, generator=torch.Generator().manual_seed(7))
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        classes = torch.randint(0, 10, (64,), generator=random)
        inputs = centres[classes] + 2 * torch.randn(64, 96, generator=random)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs.to(dtype)).float(), classes).backward()
        optimizer.step()
        yield


def pretrain() -> nn.Module:
    net = make_net()
    for _ in train(net, torch.optim.AdamW(net.parameters(), lr=1e-3), 300, seed=1):
        pass
    return net


def read(net: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in net.named_parameters()}


def whole(tensor: Any) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def fine_tune(_rank: int, size: int, dtype: torch.dtype) -> Run:
    net = pretrain().to(dtype)
    if size > 1:
        fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.01)
    recipes = [RECIPE] if dtype == torch.float32 else []
    monitor = UpdateMonitor(
        net, formats=[], recipes=recipes, every_n_steps=20, warn=lambda _: None
    ).attach(optimizer)
    start = last = read(net)
    moved = {name: torch.zeros_like(each, dtype=torch.bool) for name, each in start.items()}
    for _ in train(net, optimizer, STEPS, seed=2):
        now = read(net)
        for name, each in now.items():
            moved[name] |= each != last[name]
        last = now
    states = {n: whole(optimizer.state[p]["exp_avg_sq"]) for n, p in net.named_parameters()}
    figures = {name: dict(each.twins) for name, each in monitor.latest.layers.items()}
    return Run(start, last, moved, states, figures)


def compute_real(plain: Run, low: Run, name: str) -> tuple[float, float, float]:
    """Return what happened to a layer in the run in bf16, as `METRICS` say it."""
    frozen = (plain.moved[name] & ~low.moved[name]).sum() / plain.moved[name].sum()
    move, low_move = (run.end[name].double() - run.start[name].double() for run in (plain, low))
    kept = (move * low_move).sum() / move.square().sum()
    ratios = low.states[name].double() / plain.states[name].double()
    return float(frozen), float(kept), float(ratios[ratios.isfinite()].median())


def main() -> None:
    print_environment()
    runs = {}
    for size in (1, 2, 4):
        with Processes(size) as processes:
            runs[size] = [
                processes(fine_tune, size, dtype, limit=300.0)[0]
                for dtype in (torch.float32, torch.bfloat16)
            ]
    alone = runs[1][0].figures
    for size, (plain, low) in runs.items():
        rows = []
        for name, figures in plain.figures.items():
            real = compute_real(plain, low, name)
            keys = [f"{metric}/{RECIPE}" for metric in METRICS]
            pairs = zip((figures[key] for key in keys), real, strict=True)
            apart = max(abs(figures[key] - alone[name][key]) for key in keys)
            cells = [f"{predicted:.3f} / {true:.3f}" for predicted, true in pairs]
            rows.append((name, *cells, "0" if not apart else f"{apart:.1g}"))
        assert not any(math.isnan(each) for run in (plain, low) for each in run.states["0.bias"])
        print(f"\n{size} process{'es' if size > 1 else ''}")
        print_table((RECIPE, *METRICS, "from one process"), rows)


if __name__ == "__main__":
    main()
