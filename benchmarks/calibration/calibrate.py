"""Find the thresholds of the verdicts from runs that were really done, and test them on others.

    python -m benchmarks.calibration.calibrate            # prints the tables
    python -m benchmarks.calibration.calibrate --write    # also writes calibration.json

`runs.py` does the runs, and writes a row for each. A run **lost** 10 % if its loss fell by 10 %
less than in fp32. A threshold is the first of a few round numbers that keeps to its rule, see
`RULES`. Thresholds come from logistic regression, the MLP and the transformer under SGD, momentum
and Adam. They are tested on the held-out tasks: the convolutional and the recurrent net under AdamW
and RMSprop.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.calibration.ways import FORMATS
from benchmarks.paired import print_table

FOLDER = Path(__file__).parent
WRITTEN = FOLDER.parents[1] / "altgrad" / "report" / "calibration.json"
HELD_OUT = {"conv", "gru"}
"""Names of the tasks that the thresholds are only tested on."""
MUCH, LITTLE = 0.1, 0.01
"""Shares of the progress in fp32: losing more than the first is much, up to the second little."""
VERDICTS = ("STORES_FINE", "WATCH", "NEEDS_REMEDY", "FROZEN", "RANGE")
"""Names of the verdicts that claim something about a run."""
TRULY_FROZEN = 0.99
"""Share of unmoved weights, in a real run, from which on a layer counts as frozen."""
Row = dict[str, Any]
"""Figures and results of a run, or of a layer of a run, by the name of the column."""

RULES = {
    "stores_fine": (
        "the lowest kept_update_ratio of 0.9, 0.99 and 0.999 from which on at most 1 run in 10 "
        "lost more than 1 %, and none more than 10 %"
    ),
    "needs_remedy": (
        "the highest tenth of kept_update_ratio such that, in the tenth below it, at least half "
        "of the runs lost more than 10 %"
    ),
    "frozen": (
        "the lowest never_moved_frac of 0.9, 0.99 and 0.999 from which on two thirds of the layers "
        "were really frozen: 99 % of their weights had not moved"
    ),
    "underflow": (
        "the lowest underflow_frac of 0.01, 0.03, 0.1 and 0.3 such that, from there to the next, "
        "at least half of the runs without a scale lost less than half as much with one"
    ),
    "saturated": (
        "a judgement: no run as a whole, but those in mxfp4, which clips by design, had more than "
        "0.6 % beyond the top"
    ),
}


def read(path: Path) -> list[Row]:
    """Read the rows of a CSV file, with cells as numbers where possible."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def nearest(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["way"] == "nearest"]


def _part(rows: Iterable[Row], held_out: bool) -> list[Row]:
    return [row for row in rows if (row["task"] in HELD_OUT) == held_out]


