"""Repeat held-out runs in float32 from weights that are a little apart: which losses are chance?

    python -m benchmarks.calibration.perturbed     # a minute

Some runs that were called fine ended above 1.5 times the loss of float32, though their controls,
which start one millionth apart, did not. Here the same runs in float32 start further apart: each
weight is multiplied by 1 + size · noise. Rounding weights to bf16 moves each by up to 2⁻⁹ = 0.002.
"""

from __future__ import annotations

import copy

import torch

from benchmarks.calibration.calibrate import FAR
from benchmarks.calibration.configs import Config, make_optimizer
from benchmarks.calibration.runs import measure_loss
from benchmarks.calibration.tasks import TASKS
from benchmarks.paired import print_table
from examples.predict_and_confirm import loss_and_accuracy

CONFIGS = (
    Config("residual", "nadam", 1e-3),
    Config("residual", "nadam", 3e-3),
    Config("residual", "nadam", 1e-2),
    Config("residual", "adamw-999", 1e-3, seed=1),
    Config("residual", "adamw", 3e-4),
)
"""The ways to train for 300 steps in which fine runs ended far from float32."""
SIZES = (1e-6, 1e-4, 1e-3)
REPEATS = 16


def find_losses(config: Config, sizes: tuple[float, ...], repeats: int) -> list[list[float]]:
    """Return final losses over that of the unchanged run, by size of the perturbation.

    Args:
        config: The way to train.
        sizes: Sizes of the perturbation of the first weights, relative to these.
        repeats: Number of runs for each size.
    """
    task = TASKS[config.task]
    start = task.make_start(config.seed, is_tuned=False)
    data = task.draw(config.seed, config.steps, False)

    def train(size: float, seed: int) -> float:
        net = copy.deepcopy(start)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in net.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(1 + size * noise)
        optimizer = make_optimizer(config, net.parameters())
        for batch in data.batches:
            optimizer.zero_grad()
            loss_and_accuracy(net, batch)[0].backward()
            optimizer.step()
        return measure_loss(net, data.training)

    unchanged = train(0.0, 0)
    return [[train(size, seed) / unchanged for seed in range(repeats)] for size in sizes]


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for config in CONFIGS:
        counts = (
            f"{sum(ratio > FAR for ratio in ratios)} of {REPEATS}, up to × {max(ratios):.2g}"
            for ratios in find_losses(config, SIZES, REPEATS)
        )
        rows.append((f"{config.task}, {config.optimizer}, {config.lr:g}", *counts))
    print(f"Runs in float32 that ended above {FAR} times the loss of the unchanged one")
    print_table(("run", *(f"perturbed by {size:g}" for size in SIZES)), rows)


if __name__ == "__main__":
    main()
