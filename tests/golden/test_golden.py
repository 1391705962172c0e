"""Every key and figure of a recorded run, its run file and its checkpoints, as 0.1.0 wrote them."""

import json
import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from altgrad import Figures
from altgrad.measurement.catalogue import TWIN_METRICS
from altgrad.report import read
from tests.golden import replay

RENAMES = {"zero_update_frac": "ulp_zero_frac"}
"""Metrics by the name that 0.1.0 gave them, and the name that they have now."""

ADDED: frozenset[str] = frozenset(TWIN_METRICS)
"""Metrics that 0.1.0 did not have: without twins, those of the run itself, which is in bf16."""

CHANGED: dict[str, str] = {
    "stochastic_move_frac": "the gap is that on the side of the update, from the stored weight on",
    "saturated_frac": "weights that round to the top without the clamp do not count",
}
"""Metrics whose figures were recorded anew, and why: files of 0.1.0 hold the former ones."""

WRITTEN = 1e-7
"""Relative: numbers in a run file have 8 significant digits."""


def renamed(key: str) -> str:
    metric, slash, rest = key.partition("/")
    return RENAMES.get(metric, metric) + slash + rest


def golden_rows(first_step: int = 0) -> list[dict[str, Any]]:
    data = replay.load_figures()
    keys = [renamed(key) for key in data["keys"]]
    rows = [row for row in data["rows"] if row["step"] >= first_step]
    for row in rows:
        for part in ("figures", "tolerances", "errors", "error_tolerances"):
            numbers = map(float, row[part])
            row[part] = dict(zip(keys, numbers, strict=True))
    return rows


def close(value: float, expected: float, tolerance: float) -> bool:
    if math.isnan(expected) or math.isinf(expected) or tolerance == 0:
        return value == expected or (math.isnan(value) and math.isnan(expected))
    return abs(value - expected) <= tolerance


def differences(figures: Figures, row: dict[str, Any]) -> list[str]:
    """Describe each figure that differs from the recorded one."""
    found = []
    for key, expected in row["figures"].items():
        if not close(figures[key], expected, row["tolerances"][key]):
            found.append(f"{key}: {figures[key]!r}, recorded {expected!r}")
        error, recorded = figures.standard_error(key), row["errors"][key]
        if not close(error, recorded, row["error_tolerances"][key]):
            found.append(f"standard error of {key}: {error!r}, recorded {recorded!r}")
    for key, (first, counts) in row["histograms"].items():
        now = figures.histogram(key)
        if now.first != first or [*now.counts] != counts:
            found.append(f"histogram {key}: {now}, recorded {counts} from {first} on")
    if (figures.population, figures.elements) != (row["population"], row["elements"]):
        found.append(f"{figures.elements} of {figures.population} elements")
    return found


def assert_as_recorded(records: list[Any], expected: list[dict[str, Any]], first_step: int) -> None:
    actual = [*replay.rows_of(records)]
    assert [(step + first_step, name) for step, name, _ in actual] == [
        (row["step"], row["layer"]) for row in expected
    ]
    for (step, name, figures), row in zip(actual, expected, strict=True):
        now = {key for key in figures if key.split("/")[0] not in ADDED}
        assert now == {*row["figures"]}, f"keys of {name}"
        assert not differences(figures, row), f"{name or 'model'}, step {step + first_step}"


# The run has bf16 weights, whose updates in bf16 cannot be judged.
pytestmark = [
    pytest.mark.filterwarnings("ignore:PrecisionMonitor cannot judge bf16:UserWarning"),
    pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning"),
]


def test_every_figure_equals_the_recorded_one() -> None:
    records, _ = replay.replay()
    assert_as_recorded(records, golden_rows(), 0)


def test_a_monitor_is_restored_from_the_recorded_state() -> None:
    first = replay.CHECKPOINT_STEP
    state = torch.load(replay.STATE_FILE, weights_only=True)
    records, _ = replay.replay(first, state=state)
    assert_as_recorded(records, golden_rows(first), first)
    anew, _ = replay.replay(first)
    key = "never_moved_frac/e5m2"
    assert anew[-1].model[key] > records[-1].model[key], "the state counts"


def test_the_recorded_run_file_can_be_read() -> None:
    run = read(replay.RUN_FILE)
    assert not run.notes
    assert [*run.formats] == [*replay.FORMATS]
    assert_rows_as_recorded(run.rows, golden_rows(), but=CHANGED)


def test_a_trainer_writes_the_recorded_rows(tmp_path: Path) -> None:
    replay.fit(tmp_path)
    rows, expected = read(tmp_path).rows, golden_rows()
    assert_rows_as_recorded(rows, expected)
    # Those in the recorded run file are of 0.1.0, whose intervals had no width at 0 and 1.
    for row, golden in zip(rows, expected, strict=True):
        for key, error in row.errors.items():
            if key.split("/")[0] in ADDED:
                continue
            assert close(error, golden["errors"][key], abs(golden["errors"][key]) * WRITTEN), key
    recorded, written = (
        json.loads(path.read_bytes().split(b"\n")[0])
        for path in (replay.RUN_FILE, tmp_path / replay.RUN_FILE.name)
    )
    for layer in written["layers"].values():
        del layer["states"], layer["twin_elements"]  # not in 0.1.0
    assert {key: recorded[key] for key in ("formats", "scaling", "layers")} == {
        key: written[key] for key in ("formats", "scaling", "layers")
    }


def test_a_trainer_resumes_from_the_recorded_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume in a new file, which follows the steps before the checkpoint in that of schema 1."""
    monkeypatch.chdir(tmp_path)  # the checkpoint names the run file relative to it
    shutil.copy(replay.RUN_FILE, tmp_path)
    monitor = replay.fit(tmp_path, ckpt_path=replay.CHECKPOINT_FILE)
    assert monitor.path == Path("altgrad-2.jsonl")
    assert Path(replay.RUN_FILE.name).read_bytes() == replay.RUN_FILE.read_bytes()
    run = read(monitor.path)
    assert (run.predecessors, run.notes) == ([Path(replay.RUN_FILE.name)], [])
    assert_rows_as_recorded(run.rows, golden_rows(), but=CHANGED)


def assert_rows_as_recorded(
    rows: list[Any], expected: list[dict[str, Any]], but: Collection[str] = ()
) -> None:
    assert [(row.step, row.layer or "") for row in rows] == [
        (row["step"], row["layer"]) for row in expected
    ]
    for row, golden in zip(rows, expected, strict=True):
        figures = {k: v for k, v in row.figures.items() if k.split("/")[0] not in ADDED}
        assert figures.keys() == golden["figures"].keys()
        for key, value in golden["figures"].items():
            if key.split("/")[0] in but:
                continue
            tolerance = abs(value) * WRITTEN + golden["tolerances"][key]
            assert close(figures[key], value, tolerance), key
        for key, (first, counts) in golden["histograms"].items():
            if row.layer is None:
                assert row.histograms[key].first == first
                assert [*row.histograms[key].counts] == pytest.approx(counts, rel=WRITTEN)
