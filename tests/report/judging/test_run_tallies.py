"""The tallies of a run are those of one row after the other, as a monitor adds them."""

import json
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from altgrad.measurement.catalogue import NOW
from altgrad.report import Row, read
from altgrad.report.judging.judge import Judge
from altgrad.report.judging.run_tallies import tally_run
from altgrad.report.judging.tallies import STEP_METRICS
from altgrad.report.records.run import Run
from tests.report.records.damage import as_bytes, extreme_lines
from tests.report.records.recording import record_run, written
from tests.report.runs import make_run

RECIPES = (NOW, "bf16", "e4m3fn-sr")
FORMATS = ("bf16", "e4m3fn")


def make_judge(run: Run) -> Judge:
    return Judge(run.formats, run.layers, run.recipes, run.now)


def describe(judge: Judge) -> Any:
    """Return all tallies, in a text: NaN equals NaN."""
    state = judge.state_dict()
    return json.dumps({key: state[key] for key in ("observed", "steps", "twins")}, sort_keys=True)


def check(run: Run) -> None:
    slow, fast = make_judge(run), make_judge(run)
    for row in run.rows:
        if row.layer is not None:
            slow.add(row.step, row.layer, row.figures, row.errors)
    fast.add_run(run)
    assert describe(fast) == describe(slow)
    assert repr(fast.assessment()) == repr(slow.assessment())


def test_a_run_with_twins_has_the_tallies_of_its_rows(tmp_path) -> None:
    options = {"formats": FORMATS, "recipes": ["bf16", "e4m3fn-sr"], "twin_elements": 64}
    header, records = record_run(steps=6, optimizer=torch.optim.AdamW, max_elements=1000, **options)
    run = read(written(tmp_path, header, records))
    assert {*tally_run(run, RECIPES, FORMATS).twins["0.weight"]} == {"bf16", "e4m3fn-sr"}
    check(run)


VALUES = (0.0, 1.0, 0.5, 0.995, 0.001, math.nan)


def make_rows(seed: int) -> list[Row]:
    """Return rows of layers that appear, lose figures, become NaN, stand still and recover."""
    generator = random.Random(seed)
    figures_by_layer = {
        layer: [
            *("update_rms", "weight_rms", "nonfinite_frac"),
            *(f"{m}/{f}" for m in STEP_METRICS for f in FORMATS if generator.random() < 0.95),
            *(
                f"{m}/{r}"
                for r in RECIPES
                for m in ("progress_kept", "still_frac", "twin_nonfinite_frac", "frozen_frac")
                if generator.random() < 0.9
            ),
        ]
        for layer in "abc"
    }
    rows = []
    for step in sorted(generator.choices(range(40), k=25)):
        for layer, keys in figures_by_layer.items():
            if generator.random() < 0.8:
                figures = {key: generator.choice(VALUES) for key in keys}
                if generator.random() < 0.7:
                    figures["nonfinite_frac"] = 0.0
                some = generator.sample(keys, len(keys) // 2)
                rows.append(Row(step, layer, figures, {k: generator.choice(VALUES) for k in some}))
        if generator.random() < 0.9:
            rows.append(Row(step, None, {"update_rms": 1.0}, {}))
    return rows


@pytest.mark.parametrize("seed", range(30))
def test_any_run_has_the_tallies_of_its_rows(seed: int) -> None:
    formats, recipes = dict.fromkeys(FORMATS), dict.fromkeys(RECIPES[1:])
    run = make_run(make_rows(seed))
    slow = Judge(formats, {}, recipes)  # type: ignore[arg-type] # names alone are read
    for row in run.rows:
        if row.layer is not None:
            slow.add(row.step, row.layer, row.figures, row.errors)
    fast = Judge(formats, {}, recipes)  # type: ignore[arg-type]
    fast.add_run(run)
    assert describe(fast) == describe(slow)


@settings(max_examples=10, deadline=None)
@given(extreme_lines())
def test_a_run_with_values_up_to_their_bounds_has_the_tallies_of_its_rows(
    tmp_path_factory, lines: list[Any]
) -> None:
    path = tmp_path_factory.mktemp("run") / "altgrad.jsonl"
    path.write_bytes(as_bytes(lines))
    check(read(path))
