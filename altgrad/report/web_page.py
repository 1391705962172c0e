"""The report as one page of HTML that needs no network, and no script to be read."""

from __future__ import annotations

import math
from importlib.resources import files

from altgrad._version import __version__
from altgrad.report.canvas import svg
from altgrad.report.cells import EVIDENCE, MEANINGS, cell_text, kept_text
from altgrad.report.run_report import RunReport

_CAPTIONS = {
    "kept": "Per layer and format, the mean share of the update's energy that is left.",
    "steps": "How large the updates of the last observed step were, in steps of the grid. Below a "
    "half, a weight that lies on the grid does not move.",
    "ranges": "Where the weights lie, and which of them each format can represent.",
}
_STALLS = "Per layer, over the run, the share of the updates that vanish. Dark rows never move."


def page(report: RunReport) -> str:
    """The page. Names of layers are escaped; searching and sorting work where scripts run.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": cell_text, "kept": kept_text, "isnan": math.isnan}
    template = environment.from_string(
        files("altgrad.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    pictures = {name: svg(figure, name) for name, figure in report.pictures().items()}
    return template.render(
        report=report,
        assessment=report.assessment,
        run=report.run,
        meanings=MEANINGS,
        evidence=EVIDENCE,
        seen={advice.verdict for advice in report.assessment.advice},
        pictures=pictures,
        captions={name: _CAPTIONS.get(name, _STALLS) for name in pictures},
        version=__version__,
    )
