"""Thresholds and evidence of the verdicts follow from the committed rows of real runs."""

from __future__ import annotations

import json
import math
import re
from importlib.resources import files

import pandas as pd
import pytest

from altgrad.quantization.block_formats import get_formats
from altgrad.report import FormatInfo, Judge, Verdict
from altgrad.report.calibration import calibration
from benchmarks.calibration.calibrate import FOLDER, HELD_OUT, as_text, calibrate, lost, read

METRICS = {
    "kept": "kept_update_ratio",
    "stall": "stall_frac",
    "never_moved": "never_moved_frac",
    "underflow": "underflow_frac",
    "saturated": "saturated_frac",
}


@pytest.fixture(scope="module")
def real_runs() -> pd.DataFrame:
    """Read the runs that round to nearest, with pandas instead of the code under test."""
    frame = pd.read_csv(FOLDER / "runs.csv", keep_default_na=False, na_values=["nan"])
    frame = frame[frame.way == "nearest"].copy()
    frame["lost"] = (frame.loss - frame.fp32) / (frame.initial - frame.fp32)
    frame["lost"] = frame.lost.fillna(math.inf)
    frame["held_out"] = frame.task.isin(HELD_OUT)
    return frame


def test_calibration_json_is_what_the_rows_give() -> None:
    written = files("altgrad.report").joinpath("calibration.json").read_text(encoding="utf-8")
    found = calibrate(read(FOLDER / "runs.csv"), read(FOLDER / "layers.csv"))
    assert as_text(found) == written
    assert json.loads(written)["thresholds"] == vars(calibration().thresholds)


def test_the_rows_cover_several_tasks_optimizers_and_learning_rates(real_runs) -> None:
    seen, unseen = real_runs[~real_runs.held_out], real_runs[real_runs.held_out]
    assert (len(seen), len(unseen)) == (324, 144)
    for key, count in (("task", 3), ("optimizer", 3), ("lr", 8)):
        assert seen[key].nunique() == count
    assert not {*seen.optimizer} & {*unseen.optimizer}
    assert not {*seen.task} & {*unseen.task}
    assert (seen.fp32 < 0.9 * seen.initial).all()  # a run without progress can lose none


@pytest.mark.parametrize("held_out", [False, True])
def test_the_counts_of_each_verdict_are_those_of_the_rows(real_runs, held_out: bool) -> None:
    limits = calibration().thresholds
    counts = calibration().held_out if held_out else calibration().outcomes
    mine = real_runs[real_runs.held_out == held_out]
    verdicts = mine.apply(judge_row, axis=1)
    assert {*verdicts} == {*counts}
    for verdict, found in counts.items():
        same = mine[verdicts == verdict]
        assert found["runs"] == len(same)
        assert found["lost_1_percent"] == (same.lost > 0.01).sum()
        assert found["lost_10_percent"] == (same.lost > 0.1).sum()
        scaled = {*same.format[same.scaling == "tensor"]}
        without = {*same.format} - scaled
        assert {*found["formats"]} == scaled | {f"{name} without a scale" for name in without}
    out = mine[(verdicts == "RANGE") & (mine.scaling == "none")]
    keys = ["task", "optimizer", "lr", "format"]
    both = out.merge(mine[mine.scaling == "tensor"], on=keys, suffixes=("", "_with_one"))
    mended = (both.lost > 0.01) & (both.lost_with_one < both.lost / 2)
    assert counts["RANGE"]["without_a_scale"] == len(both)
    assert counts["RANGE"]["mended_by_a_scale"] == mended.sum()
    layers = pd.read_csv(FOLDER / "layers.csv", keep_default_na=False, na_values=["nan"])
    layers = layers[(layers.scaling == "tensor") & (layers.task.isin(HELD_OUT) == held_out)]
    predicted, frozen = layers.never_moved >= limits.frozen, layers.true_never_moved >= 0.99
    assert counts["FROZEN"]["layers"] == predicted.sum()
    assert counts["FROZEN"]["frozen"] == (predicted & frozen).sum()
    assert counts["FROZEN"]["missed"] == (~predicted & frozen).sum()


def judge_row(row: pd.Series) -> str:
    """Return the name of the verdict on a layer with the figures of a run."""
    judge = Judge({"format": FormatInfo.from_format(get_formats("bf16")[0], None)})
    metrics = {metric: row[key] for key, metric in METRICS.items()}
    judge.add("model", {f"{metric}/format": value for metric, value in metrics.items()}, {})
    (advice,) = judge.assessment().advice
    return advice.verdict.name


def test_worse_verdicts_lose_more_on_held_out_runs_too() -> None:
    """Verdicts on runs of users are worth something only if this holds."""
    for counts in (calibration().outcomes, calibration().held_out):
        shares = [
            counts[verdict.name]["lost_10_percent"] / counts[verdict.name]["runs"]
            for verdict in (Verdict.STORES_FINE, Verdict.WATCH, Verdict.NEEDS_REMEDY)
        ]
        assert shares[0] == 0
        assert 0 < shares[1] < 0.2
        assert shares[2] > 0.75
        assert counts["FROZEN"]["lost_10_percent"] / counts["FROZEN"]["runs"] > 0.95


@pytest.mark.parametrize("verdict", Verdict)
def test_every_verdict_except_uncertain_and_not_judged_has_evidence(verdict: Verdict) -> None:
    evidence = calibration().evidence(verdict.name)
    assert bool(evidence) == (verdict not in (Verdict.UNCERTAIN, Verdict.NOT_JUDGED))
    if evidence:
        assert re.match(r"\d+ of \d+ (runs|layers) like this ", evidence)
    if verdict is Verdict.STORES_FINE:
        assert "(fp16, bf16)" in evidence  # no run in another format has this verdict


def test_advice_has_the_evidence_of_its_verdict() -> None:
    judge = Judge({"bf16": FormatInfo.from_format(get_formats("bf16")[0], None)})
    names = ("kept_update_ratio", "stall_frac", "underflow_frac", "saturated_frac")
    figures = dict.fromkeys((f"{name}/bf16" for name in (*names, "never_moved_frac")), 0.0)
    judge.add("layer", figures | {"kept_update_ratio/bf16": 0.3}, {})
    (advice,) = judge.assessment().advice
    assert advice.verdict is Verdict.NEEDS_REMEDY
    assert advice.evidence == (
        "122 of 146 runs like this (e3m4, e4m3fn, e5m2) lost over 10 % of their progress"
    )


def test_a_diverged_run_has_lost_all_progress() -> None:
    assert lost({"initial": 2.0, "fp32": 1.0, "loss": math.nan}) == math.inf
    assert lost({"initial": 2.0, "fp32": 1.0, "loss": 1.25}) == 0.25
