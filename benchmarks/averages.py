"""Compare what twins predict of averages of the weights with averages that are really in bf16.

    python -m benchmarks.averages [--quick]       # two minutes, from the root of the repository

A twin stores a sample of each layer as a recipe says, makes every step of an fp32 run, and keeps an
average of its weights as the run does. A net is trained in fp32, and fine-tuned with an exponential
moving average, an `AveragedModel` of torch: in fp32 with a twin of `bf16-true`, and really after
``net.to(torch.bfloat16)``, so that the average is in bf16, too. The table shows predicted / real,
as means over layers; **fed** is a run in fp32 with the gradients of the real run.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from altgrad import UpdateMonitor
from benchmarks.paired import (
    Target,
    print_environment,
    print_table,
    print_targets,
    script_arguments,
    write_json,
)
from benchmarks.twin_runs import train
from benchmarks.twin_tasks import TASKS, Task

DECAYS = (0.99, 0.999, 0.9999)
RATE = 3e-4
RECIPE = "bf16-true"


class Fate(NamedTuple):
    """What becomes of the average of a layer in bf16, predicted or real.

    Attributes:
        error: ‖bf16 − fp32‖ / ‖fp32‖.
        ratio: The median of bf16 / fp32.
    """

    error: float
    ratio: float


class Layer(NamedTuple):
    """The predicted and real figures of the average of a layer.

    Attributes:
        name: Name of the layer.
        predicted: Figures of the twin of the fp32 run.
        real: Figures of the run in bf16, compared with the fp32 run.
        fed: Figures of the twin of the fp32 run that gets the gradients of the run in bf16.
        real_fed: Figures of the run in bf16, compared with the fed run.
    """

    name: str
    predicted: Fate
    real: Fate
    fed: Fate
    real_fed: Fate


class AveragedRun:
    """A net, its optimizer, and a moving average of its weights.

    Args:
        net: The net.
        lr: Learning rate.
        decay: Decay of the average.
        steps: Number of steps; the last one is observed, before the average gets its weights.
        elements: Number of elements that twins have of each layer; 0 for no twins.
    """

    def __init__(self, net: nn.Module, lr: float, decay: float, steps: int, elements: int) -> None:
        self.net = net
        self.averages: dict[str, Tensor] = {}  # at the end of the last step
        self._optimizer = AdamW(net.parameters(), lr)
        self._averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._averaged.update_parameters(net)  # which copies the weights
        if elements:
            self._monitor = UpdateMonitor(
                net,
                formats="bf16",
                every_n_steps=lambda index: index == steps - 1,
                recipes=RECIPE,
                twin_elements=elements,
                strict=True,
            )
            self._monitor.watch_average(self._averaged).attach(self._optimizer)

    def step(self) -> None:
        self._optimizer.step()
        named = self._averaged.module.named_parameters()
        self.averages = {name: each.detach().double() for name, each in named}
        self._averaged.update_parameters(self.net)

    def predict(self, name: str) -> Fate:
        """Return the figures of the twin for a layer."""
        assert self._monitor.latest is not None
        figures = self._monitor.latest.layers[name]
        return Fate(figures[f"average_error/{RECIPE}"], figures[f"average_ratio/{RECIPE}"])


def find_fate(low: Tensor, high: Tensor) -> Fate:
    """Compute the real figures of an average from all its elements.

    Args:
        low: The average in bf16, float64.
        high: The average in fp32, float64.
    """
    known = high != 0
    error = (low - high).norm() / high.norm()
    return Fate(error.item(), (low / high)[known].median().item())


def compare_averages(
    start: nn.Module, task: Task, lr: float, decay: float, steps: int, elements: int = 256
) -> list[Layer]:
    """Do the three runs, and compare predicted with real figures layer by layer.

    Args:
        start: The net at the start of each run.
        task: The data.
        lr: Learning rate.
        decay: Decay of the average.
        steps: Number of steps of each run.
        elements: Number of elements that twins have of each layer.
    """
    high, fed = (AveragedRun(copy.deepcopy(start), lr, decay, steps, elements) for _ in range(2))
    low = AveragedRun(copy.deepcopy(start).bfloat16(), lr, decay, steps, 0)
    train(high.net, task.tuning, steps, high.step)

    def step_both() -> None:
        for ours, theirs in zip(low.net.parameters(), fed.net.parameters(), strict=True):
            assert ours.grad is not None
            theirs.grad = ours.grad.float().clone()
        low.step()
        fed.step()

    train(low.net, task.tuning, steps, step_both)
    return [
        Layer(
            name,
            high.predict(name),
            find_fate(low.averages[name], high.averages[name]),
            fed.predict(name),
            find_fate(low.averages[name], fed.averages[name]),
        )
        for name in high.averages
    ]


def pretrain(task: Task, steps: int) -> nn.Module:
    torch.manual_seed(0)
    net = task.make_net()
    train(net, task.pretraining, steps, AdamW(net.parameters(), 1e-3).step)
    return net


def main() -> None:
    arguments = script_arguments("Hold averages that twins predict against real ones.").parse_args()
    torch.set_num_threads(1)
    print_environment()
    steps = 30 if arguments.quick else 300
    rows = [
        (net, decay, compare_averages(start, TASKS[net], RATE, decay, steps))
        for net, start in [(net, pretrain(task, steps)) for net, task in TASKS.items()]
        for decay in DECAYS
    ]
    print()
    print_table(
        ("net", "decay", "average_error", "fed", "average_ratio", "fed"),
        [(net, f"{decay:g}", *format_pairs(layers)) for net, decay, layers in rows],
    )
    layers = [layer for *_, each in rows for layer in each]
    off, fed_off = (
        statistics.fmean(abs(a / b - 1) for a, b in pairs)
        for pairs in (
            [(x.predicted.error, x.real.error) for x in layers],
            [(x.fed.error, x.real_fed.error) for x in layers],
        )
    )
    rank = spearmanr([x.predicted.error for x in layers], [x.real.error for x in layers]).statistic
    ratios = statistics.fmean(abs(x.fed.ratio - x.real_fed.ratio) for x in layers)
    targets = [
        Target("average_error, fed, is off by, as a share of itself", fed_off, 0.05),
        Target("average_ratio, fed, is off by", ratios, 0.01),
        Target("average_error of a separate run is off by, as a share of itself", off, 0.3),
        Target(f"1 − Spearman of average_error over {len(layers)} layers", 1 - float(rank), 0.1),
    ]
    print_targets(targets, ".3f")
    write_json(
        arguments.json,
        {
            "rows": [
                {"net": net, "decay": decay, "layer": layer.name, **as_dict(layer)}
                for net, decay, each in rows
                for layer in each
            ],
            "targets": [target._asdict() for target in targets],
        },
    )


def format_pairs(layers: list[Layer]) -> list[str]:
    def pair(sides: tuple[str, str], read: Callable[[Fate], float]) -> str:
        each = (statistics.fmean(read(getattr(layer, side)) for layer in layers) for side in sides)
        return " / ".join(f"{number:.4f}" for number in each)

    both = ("predicted", "real"), ("fed", "real_fed")
    return [
        pair(sides, read)
        for read in (lambda fate: fate.error, lambda fate: fate.ratio)
        for sides in both
    ]


def as_dict(layer: Layer) -> dict[str, object]:
    sides = ("predicted", "real", "fed", "real_fed")
    return {side: getattr(layer, side)._asdict() for side in sides}


if __name__ == "__main__":
    main()
