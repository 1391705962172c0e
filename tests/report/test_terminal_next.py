"""The next lines in a terminal: few, complete, and those of the first proposal."""

from __future__ import annotations

import pytest

from altgrad.report import RunReport, list_next_lines
from altgrad.report.terminal_next import MOST_LINES, print_next
from tests.report.next_runs import make_advice, make_report
from tests.report.shown_runs import print_to_text

NORMS = [f"blocks.{k}.{name}.weight" for k in range(2) for name in ("attention_norm", "mlp_norm")]
FROZEN = make_advice("bf16-true", kept=0.98, frozen=[*NORMS, "norm.weight"])


def show(report: RunReport, width: int = 80, **more: int | None) -> str:
    return print_to_text(lambda console: print_next(report, console, **more), width)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "report",
    [
        make_report(FROZEN, make_advice("bf16-sr"), layers=[*NORMS, "norm.weight", "head.weight"]),
        make_report(make_advice("bf16-sr")),
        make_report(make_advice("e4m3fn")),
        make_report(make_advice("bf16-true"), make_advice("torchao-sr")),
    ],
)
def test_the_first_proposal_fits_into_twelve_lines(report: RunReport, width: int) -> None:
    text = show(report, width)
    lines = text.splitlines()
    assert 3 <= len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= width
    first = list_next_lines(report)[0]
    assert " ".join(text.split()).startswith(f"Next: {first.why}")
    for code in first.code.splitlines():
        assert not code or code in lines
    assert lines[-1].startswith("More in --html and --json")


def test_lines_that_do_not_fit_are_named() -> None:
    names = [f"{part}_{k}.weight" for k, part in enumerate("abcdefghijklmnopqrst")]
    report = make_report(make_advice("bf16-true", frozen=names), layers=[*names, "b.weight"])
    text = show(report)
    assert len(text.splitlines()) <= MOST_LINES
    assert "fnmatchcase" not in text
    assert "More in --html and --json: a simulation, fp32." in text


def test_all_lines_are_printed_on_demand() -> None:
    report = make_report(make_advice("bf16-sr"), make_advice("e4m3fn-sr"))
    text = show(report, most=None)
    assert "More in" not in text
    lines = text.splitlines()
    for each in list_next_lines(report):
        assert all(not code or code in lines for code in each.code.splitlines())
    assert (text.count("Next: "), text.count("Or: ")) == (1, 2)


def test_a_run_without_verdicts_prints_nothing() -> None:
    assert show(make_report()) == ""
