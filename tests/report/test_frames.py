"""DataFrames of verdicts: a line for each layer and recipe, and for each recipe of the run."""

import math
import sys
from pathlib import Path
from unittest import mock

import pytest

from altgrad.report import Assessment, RunReport, Verdict
from altgrad.report.frames import make_frame
from tests.report.json_examples import make_report
from tests.report.runs import make_rows, make_run
from tests.report.shown_runs import record_bf16


def test_layers_have_a_line_for_each_recipe(tmp_path: Path) -> None:
    assessment = RunReport.from_run(record_bf16(tmp_path)).assessment
    frame = assessment.to_pandas()
    assert len(frame) == len(assessment.advice) == 8
    assert [*frame.columns[:7]] == [
        *("layer", "recipe", "verdict", "kept", "has_twin", "nonfinite", "suggestion")
    ]
    for advice, (_, row) in zip(assessment.advice, frame.iterrows(), strict=True):
        assert (row["layer"], row["recipe"]) == (advice.layer, advice.recipe)
        assert Verdict[row["verdict"]] is advice.verdict
        assert row["kept"] == advice.kept
        assert row["progress_kept"] == advice.figures["progress_kept"]
        assert row["frozen_frac_error"] == advice.errors["frozen_frac"]
        assert row["reason"] == advice.reason
        suggestion = assessment.suggestions[advice.layer]
        assert row["suggestion"] == suggestion or suggestion is None
    assert frame.pivot_table(index="layer", columns="recipe", values="kept").shape == (2, 4)


def test_figures_that_a_layer_lacks_are_nan() -> None:
    frame = make_report().assessment.to_pandas().set_index(["layer", "recipe"])
    assert math.isnan(frame.loc[("gain", "bf16"), "progress_kept"])
    assert frame.loc[("gain", "bf16"), "kept_update_ratio"] == 1.0
    assert frame.loc[("gain", "e5m2"), "verdict"] == "FROZEN"


def test_the_run_has_a_line_for_each_recipe() -> None:
    assessment = make_report().assessment
    frame = assessment.runs_to_pandas().set_index("recipe")
    assert [*frame.index] == [*assessment.runs] == ["e5m2", "bf16"]
    low = assessment.runs["e5m2"]
    row = frame.loc["e5m2"]
    assert (row["kept"], row["low"], row["high"]) == (low.kept, *low.interval)
    assert (row["verdict"], row["frozen_layers"], row["layers"]) == (low.verdict.name, 1, 2)
    assert row["to_do"] == low.to_do


def test_a_run_without_verdicts_has_no_lines() -> None:
    empty = Assessment({}, [], {}, "")
    assert len(empty.to_pandas()) == len(empty.runs_to_pandas()) == 0
    assert "layer" in empty.to_pandas().columns


def test_without_pandas_the_error_says_how_to_install_it() -> None:
    assessment = make_report().assessment
    run = make_run(make_rows({"a": {"bf16": 1.0}}), ["bf16"])
    with mock.patch.dict(sys.modules, {"pandas": None}):
        for call in (assessment.to_pandas, assessment.runs_to_pandas, run.to_pandas):
            with pytest.raises(
                ImportError, match=rf"^{call.__name__}\(\): expected pandas; run pip"
            ):
                call()
        with pytest.raises(ImportError, match="other"):
            make_frame({}, "other")
