"""The figures on docs/does-it-predict.md are those of the committed rows of real runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks.calibration import tables
from benchmarks.calibration.calibrate import FOLDER, calibrate

PAGE = (Path(__file__).parents[1] / "docs" / "does-it-predict.md").read_text()
WORDS = " ".join(PAGE.split())
LOW = ("nearest", "true", "stochastic", "kahan")
FEW_BITS = r"e3m4|e4m3fn|e5m2|mxfp4"


@pytest.fixture(scope="module")
def runs() -> dict[str, pd.DataFrame]:
    """Read the rows of runs with pandas instead of the code under test."""
    frames = {}
    for part in ("calibration", "held_out"):
        frame = pd.read_csv(FOLDER / f"{part}_runs.csv")
        frame["lost"] = ((frame.loss - frame.fp32) / (frame.initial - frame.fp32)).fillna(np.inf)
        frame["ratio"] = (frame.loss / frame.fp32).fillna(np.inf)
        frames[part] = frame
    return frames


@pytest.fixture(scope="module")
def frozen_layers(runs) -> pd.DataFrame:
    """Return the held-out layers that froze in a real run with low weights."""
    layers = pd.read_csv(FOLDER / "held_out_layers.csv")
    families = runs["held_out"][[*layers.columns[:10], "family"]]
    layers = layers.merge(families, on=[*layers.columns[:10]])
    is_frozen = (layers.real_frozen >= 0.99) & (layers.fp32_moved > 1e-3)
    return layers[is_frozen & layers.family.isin(LOW)]


def test_the_page_says_which_rows_there_are(runs) -> None:
    counts = []
    for frame in runs.values():
        is_stored = frame.ways == "stored"
        kinds = [
            is_stored & (frame.family == "nearest"),
            is_stored & frame.family.isin(["stochastic", "kahan"]),
            ~is_stored & frame.family.isin(LOW),
            frame.family == "states",
            frame.family == "average",
            frame.family == "control",
            frame.ways.notna(),
        ]
        counts.append([kind.sum() for kind in kinds])
    table = PAGE.split("| rows | calibration |")[1].split("\n\n")[0]
    found = re.findall(r"^\| [^|]+ \| ([\d,]+) \| ([\d,]+) \|", table, re.MULTILINE)
    figures = [[int(cell.replace(",", "")) for cell in row] for row in found]
    assert figures[: len(counts[0])] == [[*pair] for pair in zip(*counts, strict=True)]
    assert f"{sum(sum(each[:4]) for each in counts):,} runs in the first four lines" in WORDS
    layers = [len(pd.read_csv(FOLDER / f"{part}_layers.csv")) for part in runs]
    assert figures[-1] == layers


def test_the_page_says_which_frozen_layers_are_missed(frozen_layers) -> None:
    is_said = (frozen_layers.frozen >= 0.995) & (frozen_layers.kept < 0.5)
    missed = frozen_layers[~is_said]
    is_small = missed.way.str.contains(FEW_BITS) & ~missed.way.str.startswith("bf16")
    is_new = missed.optimizer == "nadam"
    assert f"{100 * len(missed) / len(frozen_layers):.1f} % were missed" in WORDS
    assert (
        f"{is_small.sum()} of the {len(missed)} are in 8 bits or fewer, "
        f"{(is_small & is_new).sum()} of these under NAdam" in WORDS
    )
    of_all = (~frozen_layers.way.str.contains(FEW_BITS)).sum()
    assert f"in 16 bits, {(~is_small).sum()} of {of_all} are missed" in WORDS


def test_the_page_says_which_fine_runs_ended_far(runs) -> None:
    fine = {}
    for part, frame in runs.items():
        is_fine = frame.kept.between(0.98, 1.1) & (frame.drift * frame.fp32_moved <= 0.05)
        fine[part] = frame[is_fine & ~frame.family.isin(["control", "average"])]
    is_low = fine["held_out"].fp32 / fine["held_out"].initial < 0.03
    is_far = fine["held_out"].ratio > 1.5
    assert f"{is_far.sum()} of {len(is_far)} ended above 1.5 times the loss" in WORDS
    assert f"they are {is_far.sum()} of the {is_low.sum()} whose loss in float32" in WORDS
    assert not (is_far & ~is_low).any()
    seen = fine["calibration"]
    is_seen_high = seen.fp32 / seen.initial >= 0.03
    assert not (seen.ratio[is_seen_high] > 1.5).any()
    assert f"Of the other {(~is_low).sum()} none did, nor any of {is_seen_high.sum()}" in WORDS


def test_the_page_says_how_well_other_figures_rank(runs) -> None:
    found = []
    for frame in runs.values():
        is_run = (frame.ways == "real") & ~frame.family.isin(["control", "average"])
        real = frame[is_run & frame.kept.notna()]
        missing, beyond = (1 - real.kept).clip(lower=0), (real.kept - 1).clip(lower=0)
        zeros = (real.v_zero_frac > 0.01) / 2
        ranks = (missing + beyond, missing + beyond / 10, missing + zeros)
        found.append([roc_auc_score(real.lost > 0.1, rank) for rank in ranks])
    (_, tenth, zero), (today, held_tenth, held_zero) = found
    assert f"AUC {today:.3f}, the aim was 0.95" in WORDS
    assert f"the AUC is {tenth:.3f} in the calibration and {held_tenth:.3f} held out" in WORDS
    assert f"it is {zero:.3f} and {held_zero:.3f}" in WORDS


def test_the_page_says_how_well_drift_is_ranked(runs) -> None:
    true = runs["held_out"].query("family == 'true'")
    rest, residual = (true.query(f"task {sign} 'residual'") for sign in ("!=", "=="))
    every, others, own = (
        each.drift.corr(each.real_drift, method="spearman") for each in (true, rest, residual)
    )
    assert f"Spearman {every:.3f}, the aim was 0.9" in WORDS
    assert f"It is {others:.3f} without the residual net" in WORDS
    assert f"{len(residual)} runs rank with {own:.3f}" in WORDS
    assert f"drift {(residual.real_drift / residual.drift).mean():.2f} times as far" in WORDS


@pytest.mark.slow
def test_the_tables_of_the_page_are_those_that_the_command_prints(capsys) -> None:
    parts = tables.list_parts(FOLDER)
    found = calibrate(parts[0][1:], parts[1][1:])
    limits = found["thresholds"]
    tables.print_rows(*parts[:2])
    tables.print_rules(limits, found["rules"])
    tables.print_outcomes(found["runs"], found["held_out"]["runs"])
    tables.print_frozen(parts, limits)
    tables.print_levels(parts, found["offsets"])
    tables.print_ranking(parts)
    tables.print_states(parts)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) > 80
    shown = {*PAGE.splitlines()}
    assert not [line for line in lines if line not in shown]
