"""Print what the verdicts are worth: the tables of docs/does-it-predict.md.

    python -m benchmarks.calibration.tables     # from the committed rows of all runs

Each table is printed for the runs that set the thresholds and for those that were held out. Of the
latter, tasks whose results were seen before, tasks that were not, and the optimizer that was not
are also counted apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import spearmanr

from altgrad.report import Verdict
from benchmarks.calibration import configs, tasks
from benchmarks.calibration.calibrate import (
    FAR,
    FOLDER,
    MUCH,
    VERDICTS,
    LayerSums,
    Row,
    add_layers,
    add_now,
    calibrate,
    count_lost,
    find_family,
    find_lost,
    find_quantiles,
    find_ratio,
    find_ratio_beyond_chance,
    identify_view,
    is_frozen,
    is_said,
    judge,
    read_part,
    select_weights,
    stores_weights_low,
)
from benchmarks.paired import print_table

_QUARTILES = (0.25, 0.5, 0.75)
_FAMILIES = {
    "nearest-16": "fp16, bf16 to nearest",
    "nearest-8": "8 bits and fewer, to nearest",
    "true": "bf16-true, foreach and fused",
    "stochastic": "stochastic rounding",
    "kahan": "Kahan summation",
    "states": "optimizer states in 16 and 8 bits",
    "now": "`now`: bf16-true, watched itself",
}
"""Names of the families of recipes on the page."""
_RULES = {
    "stores_fine": "fine: progress_kept ≥",
    "weight_error": "fine: weights off by ≤",
    "needs_remedy": "watch: progress_kept ≥",
    "left_behind": "fine, watch: weights in layers that keep < 0.5, ≤",
    "overshoots": "over: progress_kept >",
    "frozen": "frozen: frozen_frac ≥",
    "frozen_kept": "frozen: progress_kept <",
}
"""Names of thresholds on the page."""


class Part(NamedTuple):
    """Some runs and their layers, with a heading."""

    name: str
    runs: Sequence[Row]
    layers: Sequence[Row]


def list_parts(folder: Path) -> list[Part]:
    """Return the calibration, the held-out rows, and three parts of these.

    Args:
        folder: The folder with the CSV files.
    """
    seen, held_out = (
        Part(name, *read_part(part, folder))
        for name, part in (("calibration", "calibration"), ("held out", "held_out"))
    )
    chosen: dict[str, Callable[[Row], bool]] = {
        "of these, tasks seen before": lambda row: row["task"] in tasks.SEEN_BEFORE,
        "tasks never seen": lambda row: row["task"] in tasks.NEVER_SEEN,
        "the optimizer never seen": lambda row: row["optimizer"] in configs.NEVER_SEEN,
    }
    parts = [seen, held_out]
    for name, is_chosen in chosen.items():
        own = ([*filter(is_chosen, rows)] for rows in held_out[1:])
        parts.append(Part(name, *own))
    return [part for part in parts if part.runs]


def find_wilson(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's interval of 95 % of a share; 0 to 1 without a total.

    Args:
        count: Number of cases.
        total: Number of trials.
    """
    if not total:
        return 0.0, 1.0
    z2 = 1.959963984540054**2
    share = count / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(share * (1 - share) * z2 / total + z2 * z2 / (4 * total * total))
    half /= 1 + z2 / total
    return max(0.0, centre - half), min(1.0, centre + half)


def write_share(count: int, total: int) -> str:
    low, high = find_wilson(count, total)
    return f"{count} of {total} ({low:.3f} to {high:.3f})" if total else "–"


def find_auc(runs: Iterable[Row], rank: Callable[[Row], float]) -> float:
    """Return how often a run that lost more than 10 % ranks above one that did not; NaN if none.

    Args:
        runs: Rows of runs.
        rank: Function that ranks a run; a high rank is bad.
    """
    known = [run for run in runs if not math.isnan(rank(run))]
    bad = [rank(run) for run in known if find_lost(run) > MUCH]
    good = [rank(run) for run in known if not find_lost(run) > MUCH]
    wins = sum((a > b) + (a == b) / 2 for a in bad for b in good)
    return wins / (len(bad) * len(good)) if bad and good else math.nan


def find_mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


# --- the tables


