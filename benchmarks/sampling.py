"""Compare the standard errors that AltGrad states with the errors of 200 samples.

    python benchmarks/sampling.py [--quick]

One step of SGD on a matrix of 500,000 weights is measured on all weights, and then on 200 samples
of each size, each with another seed.

- **stated**: the mean of the samples' standard errors.
- **observed**: the root mean square of the difference between a sample's figure and that of all
    weights.
- **bias**: the mean of this difference.
- **even**: weights and gradients are drawn as a layer has them at its start.
- **uneven**: a tenth of the rows has gradients 30 times as large, as in embeddings.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from paired import (
    Target,
    print_environment,
    print_table,
    print_targets,
    script_arguments,
    write_json,
)

from altgrad import Figures, UpdateMonitor

FORMATS = ("bf16", "e4m3fn")
METRICS = ("kept_update_ratio", "stall_frac", "visible_frac")
SIZES = (256, 1024, 4096)
DRAWS = 200
SHAPE = (1000, 500)


class Row(NamedTuple):
    step: str
    figure: str
    elements: int
    whole: float
    stated: float
    observed: float
    bias: float


def a_step(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw weights and a gradient; the first tenth of the gradient's rows is multiplied by `scale`.

    Args:
        scale: The factor.

    Returns:
        Weights and gradient, float32 (1000, 500).
    """
    torch.manual_seed(0)
    gradient = torch.randn(SHAPE) * 1e-3
    gradient[: SHAPE[0] // 10] *= scale
    return torch.randn(SHAPE) * 0.02, gradient


def measure_figures(
    weights: torch.Tensor, gradient: torch.Tensor, elements: int | None, seed: int
) -> Figures:
    """Make a step of SGD, and return its figures.

    Args:
        weights: Weights before the step.
        gradient: The gradient.
        elements: Number of elements in the sample; None for all.
        seed: Seed of the sample.
    """
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.05)
    settings = {"formats": FORMATS, "max_elements": elements, "seed": seed, "strict": True}
    with UpdateMonitor([("w", parameter)], **settings).attach(optimizer) as monitor:
        parameter.grad = gradient
        optimizer.step()
    assert monitor.latest is not None
    return monitor.latest.layers["w"]


def make_rows(name: str, scale: float, draws: int) -> list[Row]:
    weights, gradient = a_step(scale)
    whole = measure_figures(weights, gradient, None, 0)
    keys = [f"{metric}/{format}" for format in FORMATS for metric in METRICS]
    rows = []
    for size in SIZES:
        samples = [measure_figures(weights, gradient, size, seed) for seed in range(draws)]
        for key in keys:
            errors = [sample[key] - whole[key] for sample in samples]
            stated = [sample.standard_error(key) for sample in samples]
            known = [error for error in stated if not math.isnan(error)]
            rows.append(
                Row(
                    name,
                    key,
                    size,
                    whole[key],
                    sum(known) / len(known) if known else math.nan,
                    math.sqrt(sum(error**2 for error in errors) / draws),
                    sum(errors) / draws,
                )
            )
    return rows


def main() -> None:
    arguments = script_arguments("Hold stated standard errors against those of draws.").parse_args()
    print_environment()
    draws = DRAWS // (10 if arguments.quick else 1)
    rows = make_rows("even", 1.0, draws) + make_rows("uneven", 30.0, draws)
    cells = [
        (
            *(row.step, row.figure, f"{row.elements:,}", f"{row.whole:.4f}"),
            *(f"{value:.4f}" for value in row[4:6]),
            *(f"{row.stated / row.observed:.2f}", f"{row.bias:+.4f}"),
        )
        for row in rows
    ]
    print()
    print_table(
        ("step", "figure", "elements", "whole", "stated", "observed", "ratio", "bias"), cells
    )
    ratios = [max(row.stated / row.observed, row.observed / row.stated) for row in rows]
    worst = max(ratio for ratio in ratios if not math.isnan(ratio))
    targets = [Target("stated and observed errors differ by a factor of", worst, 1.25)]
    print_targets(targets)
    figures = {"rows": [row._asdict() for row in rows]}
    write_json(arguments.json, {**figures, "targets": [target._asdict() for target in targets]})


if __name__ == "__main__":
    main()
