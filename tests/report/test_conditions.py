"""Conditions for scripts: what they mean, what they say, and what is no condition."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from altgrad.report import Assessment, Row, RunAdvice, RunReport, Verdict
from altgrad.report.conditions import parse_condition
from tests.command_line import altgrad
from tests.report.runs import figures, make_rows, make_run, write_empty_run
from tests.report.shown_runs import record_bf16, record_fp32
from tests.report.twin_runs import make_run_advice

NAN = math.nan


def make_report(*runs: RunAdvice, formats: Sequence[str] = ()) -> RunReport:
    """Make the report of a run in float32 with these verdicts on it."""
    run = make_run(make_rows({"a": {"bf16": 1.0}}), formats)
    return RunReport(run, Assessment({each.recipe: each for each in runs}, [], {}, ""))


def say(text: str, *runs: RunAdvice) -> str:
    return parse_condition(text).test(make_report(*runs))


FROZEN = make_run_advice("bf16", Verdict.FROZEN, 0.25, frozen=("gain", "x"), frozen_share=0.125)
FINE = make_run_advice("bf16-sr", Verdict.STORES_FINE, 0.984375)
WATCH = make_run_advice("e4m3fn-sr", Verdict.WATCH, 0.9375)
UNSURE = make_run_advice("fp16", Verdict.UNCERTAIN, 0.99)
UNJUDGED = make_run_advice("fp32", Verdict.NOT_JUDGED, NAN)
OVER = make_run_advice("e5m2-sr", Verdict.OVERSHOOTS, 2.0)
BREAKS = make_run_advice("e5m2", Verdict.BREAKS, 0.99)
UNKNOWN = make_run_advice("now", Verdict.NEEDS_REMEDY, NAN, frozen=("gain",), frozen_share=0.5)
"""Verdicts on a run, of which binary fractions are kept."""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("frozen:bf16", "2 layers (12 % of the weights) would freeze in bf16: gain, x"),
        ("frozen:bf16>0.1", "2 layers (12 % of the weights) would freeze in bf16: gain, x"),
        ("frozen:bf16>0.125", ""),
        ("frozen:now", "1 layer (50 % of the weights) stand still: gain"),
        ("frozen:bf16-sr", ""),
        ("lost:bf16>0.5", "bf16 loses 0.75 of the progress"),
        ("lost:bf16>0.75", ""),
        ("lost:bf16-sr>0.01", "bf16-sr loses 0.01562 of the progress"),
        ("lost:bf16-sr>0.02", ""),
        ("lost:e5m2>0.9", "e5m2 becomes NaN or inf"),
        ("lost:e5m2-sr>0.9", "e5m2-sr moves weights too far, so that its progress is not kept"),
        ("lost:now>0.9", "what now keeps of the progress is unknown"),
        ("lost:bf16*-sr>0.01", "bf16-sr loses 0.01562 of the progress"),
        ("lost:e4m3fn-*>0.05", "e4m3fn-sr loses 0.0625 of the progress"),
        ("not-fine:bf16-sr", ""),
        ("not-fine:e4m3fn-sr", "e4m3fn-sr is watch"),
        ("not-fine:bf16*", "bf16 is frozen"),
        ("not-fine:*-sr", "e4m3fn-sr is watch; e5m2-sr is over"),
    ],
)
def test_a_condition_holds_as_its_text_says(text: str, problem: str) -> None:
    found = say(text, FROZEN, FINE, WATCH, OVER, BREAKS, UNKNOWN)
    assert found == (f"--fail-on={text}: {problem}" if problem else "")


def test_a_pattern_gives_one_sentence_for_all_its_recipes() -> None:
    found = say("frozen:*", FROZEN, UNKNOWN, FINE)
    assert found.count("--fail-on") == 1
    assert "would freeze in bf16: gain, x; 1 layer (50 % of the weights) stand still" in found


@pytest.mark.parametrize("kind", ["frozen:{}", "lost:{}>0.5", "not-fine:{}"])
def test_what_cannot_be_tested_holds(kind: str) -> None:
    runs = (FINE, UNSURE, UNJUDGED)
    assert "fp16 is unsure, so that" in say(kind.format("fp16"), *runs)
    assert "fp32 was not judged, so that" in say(kind.format("fp32"), *runs)
    assert "fp16 is unsure" in say(kind.format("*"), *runs)
    assert "fp32" not in say(kind.format("*"), *runs)  # others were judged
    assert "fp32 was not judged" in say(kind.format("*"), UNJUDGED)
    report = make_report(FINE, formats=["nvfp4"])
    assert "nvfp4 was not judged" in parse_condition(kind.format("nvfp4")).test(report)


def test_nan_is_about_elements_of_the_run_itself() -> None:
    clean = RunReport.from_run(make_run(make_rows({"a": {"bf16": 1.0}}), ["bf16"]))
    assert parse_condition("nan").test(clean) == ""
    rows = make_rows({"a": {"bf16": 1.0}})
    values = {**figures(), "nonfinite_frac": 0.25}
    broken = make_run([row for each in rows for row in [type(each)(0, "a", values, {})]], ["bf16"])
    found = parse_condition("nan").test(RunReport.from_run(broken))
    assert found == "--fail-on=nan: 1 layer had NaN or inf: a"


def test_nan_holds_in_a_run_that_judged_nothing() -> None:
    rows = [Row(0, "a", {"nonfinite_frac": 0.25}, {}), Row(0, None, {}, {})]
    report = RunReport.from_run(make_run(rows, ()))
    assert parse_condition("nan").test(report) == "--fail-on=nan: 1 layer had NaN or inf: a"


def test_a_run_in_float32_loses_nothing_now() -> None:
    assert say("frozen:now", FINE) == ""


@pytest.mark.parametrize(
    "text",
    ["", "frozen", "frozen:", "lost:bf16", "not-fine:bf16>0.5", "nan:bf16", "fine:bf16", "bf16"],
)
def test_another_text_is_an_error_that_lists_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match="expected frozen:RECIPE, frozen:RECIPE>SHARE, lost:"):
        parse_condition(text)


@pytest.mark.parametrize("share", ["", "x", "1", "-0.5", "nan", "5 %"])
def test_a_share_lies_between_0_and_1(share: str) -> None:
    with pytest.raises(ValueError, match="expected a share from 0 to below 1 behind >"):
        parse_condition(f"lost:bf16>{share}")


def test_an_unknown_recipe_is_an_error_that_lists_those_of_the_run() -> None:
    with pytest.raises(ValueError, match=r"bf16, bf16-sr; got bf16sr; did you mean bf16-sr\?"):
        say("frozen:bf16sr", FROZEN, FINE)
    with pytest.raises(ValueError, match="got fp8"):
        say("lost:fp8*>0.1", FROZEN)
    now = make_run(make_rows({"a": {"bf16": 1.0}}), ["bf16"])
    low = {"a": now.layers["a"].__class__((8,), "bfloat16", 8, ("bf16",))}
    report = RunReport.from_run(make_run(now.rows, ["bf16"], layers=low))
    with pytest.raises(ValueError, match="got now"):
        parse_condition("frozen:now").test(report)


# --- the command


def test_the_command_exits_with_1_and_a_sentence_for_each_condition(tmp_path: Path) -> None:
    run = record_fp32(tmp_path).path
    conditions = ["--fail-on", "frozen:bf16", "--fail-on", "lost:e5m2>0.5", "--fail-on", "nan"]
    failed = altgrad("report", run, *conditions, "--json")
    assert failed.returncode == 1
    assert [line.partition(": ")[0] for line in failed.stderr.splitlines()] == [
        "--fail-on=frozen:bf16",
        "--fail-on=lost:e5m2>0.5",
    ]
    assert json.loads(failed.stdout)["formats"] == ["bf16", "e5m2"]
    shown = altgrad("report", run, "--fail-on", "frozen:bf16-kahan")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "recipe " in shown.stdout


def test_a_frozen_run_in_bf16_fails_by_now(tmp_path: Path) -> None:
    failed = altgrad("report", record_bf16(tmp_path).path, "--fail-on", "frozen:now")
    assert failed.returncode == 1
    assert (
        failed.stderr == "--fail-on=frozen:now: 1 layer (67 % of the weights) stand still: gain\n"
    )


def test_a_run_without_an_observed_step_fails(tmp_path: Path) -> None:
    path = write_empty_run(tmp_path)
    for arguments in ([], ["--json"], ["--fail-on", "nan"], ["--fail-on", "frozen:bf16"]):
        failed = altgrad("report", path, *arguments)
        assert failed.returncode == 1
        assert failed.stderr == f"{path}: no step was observed, so that nothing could be judged\n"


def test_a_wrong_condition_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    path = write_empty_run(tmp_path)
    for text in ("frozen", "frozen:fp8"):
        failed = altgrad("report", path, "--fail-on", text, "--html", tmp_path / "page.html")
        assert (failed.returncode, failed.stdout) == (2, "")
        assert failed.stderr.startswith(f"--fail-on={text}: expected ")
        assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
