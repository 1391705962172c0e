"""Differences between two runs that are made of plain numbers."""

import math
from collections.abc import Mapping
from typing import Any

from altgrad.report import Comparison, Row, RunReport
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
    assert [(a.layer, a.format) for a, _ in comparison.changes] == [("a", "bf16")]
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


def test_notes_of_both_runs_and_different_scalings_are_reported() -> None:
    first, second = (
        report(KEPT_IN_BF16, notes=["torn"]),
        report(KEPT_IN_BF16, notes=["moved"], scaling=None),
    )
    assert Comparison((first, second)).notes == [
        *("torn", "moved"),
        "grids differ: scaling is 'tensor' in A and None in B",
    ]
