"""Thresholds and evidence of the verdicts follow from the committed rows of real runs."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from altgrad.report import Advice, Verdict
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.run_rules import LayerShare, judge_recipe
from altgrad.report.judging.tallies import TwinTally
from altgrad.report.judging.twin_rules import judge_twin
from benchmarks.calibration import configs, runs, tasks, ways
from benchmarks.calibration.calibrate import (
    FOLDER,
    PARTS,
    LayerSums,
    Row,
    add_layers,
    as_text,
    calibrate,
    find_lost,
    identify_view,
    judge,
    judge_layer,
    read_part,
)
from tests.report.twin_runs import add_twin_step

CONFIG = configs.Config("logistic", "sgd", 0.1)


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[list[Row], list[Row]]]:
    return {part: read_part(part) for part in PARTS}


@pytest.fixture(scope="module")
def frames() -> dict[str, pd.DataFrame]:
    """Read the runs with pandas instead of the code under test."""
    return {part: pd.read_csv(FOLDER / f"{part}_runs.csv") for part in PARTS}


def test_calibration_json_is_what_the_rows_give(parts) -> None:
    written = (
        files("altgrad.report.judging").joinpath("calibration.json").read_text(encoding="utf-8")
    )
    assert as_text(calibrate(parts["calibration"], parts["held_out"])) == written
    thresholds = dataclasses.asdict(calibration().thresholds)
    assert json.loads(written)["thresholds"] == thresholds
    assert {*thresholds} <= {*calibration().rules}


def test_the_rows_cover_tasks_optimizers_learning_rates_and_ways(frames) -> None:
    seen, unseen = frames["calibration"], frames["held_out"]
    for frame, part in ((seen, "calibration"), (unseen, "held_out")):
        assert len(frame.groupby([*configs.Config._fields])) == len(configs.PARTS[part])
        assert (frame.fp32 < frame.initial).all()  # a run without progress can lose none
        assert {*frame.family} == {
            *("nearest", "true", "stochastic", "kahan", "states", "average", "control")
        }
    assert not {*seen.task} & {*unseen.task}
    assert {*configs.NEVER_SEEN} <= {*unseen.optimizer} - {*seen.optimizer}
    assert {*unseen.task} == {*tasks.SEEN_BEFORE, *tasks.NEVER_SEEN}


@pytest.mark.parametrize("part", PARTS)
def test_altgrad_judges_layers_as_the_script_does(parts, part: str) -> None:
    limits = dataclasses.asdict(calibration().thresholds)
    known = [row for row in parts[part][1] if not math.isnan(row["kept"] + row["fp32_moved"])]
    assert len(known) > 1000
    for row in known[::7]:
        is_drawn = row["family"] == "stochastic"
        # Of infinitely many elements, which leaves nothing to chance.
        verdict, _ = judge_twin(make_tally(row), drawn=10**60 if is_drawn else 0)
        assert verdict.name == judge_layer(row, limits), row


def make_tally(row: Row, **errors: float) -> TwinTally:
    """Make the tally of a layer whose weights have the size 1; other figures are exact."""
    tally = TwinTally("recipe")
    figures = {
        "progress_kept": row["kept"],
        "frozen_frac": row["frozen"],
        "still_frac": math.nan,
        "drift": row["drift"],
        "moved_rms": row["fp32_moved"],
        "twin_nonfinite_frac": row.get("nonfinite", 0.0),
    }
    exact = {f"{metric}/recipe": value for metric, value in figures.items()}
    stated = {f"{metric}/recipe": error for metric, error in errors.items()}
    add_twin_step(tally, 0, exact | {"weight_rms": 1.0}, dict.fromkeys(exact, 0.0) | stated)
    return tally


@pytest.mark.parametrize("part", PARTS)
def test_altgrad_judges_runs_as_the_script_does(parts, part: str) -> None:
    """A layer stands for those of a run that freeze, another one for the rest."""
    limits = dataclasses.asdict(calibration().thresholds)
    run_rows, layers = parts[part]
    sums = add_layers(layers, limits)
    known = [row for row in run_rows if not math.isnan(row["kept"] + row["fp32_moved"])]
    assert len(known) > 400
    for row in known:
        if any(math.isclose(row["kept"], limit) for limit in limits.values()):
            continue  # a sum of shares may end on the other side of it
        share, _, error = sums[identify_view(row)]
        each = error / math.hypot(1 - share, share)
        tally = make_tally(row, progress_kept=each)
        verdict = Verdict.BREAKS if row["nonfinite"] > 0 else Verdict.NEEDS_REMEDY
        rest = make_advice(verdict, tally)
        frozen = make_advice(Verdict.FROZEN, tally)
        advice = judge_recipe(
            "recipe",
            row["family"],
            [
                LayerShare(rest, 1 - share, row["fp32_moved"], 1.0, row["error"]),
                LayerShare(frozen, share, row["fp32_moved"], 1.0, row["error"]),
            ],
            is_stochastic=row["family"] == "stochastic",
        )
        assert advice.verdict.name == judge(row, sums[identify_view(row)], limits), row


@pytest.mark.parametrize("part", PARTS)
def test_no_run_that_was_fine_left_many_weights_behind(parts, part: str) -> None:
    """As the rule of left_behind says."""
    limits = dataclasses.asdict(calibration().thresholds)
    sums = add_layers(parts[part][1], limits)
    behind = {"STORES_FINE": 0.0, "WATCH": 0.0}
    for row in parts[part][0]:
        if (verdict := judge(row, LayerSums(), limits)) in behind:
            behind[verdict] = max(behind[verdict], sums[identify_view(row)].behind)
    assert max(behind.values()) <= 0.21 < limits["left_behind"]


def make_advice(verdict: Verdict, tally: TwinTally) -> Advice:
    return Advice("layer", "recipe", verdict, tally.figures, tally.errors, "")


def test_the_counts_of_runs_are_those_of_the_rows(frames) -> None:
    for part, outcomes in (
        ("calibration", calibration().runs),
        ("held_out", calibration().held_out["runs"]),
    ):
        frame = frames[part]
        lost = ((frame.loss - frame.fp32) / (frame.initial - frame.fp32)).fillna(math.inf)
        for family in ("nearest", "true", "stochastic", "kahan", "states"):
            is_own = (frame.family == family) & frame.kept.notna()
            names = [name for name in outcomes if name.startswith(family)]
            counts = [each for name in names for each in outcomes[name].values()]
            # Of a few runs, all of the calibration, the sample leaves open what they keep.
            uncertain = is_own.sum() - sum(each["runs"] for each in counts)
            assert 0 <= uncertain <= (3 if part == "calibration" else 0)
            assert sum(each["lost_10_percent"] for each in counts) == (lost[is_own] > 0.1).sum()


def test_a_diverged_run_has_lost_all_progress() -> None:
    assert find_lost({"initial": 2.0, "fp32": 1.0, "loss": math.nan}) == math.inf
    assert find_lost({"initial": 2.0, "fp32": 1.0, "loss": 1.25}) == 0.25


def test_evidence_is_of_the_same_kind_as_what_it_stands_beside() -> None:
    found = calibration()
    tested = found.count_runs("nearest-8", "NEEDS_REMEDY")
    assert tested is not None
    assert tested.runs >= tested.lost > 0
    assert found.count_runs("nearest-16", "BREAKS") == (0, 0)
    assert found.count_runs(None, "STORES_FINE") is None
    assert found.describe_layers("true", "FROZEN").endswith("such layers were frozen in real runs")
    assert found.describe_layers("true", "UNCERTAIN") == ""
    assert found.describe_layers("true", "NOT_JUDGED") == ""
    assert "was tested" in found.describe_layers(None, "STORES_FINE")
    assert "had this verdict" in found.describe_layers("nearest-16", "BREAKS")


def test_offsets_are_sorted_and_cover_every_prediction() -> None:
    found = calibration()
    ends = [offset.below for offset in found.offsets]
    assert ends == sorted(ends)
    for kept in (-5.0, 0.0, 0.5, 0.979, 0.98, 1.0, 1e6):
        low, high = found.find_offsets(kept)
        assert low <= high


def test_a_short_run_gives_rows_like_the_committed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows have the keys and the order of the committed ones, and plausible figures."""
    config = CONFIG._replace(steps=60)
    run_rows, layer_rows = runs.make_rows(config)
    for what, rows, columns in (
        ("runs", run_rows, [*run_rows[0]]),
        ("layers", layer_rows, runs.LAYER_COLUMNS),
    ):
        runs.write(tmp_path / f"calibration_{what}.csv", rows, columns)
        again = pd.read_csv(tmp_path / f"calibration_{what}.csv")
        committed = pd.read_csv(FOLDER / f"calibration_{what}.csv")
        assert [*again.columns] == [*committed.columns]
        same = committed[(committed.task == "logistic") & (committed.optimizer == "sgd")]
        same = same[same.lr == CONFIG.lr]
        for key in ("way", "scaling"):
            assert [*again[key]] == [*same[key]]
    by_way = {(row["way"], row["scaling"]): row for row in run_rows}
    fp16, e5m2, control = (by_way[way, "tensor"] for way in ("fp16", "e5m2", "fp32"))
    assert fp16["loss"] == pytest.approx(fp16["fp32"], rel=1e-3)
    assert e5m2["loss"] > 1.02 * e5m2["fp32"]
    assert control["loss"] == pytest.approx(control["fp32"], rel=1e-3)
    for row in run_rows:
        if row["family"] == "nearest":
            assert row["frozen"] == pytest.approx(row["real_frozen"], abs=0.1)
            assert row["kept"] == pytest.approx(row["real_kept"], abs=0.2)


@pytest.mark.slow
def test_real_ways_really_train_in_bf16() -> None:
    config = configs.Config("logistic", "adamw-999", 1e-2, steps=30, ways="real")
    rows: list[dict[str, Any]] = runs.make_rows(config)[0]
    names = [way.recipe.name for way in ways.WAYS["real"]]
    assert [row["way"] for row in rows] == [*names, "ema-bf16"]
    by_way = {row["way"]: row for row in rows}
    assert by_way["bf16-true"]["now_kept"] == pytest.approx(
        by_way["bf16-true"]["real_kept"], abs=0.1
    )
    assert by_way["ema-bf16"]["m_error"] == pytest.approx(
        by_way["ema-bf16"]["real_m_error"], rel=0.1
    )
