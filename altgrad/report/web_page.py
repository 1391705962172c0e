"""The report as one HTML page, which works without a network and is readable without scripts.

The file page.html is the template. Style, script and pictures are part of the page. The page about
what one run predicted, `confirmation_page`, replaces the content of page.html by confirmation.html.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from altgrad._version import __version__
from altgrad.report.answers import (
    INTERVAL,
    STEP_BY_STEP,
    has_intervals,
    list_actions,
    list_rows,
    write_answer,
    write_storage,
    write_visible,
)
from altgrad.report.canvas import svg
from altgrad.report.cells import KEPT_MEANING, cell_text, write_short_cell, write_short_legend
from altgrad.report.colours import CELLS, find_share_colour, find_text_colour
from altgrad.report.confirmation import FROZEN, MEANING, Confirmation, explain_metric
from altgrad.report.confirmation_drawing import agreement
from altgrad.report.judging.decimals import format_difference, format_figure, format_kept
from altgrad.report.judging.summaries import write_nonfinite
from altgrad.report.judging.verdicts import Advice, Assessment, Verdict
from altgrad.report.memory import measure_memory
from altgrad.report.memory_table import NOTE as MEMORY_NOTE, is_known, tabulate_memory, write_memory
from altgrad.report.names import replace_unprintable_in_lines
from altgrad.report.next_lines import NextLine, list_next_lines, write_next
from altgrad.report.ranking import LOST
from altgrad.report.run_report import RunReport

if TYPE_CHECKING:
    from jinja2 import Environment

_CAPTIONS = {
    "kept": "Share of the progress that is kept, by layer and recipe; “now” is the run itself.",
    "steps": "Size of the updates in the last observed step, in units of the grid spacing. Below "
    "0.5, a weight on the grid does not move.",
    "ranges": "Distribution of the weights, and the range of each format.",
}
_MOST_REASONS = 200
"""Maximum number of layers whose reasons are on the page; more would make it slow to open."""
_STALLS = "Share of the updates that stall, by layer and step. Black rows never move."


def page(report: RunReport) -> str:
    """Return the report of a run, its verdicts and pictures, as the text of one HTML page.

    Names of layers are escaped, and each unprintable character becomes �, so that the page can be
    encoded as UTF-8. Tables can be searched and sorted if the browser runs scripts.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    pictures = {name: svg(figure, name) for name, figure in report.pictures().items()}
    memory = measure_memory(report.run.layers, report.run.recipes)
    return (
        make_environment()
        .get_template("page.html")
        .render(
            **_fill_first_screen(report.assessment, report),
            run=report.run,
            visible=write_visible(report.visible),
            reasons=[*report.by_layer.values()][:_MOST_REASONS],
            next_lines=_group_by_recipe(list_next_lines(report)),
            kept_meaning=KEPT_MEANING,
            short_legend=write_short_legend(report.assessment.advice),
            nan=math.nan,
            not_judged={
                layer
                for layer, advice in report.by_layer.items()
                if all(each.verdict is Verdict.NOT_JUDGED for each in advice.values())
            },
            pictures=pictures,
            memory=tabulate_memory(memory) if is_known(memory) else None,
            memory_sentence=write_memory(report.run, memory) if memory else "",
            memory_note=MEMORY_NOTE,
            captions={name: _CAPTIONS.get(name, _STALLS) for name in pictures},
            version=__version__,
        )
    )


def first_screen(assessment: Assessment, report: RunReport | None = None) -> str:
    """Return the first screen of a report as a piece of HTML, for a notebook.

    It has what each recipe would make of the run, and what to do.

    Args:
        assessment: Verdicts on the run and its layers.
        report: Report of the run, which adds how the run is stored and which steps were observed.

    Raises:
        ImportError: jinja2 is missing.
    """
    filled = _fill_first_screen(assessment, report)
    return make_environment().get_template("notebook.html").render(**filled)


def _fill_first_screen(assessment: Assessment, report: RunReport | None) -> dict[str, Any]:
    """Return the values of the template first_screen.html, by name."""
    runs = assessment.runs
    rows = list_rows(runs)
    return {
        "report": report,
        "assessment": assessment,
        "answer": report.answer if report else write_answer(runs),
        "stored": write_storage(report.run, runs, report.visible) if report else "",
        "rows": rows,
        "has_intervals": has_intervals(rows),
        "step_by_step": STEP_BY_STEP,
        "interval": INTERVAL,
        "actions": list_actions(runs),
        "broken": write_nonfinite(assessment.nonfinite, assessment.advice),
        "next_recipe": write_next(report.run, runs) if report else "",
    }


def _group_by_recipe(lines: Iterable[NextLine]) -> list[list[NextLine]]:
    """Return the lines of each recipe, in order."""
    return [[*each] for _, each in itertools.groupby(lines, key=lambda line: line.recipe)]


def confirmation_page(confirmation: Confirmation) -> str:
    """Return what one run predicted beside what really happened in another, as one HTML page.

    It has a picture with a point for each layer, and a table. Names of layers are escaped, as in
    `page`.

    Args:
        confirmation: The prediction, and the run in which it came true or not.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    environment = make_environment()
    environment.filters |= {
        "figure": format_figure,
        "difference": format_difference,
        "explain": explain_metric,
    }
    return environment.get_template("confirmation.html").render(
        confirmation=confirmation,
        run=confirmation.real,
        picture=svg(agreement(confirmation), "agreement"),
        meaning=MEANING,
        least_frozen=FROZEN,
        version=__version__,
    )


def make_environment() -> Environment:
    """Return an environment of jinja2 with the templates of this package, which escapes names."""
    from jinja2 import Environment, FunctionLoader

    # Names of layers may hold markup; autoescape renders it as text.
    environment = Environment(
        autoescape=True,
        finalize=_replace_unprintable,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_read_template),
    )
    environment.filters |= {
        "cell": write_short_cell,
        "verdict_cell": cell_text,
        "cell_style": _style_cell,
        "kept": format_kept,
        "isnan": math.isnan,
    }
    environment.globals["verdict_colours"] = [
        (verdict.name, colour, find_text_colour(colour)) for verdict, colour in CELLS.items()
    ]
    return environment


def _style_cell(advice: Advice) -> str:
    """Return the CSS of a layer's cell: the scale of the pictures, with its own for lost layers."""
    is_share = advice.verdict not in LOST and not math.isnan(advice.kept)
    colour = find_share_colour(advice.kept) if is_share else CELLS[advice.verdict]
    return f"background: {colour}; color: {find_text_colour(colour)}"


def _read_template(name: str) -> str:
    return files("altgrad.report").joinpath(name).read_text(encoding="utf-8")


def _replace_unprintable(value: object) -> object:
    """Return a value as printable text; return markup, such as a picture, as given."""
    is_markup = hasattr(value, "__html__")
    return value if is_markup else replace_unprintable_in_lines(str(value))