def print_rows(seen: Part, unseen: Part) -> None:
    """Print which rows there are, and which of the tables count them.

    Args:
        seen: The calibration.
        unseen: The held-out rows.
    """
    kinds: dict[str, tuple[str, Callable[[Row], bool]]] = {
        "simulated storage of the weights, to nearest": (
            "verdicts, progress, ranking",
            lambda r: r["ways"] == "stored" and r["family"] == "nearest",
        ),
        "simulated storage of the weights, stochastic or Kahan": (
            "verdicts, progress, ranking",
            lambda r: r["ways"] == "stored" and r["family"] in ("stochastic", "kahan"),
        ),
        "real runs with weights in bf16": (
            "verdicts, progress, ranking",
            lambda r: r["ways"] == "real" and stores_weights_low(r),
        ),
        "real runs with optimizer states alone in few bits": (
            "verdicts, ranking",
            lambda r: r["family"] == "states",
        ),
        "averages of the weights in bf16, beside a run": (
            "averages",
            lambda r: r["family"] == "average",
        ),
        "controls in float32, whose weights start one millionth apart": (
            "tell unstable runs",
            lambda r: r["family"] == "control",
        ),
        "**rows of runs**": ("", lambda _: True),
    }
    layers: dict[str, tuple[str, Callable[[Row], bool]]] = {
        "layers of runs with low weights": ("frozen layers", stores_weights_low),
        "layers of runs with low states": ("states", lambda r: r["family"] == "states"),
        "layers of controls": ("", lambda r: r["family"] == "control"),
        "**rows of layers**": ("", lambda _: True),
    }
    rows = []
    for place, group in enumerate((kinds, layers), start=1):
        for name, (counted, is_own) in group.items():
            counts = (f"{sum(map(is_own, part[place])):,}" for part in (seen, unseen))
            rows.append((name, *counts, counted))
    print("\n## Which rows\n")
    _print_plain(("rows", "calibration", "held out", "counted in"), rows, numbers=(1, 2))


