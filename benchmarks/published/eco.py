"""Repeat a published result: without master weights, the error grows as 1 / learning rate.

    python -m benchmarks.published.eco         # ten seconds, from the root of the repository

Nikdan et al. (ECO, arXiv 2601.22101) prove that removing the master weights naively can incur an
error that is inversely proportional to the learning rate. Here, gradient descent solves least
squares on the digits, with a little weight decay. Its weights are stored in a format, rounded to
nearest. It ends when no weight moves any more.

At the end, the update of each weight, learning rate × gradient, is at most half a spacing of the
grid. The lower the learning rate, the larger is the gradient at which this happens, and with it the
loss and the distance to the optimum. At the lowest rates, the weights never leave their start.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad import WeightStorage, spacing
from benchmarks.paired import Target, print_table, print_targets

LRS = tuple(0.4 * 2.0**-k for k in range(15))
MOST_STEPS = 200_000
DECAY = 1e-2


class Rest(NamedTuple):
    """The point at which a run has come to rest.

    Attributes:
        lr: Learning rate of the run.
        steps: Number of steps until then.
        gradient: Root mean square of the gradient there.
        update: The largest update that rounding undoes there, in halves of the spacing.
        distance: Distance to the optimum, as a share of the distance from the start to it.
        loss: Loss above that of the optimum, as a share of the same at the start.
    """

    lr: float
    steps: int
    gradient: float
    update: float
    distance: float
    loss: float


class Quadratic(NamedTuple):
    """The loss ½ wᵀHw − tᵀw of least squares on the digits, with Hessian H and target t."""

    hessian: Tensor
    target: Tensor

    @classmethod
    def from_digits(cls) -> Quadratic:
        from sklearn.datasets import load_digits

        data = load_digits()
        x = torch.tensor(data.data, dtype=torch.float64) / 16
        x = (x - x.mean(0)) / x.std()
        y = torch.nn.functional.one_hot(torch.tensor(data.target)).double() - 0.1
        decay = DECAY * torch.eye(x.shape[1], dtype=torch.float64)
        return cls(x.T @ x / len(x) + decay, x.T @ y / len(x))

    def gradient(self, w: Tensor) -> Tensor:
        return self.hessian @ w - self.target

    def loss(self, w: Tensor) -> float:
        return (0.5 * (w * (self.hessian @ w)).sum() - (w * self.target).sum()).item()

    @property
    def optimum(self) -> Tensor:
        return torch.linalg.solve(self.hessian, self.target)


def come_to_rest(problem: Quadratic, format: str, lr: float) -> Rest:
    """Descend until a step changes no weight; all later steps would change none, either.

    Args:
        problem: The loss.
        format: Name of the format that stores the weights.
        lr: Learning rate, in units of 1 / the largest diagonal element of the Hessian.
    """
    torch.manual_seed(0)
    scale = problem.hessian.diagonal().max().item()  # `lr` is in units of its inverse
    start = 0.1 * torch.randn(problem.target.shape, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([weight], lr=lr / scale)
    storage = WeightStorage(format, scaling=None).attach(optimizer)
    for step in range(MOST_STEPS):  # noqa: B007 - read after the loop
        before = weight.detach().clone()
        weight.grad = problem.gradient(before)
        optimizer.step()
        if torch.equal(weight, before):
            break
    storage.detach()
    rest, optimum = weight.detach(), problem.optimum
    gradient = problem.gradient(rest)
    halves = (lr / scale * gradient).abs() / (spacing(rest, format) / 2)
    least = problem.loss(optimum)
    return Rest(
        lr,
        step,
        gradient.square().mean().sqrt().item(),
        halves.max().item(),
        ((rest - optimum).norm() / (start - optimum).norm()).item(),
        (problem.loss(rest) - least) / (problem.loss(start) - least),
    )


def slope(rests: list[Rest]) -> float:
    """Return d log(gradient) / d log(lr) between the first and the last run; -1 means 1 / lr."""
    first, last = rests[0], rests[-1]
    return math.log(last.gradient / first.gradient) / math.log(last.lr / first.lr)


def split(rests: list[Rest]) -> tuple[list[Rest], list[Rest]]:
    """Return the runs that lose less than half of the progress, and those that make hardly any."""
    return [r for r in rests if r.loss < 0.5], [r for r in rests if r.loss > 0.95]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--formats", nargs="+", default=["bf16", "e4m3fn"])
    arguments = parser.parse_args()
    problem = Quadratic.from_digits()
    targets = []
    for format in arguments.formats:
        rests = [come_to_rest(problem, format, lr) for lr in LRS]
        print(f"\n{format}")
        print_table(
            ("lr", "steps", "gradient left", "largest lost update", "distance", "loss"),
            [
                (
                    f"{r.lr:.2g}",
                    f"{r.steps:,}",
                    f"{r.gradient:.2e}",
                    f"{r.update:.2f}",
                    f"{r.distance:.1%}",
                    f"{r.loss:.2%}",
                )
                for r in rests
            ],
        )
        growing, saturated = split(rests)
        targets += [
            Target(f"{format}: as 1 / lr, exponent off -1", abs(slope(growing) + 1), 0.15),
            Target(f"{format}: saturated, exponent", abs(slope(saturated)), 0.05),
            Target(f"{format}: lost, half steps", max(r.update for r in rests), 1),
        ]
    print_targets(targets)


if __name__ == "__main__":
    main()
