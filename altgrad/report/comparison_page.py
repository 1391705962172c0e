"""The comparison of two runs, of which none predicted the other, as one HTML page.

The template comparison.html replaces the content of page.html; `web_page` has the environment.
"""

from __future__ import annotations

from altgrad._version import __version__
from altgrad.report.cells import KEPT_MEANING, list_marks, list_meanings
from altgrad.report.comparison import Comparison
from altgrad.report.comparison_table import write_figures
from altgrad.report.web_page import make_environment


def comparison_page(comparison: Comparison) -> str:
    """Return the verdicts of two runs side by side, and their figures, as one HTML page.

    Layers whose verdicts differ come first. Names of layers are escaped, as in `page`.

    Args:
        comparison: The comparison of two runs.

    Raises:
        ImportError: jinja2 is missing.
    """
    shown = [advice for pair in comparison.changes for advice in pair]
    return (
        make_environment()
        .get_template("comparison.html")
        .render(
            comparison=comparison,
            run=comparison.runs[0].run,
            legend=[*list_meanings(shown), *list_marks(shown)],
            kept_meaning=KEPT_MEANING,
            write_figures=write_figures,
            version=__version__,
        )
    )
