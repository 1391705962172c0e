"""The picture: which weights never move, as predicted and as measured, and what the loss does.

Read `tables` first; `predict_and_confirm`, which runs all of this, comes last.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from examples.confirming.comparison import BF16, TUNED, Experiment, compare_layers, compare_losses
from examples.confirming.real_runs import EVALUATED
from examples.confirming.tables import Results

# Colours by Okabe and Ito, which colour-blind readers can tell apart.
POINTS: tuple[dict[str, Any], ...] = (
    {"marker": "D", "color": "#0072B2", "s": 110, "zorder": 3},
    {"marker": "s", "color": "#E69F00", "s": 130, "zorder": 1},
    {"marker": "o", "color": "#D55E00", "s": 150, "zorder": 2},
)
"""How the layers of each setting are drawn."""
LINES: dict[str, dict[str, Any]] = {
    "fp32": {"label": "fp32", "color": "black", "linewidth": 8},
    "torchao-sr": {"label": "bf16, stochastic rounding", "color": "#56B4E9", "linewidth": 4},
    "optimi-kahan": {
        "label": "bf16, Kahan summation",
        "color": "#F0E442",
        "linewidth": 4,
        "linestyle": ":",
    },
    BF16: {"label": "plain bf16", "color": "#D55E00", "linewidth": 5},
}
"""By run, how its line is drawn: the first lies below the others."""
STYLE = {
    "font.size": 18,
    "axes.titlesize": 20,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def save_picture(results: Results, path: Path) -> None:
    """Save a picture of two panels: layers, and losses in fine-tuning.

    Args:
        results: The runs.
        path: File of the picture.
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 5.8), layout="constrained")
        _draw_layers(left, results)
        _draw_losses(right, results[TUNED.name])
        figure.savefig(path, dpi=100)
        plt.close(figure)


def _draw_layers(axes: Any, results: Results) -> None:
    axes.plot([0, 1], [0, 1], color="#999999", zorder=0)
    for (setting, experiments), style in zip(results.items(), POINTS, strict=True):
        pairs = [p for e in experiments for p in compare_layers(e, "frozen_frac").values()]
        axes.scatter(*zip(*pairs, strict=True), label=setting, edgecolors="white", **style)
    axes.set(
        title="Weights that never move in bf16",
        xlabel="predicted by one fp32 run",
        ylabel="measured in real bf16",
        aspect="equal",
        xticks=(0, 0.5, 1),
        yticks=(0, 0.5, 1),
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    axes.legend(title="one point per layer", loc="upper left", handletextpad=0, borderaxespad=0)


def _draw_losses(axes: Any, experiments: Sequence[Experiment]) -> None:
    curves = _average_losses(experiments)
    for name, style in LINES.items():
        if name in curves:
            axes.plot([EVALUATED * k for k in range(len(curves[name]))], curves[name], **style)
    lost = statistics.fmean(compare_losses(e.low[BF16], e.fp32).lost for e in experiments)
    axes.annotate(
        f"{lost:.0%} of the fall lost",
        (1, curves[BF16][-1]),
        (0, -12),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=LINES[BF16]["color"],
        ha="right",
        va="top",
    )
    axes.set(title="Loss, fine-tuned at 1e-5", xlabel="step")
    axes.set(ylim=(0, None), yticks=(0, 0.5, 1, 1.5))
    axes.legend(loc="lower left", borderaxespad=0)


def _average_losses(experiments: Sequence[Experiment]) -> dict[str, list[float]]:
    """Return the losses of each run by its name, as means over seeds."""
    runs = [{"fp32": e.fp32, **e.low} for e in experiments]
    return {
        name: [statistics.fmean(each) for each in zip(*(r[name].losses for r in runs), strict=True)]
        for name in runs[0]
    }
