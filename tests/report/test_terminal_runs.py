"""What a terminal shows first: how the run is stored, a row for each recipe, and what to do."""

import math
import re
from dataclasses import replace

import pytest

from altgrad.report import Row, RunReport, print_report
from altgrad.report.terminal_runs import print_runs
from tests.report.runs import figures, make_run
from tests.report.shown_runs import print_to_text, record_bf16, record_fp32, report

NAN = math.nan
WIDTHS = [60, 80, 120]


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    return report(record_bf16(tmp_path_factory.mktemp("low")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    return report(record_fp32(tmp_path_factory.mktemp("whole")))


def show(found: RunReport, width: int) -> str:
    return print_to_text(lambda console: print_report(found, console), width)


def read_rows(text: str) -> dict[str, list[str]]:
    """Return the rows of the table of recipes, without their intervals, by first word."""
    table = text.split("──\n")[1]
    lines = [re.sub(r" \(.*? to .*?\)", "", line) for line in table.splitlines()]
    return {line.split()[0]: line.split() for line in lines if line}


def test_a_run_in_float32_begins_with_what_recipes_would_keep(whole: RunReport) -> None:
    text = show(whole, 120)
    words = " ".join(text.split())
    assert "Weights are float32: nothing is lost now, also under autocast or FSDP" in words
    rows = read_rows(text)
    assert [*rows][:3] == ["bf16", "bf16-kahan", "e5m2"]
    word = whole.assessment.runs["bf16"].verdict.short
    assert rows["bf16"][:7] == ["bf16", word, "0.33", "1", "(67", "%)", "–"]
    assert rows["bf16-kahan"][1] == "fine"
    assert "bf16, e5m2: Use bf16-kahan, which keeps" in words
    assert words.index("Weights are") < words.index("recipe verdict") < words.index("layer ")
    assert "“now”" not in words


def test_a_run_in_bf16_begins_with_what_it_loses_now(low: RunReport) -> None:
    text = show(low, 120)
    words = " ".join(text.split())
    assert re.search(
        "This run (is frozen|loses 0.67 of its progress) now: 67 % of the weights", words
    )
    assert "Weights are bfloat16. “now” is what the run keeps" in words
    assert [*read_rows(text)][:2] == ["now", "bf16"]
    assert "now: gain stands still. Use bf16-kahan, which keeps" in words


def list_words(text: str) -> set[str]:
    return {word.strip("(),.;:") for word in text.split() if "─" not in word}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["low", "whole"])
def test_no_word_is_broken_and_no_cell_is_wrapped(
    name: str, width: int, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(name)
    text = print_to_text(lambda console: print_runs(found, console), width)
    assert max(map(len, text.splitlines())) <= width
    wide = print_to_text(lambda console: print_runs(found, console), 300)
    assert list_words(text) <= list_words(f"{wide} Such that over 10 %:")
    rows = read_rows(text)
    assert [*rows][: len(found.recipes)] == found.recipes


def test_a_column_without_room_becomes_a_sentence(low: RunReport) -> None:
    narrow, wide = show(low, 60), show(low, 80)
    assert "lost >10 %" in wide
    assert "lost >10 %" not in narrow
    assert "Such runs that lost over 10 %:" in narrow
    assert "Such runs that lost over 10 %:" not in wide


def test_now_is_the_first_column_of_layers_with_the_unmoved_share_beside_it(
    low: RunReport, whole: RunReport
) -> None:
    (heading,) = (line.split() for line in show(low, 120).splitlines() if line[:6] == "layer ")
    assert heading[:4] == ["layer", "now", "unmoved", "bf16"]
    (gain,) = (line.split() for line in show(low, 120).splitlines() if line[:6] == "gain  ")
    assert gain[1:3] == ["frozen", "1.00"]
    assert "unmoved_frac, the share of single updates" in show(low, 120)
    assert "unmoved" not in show(whole, 120)


def test_what_a_forward_pass_sees_is_said_once_of_a_run_in_float32(
    low: RunReport, whole: RunReport
) -> None:
    assert show(whole, 120).count("A forward pass that rounds weights") == 1
    assert "visible_frac" not in show(low, 120)


def test_a_format_without_a_twin_is_marked(whole: RunReport) -> None:
    run = make_run([Row(0, "a", figures(kept_update_ratio=0.25), {})], ["bf16"])
    text = show(RunReport.from_run(run), 80)
    assert read_rows(text)["bf16"][:3] == ["bf16", "remedy", "0.25*"]
    assert "* of single updates, without a twin" in text
    assert "80 % of real runs" not in text
    assert "* of single updates" not in show(whole, 80)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_interval_is_explained_in_the_heading_and_below_the_table(
    whole: RunReport, width: int
) -> None:
    text = " ".join(show(whole, width).split())
    assert text.count("(80 % of real runs)") == 1
    assert "In brackets: what 80 % of those real runs kept" in text


def test_a_run_without_formats_and_recipes_is_told_to_pass_some() -> None:
    run = make_run([Row(0, "a", {}, {}), Row(0, None, {}, {})], [])
    text = " ".join(show(RunReport.from_run(run), 80).split())
    assert "The monitor has neither formats nor recipes: there are no verdicts. Pass" in text
    assert "No step was observed" not in text


def test_names_of_recipes_are_shortened_and_shown_literally(low: RunReport) -> None:
    long = f"[red]{'x' * 300}\x1b"
    runs = {long: low.assessment.runs["bf16"]._replace(recipe=long), **low.assessment.runs}
    found = replace(low, assessment=replace(low.assessment, runs=runs))
    for width in WIDTHS:
        table = print_to_text(lambda console: print_runs(found, console), width).split("──\n")[1]
        assert table.startswith("[red]" if width > 60 else "[re")
        assert "\x1b" not in table
