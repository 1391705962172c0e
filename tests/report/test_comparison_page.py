"""The page of two runs compared: differing verdicts first, any name, and runs without a step."""

import re

from altgrad.report import Comparison, RunReport
from altgrad.report.comparison_page import comparison_page
from tests.report.json_examples import make_report
from tests.report.runs import SCRIPT, make_rows, make_run


def list_rows(html: str, table: str) -> list[list[str]]:
    """Return the texts of the cells of a table, row by row."""
    body = (
        html.split(f'<table id="{table}">')[1].split("<tbody>")[1].split("</tbody>", maxsplit=1)[0]
    )
    return [
        [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?>(.*?)</td>", row, re.DOTALL)]
        for row in body.split("</tr>")[:-1]
    ]


def test_the_page_shows_verdicts_that_differ_first_and_figures_with_differences() -> None:
    html = comparison_page(Comparison((make_report(), make_report(frozen=0.0))))
    assert "<h1>Differing verdicts: 1 of 4.</h1>" in html
    rows = list_rows(html, "changes")
    assert rows[0] == ["gain", "e5m2", "frozen 0.00", "fine 1.00"]
    assert len(rows) == 4
    assert ["kept_update_ratio/bf16", "1.0000", "1.0000", "0"] in list_rows(html, "means")
    assert ["progress_kept/e5m2", "0.5000", "0.5000", "0"] in list_rows(html, "twins")
    assert html.count('class="FROZEN"') == 2  # the cell, and the legend
    assert "{{" not in html


def test_names_are_escaped() -> None:
    report = RunReport.from_run(make_run(make_rows({SCRIPT: {"bf16": 1.0}}), ["bf16"]))
    html = comparison_page(Comparison((report, report)))
    assert SCRIPT not in html
    assert "&lt;script&gt;alert" in html


def test_runs_without_a_step_have_a_page_without_tables() -> None:
    report = RunReport.from_run(make_run([], ["bf16"]))
    html = comparison_page(Comparison((report, report)))
    assert "No observed step in A and B: nothing to compare." in html
    assert "<table" not in html
