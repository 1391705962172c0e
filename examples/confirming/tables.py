"""Tables and sentences: predicted beside measured.

Read `comparison` first; `picture` comes next.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.table import Table

from examples.confirming.comparison import (
    BF16,
    SCRATCH,
    Experiment,
    average_pairs,
    compare_layers,
    compare_losses,
)
from examples.confirming.real_runs import Outcome

Results = Mapping[str, Sequence[Experiment]]
"""The runs of each seed, by name of the setting."""


def make_layer_table(results: Results, metric: str, title: str) -> Table:
    """Return a table of a figure of bf16: predicted / measured, as means over seeds.

    Args:
        results: The runs.
        metric: ``"frozen_frac"`` or ``"progress_kept"``.
        title: Title of the table.
    """
    table = Table("layer", box=box.SIMPLE_HEAD, title=f"{title}: predicted / measured")
    columns = []
    for setting, experiments in results.items():
        table.add_column(setting, justify="right")
        columns.append([compare_layers(each, metric) for each in experiments])
    for layer in columns[0][0]:
        means = [average_pairs(each[layer] for each in column) for column in columns]
        table.add_row(layer, *(f"{p.predicted:.3f} / {p.measured:.3f}" for p in means))
    return table


def make_run_table(results: Results) -> Table:
    """Return a table with a row for each kind of run: means over seeds.

    Args:
        results: The runs.
    """
    table = Table("setting", "run", box=box.SIMPLE_HEAD, title="What real runs lose")
    for title in ("loss", "lost of\nits fall", "loss,\n× fp32", "right", "progress\nkept"):
        table.add_column(title, justify="right")
    for setting, experiments in results.items():
        table.add_row(setting, "start", f"{_mean(e.fp32.losses[0] for e in experiments):.3f}")
        table.add_row("", "fp32", *_show_run([(e.fp32, e.fp32) for e in experiments]))
        for name in experiments[0].low:
            cells = _show_run([(e.low[name], e.fp32) for e in experiments])
            pair = average_pairs(
                p for e in experiments for p in compare_layers(e, "progress_kept", name).values()
            )
            table.add_row("", name, *cells, f"{pair.predicted:.2f} / {pair.measured:.2f}")
        table.add_section()
    return table


def _show_run(runs: Sequence[tuple[Outcome, Outcome]]) -> list[str]:
    losses = [compare_losses(low, fp32) for low, fp32 in runs]
    return [
        f"{_mean(each.end for each in losses):.4f}",
        f"{_mean(each.lost for each in losses):.1%}",
        f"{_mean(each.ratio for each in losses):.2f}",
        f"{_mean(low.accuracy for low, _ in runs):.3f}",
    ]


# --- sentences


def describe_errors(results: Results) -> str:
    """Return sentences on how far the predicted figures of layers are off in bf16.

    Args:
        results: The runs.
    """
    frozen = _list_errors(results, "frozen_frac", fewest_dimensions=1)
    matrices = _list_errors(results, "frozen_frac", fewest_dimensions=2)
    kept = _list_errors(results, "progress_kept", fewest_dimensions=1)
    return (
        f"Over {len(frozen)} layers, {len(matrices)} of them matrices, the share of weights that "
        f"never move is predicted to {_mean(map(abs, frozen)):.3f} on average and to "
        f"{max(map(abs, frozen)):.2f} at worst. Matrices, of which 256 elements are sampled, are "
        f"predicted to {_mean(map(abs, matrices)):.3f}. Progress is predicted to "
        f"{_mean(map(abs, kept)):.2f}, and is too low by {-_mean(kept):.2f} on average: where "
        "weights stay behind, real gradients stay large."
    )


def _list_errors(results: Results, metric: str, fewest_dimensions: int) -> list[float]:
    """Return predicted minus measured for each layer in bf16 with so many dimensions or more."""
    return [
        pair.predicted - pair.measured
        for experiments in results.values()
        for each in experiments
        for layer, pair in compare_layers(each, metric).items()
        if each.fp32.weights[layer].dim() >= fewest_dimensions
    ]


def describe_gains(results: Results) -> str:
    """Return a sentence on the gains of both LayerNorms, trained from scratch in bf16.

    Args:
        results: The runs.
    """
    experiments = results[SCRATCH.name]
    gains = [(e, name) for e in experiments for name in list_gains(e)]
    predicted = sum(compare_layers(e, "frozen_frac")[name].predicted == 1 for e, name in gains)
    exact = sum(bool((e.low[BF16].weights[name] == 1).all()) for e, name in gains)
    moved = max((e.fp32.weights[name] - 1).abs().max().item() for e, name in gains)
    return (
        f"From scratch, {predicted} of {len(gains)} LayerNorm gains are predicted to be frozen, "
        f"and {exact} of {len(gains)} are exactly 1.0 after training in bf16, in all elements. "
        f"In fp32 they move by up to {moved:.2f}."
    )


def list_gains(experiment: Experiment) -> list[str]:
    """Return the gains of the LayerNorms: vectors named weight.

    Args:
        experiment: The runs.
    """
    weights = experiment.fp32.weights
    return [name for name in weights if name.endswith("weight") and weights[name].dim() == 1]


def _mean(numbers: Iterable[float]) -> float:
    return statistics.fmean(numbers)
