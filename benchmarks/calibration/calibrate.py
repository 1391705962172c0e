"""Find the thresholds of the verdicts from runs that were really done, and test them on others.

    python -m benchmarks.calibration.calibrate            # prints the tables
    python -m benchmarks.calibration.calibrate --write    # also writes calibration.json

`runs` does the runs, and writes a row for each run and for each of its layers. A run **lost** 10 %
if its loss fell by 10 % less than in fp32. Its **loss ratio** is its final loss over that in fp32.
A threshold is the first of a few round numbers that keeps to its rule, see `RULES`. Rows of the
part “calibration” set the thresholds; those of the part “held_out” only test them. `tables` prints
what came of it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.calibration.configs import Config

PARTS = ("calibration", "held_out")
"""The parts of the rows: those that set the thresholds, and those that test them."""
FOLDER = Path(__file__).parent
WRITTEN = FOLDER.parents[1] / "altgrad" / "report" / "judging" / "calibration.json"
MUCH, LITTLE = 0.1, 0.01
"""Shares of the fall in loss in fp32: more than the first is much, up to the second little."""
FAR = 1.5
"""Loss ratio above which a run ended far from that in fp32."""
TRULY_FROZEN, TRULY_MOVED = 0.99, 1e-3
"""A layer was frozen in a real run if this share of the elements that fp32 moved never moved, and
fp32 moved the layer by more than this share of its norm."""
QUANTILE, OPEN = 1.2816, 0.5
"""Half of the width of an interval of 80 % over its standard error, and a width that leaves open
what a run keeps."""
VERDICTS = ("STORES_FINE", "WATCH", "NEEDS_REMEDY", "FROZEN", "OVERSHOOTS", "BREAKS")
"""Names of the verdicts that claim something about a run."""
FRACTIONS = (0.25, 0.5, 0.75)
Row = dict[str, Any]
"""Figures and results of a run, or of a layer of a run, by the name of the column."""

RULES = {
    "stores_fine": (
        "The lowest progress_kept of 0.9, 0.95, 0.98 and 0.99 that is safe. It is safe if, of the "
        "stable runs that keep between it and 1.05, with weights that are off by at most "
        "weight_error, none lost more than 10 %, and at most 1 in 100 ended above 1.5 times the "
        "loss of float32 and of its control."
    ),
    "weight_error": (
        "The largest weight_error of 0.01, 0.02, 0.05, 0.1 and 0.2 with which some progress_kept "
        "is safe."
    ),
    "needs_remedy": (
        "The lowest progress_kept of 0.5, 0.6, 0.7, 0.8, 0.9 and 0.95 above which watch is "
        "narrow. It is narrow if, of the runs that round to nearest, keep between it and 1.2 and "
        "are not fine, the middle half of the loss ratios spans less than a factor of 2, and at "
        "most 1 in 10 lost more than 10 %."
    ),
    "overshoots": (
        "The lowest progress_kept of 1.05, 1.1, 1.2, 1.5 and 2 such that, of the runs that keep "
        "between it and the next of these, at least half ended below 0.8 or above 1.25 times the "
        "loss of float32."
    ),
    "frozen": (
        "The lowest frozen_frac of 0.9, 0.99, 0.995 and 0.999 such that, of the layers that reach "
        "it and keep less than 0.5 of the progress, at least 19 in 20 were frozen in the real run."
    ),
    "frozen_kept": (
        "The highest progress_kept of 0.05, 0.1, 0.2 and 0.5 such that, of the layers that keep "
        "less and reach the frozen_frac above, at least 19 in 20 were frozen in the real run."
    ),
    "moved": (
        "Part of what frozen means: float32 moved the layer by more than this share of the norm "
        "of its weights."
    ),
    "stuck_loss": "Chosen, not found in the runs: a twentieth of the progress.",
    "run_frozen": "Chosen, not found in the runs: half of the weights.",
    "left_behind": (
        "Chosen: a quarter of the weights. No run that was fine or “watch” had more than 0.21 of "
        "them in layers that kept less than half of their progress."
    ),
    "offsets": (
        "For each range of predicted progress_kept, the 10th and the 90th percentile of the real "
        "progress_kept minus the predicted one."
    ),
    "steps: stores_fine": (
        "The lowest kept_update_ratio of 0.9, 0.99 and 0.999 such that, of the stable runs that "
        "reach it, none lost more than 10 %, and at most 1 in 10 lost more than 1 %."
    ),
    "steps: needs_remedy": (
        "The highest kept_update_ratio of 0.1, 0.2 and so on to 0.9 such that, of the runs that "
        "keep up to 0.1 less than it, at least half lost more than 10 %."
    ),
    "steps: frozen": (
        "The lowest never_moved_frac of 0.9, 0.99 and 0.999 such that, of the layers that reach "
        "it, at least two thirds were frozen in the real run."
    ),
    "steps: underflow": (
        "The lowest underflow_frac of 0.01, 0.03, 0.1 and 0.3 such that a scale helps at least "
        "half of the runs without a scale between it and the next of these. A scale helps a run "
        "that lost more than 1 % if the same run with a scale lost less than half of that."
    ),
    "steps: saturated": (
        "Chosen: no run had more than 0.6 % of its weights beyond the top, but for those in mxfp4, "
        "which clips by design."
    ),
}
"""The rule behind each threshold. A run *lost* 10 % if its loss fell by 10 % less than in float32,
its *loss ratio* is its final loss over that of float32, and it is *stable* if its control, a run in
float32 whose weights start one millionth apart, ends within a factor of 1.5 of float32."""
OFFSET_EDGES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.02, math.inf)
"""Upper ends of the ranges of predicted progress_kept that have offsets of their own."""


# --- rows


def read_part(part: str, folder: Path = FOLDER) -> tuple[list[Row], list[Row]]:
    """Read the rows of the runs and of the layers of a part; empty lists without files.

    Args:
        part: ``"calibration"`` or ``"held_out"``.
        folder: The folder that has the files.
    """
    paths = (folder / f"{part}_{what}.csv" for what in ("runs", "layers"))
    runs, layers = ([*map(_parse, _read(path))] if path.exists() else [] for path in paths)
    families = {identify(run): run["family"] for run in runs}
    controls = {identify_config(run): run for run in runs if run["family"] == "control"}
    for run in runs:
        control = controls.get(identify_config(run))
        run["chance"] = math.nan if control is None else control["loss"]
        run["error"] = run["drift"] * run["fp32_moved"]
    for layer in layers:
        layer["family"] = families[identify(layer)]
        layer["error"] = layer["drift"] * layer["fp32_moved"]
    return runs, layers


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def _parse(row: Mapping[str, str]) -> Row:
    """Return a row with its cells as numbers where possible; an empty cell is NaN."""
    return {key: _parse_cell(value) for key, value in row.items()}


def _parse_cell(text: str) -> float | str:
    try:
        return float(text or "nan")
    except ValueError:
        return text


def identify_config(row: Row) -> tuple[Any, ...]:
    """Return what tells the way to train of a row from others."""
    return tuple(row[name] for name in Config._fields)


def identify(row: Row) -> tuple[Any, ...]:
    """Return what tells the run of a row from others."""
    return (*identify_config(row), row["way"], row["scaling"])


def identify_view(row: Row) -> tuple[Any, ...]:
    """Return what tells the run of a row from others, and what its twins say from ``now``."""
    return (*identify(row), row["family"])


def find_family(run: Row) -> str:
    """Return the family of a run as `altgrad.report.judging.families` names it."""
    if run["family"] != "nearest":
        return str(run["family"])
    return "nearest-16" if run["way"] in ("fp16", "bf16") else "nearest-8"


def add_now(rows: Iterable[Row]) -> list[Row]:
    """Return rows of runs as monitors of these runs saw them, with the family ``"now"``."""
    return [
        row | {"kept": row["now_kept"], "frozen": row["now_frozen"], "family": "now"}
        for row in rows
        if row["family"] == "true"
    ]


def stores_weights_low(row: Row) -> bool:
    """Return True for the row of a run, or of its layer, whose weights are stored low."""
    return row["family"] in ("nearest", "true", "stochastic", "kahan")


def select_weights(rows: Iterable[Row]) -> list[Row]:
    """Return the rows whose weights are stored low: those that set most thresholds."""
    return [*filter(stores_weights_low, rows)]


# --- what became of a run


def find_lost(run: Row) -> float:
    """Return the share of the fall in loss in fp32 that a run lost; inf if it diverged."""
    share = (run["loss"] - run["fp32"]) / (run["initial"] - run["fp32"])
    return math.inf if math.isnan(share) else share


def find_ratio(run: Row) -> float:
    """Return the final loss over that in fp32; inf if the run diverged."""
    return math.inf if math.isnan(run["loss"]) else run["loss"] / run["fp32"]


def find_ratio_beyond_chance(run: Row) -> float:
    """Return the final loss over the larger of that in fp32 and that of its control.

    The control is a run in fp32 whose weights start one millionth apart. If it ends elsewhere,
    training is unstable, and storage has no part in it.
    """
    chance = run["fp32"] if math.isnan(run["chance"]) else max(run["fp32"], run["chance"])
    return math.inf if math.isnan(run["loss"]) else run["loss"] / chance


def count_lost(runs: Iterable[Row], share: float) -> int:
    return sum(find_lost(run) > share for run in runs)


def is_frozen(layer: Row) -> bool:
    """Return True if a layer was frozen in the real run, and fp32 had moved it."""
    return layer["real_frozen"] >= TRULY_FROZEN and layer["fp32_moved"] > TRULY_MOVED


def find_quantiles(values: Iterable[float], fractions: Sequence[float]) -> list[float]:
    """Return quantiles of some numbers, each the nearest of these; NaN counts as inf.

    Args:
        values: One or more numbers.
        fractions: The fractions of the quantiles, 0 to 1.
    """
    ordered = sorted(math.inf if math.isnan(value) else value for value in values)
    return [ordered[round(fraction * (len(ordered) - 1))] for fraction in fractions]


# --- the thresholds


def find_thresholds(runs: Sequence[Row], layers: Sequence[Row]) -> dict[str, float]:
    """Find the thresholds of figures of twins, by the rules in `RULES`.

    Args:
        runs: Rows of the runs to calibrate on.
        layers: Rows of their layers.
    """
    stored = select_weights(runs)
    fine, error = next(
        (kept, error)
        for error in (0.2, 0.1, 0.05, 0.02, 0.01)
        for kept in (0.9, 0.95, 0.98, 0.99)
        if _are_fine([run for run in _choose(stored, kept, 1.05) if run["error"] <= error])
    )
    nearest = [run for run in stored if run["family"] in ("nearest", "true")]
    rest = [run for run in nearest if not (run["kept"] >= fine and run["error"] <= error)]
    candidates = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
    remedy = _find_first(candidates, lambda t: t < fine and _is_narrow(_choose(rest, t, 1.2)))
    stored_layers = select_weights(layers)
    frozen = _find_first((0.9, 0.99, 0.995, 0.999), lambda t: _are_frozen(stored_layers, t, 0.5))
    kept = _find_first((0.5, 0.2, 0.1, 0.05), lambda k: _are_frozen(stored_layers, frozen, k))
    return {
        "stores_fine": fine,
        "needs_remedy": remedy,
        "weight_error": error,
        "overshoots": _find_overshoots(runs),
        "frozen": frozen,
        "frozen_kept": kept,
        "moved": TRULY_MOVED,
        "stuck_loss": 0.05,
        "run_frozen": 0.5,
        "left_behind": 0.25,
    }


def _find_first(candidates: Iterable[float], holds: Callable[[float], bool]) -> float:
    return next(candidate for candidate in candidates if holds(candidate))


def _choose(runs: Iterable[Row], low: float, high: float, key: str = "kept") -> list[Row]:
    return [run for run in runs if low <= run[key] < high]


def _are_fine(runs: Sequence[Row]) -> bool:
    stable = _remove_unstable(runs)
    far = sum(find_ratio_beyond_chance(run) > FAR for run in stable)
    return not count_lost(stable, MUCH) and far * 100 <= len(stable)


def _remove_unstable(runs: Iterable[Row]) -> list[Row]:
    """Return the runs whose control ended where the run in fp32 did: within a factor of 1.5."""
    return [run for run in runs if not _is_unstable(run)]


def _is_unstable(run: Row) -> bool:
    return not 1 / FAR <= run["chance"] / run["fp32"] <= FAR and not math.isnan(run["chance"])


def _is_narrow(runs: Sequence[Row]) -> bool:
    low, high = find_quantiles(map(find_ratio, runs), (0.25, 0.75))
    return high / low < 2 and count_lost(runs, MUCH) * 10 <= len(runs)


def _find_overshoots(runs: Sequence[Row]) -> float:
    for low, high in itertools.pairwise((1.05, 1.1, 1.2, 1.5, 2.0, math.inf)):
        over = _choose(runs, low, high)
        off = sum(not 0.8 <= find_ratio(run) <= 1.25 for run in over)
        if over and off * 2 >= len(over):
            return low
    raise ValueError("no progress_kept keeps to the rule of overshoots")


def _are_frozen(layers: Iterable[Row], frozen: float, kept: float) -> bool:
    said = [layer for layer in layers if is_said(layer, frozen, kept)]
    return sum(map(is_frozen, said)) * 20 >= len(said) * 19


def is_said(layer: Row, frozen: float, kept: float) -> bool:
    """Return True if a twin says that a layer would be frozen.

    It never does under stochastic rounding, which moves every weight in the end.

    Args:
        layer: Row of the layer.
        frozen: Least frozen_frac.
        kept: Largest progress_kept.
    """
    return _stands_still(layer, frozen, kept) and layer["family"] != "stochastic"


def _stands_still(layer: Row, frozen: float, kept: float) -> bool:
    return layer["frozen"] >= frozen and layer["kept"] < kept and layer["fp32_moved"] > TRULY_MOVED


def find_offsets(runs: Iterable[Row]) -> list[list[float]]:
    """Return upper end, tenth and ninetieth percentile for each range of predicted progress."""
    stored = [r for r in select_weights(runs) if math.isfinite(r["kept"] + r["real_kept"])]
    offsets, low = [], -math.inf
    for high in OFFSET_EDGES:
        own = [r["real_kept"] - r["kept"] for r in _choose(stored, low, high)]
        offsets.append([high if math.isfinite(high) else 1e9, *find_quantiles(own, (0.1, 0.9))])
        low = high
    return offsets


def find_step_thresholds(runs: Sequence[Row], layers: Sequence[Row]) -> dict[str, float]:
    """Find the thresholds of figures of single steps, by the rules in `RULES`.

    Args:
        runs: Rows of the runs to calibrate on.
        layers: Rows of their layers.
    """
    stored = [run for run in runs if run["family"] == "nearest"]
    own = [
        layer for layer in layers if layer["family"] == "nearest" and layer["scaling"] == "tensor"
    ]
    key = "step_kept"

    def is_harmful(limit: float) -> bool:
        below = _choose(stored, limit - 0.1, limit, key)
        return bool(below) and count_lost(below, MUCH) * 2 >= len(below)

    def is_harmless(limit: float) -> bool:
        above = _remove_unstable(_choose(stored, limit, math.inf, key))
        return count_lost(above, LITTLE) * 10 <= len(above) and not count_lost(above, MUCH)

    def are_frozen(limit: float) -> bool:
        said = [layer for layer in own if layer["step_never_moved"] >= limit]
        return sum(layer["real_frozen"] >= TRULY_FROZEN for layer in said) * 3 >= len(said) * 2

    return {
        "stores_fine": _find_first((0.9, 0.99, 0.999), is_harmless),
        "needs_remedy": _find_first([tenth / 10 for tenth in range(9, 0, -1)], is_harmful),
        "frozen": _find_first((0.9, 0.99, 0.999), are_frozen),
        "underflow": _find_underflow(stored),
        "saturated": 0.01,
    }


def _find_underflow(runs: Sequence[Row]) -> float:
    scaled = {identify(run): run for run in runs if run["scaling"] == "tensor"}
    unscaled = [run for run in runs if run["scaling"] == "none"]

    def is_mended(run: Row) -> bool:
        same = scaled[identify(run | {"scaling": "tensor"})]
        return find_lost(run) > LITTLE and find_lost(same) < find_lost(run) / 2

    edges = (0.01, 0.03, 0.1, 0.3, math.inf)
    for low, high in itertools.pairwise(edges):
        between = _choose(unscaled, low, high, "underflow")
        if between and sum(map(is_mended, between)) * 2 >= len(between):
            return low
    raise ValueError("no underflow_frac keeps to the rule")


# --- the verdicts with these thresholds


class LayerSums(NamedTuple):
    """What the layers of a run add to the verdict on it.

    Attributes:
        frozen: Share of the weights in layers that are said to be frozen.
        behind: Share of those in layers that fp32 moved, and that keep less than half of their
            progress.
        error: Standard error of the share of the progress that the run keeps.
    """

    frozen: float = 0.0
    behind: float = 0.0
    error: float = 0.0


def judge(run: Row, sums: LayerSums, limits: Mapping[str, float]) -> str:
    """Return the name of the verdict on a run.

    A test holds this against `altgrad.report`, which judges from the figures of the layers.

    Args:
        run: The row of the run.
        sums: What its layers add.
        limits: The thresholds.
    """
    if run["nonfinite"] > 0:
        return "BREAKS"
    kept = run["kept"]
    verdict, reach = _classify(kept, run["error"], limits), QUANTILE * sums.error
    if run["family"] == "stochastic" and _may_be_fine(kept, verdict, reach, limits):
        return "UNCERTAIN"
    if verdict == "OVERSHOOTS":
        return verdict
    if reach >= OPEN:
        return "UNCERTAIN"
    if kept < limits["frozen_kept"] and sums.frozen >= limits["run_frozen"]:
        return "FROZEN"
    return "NEEDS_REMEDY" if sums.behind > limits["left_behind"] else verdict


def _may_be_fine(kept: float, verdict: str, reach: float, limits: Mapping[str, float]) -> bool:
    """Return True if a verdict of harm may be the chance of stochastic rounding in the sample."""
    if verdict == "OVERSHOOTS":
        return kept - reach <= limits["overshoots"]
    return verdict == "NEEDS_REMEDY" and kept + reach >= limits["stores_fine"]


def judge_layer(layer: Row, limits: Mapping[str, float]) -> str:
    """Return the name of the verdict on a layer.

    Args:
        layer: The row of the layer.
        limits: The thresholds.
    """
    if layer["nonfinite"] > 0:
        return "BREAKS"
    if _stands_still(layer, limits["frozen"], limits["frozen_kept"]):
        return "UNCERTAIN" if layer["family"] == "stochastic" else "FROZEN"
    return _classify(layer["kept"], layer["error"], limits)


def _classify(kept: float, error: float, limits: Mapping[str, float]) -> str:
    if kept > limits["overshoots"]:
        return "OVERSHOOTS"
    if kept >= limits["stores_fine"] and not error > limits["weight_error"]:
        return "STORES_FINE"
    return "WATCH" if kept >= limits["needs_remedy"] else "NEEDS_REMEDY"


def add_layers(layers: Iterable[Row], limits: Mapping[str, float]) -> dict[Any, LayerSums]:
    """Return what its layers add to the verdict on a run, by `identify_view`.

    Args:
        layers: Rows of layers.
        limits: The thresholds.
    """
    by_run: dict[Any, list[Row]] = {}
    for layer in layers:
        by_run.setdefault(identify_view(layer), []).append(layer)
    return {key: _add_layers(own, limits) for key, own in by_run.items()}


def _add_layers(layers: Sequence[Row], limits: Mapping[str, float]) -> LayerSums:
    size = sum(layer["elements"] for layer in layers)
    frozen = sum(x["elements"] for x in layers if judge_layer(x, limits) == "FROZEN")
    behind = sum(
        layer["elements"]
        for layer in layers
        if layer["kept"] < limits["frozen_kept"] and layer["fp32_moved"] > TRULY_MOVED
    )
    known = [layer for layer in layers if math.isfinite(layer["energy"] * layer["kept"])]
    energy = sum(layer["energy"] for layer in known)
    errors = [layer["energy"] * _find_error(layer) for layer in known]
    return LayerSums(frozen / size, behind / size, math.hypot(*errors) / energy if energy else 0.0)


def _find_error(layer: Row) -> float:
    """Return the standard error of what a layer keeps; one that cannot be trusted counts as 1."""
    error = 1.0 if math.isnan(layer["kept_error"]) else layer["kept_error"]
    if layer["family"] != "stochastic":
        return float(error)
    # The draws of the sample, at most 256 elements, add theirs.
    return math.hypot(error, layer["drift"] / math.sqrt(min(layer["elements"], 256)))


def find_run_outcomes(
    runs: Sequence[Row], layers: Sequence[Row], limits: Mapping[str, float]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Count for each family and verdict the runs, and what they lost.

    Args:
        runs: Rows of runs.
        layers: Rows of layers.
        limits: The thresholds.
    """
    sums = add_layers(layers, limits)
    sorted_runs: dict[str, dict[str, list[Row]]] = {}
    for run in runs:
        if run["family"] not in ("control", "average") and not math.isnan(run["kept"]):
            verdict = judge(run, sums.get(identify_view(run), LayerSums()), limits)
            sorted_runs.setdefault(find_family(run), {}).setdefault(verdict, []).append(run)
    return {
        family: {verdict: _describe(by[verdict]) for verdict in VERDICTS if verdict in by}
        for family, by in sorted_runs.items()
    }


