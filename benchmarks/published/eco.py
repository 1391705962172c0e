"""Published: without master weights the error is inversely proportional to the learning rate.

    python -m benchmarks.published.eco         # ten seconds, from the root of the repository

Nikdan et al. (ECO, arXiv 2601.22101) prove that removing the master weights naively can incur an
error that is inversely proportional to the learning rate. Here least squares on the digits (with a
little weight decay) is solved by gradient descent whose weights live in a format, rounded to
nearest, until no weight moves any more. There the update, learning rate × gradient, is at most half
a step of the grid for each weight, so that the gradient that is left grows as 1 / learning rate,
until the weights never leave their start. The loss and the distance to the optimum grow with it.
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
    """Where a run has come to rest."""

    lr: float
    steps: int
    gradient: float
    """Root mean square of what is left of it."""
    update: float
    """The largest update that rounding took away, in halves of the grid's step."""
    distance: float
    """To the optimum, as a share of that from the start."""
    loss: float
    """The gap to the optimum, as a share of that of the start."""


class Quadratic(NamedTuple):
    """½ wᵀHw − gᵀw, of least squares on the digits."""

    hessian: Tensor
    target: Tensor

    @classmethod
    def of_digits(cls) -> Quadratic:
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
    """Descend until a step changes nothing, which then no other step does."""
    torch.manual_seed(0)
    scale = problem.hessian.diagonal().max().item()  # the step is measured in its inverse
    start = 0.1 * torch.randn(problem.target.shape, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([weight], lr=lr / scale)
    storage = WeightStorage(format, scaling=None).attach(optimizer)
    for step in range(MOST_STEPS):  # noqa: B007 - said at the end
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
    """d log(gradient left) / d log(lr) from the first to the last of them: -1 is 1 / lr."""
    first, last = rests[0], rests[-1]
    return math.log(last.gradient / first.gradient) / math.log(last.lr / first.lr)


def split(rests: list[Rest]) -> tuple[list[Rest], list[Rest]]:
    """Those that lose less than half of the progress, and those that hardly make any."""
    return [r for r in rests if r.loss < 0.5], [r for r in rests if r.loss > 0.95]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--formats", nargs="+", default=["bf16", "e4m3fn"])
    arguments = parser.parse_args()
    problem = Quadratic.of_digits()
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
