"""Whether the standard errors that are stated are those that draws show.

    python benchmarks/sampling.py [--quick]

One step of SGD on a matrix of 500,000 weights, measured as a whole, and then by 200 samples of
each size, each drawn with a seed of its own. Stated is the mean of the samples' standard errors.
Observed is how far their figures lie from those of the whole, root mean square; bias is the mean.

- **even**: weights and gradients as a layer has them at its start.
- **uneven**: a tenth of the rows gets gradients 30 times as large, as embeddings do.
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
    """Weights and a gradient."""
    torch.manual_seed(0)
    gradient = torch.randn(SHAPE) * 1e-3
    gradient[: SHAPE[0] // 10] *= scale
    return torch.randn(SHAPE) * 0.02, gradient


def figures_of(
    weights: torch.Tensor, gradient: torch.Tensor, elements: int | None, seed: int
) -> Figures:
    """Of a step of SGD."""
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.05)
    settings = {"formats": FORMATS, "max_elements": elements, "seed": seed, "strict": True}
    with UpdateMonitor([("w", parameter)], **settings).attach(optimizer) as monitor:
        parameter.grad = gradient
        optimizer.step()
    assert monitor.latest is not None
    return monitor.latest.layers["w"]


def rows_of(name: str, scale: float, draws: int) -> list[Row]:
    weights, gradient = a_step(scale)
    whole = figures_of(weights, gradient, None, 0)
    keys = [f"{metric}/{format}" for format in FORMATS for metric in METRICS]
    rows = []
    for size in SIZES:
        samples = [figures_of(weights, gradient, size, seed) for seed in range(draws)]
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
    rows = rows_of("even", 1.0, draws) + rows_of("uneven", 30.0, draws)
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
