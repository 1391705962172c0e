"""Reports of a run, made of records and other plain numbers; they never see a model."""

from altgrad.report.comparison import Comparison
from altgrad.report.drawings import heat_map, kept_map, png, ranges, steps_histogram, svg
from altgrad.report.page import page
from altgrad.report.run_report import RunReport
from altgrad.report.terminal import print_comparison, print_report, print_verdicts

__all__ = [
    "Comparison",
    "RunReport",
    "heat_map",
    "kept_map",
    "page",
    "png",
    "print_comparison",
    "print_report",
    "print_verdicts",
    "ranges",
    "steps_histogram",
    "svg",
]