def _print_plain(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()
) -> None:
    """Print a table without padding, with the columns `numbers` aligned to the right."""
    print("| " + " | ".join(header) + " |")
    ends = ("--:" if column in numbers else "---" for column in range(len(header)))
    print("| " + " | ".join(ends) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def print_rules(limits: Mapping[str, float], rules: Mapping[str, str]) -> None:
    """Print the main thresholds, and their rules.

    Args:
        limits: Thresholds by name.
        rules: Rules by name of the threshold.
    """
    print("\n## Thresholds\n")
    rows = [(words, f"{limits[name]:g}", rules[name]) for name, words in _RULES.items()]
    _print_plain(("threshold", "value", "rule"), rows)


def print_outcomes(
    seen: Mapping[str, Mapping[str, Mapping[str, Any]]],
    unseen: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> None:
    """Print what became of runs by family and verdict, held-out ones beside the others.

    Args:
        seen: Outcomes of the calibration, as calibration.json has them.
        unseen: Outcomes of the held-out runs.
    """
    rows = []
    for family, name in _FAMILIES.items():
        known = [verdict for verdict in VERDICTS if verdict in {*seen[family], *unseen[family]}]
        for verdict in known:
            counts = (part[family].get(verdict) for part in (seen, unseen))
            cells = (cell for each in counts for cell in _write_outcome(each))
            first = name if verdict == known[0] else ""
            rows.append((first, Verdict[verdict].short, *cells))
    print("\n## Verdicts on runs\n")
    header = ("recipe", "verdict", "runs", "lost > 10 %", "loss ratio, middle half")
    held_out = ("**held out:** runs", *header[3:])
    _print_plain((*header, *held_out), rows, numbers=(2, 3, 5, 6))


def _write_outcome(counts: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if counts is None:
        return "0", "–", "–"
    low, _, high = (f"{ratio:.3g}" for ratio in counts["loss_ratios"])
    runs, lost = counts["runs"], counts["lost_10_percent"]
    least, most = find_wilson(lost, runs)
    return f"{runs}", f"{lost} ({least:.2f} to {most:.2f})", f"{low} to {high}"


def print_verdicts(part: Part, limits: Mapping[str, float]) -> None:
    """Print the outcomes of runs by verdict and family.

    Args:
        part: The runs.
        limits: The thresholds.
    """
    sums = add_layers([*part.layers, *add_now(part.layers)], limits)
    by: dict[tuple[str, str], list[Row]] = {}
    for run in [*part.runs, *add_now(part.runs)]:
        if run["family"] not in ("control", "average") and not math.isnan(run["kept"]):
            verdict = judge(run, sums.get(identify_view(run), LayerSums()), limits)
            by.setdefault((find_family(run), verdict), []).append(run)
    families = dict.fromkeys(family for family, _ in by)
    rows = []
    for family in families:
        for verdict in VERDICTS:
            if runs := by.get((family, verdict)):
                ratios = find_quantiles(map(find_ratio, runs), _QUARTILES)
                rows.append(
                    (
                        *(family, verdict, f"{len(runs)}"),
                        *(f"{count_lost(runs, share)}" for share in (0.01, MUCH)),
                        _write_lost(max(map(find_lost, runs))),
                        " ".join(f"{ratio:.3g}" for ratio in ratios),
                        f"{sum(find_ratio(run) > FAR for run in runs)}",
                        f"{sum(find_ratio_beyond_chance(run) > FAR for run in runs)}",
                    )
                )
    print(f"\n## Verdicts on runs, at length: {part.name}\n")
    print_table(
        (
            *("family", "verdict", "runs", "lost > 1 %", "> 10 %", "most lost"),
            *("loss ratio, quartiles", "above 1.5", "beyond chance"),
        ),
        rows,
    )


def _write_lost(share: float) -> str:
    return f"{share:.1%}" if share < 10 else "diverged"


def print_frozen(parts: Sequence[Part], limits: Mapping[str, float]) -> None:
    """Print how often layers that are said to be frozen were.

    Args:
        parts: The layers.
        limits: The thresholds.
    """
    rows = []
    for part in parts:
        layers = [layer for layer in select_weights(part.layers) if layer["fp32_moved"] > 0]
        said = [x for x in layers if is_said(x, limits["frozen"], limits["frozen_kept"])]
        were = [layer for layer in layers if is_frozen(layer)]
        missed = [x for x in were if not is_said(x, limits["frozen"], limits["frozen_kept"])]
        errors = (abs(x["frozen"] - x["real_frozen"]) for x in layers)
        rows.append(
            (
                *(part.name, f"{len(layers)}"),
                write_share(sum(map(is_frozen, said)), len(said)),
                write_share(len(missed), len(were)),
                f"{find_mean(errors):.3f}",
            )
        )
    print("\n## Frozen layers\n")
    header = ("", "layers", "were frozen, of those said", "missed, of those that were", "error")
    print_table(header, rows)


def print_levels(parts: Sequence[Part], offsets: Sequence[Sequence[float]]) -> None:
    """Print how far the predicted progress of runs is from that of the real runs.

    Args:
        parts: The runs.
        offsets: Offsets of the real progress, as calibration.json has them.
    """
    rows = []
    for part in parts:
        for name, families in (
            ("stored by rounding to nearest", ("nearest",)),
            ("bf16-true", ("true",)),
            ("remedies", ("stochastic", "kahan")),
        ):
            runs = [r for r in part.runs if r["family"] in families]
            known = [r for r in runs if math.isfinite(r["kept"] + r["real_kept"])]
            if not known:
                continue
            inside = sum(_is_inside(run, offsets) for run in known)
            drifts = [(r["drift"], r["real_drift"]) for r in known]
            rows.append(
                (
                    *(part.name, name, f"{len(known)}"),
                    f"{find_mean(abs(r['kept'] - r['real_kept']) for r in known):.3f}",
                    f"{find_mean(r['kept'] - r['real_kept'] for r in known):+.3f}",
                    write_share(inside, len(known)),
                    f"{spearmanr(*zip(*drifts, strict=True)).statistic:.3f}",
                )
            )
    print("\n## Progress kept by runs, predicted and real\n")
    header = ("", "runs", "", "off by", "bias", "inside the interval of 80 %", "Spearman, drift")
    print_table(header, rows)


def _is_inside(run: Row, offsets: Sequence[Sequence[float]]) -> bool:
    low, high = next((o[1], o[2]) for o in offsets if run["kept"] < o[0])
    half = 1.2816 * run["kept_error"] if math.isfinite(run["kept_error"]) else 0.0
    return bool(low - half <= run["real_kept"] - run["kept"] <= high + half)


def print_ranking(parts: Sequence[Part]) -> None:
    """Print how well figures rank runs by whether they lost more than 10 %.

    Args:
        parts: The runs.
    """
    ranks: dict[str, Callable[[Row], float]] = {
        "progress_kept": lambda run: abs(1 - run["kept"]),
        "drift": lambda run: run["drift"],
        "kept_update_ratio by energy": lambda run: -run["step_kept_by_energy"],
        "kept_update_ratio": lambda run: -run["step_kept"],
        "stall_frac": lambda run: run["step_stall"],
    }
    rows = []
    for part in parts:
        stored = [r for r in part.runs if r["ways"] == "stored" and r["family"] != "control"]
        nearest = [run for run in stored if run["family"] == "nearest"]
        real = [
            r
            for r in part.runs
            if r["ways"] == "real" and r["family"] not in ("control", "average")
        ]
        low = [run for run in real if run["family"] != "states"]
        for name, runs in (
            ("simulated", stored),
            ("simulated, to nearest", nearest),
            ("real, weights", low),
            ("real, states too", real),
        ):
            aucs = [find_auc(runs, rank) for rank in ranks.values()]
            lost = sum(find_lost(run) > MUCH for run in runs)
            cells = ("–" if math.isnan(auc) else f"{auc:.3f}" for auc in aucs)
            rows.append((part.name, name, f"{len(runs)}", f"{lost}", *cells))
    print("\n## AUC for losing more than 10 %\n")
    print_table(("", "", "runs", "lost", *ranks), rows)


def print_states(parts: Sequence[Part]) -> None:
    """Print predicted and real ratios of states, and errors of averages.

    Args:
        parts: The runs.
    """
    rows = []
    for part in parts:
        ratios = [
            abs(math.log2(layer["v_ratio"] / layer["real_v_ratio"]))
            for layer in part.layers
            if layer["family"] in ("true", "states")
            and layer["v_ratio"] > 0
            and layer["real_v_ratio"] > 0
        ]
        averages = [run for run in part.runs if run["family"] == "average"]
        off = [abs(math.log2(run["m_error"] / run["real_m_error"])) for run in averages]
        close = sum(ratio <= 0.1 for ratio in ratios)
        rows.append(
            (
                *(part.name, write_share(close, len(ratios))),
                f"{statistics.median(ratios):.3f}" if ratios else "–",
                f"{len(averages)}",
                f"{max(off):.3f}" if off else "–",
            )
        )
    print("\n## Optimizer states of separate runs, and averages of the weights in bf16\n")
    print_table(
        ("", "v within 0.1 octaves", "median octaves", "averages", "error off by at most, octaves"),
        rows,
    )


def print_losses(part: Part) -> None:
    """Print what real runs in bf16 lose, and why: weights, moments, all together.

    Args:
        part: The runs.
    """
    ways = ("bf16", "v-bf16", "bf16-true", "bf16-true-fused", "torchao-sr", "optimi-kahan")
    by: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for run in part.runs:
        if run["ways"] == "real" and run["way"] in ways:
            names = ("task", "start", "lr", "optimizer", "schedule", "steps")
            key = tuple(f"{run[n]:g}" if isinstance(run[n], float) else run[n] for n in names)
            by.setdefault(key, {}).setdefault(run["way"], []).append(run)
    rows = []
    for key, runs in by.items():
        cells = []
        for way in ways:
            own = runs.get(way)
            cells.append(
                f"{100 * find_mean(map(find_lost, own)):.2f} / "
                f"{find_mean(map(find_ratio, own)):.3g}"
                if own
                else "–"
            )
        rows.append((*key, *cells))
    print(f"\n## Lost, % of the fall in loss / final loss ratio: {part.name}\n")
    print_table(("task", "start", "lr", "optimizer", "schedule", "steps", *ways), rows)


def print_bounds(part: Part, limits: Mapping[str, float]) -> None:
    """Print what no fine run may do, and how many runs were fine.

    Args:
        part: The held-out runs.
        limits: The thresholds.
    """
    sums = add_layers([*part.layers, *add_now(part.layers)], limits)
    judged = [
        (run, judge(run, sums.get(identify_view(run), LayerSums()), limits))
        for run in part.runs
        if run["family"] not in ("control", "average") and not math.isnan(run["kept"])
    ]
    fine = [run for run, verdict in judged if verdict == "STORES_FINE"]
    nearest = [run for run in fine if run["family"] in ("nearest", "true")]
    bad = [r for r in fine if find_lost(r) > MUCH or find_ratio(r) > FAR]
    print(
        f"\n{part.name}: {len(fine)} runs are called fine, {len(nearest)} of them rounded to "
        f"nearest; {len(judged) - len(fine)} are not. Of the fine ones {len(bad)} lost more than "
        f"10 % or ended above {FAR} times the loss, "
        f"{sum(find_ratio_beyond_chance(run) > FAR for run in bad)} of them beyond chance:"
    )
    for run in sorted(bad, key=find_ratio, reverse=True):
        print(
            f"  {run['task']} {run['optimizer']} {run['lr']:g} {run['start']} {run['way']}"
            f"{' unscaled' if run['scaling'] == 'none' else ''}: kept {run['kept']:.3f}, lost "
            f"{find_lost(run):.2%}, loss x {find_ratio(run):.2f}, control x "
            f"{run['chance'] / run['fp32']:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the rows are")
    folder = parser.parse_args().folder
    found = calibrate(*(read_part(part, folder) for part in ("calibration", "held_out")))
    limits, parts = found["thresholds"], list_parts(folder)
    print_rows(*parts[:2])
    print_rules(limits, found["rules"])
    print_outcomes(found["runs"], found["held_out"]["runs"])
    for part in parts:
        print_verdicts(part, limits)
    print_frozen(parts, limits)
    print_levels(parts, found["offsets"])
    print_ranking(parts)
    print_states(parts)
    for part in parts[:2]:
        print_losses(part)
        print_bounds(part, limits)


if __name__ == "__main__":
    main()
