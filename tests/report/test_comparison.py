"""Differences between two runs that are made of plain numbers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from altgrad.report import Comparison, Row, RunReport
from tests.report.confirming import info
from tests.report.runs import make_rows, make_run

NAN = math.nan
KEPT_IN_BF16 = {"a": {"bf16": 1.0}, "b": {"bf16": 0.7}}


def report(kept: Mapping[str, Mapping[str, float]], *model_rows: Row, **more: Any) -> RunReport:
    return RunReport.from_run(make_run([*make_rows(kept), *model_rows], **more))


def compared(a: Mapping[str, float], b: Mapping[str, float]) -> Comparison:
    """Compare runs with this kept_update_ratio by layer in bf16."""
    one, two = ({layer: {"bf16": kept} for layer, kept in each.items()} for each in (a, b))
    return Comparison((report(one), report(two)))


def test_differing_verdicts_come_first_and_then_the_largest_changes() -> None:
    before = {"grows": 0.6, "falls": 1.0, "stays": 0.7, "mends": 0.2, "comes": NAN, "unknown": NAN}
    after = {"grows": 0.95, "falls": 0.98, "stays": 0.7, "mends": 0.7, "comes": 1.0, "unknown": NAN}
    changes = compared(before, after).changes
    assert [a.layer for a, _ in changes] == [
        *("comes", "mends", "falls"),  # these verdicts differ
        *("grows", "stays", "unknown"),
    ]
    assert [a.layer for a, _ in changes] == [b.layer for _, b in changes]
    assert [(a.kept, b.kept) for a, b in changes[1:4]] == [(0.2, 0.7), (1.0, 0.98), (0.6, 0.95)]


def test_only_layers_and_formats_in_both_runs_are_compared() -> None:
    first = report({"a": {"bf16": 1.0, "e5m2": 0.2}, "b": {"bf16": 1.0}})
    second = report({"a": {"fp16": 1.0, "bf16": 1.0}, "c": {"bf16": 1.0}}, formats=["fp16", "bf16"])
    comparison = Comparison((first, second))
    assert comparison.formats == ["bf16"]
    assert [(a.layer, a.recipe) for a, _ in comparison.changes] == [("a", "bf16")]
    assert comparison.notes == [
        *("formats only in A: 1 (e5m2)", "layers only in A: 1 (b)"),
        *("formats only in B: 1 (fp16)", "layers only in B: 1 (c)"),
    ]


def test_the_model_is_compared_by_means_over_the_steps_with_a_value() -> None:
    def model(step: int, stalled: float, kept: float, **more: float) -> Row:
        figures = {"stall_frac/bf16": stalled, "kept_update_ratio/bf16": kept}
        return Row(step, None, figures | more, {})

    first = report(KEPT_IN_BF16, model(0, 0.25, NAN), model(1, NAN, NAN), model(2, 0.75, NAN))
    second = report(KEPT_IN_BF16, model(0, 0.125, 0.5, ulp_zero_frac=0.5))
    assert Comparison((first, second)).model_means == [("stall_frac/bf16", 0.5, 0.125)]
    assert Comparison((second, second)).model_means == [
        ("ulp_zero_frac", 0.5, 0.5),
        ("kept_update_ratio/bf16", 0.5, 0.5),
        ("stall_frac/bf16", 0.125, 0.125),
    ]


def test_the_summary_is_one_sentence() -> None:
    some, none = report(KEPT_IN_BF16), report({})
    other, changed = report({"c": {"bf16": 1.0}}), report({"a": {"bf16": 0.9}, "b": {"bf16": 0.7}})
    assert [Comparison(runs).summary for runs in ((some, none), (none, none))] == [
        "No observed step in B: nothing to compare.",
        "No observed step in A and B: nothing to compare.",
    ]
    assert [Comparison((some, each)).summary for each in (other, some, changed)] == [
        "No layer and format in common: nothing to compare.",
        "Differing verdicts: 0 of 2.",
        "Differing verdicts: 1 of 2.",
    ]


def test_a_run_without_formats_and_recipes_is_told_from_one_with_others() -> None:
    some, silent = report(KEPT_IN_BF16), RunReport.from_run(make_run([Row(0, "a", {}, {})], []))
    assert Comparison((silent, some)).summary == (
        "Nothing was judged in A, for want of formats and recipes: nothing to compare."
    )


def test_notes_of_both_runs_and_different_scalings_are_reported() -> None:
    first, second = (
        report(KEPT_IN_BF16, notes=["torn"]),
        report(KEPT_IN_BF16, notes=["moved"], scaling=None),
    )
    assert Comparison((first, second)).notes == [
        *("torn", "moved"),
        "grids differ: scaling is 'tensor' in A and None in B",
    ]


# --- samples that recipes store


def twins(steps: list[int], letter: str, *recipes: str, now: bool = False) -> RunReport:
    """Report a run whose model has figures of these recipes, which are its steps over 10."""
    names = [*recipes, *(["now"] if now else [])]
    rows = [
        Row(step, None, {f"{metric}/{n}": step / 10 for n in names for metric in PER_TWIN}, {})
        for step in steps
    ]
    about = {"recipes": {name: info(name) for name in recipes}, "path": Path(letter)}
    return RunReport.from_run(make_run(rows, **about))


PER_TWIN = ("progress_kept", "frozen_frac", "drift")


def test_recipes_of_both_runs_are_compared_at_the_last_step_of_both() -> None:
    runs = twins([1, 4, 7], "a", "bf16", "e5m2", now=True), twins([4, 6], "b", "e5m2", now=True)
    found = Comparison(runs).twins
    assert found is not None
    assert found.step == 4
    assert found.rows == [
        (f"{metric}/{recipe}", 0.4, 0.4)
        for recipe in ("e5m2", "now")
        for metric in ("frozen_frac", "progress_kept")
    ]


def test_runs_without_a_common_recipe_or_step_have_no_twins_to_compare() -> None:
    one, other, later = twins([1], "a", "bf16"), twins([1], "b", "e5m2"), twins([2], "c", "bf16")
    assert Comparison((one, other)).twins is Comparison((one, later)).twins is None


def test_a_note_says_how_a_low_run_could_be_compared_with_a_prediction() -> None:
    predicting, low = twins([1], "a", "bf16-true"), twins([1], "b", now=True)
    (note,) = Comparison((predicting, low)).notes
    assert note.startswith("B is stored low, but the file of B does not say how: to see ")
    assert note.endswith("pass --recipe=NAME (bf16-true)")
