"""The verdicts on a run as Markdown: for the text page of TensorBoard, and for a pull request.

`write_verdicts` has all of it, one part below the other. `write_comment` has the first screen of a
report, and folds the layers away, as GitHub shows them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from altgrad._messages import format_count
from altgrad._version import __version__
from altgrad.report.answers import (
    INTERVAL,
    STEP_BY_STEP,
    has_intervals,
    list_actions,
    list_rows,
    write_answer,
    write_storage,
)
from altgrad.report.cells import KEPT_MEANING, cell_text, list_legend
from altgrad.report.judging.summaries import write_nonfinite
from altgrad.report.judging.verdicts import Assessment
from altgrad.report.names import replace_unprintable
from altgrad.report.next_lines import write_next
from altgrad.report.ranking import list_lost, rank_layers
from altgrad.report.records.schema import RunDescription
from altgrad.report.run_report import RunReport

_RUN_HEADINGS = (
    *("recipe", "verdict", "progress kept (80 % of real runs)", "layers that freeze"),
    *("memory saved", "such runs that lost over 10 %", "weights that never move"),
)
# As many as one reads; the run file has all layers.
_MOST_LAYERS = 100
_MOST_FOLDED = 20  # of a comment
_INSIDE_A_WORD = re.compile(r"((?<=[^\W_])[_/](?=[^\W_]))")
"""An underscore or a slash between two letters or digits, which Markdown takes literally.

https://github.github.com/gfm/#emphasis-and-strong-emphasis: such an underscore begins no emphasis.
"""
BEGINNING = "<!-- altgrad report -->"
"""The first line of a comment: invisible, and by it a script finds the comment to replace."""


def write_verdicts(assessment: Assessment, run: RunDescription | None = None) -> str:
    """Return the verdicts on a run, what to do, and a table of layers by recipes, as Markdown.

    If weights of the run are stored below float32, the first column is ``now``, what the run itself
    loses. The worst layers come first, and at most 100 layers are shown.

    Args:
        assessment: The verdicts.
        run: The run, or the header of its file, for how it is stored and which recipe is next. None
            leaves both out.

    Returns:
        The Markdown, with names of layers escaped.
    """
    meanings = _list_meanings(assessment)
    stored = write_storage(run, assessment.runs) if run else ""
    lines = _write_run(assessment, write_answer(assessment.runs), stored)
    if run:
        lines += _write_next_recipe(run, assessment)
    layers = _write_layers(assessment, _MOST_LAYERS)
    return "\n".join([*lines, "", *layers, "", *meanings, *_write_notes(assessment)])


def write_comment(report: RunReport) -> str:
    """Return the first screen of a report as the Markdown of a comment on GitHub.

    It has a line for each recipe, and what to do. The worst 20 layers are folded away.

    Args:
        report: The report of a run.
    """
    assessment = report.assessment
    stored = write_storage(report.run, assessment.runs, report.visible)
    lines = [BEGINNING, "Would this training still learn if it were stored in fewer bits?", ""]
    lines += [*_write_run(assessment, report.answer, stored)]
    lines += [*_write_next_recipe(report.run, assessment), ""]
    if assessment.advice:
        count = format_count(len(assessment.by_layer), "layer")
        lines += [f"<details><summary>Layer by layer: {count}</summary>", ""]
        lines += [*_write_layers(assessment, _MOST_FOLDED), "", *_list_meanings(assessment)]
        lines += [*_write_notes(assessment), "", "</details>", ""]
    about = f"{report.run.path}: {report.steps}; AltGrad {__version__}"
    return "\n".join([*lines, f"<sub>{_escape(about)}</sub>", ""])


def _write_run(assessment: Assessment, answer: str, stored: str) -> list[str]:
    """Return lines of Markdown on the run: the answer, a table of recipes, and what to do."""
    lines = [f"**{_escape(answer)}**", "", *([_escape(stored), ""] if stored else [])]
    if broken := write_nonfinite(assessment.nonfinite, assessment.advice):
        lines += [_escape(broken), ""]
    rows = list_rows(assessment.runs)
    if rows:
        lines += [_join_cells(_RUN_HEADINGS), _join_cells(["---"] * len(_RUN_HEADINGS))]
    for row in rows:
        texts = (row.recipe, row.word, row.kept, row.frozen, row.saved, row.evidence, row.never)
        lines += [_join_cells(map(_escape, texts))]
    actions = [f"- {_escape(action)}" for action in list_actions(assessment.runs)]
    return [*lines, "", *actions]


def _write_next_recipe(run: RunDescription, assessment: Assessment) -> list[str]:
    """Return lines of Markdown with the recipe to train with next; none without one."""
    next_recipe = write_next(run, assessment.runs)
    return ["", f"**Next:** {_escape(next_recipe)}"] if next_recipe else []


def _write_notes(assessment: Assessment) -> list[str]:
    """Return lines of Markdown that explain intervals and marks in the table of recipes."""
    rows = list_rows(assessment.runs)
    lines = ["", _escape(INTERVAL)] if has_intervals(rows) else []
    return lines + (["", _escape(STEP_BY_STEP)] if any(r.is_step_by_step for r in rows) else [])


def _write_layers(assessment: Assessment, most: int) -> list[str]:
    """Return lines of Markdown with a table of layers by recipes."""
    by_layer = rank_layers(assessment)
    recipes = [*assessment.runs]
    lines = []
    if len(by_layer) > most:
        lost = len(list_lost(assessment))
        first = f", first those frozen, stuck or NaN ({lost:,} in all)" if lost else ""
        lines += [f"The worst {most} of {format_count(len(by_layer), 'layer')}{first}:", ""]
    lines += [_join_cells(["layer", *map(_escape, recipes), "smallest fine"])]
    lines += [_join_cells(["---"] * (len(recipes) + 2))]
    for layer in [*by_layer][:most]:
        cells = [_escape(cell_text(by_layer[layer].get(recipe)) or "–") for recipe in recipes]
        suggestion = assessment.suggestions.get(layer)
        lines += [_join_cells([_escape(layer), *cells, _escape(suggestion or "none")])]
    return [*lines, "", _escape(KEPT_MEANING)]


def _list_meanings(assessment: Assessment) -> list[str]:
    return [f"- {_escape(each.word)}: {_escape(each.text)}" for each in list_legend(assessment)]


def _join_cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Replace each character that Markdown might read as markup by its HTML reference."""
    text = replace_unprintable(text)
    # A hyphen begins a list, and brackets a link behind ] alone, which is replaced.
    plain = " .,:;%()" + ("" if text.startswith("-") else "-")
    parts = _INSIDE_A_WORD.split(text)  # every second part is such a character
    return "".join(
        part if k % 2 else "".join(c if c.isalnum() or c in plain else f"&#{ord(c)};" for c in part)
        for k, part in enumerate(parts)
    )
