"""Verdicts as Markdown: any name, the layers to look at first, a legend, and a comment."""

import math
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from altgrad.report import Assessment, RunReport, Verdict, write_comment, write_verdicts
from altgrad.report.cells import MEANINGS, STEP_MEANINGS
from tests.command_line import altgrad
from tests.lightning.assessments import assessment, make_advice, make_run
from tests.lightning.rendered import as_text, cells, render
from tests.report.runs import make_run as make_plain_run, write_empty_run
from tests.report.shown_runs import record_bf16


@pytest.mark.parametrize(
    "name",
    [
        "__a__",
        "*a*",
        "`a`",
        "a|b",
        "<script>x</script>",
        "[a](b)",
        "&amp;",
        "a\\|b",
        "![](x)",
        "a$b$",
    ],
)
def test_any_layer_name_is_shown_verbatim_in_one_cell(name: str) -> None:
    markdown = write_verdicts(assessment((name,)))
    html = render(markdown)
    layers = html.split("<table>")[2]
    assert as_text(cells(layers)[5]) == name
    assert as_text(html).count(name) >= 2  # in what to do, too
    html = html.replace("<strong>This", "").replace(".</strong>", "")
    assert not {"<strong>", "<em>", "<code>", "<a", "<img", "<script"} & {
        *re.findall("<[a-z]+>?", html)
    }


def test_the_verdict_shows_the_worst_100_layers() -> None:
    layers = tuple(f"layer.{k}" for k in range(2000))
    markdown = write_verdicts(assessment(layers))
    assert "The worst 100 of 2,000 layers, first those frozen, stuck or NaN (2,000 in all):" in (
        markdown
    )
    assert markdown.count("| layer.") == 100
    assert "| layer.99 |" in markdown


def test_the_verdict_shows_frozen_layers_before_those_that_keep_less() -> None:
    slow = [
        make_advice(f"slow.{k}", "bf16", {"progress_kept": 0.1})._replace(
            verdict=Verdict.NEEDS_REMEDY
        )
        for k in range(200)
    ]
    frozen = make_advice("gain", "bf16", {"progress_kept": 0.4})
    runs = {"bf16": make_run("bf16", ("gain",))}
    markdown = write_verdicts(Assessment(runs, [*slow, frozen], {}, ""))
    assert "of 201 layers, first those frozen, stuck or NaN (1 in all):" in markdown
    assert markdown.index("| gain |") < markdown.index("| slow.0 |")


def test_shares_of_single_updates_are_explained_by_their_own_thresholds() -> None:
    single = make_advice("a", "bf16", {"kept_update_ratio": 0.985})._replace(verdict=Verdict.WATCH)
    runs = {"bf16": make_run("bf16", ())._replace(has_twin=False, verdict=Verdict.WATCH)}
    text = as_text(write_verdicts(Assessment(runs, [single], {}, "")))
    assert "| watch 0.98* |" in text
    assert f"- watch*: {STEP_MEANINGS[Verdict.WATCH]}" in text
    assert MEANINGS[Verdict.WATCH] not in text


def test_the_verdict_shows_a_dash_for_missing_figures() -> None:
    advice = make_advice("a", "bf16", {"progress_kept": math.nan})
    run = make_run("bf16", ())._replace(verdict=Verdict.NOT_JUDGED, kept=math.nan, to_do="")
    judged = advice._replace(verdict=Verdict.NOT_JUDGED)
    html = render(write_verdicts(Assessment({"bf16": run}, [judged], {}, "")))
    assert cells(html.split("<table>")[2])[3:] == ["a", "&#8211;", "none"]
    assert "–: nothing moved that the recipe could lose" in " ".join(as_text(html).split())
    assert "neither formats nor recipes" in render(write_verdicts(Assessment({}, [], {}, "")))


def test_the_verdict_names_layers_with_nan_in_the_run_itself() -> None:
    bad = make_advice("a", "now", {"progress_kept": 0.5})._replace(nonfinite=0.5)
    twin = make_advice("b", "bf16", {"progress_kept": 0.5})._replace(nonfinite=0.5)
    runs = {recipe: make_run(recipe, ()) for recipe in ("now", "bf16")}
    text = as_text(write_verdicts(Assessment(runs, [bad, twin], {}, "")))
    assert (
        "NaN or inf in elements (nonfinite_frac), which no figure counts: a (50 %), b (50 %)"
        in text
    )


