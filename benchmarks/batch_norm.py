"""Compare what twins predict of running statistics with BatchNorm modules that are in bf16.

    python -m benchmarks.batch_norm [--quick]       # a minute, from the root of the repository

A twin stores a sample of each layer as a recipe says, makes every step of an fp32 run, and keeps
the running mean and variance as BatchNorm would in its dtype. A small convolutional net is trained
in fp32 with a twin of `bf16-true`. What really happens is measured in two ways: in the same net
after ``net.to(torch.bfloat16)``, trained with gradients of its own; and, **fed**, in copies of the
BatchNorm modules in bf16 that get the inputs of those in fp32. The figures are of all channels.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from altgrad import StepRecord, UpdateMonitor
from benchmarks.paired import (
    Target,
    print_environment,
    print_table,
    print_targets,
    script_arguments,
    write_json,
)

RECIPE = "bf16-true"
MOMENTA = (0.1, 0.01)
STATISTICS = ("running_mean", "running_var")


class Row(NamedTuple):
    """The relative error and the median ratio of a statistic in bf16, predicted and real."""

    momentum: float
    layer: str
    statistic: str
    error: tuple[float, float, float]
    ratio: tuple[float, float, float]


def make_net(momentum: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128, momentum=momentum), nn.ReLU()),
        *(nn.Conv2d(128, 64, 3, padding=1), nn.BatchNorm2d(64, momentum=momentum), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    ]
    return nn.Sequential(*layers)


def draw_batch(number: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    classes = torch.randint(10, (16,), generator=random)
    noise = torch.randn(16, 3, 8, 8, generator=random)
    grid = torch.linspace(0, 3, 64).view(8, 8)
    return noise + torch.sin(grid * (1 + classes.view(-1, 1, 1, 1))) + 0.3, classes


def train(net: nn.Module, optimizer: Optimizer, steps: int) -> None:
    dtype = next(net.parameters()).dtype
    for number in range(steps):
        inputs, classes = draw_batch(number)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs.to(dtype)).float(), classes).backward()
        optimizer.step()


def feed_copies(net: nn.Module) -> dict[str, nn.Module]:
    """Return bf16 copies of the BatchNorm modules of a net that will get the inputs of these."""
    copies: dict[str, nn.Module] = {}
    for name, each in net.named_modules():
        if isinstance(each, nn.BatchNorm2d):
            low = copies[name] = copy.deepcopy(each).bfloat16()

            def feed(_: nn.Module, inputs: tuple[Any, ...], low: nn.Module = low) -> None:
                low(inputs[0].detach().bfloat16())

            each.register_forward_pre_hook(feed)
    return copies


def compare(momentum: float, steps: int) -> list[Row]:
    """Train in fp32 with a twin and in bf16, and compare the running statistics at the end.

    Args:
        momentum: The momentum of BatchNorm.
        steps: Number of steps.
    """
    net, low = make_net(momentum), make_net(momentum).bfloat16()
    copies, records = feed_copies(net), list[StepRecord]()
    optimizer = AdamW(net.parameters(), 1e-3)
    settings = {"recipes": RECIPE, "formats": "bf16", "strict": True}
    monitor = UpdateMonitor(
        net, records.append, every_n_steps=lambda index: index == steps - 1, **settings
    )
    with monitor.attach(optimizer):
        train(net, optimizer, steps)
    train(low, AdamW(low.parameters(), 1e-3), steps)
    rows = []
    for layer, fed in copies.items():
        figures = records[-1].layers[f"{layer}.weight"]
        for name in STATISTICS:
            own, real, real_fed = (
                getattr(each, name).double()
                for each in (net.get_submodule(layer), low.get_submodule(layer), fed)
            )
            errors = [((each - own).norm() / own.norm()).item() for each in (real, real_fed)]
            ratios = [(each / own).median().item() for each in (real, real_fed)]
            predicted = (figures[f"{name}_{figure}/{RECIPE}"] for figure in ("error", "ratio"))
            error, ratio = ((p, *r) for p, r in zip(predicted, (errors, ratios), strict=True))
            rows.append(Row(momentum, layer, name, error, ratio))
    return rows


def main() -> None:
    arguments = script_arguments("Hold running statistics that twins predict against real ones.")
    parsed = arguments.parse_args()
    torch.set_num_threads(1)
    print_environment()
    steps = 60 if parsed.quick else 400
    rows = [row for momentum in MOMENTA for row in compare(momentum, steps)]
    print()
    print_table(
        ("momentum", "layer", "statistic", "error: predicted / fed / real", "ratio"),
        [
            (
                *(f"{row.momentum:g}", row.layer, row.statistic),
                *(format_numbers(row.error), format_numbers(row.ratio)),
            )
            for row in rows
        ],
    )
    off = [abs(row.error[0] / row.error[2] - 1) for row in rows]
    ratios = [abs(row.ratio[0] - row.ratio[2]) for row in rows]
    targets = [
        Target("error, fed, is off by at most, as a share of itself", max(off), 0.15),
        Target("ratio, fed, is off by at most", max(ratios), 0.02),
    ]
    print_targets(targets, ".3f")
    write_json(
        parsed.json,
        {
            "rows": [row._asdict() for row in rows],
            "targets": [target._asdict() for target in targets],
        },
    )


def format_numbers(numbers: tuple[float, float, float]) -> str:
    predicted, real, fed = numbers
    return " / ".join(f"{number:.3f}" for number in (predicted, fed, real))


if __name__ == "__main__":
    main()