def _scaled(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with a scale for each tensor."""
    return [row for row in rows if row["scaling"] == "tensor"]


def lost(run: Row) -> float:
    """Return the share of the progress in fp32 that a run lost; inf if it diverged."""
    share = (run["loss"] - run["fp32"]) / (run["initial"] - run["fp32"])
    return math.inf if math.isnan(share) else share


def is_mended(run: Row, runs: Iterable[Row]) -> bool:
    """Return True if a run without a scale lost more than 1 %, and with one less than half of it.

    Args:
        run: The run without a scale.
        runs: All runs, among them the same run with a scale.
    """
    same = [
        other
        for other in runs
        if other["scaling"] == "tensor"
        and all(other[key] == run[key] for key in ("task", "optimizer", "lr", "format", "way"))
    ]
    (scaled,) = same
    return lost(run) > LITTLE and lost(scaled) < lost(run) / 2


# --- the thresholds


def thresholds(runs: Sequence[Row], layers: Sequence[Row]) -> dict[str, float]:
    """Find the threshold of each rule in `RULES`.

    Args:
        runs: Rows of the runs to calibrate on.
        layers: Rows of their layers.
    """
    return {
        "stores_fine": _first((0.9, 0.99, 0.999), lambda t: _is_fine(_kept(runs, t, math.inf))),
        "needs_remedy": _first(
            [tenth / 10 for tenth in range(9, 0, -1)],
            lambda t: (
                _count_lost(_kept(runs, t - 0.1, t), MUCH) * 2 >= len(_kept(runs, t - 0.1, t))
                and bool(_kept(runs, t - 0.1, t))
            ),
        ),
        "frozen": _first(
            (0.9, 0.99, 0.999),
            lambda t: _share_frozen([x for x in layers if x["never_moved"] >= t]) >= 2 / 3,
        ),
        "underflow": _underflow(runs),
        "saturated": 0.01,
    }


def _first(candidates: Iterable[float], holds: Callable[[float], bool]) -> float:
    return next(candidate for candidate in candidates if holds(candidate))


def _kept(runs: Iterable[Row], low: float, high: float) -> list[Row]:
    return [run for run in runs if low <= run["kept"] < high]


def _count_lost(runs: Iterable[Row], share: float) -> int:
    return sum(lost(run) > share for run in runs)


def _is_fine(runs: Sequence[Row]) -> bool:
    return _count_lost(runs, LITTLE) * 10 <= len(runs) and not _count_lost(runs, MUCH)


def _share_frozen(layers: Sequence[Row]) -> float:
    return sum(x["true_never_moved"] >= TRULY_FROZEN for x in layers) / max(len(layers), 1)


def _underflow(runs: Sequence[Row]) -> float:
    edges = (0.01, 0.03, 0.1, 0.3, math.inf)
    for low, high in itertools.pairwise(edges):
        between = [r for r in _unscaled(runs) if low <= r["underflow"] < high]
        if between and sum(is_mended(r, runs) for r in between) * 2 >= len(between):
            return low
    raise ValueError("no underflow_frac keeps to the rule")


def _unscaled(runs: Iterable[Row]) -> list[Row]:
    return [run for run in runs if run["scaling"] == "none"]


# --- the verdicts with these thresholds


def judge(run: Row, limits: dict[str, float]) -> str:
    """Return the name of the verdict on a run, from the figures of its whole model.

    `altgrad.report.verdicts` also asks for standard errors. Here all elements are measured.

    Args:
        run: The row of the run.
        limits: The thresholds.
    """
    out_of_range = any(run[key] >= limits[key] for key in ("underflow", "saturated"))
    if run["never_moved"] >= limits["frozen"]:
        return "FROZEN"
    if run["kept"] >= limits["stores_fine"]:
        return "STORES_FINE"
    if out_of_range:
        return "RANGE"
    return "WATCH" if run["kept"] >= limits["needs_remedy"] else "NEEDS_REMEDY"


def outcomes(
    runs: Sequence[Row], layers: Sequence[Row], limits: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Count, for each verdict, the runs that got it, and how many of them lost over 1 % and 10 %.

    Under ``"FROZEN"`` are also counts of layers, under ``"RANGE"`` those of runs without a scale.

    Args:
        runs: Rows of runs.
        layers: Rows of layers.
        limits: The thresholds.
    """
    found: dict[str, dict[str, Any]] = {}
    for verdict in VERDICTS:
        same = [run for run in runs if judge(run, limits) == verdict]
        found[verdict] = {
            "runs": len(same),
            "lost_1_percent": _count_lost(same, LITTLE),
            "lost_10_percent": _count_lost(same, MUCH),
            "formats": _name_formats(same),
        }
        if verdict == "RANGE":
            found[verdict] |= {
                "without_a_scale": len(_unscaled(same)),
                "mended_by_a_scale": sum(is_mended(run, runs) for run in _unscaled(same)),
            }
    said = [layer for layer in layers if layer["never_moved"] >= limits["frozen"]]
    found["FROZEN"] |= {
        "layers": len(said),
        "frozen": sum(x["true_never_moved"] >= TRULY_FROZEN for x in said),
        "frozen_to_90_percent": sum(x["true_never_moved"] >= 0.9 for x in said),
        "missed": sum(x["true_never_moved"] >= TRULY_FROZEN for x in layers if x not in said),
    }
    return found


def _name_formats(rows: Sequence[Row]) -> list[str]:
    """Return the names of the formats in some rows, those with a scale first."""
    scaled = {row["format"] for row in _scaled(rows)}
    others = {row["format"] for row in rows} - scaled
    return [
        *(format for format in FORMATS if format in scaled),
        *(f"{format} without a scale" for format in FORMATS if format in others),
    ]


def calibrate(runs: Sequence[Row], layers: Sequence[Row]) -> dict[str, Any]:
    """Return the contents of altgrad/report/calibration.json.

    Args:
        runs: Rows of all runs.
        layers: Rows of all layers.
    """
    seen, unseen = (
        (nearest(_part(runs, held_out)), _scaled(_part(layers, held_out)))
        for held_out in (False, True)
    )
    limits = thresholds(*seen)
    return {
        "about": "Written by benchmarks/calibration/calibrate.py, from runs really done.",
        "thresholds": limits,
        "rules": RULES,
        "calibration": outcomes(*seen, limits),
        "held_out": outcomes(*unseen, limits),
    }


def as_text(calibration: dict[str, Any]) -> str:
    return json.dumps(calibration, indent=1) + "\n"


# --- the tables


def auc(runs: Sequence[Row], key: str, sign: int) -> float:
    """Return the AUC: how often a run that lost more than 10 % ranks above one that did not.

    Args:
        runs: Rows of runs.
        key: Column of the figure that ranks the runs.
        sign: 1 if a high figure is bad, -1 if a low one is.
    """
    bad = [sign * run[key] for run in runs if lost(run) > MUCH]
    good = [sign * run[key] for run in runs if not lost(run) > MUCH]
    wins = sum((a > b) + (a == b) / 2 for a in bad for b in good)
    return wins / max(len(bad) * len(good), 1)


def print_part(name, runs, layers, found, *, held_out: bool) -> None:
    print_outcomes(name, nearest(_part(runs, held_out)), found)
    print_stalls(name, _scaled(_part(layers, held_out)))


def print_outcomes(name: str, runs: Sequence[Row], found: dict[str, dict[str, Any]]) -> None:
    print(f"\n{name}: {len(runs)} runs that round to nearest\n")
    header = ("verdict on the model", "runs", "lost > 1 %", "lost > 10 %", "formats")
    keys = ("runs", "lost_1_percent", "lost_10_percent")
    rows = [
        (verdict, *(str(found[verdict][key]) for key in keys), ", ".join(found[verdict]["formats"]))
        for verdict in VERDICTS
    ]
    print_table(header, rows)
    frozen, out = found["FROZEN"], found["RANGE"]
    print(
        f"\nfrozen: said of {frozen['layers']} layers, {frozen['frozen']} were, and "
        f"{frozen['frozen_to_90_percent']} to 90 %; {frozen['missed']} that were had not been said"
        f"\nrange: of {out['without_a_scale']} runs without a scale, {out['mended_by_a_scale']} "
        "lost less than half as much with one"
    )
    ranked = {"kept": -1, "kept_by_energy": -1, "stall": 1, "never_moved": 1}
    aucs = "  ".join(f"{key} {auc(runs, key, sign):.3f}" for key, sign in ranked.items())
    print(f"AUC for losing more than 10 %: {aucs}")


def print_stalls(name: str, layers: Sequence[Row]) -> None:
    """Print how far the predicted stall_frac of layers is from the measured one.

    Args:
        name: Heading of the table.
        layers: Rows of layers in runs with a scale.
    """
    rows = []
    for what, chosen in (
        ("all", layers),
        ("matrices", [x for x in layers if x["dims"] > 1]),
        ("vectors", [x for x in layers if x["dims"] <= 1]),
    ):
        known = [x for x in chosen if not math.isnan(x["stall"])]
        errors = sorted(abs(x["stall"] - x["true_stall"]) for x in known)
        mean = sum(errors) / len(errors)
        shown = (mean, errors[int(0.95 * len(errors))], errors[-1])
        rows.append((what, str(len(known)), *(f"{error:.3f}" for error in shown)))
    print(f"\n{name}: stall_frac of a layer, predicted against measured\n")
    print_table(("layers", "", "mean error", "95 % below", "largest"), rows)


def print_remedies(runs: Sequence[Row]) -> None:
    print("\nAll tasks, the remedies\n")
    keys = ("task", "optimizer", "lr", "format", "scaling")
    by_nearest = {tuple(run[k] for k in keys): lost(run) for run in nearest(runs)}
    rows = []
    for way in ("stochastic", "kahan"):
        same = [run for run in runs if run["way"] == way]
        losses = sorted(map(lost, same))
        lost_before = sum(by_nearest[tuple(run[k] for k in keys)] > MUCH for run in same)
        numbers = (len(same), lost_before, _count_lost(same, LITTLE), _count_lost(same, MUCH))
        rows.append((way, *map(str, numbers), f"{losses[-2]:.1%}, {losses[-1]:.1%}"))
    header = ("way", "runs", "lost > 10 % to nearest", "> 1 %", "> 10 %", "the two worst")
    print_table(header, rows)


def print_by_energy(runs: Sequence[Row], layers: Sequence[Row]) -> None:
    """Print the verdicts that would follow if a mean over steps weighed each by Σ update².

    Args:
        runs: Rows of all runs.
        layers: Rows of all layers.
    """
    found = calibrate([run | {"kept": run["kept_by_energy"]} for run in runs], layers)
    limit = found["thresholds"]["needs_remedy"]
    each = (found[part]["NEEDS_REMEDY"] for part in ("calibration", "held_out"))
    counts = ", ".join(f"{c['lost_10_percent']} of {c['runs']}" for c in each)
    print(
        f"\nWith steps weighed by energy a remedy would be needed below {limit:g}; of these, lost "
        f"more than 10 %, calibration and held out: {counts}"
    )


def print_failures(runs: Sequence[Row], layers: Sequence[Row], limits: dict[str, float]) -> None:
    """Print the runs and layers whose verdict or prediction was furthest from the truth.

    Args:
        runs: Rows of all runs.
        layers: Rows of all layers.
        limits: The thresholds.
    """

    def name_run(row: Row) -> str:
        scale = " without a scale" if row["scaling"] == "none" else ""
        return f"{row['task']} {row['optimizer']} {row['lr']:g} {row['format']}{scale}"

    fine = [r for r in nearest(runs) if judge(r, limits) == "STORES_FINE"]
    print("\nStores fine, and lost most:")
    for run in sorted(fine, key=lost)[-4:]:
        print(f"  {name_run(run)}: kept {run['kept']:.3f}, lost {lost(run):.1%}")
    remedy = [r for r in nearest(runs) if judge(r, limits) == "NEEDS_REMEDY"]
    harmless = sum(lost(r) <= LITTLE for r in remedy)
    print(f"Needs a remedy, and lost least; {harmless} of {len(remedy)} lost at most 1 %:")
    for run in sorted(remedy, key=lost)[:4]:
        print(f"  {name_run(run)}: kept {run['kept']:.3f}, lost {lost(run):.1%}")
    print("Stall predicted worst, in each of the five worst runs:")
    worst: dict[str, Row] = {}
    for layer in sorted(_scaled(layers), key=lambda x: -_error(x)):
        worst.setdefault(name_run(layer), layer)
    for name, layer in [*worst.items()][:5]:
        said, true = layer["stall"], layer["true_stall"]
        print(f"  {name}, {layer['layer']}: {said:.2f} predicted, {true:.2f} measured")
    print(f"Most that a run kept: {max(run['kept'] for run in nearest(runs)):.4f}")


def _error(layer: Row) -> float:
    error = abs(layer["stall"] - layer["true_stall"])
    return 0.0 if math.isnan(error) else error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the rows are")
    parser.add_argument(
        "--write", action="store_true", help="write altgrad/report/calibration.json"
    )
    arguments = parser.parse_args()
    runs = read(arguments.folder / "runs.csv")
    layers = read(arguments.folder / "layers.csv")
    found = calibrate(runs, layers)
    for key, limit in found["thresholds"].items():
        print(f"{key} {limit:g}: {RULES[key]}")
    print_part("Calibration", runs, layers, found["calibration"], held_out=False)
    print_part("Held out", runs, layers, found["held_out"], held_out=True)
    print_remedies(runs)
    print_by_energy(runs, layers)
    print_failures(runs, layers, found["thresholds"])
    if arguments.write:
        WRITTEN.write_text(as_text(found), encoding="utf-8")


if __name__ == "__main__":
    main()