def test_names_stay_readable_in_markdown_and_cannot_be_markup() -> None:
    name, odd = "block_0.attn_norm/weight", "_a_ __b__ c_*d* [e](f) <g> |"
    advice = [make_advice(each, "bf16", {"progress_kept": 0.5}) for each in (name, odd)]
    runs = {"bf16": make_run("bf16", ())}
    markdown = write_verdicts(Assessment(runs, advice, {}, ""))
    assert f"| {name} |" in markdown
    html = render(markdown)
    assert html.count("<em>") == render(markdown.replace("_", "")).count("<em>")
    assert odd in as_text(markdown)


# --- a comment on GitHub


def render_comment(comment: str) -> str:
    """Return the HTML of CommonMark with tables, as GitHub renders a comment."""
    return MarkdownIt("commonmark").enable("table").render(comment)


def test_a_comment_has_the_first_screen_and_folds_the_layers(tmp_path: Path) -> None:
    report = RunReport.from_run(record_bf16(tmp_path))
    html = render_comment(write_comment(report))
    screen, layers = html.split("<details>")
    assert f"<strong>{report.answer}</strong>" in screen
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in screen.split("<tr>")[2:]]
    assert [row[0] for row in rows] == ["now", "bf16", "bf16-kahan", "e5m2"]
    assert rows[0][1] == "frozen now"
    assert "<li>now: gain stands still. Use bf16-kahan" in screen
    assert "<summary>Layer by layer: 2 layers</summary>" in layers
    assert "<td>gain</td>" in layers
    assert layers.index("<td>gain</td>") < layers.index("</details>")
    assert "4 steps observed" in layers


def test_a_comment_and_the_text_page_say_how_the_run_is_stored_and_what_is_next(
    tmp_path: Path,
) -> None:
    report = RunReport.from_run(record_bf16(tmp_path))
    text = write_verdicts(report.assessment, report.run)
    pages = [render_comment(write_comment(report)), render(text)]
    for html in pages:
        screen = as_text(html.split("gain</td>")[0])
        assert "Weights are bfloat16. “now” is what the run keeps" in screen
        assert "Next:</strong> bf16-kahan: fine, keeps" in screen
    assert "Next:" not in write_verdicts(report.assessment)


def test_a_comment_folds_away_the_worst_20_layers() -> None:
    layers = tuple(f"layer.{k}" for k in range(50))
    report = RunReport(make_plain_run([]), assessment(layers))
    html = render_comment(write_comment(report))
    assert "The worst 20 of 50 layers" in html
    assert html.count("<td>layer.") == 20


@pytest.mark.parametrize("name", ["-x", "a-b", "(a)", "[a](b)", "<b>", "a\nb", "a|b", "@me", "#1"])
def test_a_comment_shows_any_layer_name_verbatim(name: str) -> None:
    html = render_comment(write_comment(RunReport(make_plain_run([]), assessment((name,)))))
    assert f"<td>{name.replace('<', '&lt;').replace('>', '&gt;')}</td>".replace("\n", "�") in html
    assert not {"<a", "<b"} & {*re.findall("<[a-z]+", html)}


def test_the_command_writes_a_comment_to_the_terminal_or_a_file(run: Path, tmp_path: Path) -> None:
    shown = altgrad("report", run, "--markdown")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(
        "<!-- altgrad report -->\n"
        "Would this training still learn if it were stored in fewer bits?\n\n"
        "**Not fine: bf16, e5m2. 3 steps observed: early.**\n"
    )
    path = tmp_path / "comment.md"
    for _ in range(2):  # a comment is a report, and is replaced
        assert altgrad("report", run, "--markdown", path).returncode == 0
    assert path.read_text() == shown.stdout
    empty = altgrad("report", write_empty_run(tmp_path), "--markdown")
    assert "**No step was observed" in empty.stdout