def _describe(runs: Sequence[Row]) -> dict[str, Any]:
    return {
        "runs": len(runs),
        "lost_1_percent": count_lost(runs, LITTLE),
        "lost_10_percent": count_lost(runs, MUCH),
        "ended_far": sum(find_ratio(run) > FAR for run in runs),
        "ended_far_beyond_chance": sum(find_ratio_beyond_chance(run) > FAR for run in runs),
        "loss_ratios": _round(find_quantiles(map(find_ratio, runs), FRACTIONS)),
    }


def find_layer_outcomes(
    layers: Iterable[Row], limits: Mapping[str, float]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Count for each family and verdict the layers, and what they kept in the real run.

    Args:
        layers: Rows of layers.
        limits: The thresholds.
    """
    sorted_layers: dict[str, dict[str, list[Row]]] = {}
    for layer in layers:
        if layer["family"] != "control" and not math.isnan(layer["kept"] + layer["real_kept"]):
            family, verdict = find_family(layer), judge_layer(layer, limits)
            sorted_layers.setdefault(family, {}).setdefault(verdict, []).append(layer)
    return {
        family: {
            verdict: {
                "layers": len(by[verdict]),
                "frozen": sum(map(is_frozen, by[verdict])),
                "kept": _round(find_quantiles((x["real_kept"] for x in by[verdict]), FRACTIONS)),
            }
            for verdict in VERDICTS
            if verdict in by
        }
        for family, by in sorted_layers.items()
    }


def _round(values: Iterable[float]) -> list[float]:
    # JSON has no inf; nothing trains from a loss of 1e9 times the usual one.
    return [float(f"{min(max(value, -1e9), 1e9):.4g}") for value in values]


def calibrate(
    seen: tuple[Sequence[Row], Sequence[Row]], unseen: tuple[Sequence[Row], Sequence[Row]]
) -> dict[str, Any]:
    """Return the contents of altgrad/report/judging/calibration.json.

    Args:
        seen: Rows of runs and layers to calibrate on.
        unseen: Rows of the held-out runs and layers.
    """
    limits = find_thresholds(*seen)
    (runs, layers), (held_runs, held_layers) = (
        ([*part[0], *add_now(part[0])], [*part[1], *add_now(part[1])]) for part in (seen, unseen)
    )
    return {
        "about": "Written by benchmarks/calibration/calibrate.py, from runs really done.",
        "thresholds": limits,
        "step_thresholds": find_step_thresholds(*seen),
        "rules": RULES,
        "offsets": [_round(each) for each in find_offsets(seen[0])],
        "runs": find_run_outcomes(runs, layers, limits),
        "layers": find_layer_outcomes(layers, limits),
        "held_out": {
            "runs": find_run_outcomes(held_runs, held_layers, limits),
            "layers": find_layer_outcomes(held_layers, limits),
        },
    }


def as_text(calibration: Mapping[str, Any]) -> str:
    return json.dumps(calibration, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the rows are")
    parser.add_argument(
        "--write", action="store_true", help="write altgrad/report/judging/calibration.json"
    )
    arguments = parser.parse_args()
    seen, unseen = (read_part(part, arguments.folder) for part in ("calibration", "held_out"))
    found = calibrate(seen, unseen)
    for group in ("thresholds", "step_thresholds", "runs", "layers"):
        print(group)
        print(json.dumps(found[group], indent=1))
    if arguments.write:
        WRITTEN.write_text(as_text(found), encoding="utf-8")


if __name__ == "__main__":
    main()
