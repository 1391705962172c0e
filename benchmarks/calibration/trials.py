"""Try other rules where the held-out runs missed an aim, and print what these would have given.

    python -m benchmarks.calibration.trials     # from the committed rows of all runs; seconds

Four aims were missed: layers that froze without a verdict that says so, fine runs that ended above
1.5 times the loss, the ranking of runs whose optimizer states are stored low, and that of the drift
of runs in bf16-true. None of the rules here judges anything: they were tried after the held-out
rows were seen, so that new runs would have to test them. `perturbed` does one more trial.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from scipy.stats import spearmanr

from benchmarks.calibration import configs, tasks
from benchmarks.calibration.calibrate import (
    FAR,
    FOLDER,
    MUCH,
    LayerSums,
    Row,
    add_layers,
    calibrate,
    find_lost,
    find_ratio,
    identify_view,
    is_frozen,
    is_said,
    judge,
    read_part,
    select_weights,
)
from benchmarks.calibration.tables import Part, find_auc, find_mean, write_share
from benchmarks.paired import print_table

Rank = Callable[[Row], float]
_SHARES = (0.003, 0.01, 0.03, 0.1, math.inf)


# --- frozen layers


def print_frozen_thresholds(parts: Sequence[Part], kept: float) -> None:
    """Print how often “frozen” would be right, and missed, with other thresholds of frozen_frac.

    Args:
        parts: The layers.
        kept: Largest progress_kept of a frozen layer.
    """
    rows = []
    for limit in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999):
        cells = []
        for part in parts:
            layers = select_weights(part.layers)
            said = [layer for layer in layers if is_said(layer, limit, kept)]
            were, right = (sum(map(is_frozen, each)) for each in (layers, said))
            cells += [f"{right / len(said):.3f}", f"{1 - right / were:.3f}"]
        rows.append((f"{limit:g}", *cells))
    print("\n## Frozen layers by the threshold of frozen_frac\n")
    header = [f"{part.name}: {what}" for part in parts for what in ("right", "missed")]
    print_table(("frozen_frac ≥", *header), rows)


def print_frozen_groups(part: Part, limits: Mapping[str, float]) -> None:
    """Print in which layers frozen ones are missed.

    Args:
        part: The held-out layers.
        limits: The thresholds.
    """
    is_new = {True: "under the optimizer never seen", False: "under the others"}
    groups: dict[str, list[Row]] = {}
    for layer in select_weights(part.layers):
        bits = "16 bits" if _has_16_bits(layer) else "8 bits and fewer"
        optimizer = is_new[layer["optimizer"] in configs.NEVER_SEEN]
        groups.setdefault(f"{bits}, {optimizer}", []).append(layer)
    rows = []
    for name, layers in sorted(groups.items()):
        said = [x for x in layers if is_said(x, limits["frozen"], limits["frozen_kept"])]
        were, right = (sum(map(is_frozen, each)) for each in (layers, said))
        rows.append((name, write_share(right, len(said)), write_share(were - right, were)))
    print(f"\n## Frozen layers by group: {part.name}\n")
    print_table(("", "were frozen, of those said", "missed, of those that were"), rows)


def _has_16_bits(row: Row) -> bool:
    return row["family"] == "true" or row["way"].startswith(("bf16", "fp16", "torchao", "optimi"))


# --- fine runs that ended far from float32


def print_fine(parts: Sequence[Part], limits: Mapping[str, float]) -> None:
    """Print which fine runs ended far: by how low the loss is, and with stricter thresholds.

    Args:
        parts: The runs.
        limits: The thresholds.
    """
    fine = [_select_fine(part, limits) for part in parts]
    rows, low = [], 0.0
    for high in _SHARES:
        name = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} and more"
        cells = []
        for runs in fine:
            own = [run for run in runs if low <= run["fp32"] / run["initial"] < high]
            cells.append(_count_far(own))
        rows.append((name, *cells))
        low = high
    names = [f"{part.name}: above {FAR} × the loss" for part in parts]
    print("\n## Fine runs by the final loss of float32, as a share of the loss at the start\n")
    print_table(("final loss / first loss", *names), rows)

    rows = []
    for kept, error in ((0.98, 0.05), (0.99, 0.05), (0.99, 0.02), (0.995, 0.01), (0.999, 0.005)):
        cells = [
            _count_far([r for r in runs if kept <= r["kept"] <= 2 - kept and r["error"] <= error])
            for runs in fine
        ]
        rows.append((f"{kept:g}", f"{error:g}", *cells))
    print("\n## Fine runs with stricter thresholds\n")
    print_table(("progress_kept within 1 ∓", "weights off by at most", *names), rows)


def _select_fine(part: Part, limits: Mapping[str, float]) -> list[Row]:
    sums = add_layers(part.layers, limits)
    return [
        run
        for run in part.runs
        if run["family"] not in ("control", "average")
        and judge(run, sums.get(identify_view(run), LayerSums()), limits) == "STORES_FINE"
    ]


def _count_far(runs: Sequence[Row]) -> str:
    return f"{sum(find_ratio(run) > FAR for run in runs)} of {len(runs)}"


# --- which runs lose


def _find_distance(run: Row, price: float) -> float:
    """Return the missing share of the progress, plus `price` times what goes beyond it."""
    return max(0.0, 1 - run["kept"]) + price * max(0.0, run["kept"] - 1)


def _is_cut_to_zero(run: Row) -> float:
    """Return 1 if more than 1 % of the second moment is stored as 0, else 0."""
    return float(run["v_zero_frac"] > 0.01)


RANKS: Mapping[str, Rank] = {
    "1 − progress_kept, either way": lambda run: _find_distance(run, 1),
    "half the price for what is too much": lambda run: _find_distance(run, 0.5),
    "a tenth of the price": lambda run: _find_distance(run, 0.1),
    "no price": lambda run: _find_distance(run, 0),
    "no price, 0.5 for a v stored as 0": lambda run: (
        _find_distance(run, 0) + _is_cut_to_zero(run) / 2
    ),
    "drift": lambda run: run["drift"],
    "window_progress_kept": lambda run: abs(1 - run["window_kept"]),
    "frozen_frac": lambda run: run["frozen"],
    "still_frac": lambda run: run["still"],
    "exp_avg_sq_ratio": lambda run: abs(math.log(run["v_ratio"])) if run["v_ratio"] > 0 else 0.0,
    "exp_avg_sq_error": lambda run: run["v_error"] if run["v_error"] >= 0 else 0.0,
    "exp_avg_sq_zero_frac": lambda run: run["v_zero_frac"] if run["v_zero_frac"] >= 0 else 0.0,
}
"""Ways to rank a run by figures of its twins; a high rank is bad. A figure without a value is 0."""


def print_ranks(parts: Sequence[Part]) -> None:
    """Print how well `RANKS` tell real runs that lost more than 10 %, with states stored low.

    Args:
        parts: The runs.
    """
    chosen = [
        [r for r in part.runs if r["ways"] == "real" and r["family"] not in ("control", "average")]
        for part in parts
    ]
    rows = [
        (name, *(f"{find_auc(runs, rank):.3f}" for runs in chosen)) for name, rank in RANKS.items()
    ]
    lost = [sum(find_lost(run) > MUCH for run in runs) for runs in chosen]
    names = [
        f"{part.name}: AUC ({count} of {len(runs)} lost)"
        for part, count, runs in zip(parts, lost, chosen, strict=True)
    ]
    print("\n## Real runs, states stored low among them, that lost more than 10 %\n")
    print_table(("ranked by", *names), rows)


# --- drift of runs in bf16-true


def print_drift(part: Part) -> None:
    """Print how well the drift of runs in bf16-true is ranked, by task.

    Args:
        part: The held-out runs.
    """
    runs = [run for run in part.runs if run["family"] == "true"]
    known: Iterable[tuple[str, list[Row]]] = (
        ("all", runs),
        *((task, [run for run in runs if run["task"] == task]) for task in _list_tasks()),
        ("all but the residual net", [run for run in runs if run["task"] != "residual"]),
    )
    rows = []
    for name, own in known:
        real = [run["real_drift"] for run in own]
        moved = [run["real_drift"] * run["fp32_moved"] for run in own]
        rows.append(
            (
                *(name, f"{len(own)}"),
                f"{spearmanr([run['drift'] for run in own], real).statistic:.3f}",
                f"{spearmanr([abs(1 - run['kept']) for run in own], real).statistic:.3f}",
                f"{spearmanr([run['error'] for run in own], moved).statistic:.3f}",
                f"{find_mean(run['real_drift'] / run['drift'] for run in own):.2f}",
            )
        )
    print(f"\n## Drift of runs in bf16-true, predicted and real (Spearman): {part.name}\n")
    header = ("", "runs", "drift", "by progress_kept", "weights off by", "drift, real / predicted")
    print_table(header, rows)


def _list_tasks() -> list[str]:
    return [*tasks.SEEN_BEFORE, *tasks.NEVER_SEEN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the rows are")
    folder = parser.parse_args().folder
    seen, unseen = (
        Part(name, *read_part(part, folder))
        for name, part in (("calibration", "calibration"), ("held out", "held_out"))
    )
    limits = calibrate(seen[1:], unseen[1:])["thresholds"]
    print_frozen_thresholds((seen, unseen), limits["frozen_kept"])
    print_frozen_groups(unseen, limits)
    print_fine((seen, unseen), limits)
    print_ranks((seen, unseen))
    print_drift(unseen)


if __name__ == "__main__":
    main()
