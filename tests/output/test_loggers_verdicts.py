"""The text of the verdicts for loggers: any name, the layers to look at first, a legend."""

import math
import re

import pytest

from altgrad.output import loggers
from altgrad.report import Assessment, Verdict
from altgrad.report.cells import MEANINGS, STEP_MEANINGS
from tests.lightning.assessments import assessment, make_advice, make_run
from tests.lightning.rendered import as_text, cells, render


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
    markdown = loggers.format_verdict(assessment((name,)))
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
    markdown = loggers.format_verdict(assessment(layers))
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
    markdown = loggers.format_verdict(Assessment(runs, [*slow, frozen], {}, ""))
    assert "of 201 layers, first those frozen, stuck or NaN (1 in all):" in markdown
    assert markdown.index("| gain |") < markdown.index("| slow.0 |")


def test_shares_of_single_updates_are_explained_by_their_own_thresholds() -> None:
    single = make_advice("a", "bf16", {"kept_update_ratio": 0.985})._replace(verdict=Verdict.WATCH)
    runs = {"bf16": make_run("bf16", ())._replace(has_twin=False, verdict=Verdict.WATCH)}
    text = as_text(loggers.format_verdict(Assessment(runs, [single], {}, "")))
    assert "| watch 0.98* |" in text
    assert f"- watch*: {STEP_MEANINGS[Verdict.WATCH]}" in text
    assert MEANINGS[Verdict.WATCH] not in text


def test_the_verdict_shows_a_dash_for_missing_figures() -> None:
    advice = make_advice("a", "bf16", {"progress_kept": math.nan})
    run = make_run("bf16", ())._replace(verdict=Verdict.NOT_JUDGED, kept=math.nan, to_do="")
    judged = advice._replace(verdict=Verdict.NOT_JUDGED)
    html = render(loggers.format_verdict(Assessment({"bf16": run}, [judged], {}, "")))
    assert cells(html.split("<table>")[2])[3:] == ["a", "&#8211;", "none: fp32"]
    assert "–: nothing moved that the recipe could lose" in " ".join(as_text(html).split())
    assert "neither formats nor recipes" in render(
        loggers.format_verdict(Assessment({}, [], {}, ""))
    )


def test_the_verdict_names_layers_with_nan_in_the_run_itself() -> None:
    bad = make_advice("a", "now", {"progress_kept": 0.5})._replace(nonfinite=0.5)
    twin = make_advice("b", "bf16", {"progress_kept": 0.5})._replace(nonfinite=0.5)
    runs = {recipe: make_run(recipe, ()) for recipe in ("now", "bf16")}
    text = as_text(loggers.format_verdict(Assessment(runs, [bad, twin], {}, "")))
    assert (
        "NaN or inf in elements (nonfinite_frac), which no figure counts: a (50 %), b (50 %)"
        in text
    )
