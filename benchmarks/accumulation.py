"""Compare twins that add up gradients in bf16 with runs that really do.

    python -m benchmarks.accumulation [--quick]       # two minutes, from the root of the repository

In gradient accumulation, several backward passes come before a step, and each adds its gradient. A
twin with the recipe `accumulate="bf16"` makes every step of an fp32 run with sums of its own, which
are rounded to bf16 after each addition. For several numbers of backward passes in a step, a net is
trained in fp32 with such twins, and really with a buffer in bf16 for each layer:

- **real**: the buffers get the gradients of their own run;
- **fed**: they get the gradients of the fp32 run, so that the twin must equal it bit for bit.

The columns are means over layers: `progress_kept` as predicted / fed / real; by how much the sum of
a step differs from that in fp32, as a share of its norm; and which share of it is missing, on
average in its own direction. `steady` sees one batch again and again, so that all gradients of a
step are equal: the worst case.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

from altgrad import Recipe, UpdateMonitor
from benchmarks.paired import (
    Target,
    print_environment,
    print_table,
    print_targets,
    script_arguments,
    write_json,
)
from benchmarks.twin_tasks import TASKS, World

RECIPE = Recipe("low", accumulate="bf16")
ELEMENTS = 4096
"""Number of sampled elements: whole layers, but for the largest ones of the perceptron."""


class Case(NamedTuple):
    """A way to train.

    Attributes:
        name: Its name in the table.
        make_net: Function that makes the net.
        world: The data.
        make: Function that makes the optimizer.
        rows: Number of examples of a batch that a backward pass sees.
    """

    name: str
    make_net: Callable[[], nn.Module]
    world: World
    make: Callable[[list[nn.Parameter]], Optimizer]
    rows: int


class Row(NamedTuple):
    """What a twin predicts, and what happened, as means over layers.

    Attributes:
        name: Name of the case.
        count: Number of backward passes in a step.
        predicted: `progress_kept` of the twin.
        fed: The same of the buffers that got the gradients of the fp32 run.
        real: The same of the run with gradients of its own.
        error: ‖bf16 − fp32‖ / ‖fp32‖ of the sums, mean over steps and layers.
        missing: 1 − ⟨bf16, fp32⟩ / ‖fp32‖² of the sums, mean over steps and layers.
        loss: Loss at the end in fp32.
        low_loss: Loss at the end of the real run.
        unequal: Number of sampled weights that differ between twin and fed run.
    """

    name: str
    count: int
    predicted: float
    fed: float
    real: float
    error: float
    missing: float
    loss: float
    low_loss: float
    unequal: int


class Buffers:
    """A net whose gradients are added up in a buffer in bf16 for each parameter, by plain torch."""

    def __init__(self, net: nn.Module, case: Case) -> None:
        self.net = net
        self.parameters = [*net.parameters()]
        self.start = [each.detach().clone() for each in self.parameters]
        self.sums = [torch.zeros_like(each, dtype=torch.bfloat16) for each in self.parameters]
        self._optimizer = case.make(self.parameters)

    def add(self, number: int, gradient: Tensor) -> None:
        self.sums[number].add_(gradient)

    def step(self) -> None:
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            parameter.grad = total.float()
            total.zero_()
        self._optimizer.step()


def find_loss(net: nn.Module, case: Case, number: int) -> Tensor:
    inputs, classes = case.world(number)
    outputs = net(inputs[: case.rows])
    return functional.cross_entropy(outputs.flatten(0, -2), classes[: case.rows].flatten())


def project(low: list[Tensor], high: list[Tensor]) -> list[float]:
    """Return ⟨low, high⟩ / ‖high‖² of each layer."""
    pairs = ((a.double(), b.double()) for a, b in zip(low, high, strict=True))
    return [((a * b).sum() / b.square().sum()).item() for a, b in pairs]


def move(net: nn.Module, start: list[Tensor]) -> list[Tensor]:
    return [now.detach() - then for now, then in zip(net.parameters(), start, strict=True)]


def compare(case: Case, count: int, steps: int) -> Row:
    """Train in fp32 with a twin, and really with buffers in bf16, fed and with own gradients.

    Args:
        case: The way to train.
        count: Number of backward passes in a step.
        steps: Number of steps.
    """
    torch.manual_seed(0)
    net = case.make_net()
    fed, real = (Buffers(copy.deepcopy(net), case) for _ in range(2))
    optimizer = case.make([*net.parameters()])
    for number, parameter in enumerate(net.parameters()):
        parameter.register_hook(lambda gradient, number=number: fed.add(number, gradient))
    for number, parameter in enumerate(real.parameters):
        parameter.register_hook(lambda gradient, number=number: real.add(number, gradient))
    monitor = UpdateMonitor(
        net,
        recipes=RECIPE,
        twin_elements=ELEMENTS,
        every_n_steps=lambda index: index == steps - 1,
        strict=True,
    ).attach(optimizer)
    errors, missing = [], []
    loss = low_loss = torch.tensor(0.0)
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(step * count, (step + 1) * count):
            loss, low_loss = (find_loss(each, case, number) for each in (net, real.net))
            (loss / count).backward()
            (low_loss / count).backward()
        sums = [each.grad for each in net.parameters() if each.grad is not None]
        pairs = [*zip(fed.sums, sums, strict=True)]
        errors += [((a - b).norm() / b.norm()).item() for a, b in pairs]
        missing += [1 - each for each in project(fed.sums, sums)]
        optimizer.step()
        fed.step()
        real.step()
    movements = move(net, fed.start)
    assert monitor.latest is not None
    figures = [
        monitor.latest.layers[name]["progress_kept/low"] for name, _ in net.named_parameters()
    ]
    unequal = count_unequal(monitor, fed.net)
    monitor.detach()
    return Row(
        *(case.name, count, statistics.fmean(figures)),
        statistics.fmean(project(move(fed.net, fed.start), movements)),
        statistics.fmean(project(move(real.net, fed.start), movements)),
        *(statistics.fmean(errors), statistics.fmean(missing)),
        *(loss.item(), low_loss.item(), unequal),
    )


def count_unequal(monitor: UpdateMonitor, net: nn.Module) -> int:
    """Return how many sampled weights of the twin differ from those of a net."""
    parameters, unequal = dict(net.named_parameters()), 0
    for lane in monitor.state_dict()["twins"]["lanes"]:
        start, weights = 0, lane["twins"]["low"]["tensors"]["weights"]
        for _, counts, *_ in lane["buckets"]:
            for name, size in counts.items():
                expected = parameters[name].detach().flatten()[lane["samples"][name][0]]
                unequal += int((weights[start : start + size] != expected).sum())
                start += size
            start += -start % 64
    return unequal


def make_adam(held: list[nn.Parameter]) -> Optimizer:
    return AdamW(held, 1e-3)


def make_sgd(held: list[nn.Parameter]) -> Optimizer:
    return SGD(held, 0.03, momentum=0.9)


PERCEPTRON, TRANSFORMER = TASKS["perceptron"], TASKS["transformer"]
CASES = (
    Case("perceptron, AdamW", PERCEPTRON.make_net, PERCEPTRON.pretraining, make_adam, 8),
    Case("perceptron, SGD", PERCEPTRON.make_net, PERCEPTRON.pretraining, make_sgd, 8),
    Case("transformer, AdamW", TRANSFORMER.make_net, TRANSFORMER.pretraining, make_adam, 2),
    Case(
        "steady, SGD",
        PERCEPTRON.make_net,
        lambda _: PERCEPTRON.pretraining(0),
        make_sgd,
        64,
    ),
)


def main() -> None:
    arguments = script_arguments("Hold twins that add up gradients against real runs.").parse_args()
    torch.set_num_threads(1)
    print_environment()
    counts, steps = ((8, 128), 3) if arguments.quick else ((8, 128, 512), 8)
    rows = [compare(case, count, steps) for case in CASES for count in counts]
    print()
    print_table(
        ("run", "passes", "progress_kept", "sum off by", "missing", "loss", "unequal"),
        [
            (
                *(
                    row.name,
                    f"{row.count}",
                    f"{row.predicted:.3f} / {row.fed:.3f} / {row.real:.3f}",
                ),
                *(f"{100 * row.error:.2f} %", f"{100 * row.missing:+.2f} %"),
                *(f"{row.loss:.4f} / {row.low_loss:.4f}", f"{row.unequal}"),
            )
            for row in rows
        ],
    )
    targets = [
        Target("sampled weights that differ from the fed run", sum(row.unequal for row in rows), 0),
        Target("progress_kept, fed, is off by", max(abs(x.predicted - x.fed) for x in rows), 0.01),
    ]
    print_targets(targets, ".3f")
    write_json(arguments.json, {"rows": [row._asdict() for row in rows]})


if __name__ == "__main__":
    main()
