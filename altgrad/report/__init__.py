"""Reports of a training run: its run file, verdicts, tables, pictures and pages.

A verdict says whether a run, or a layer of it, would make its progress if it were stored as a
*recipe* says. The package works on plain numbers, without a model and without torch.

Read it in this order:

1. `records` writes and reads the run file.
2. `judging` judges a run, and each of its layers.
3. `run_report` combines a run with its verdicts, and `ranking` orders its layers. `drawings`, on
   figures of `canvas`, draws its pictures, and `applying` writes Python code that applies its
   suggestions.
4. `terminal`, which begins with `terminal_runs`, `web_page` and `exports` show the report;
   `answers`, `cells`, `colours`, `names` and `printing` hold what they share.
5. `comparison` compares two runs. If one of them predicted how the other is stored, which
   `matching` finds out, `confirmation` sets the prediction beside what happened;
   `confirmation_table` and `confirmation_drawing` show it.
6. `commands` is the command line.
"""

from typing import TYPE_CHECKING

from altgrad import _lazy

if TYPE_CHECKING:
    from altgrad.report.answers import (
        INTERVAL,
        STEP_BY_STEP,
        describe_frozen_now,
        has_intervals,
        list_actions,
        list_rows,
        write_answer,
    )
    from altgrad.report.canvas import png, svg
    from altgrad.report.cells import KEPT_MEANING, Meaning, cell_text, list_legend
    from altgrad.report.comparison import Comparison
    from altgrad.report.confirmation import (
        Confirmation,
        ConfirmedLayer,
        FrozenCounts,
        Pair,
        find_confirmation,
    )
    from altgrad.report.confirmation_drawing import agreement
    from altgrad.report.confirmation_table import print_confirmation
    from altgrad.report.drawings import heat_map, kept_map, ranges, steps_histogram
    from altgrad.report.judging.judge import Judge, StandardErrors, judge_run
    from altgrad.report.judging.summaries import write_nonfinite, write_sentence
    from altgrad.report.judging.verdicts import Advice, Assessment, RunAdvice, Verdict
    from altgrad.report.ranking import find_frozen, list_lost, rank_layers
    from altgrad.report.records.fields import SCHEMA
    from altgrad.report.records.reading import read
    from altgrad.report.records.run import Row, Run
    from altgrad.report.records.schema import (
        FormatInfo,
        Header,
        LayerInfo,
        Predecessor,
        RecipeInfo,
        RunFileError,
    )
    from altgrad.report.records.writing import RunFile
    from altgrad.report.run_report import RunReport
    from altgrad.report.terminal import print_comparison, print_report, print_verdicts
    from altgrad.report.web_page import confirmation_page, page

__all__ = [
    "INTERVAL",
    "KEPT_MEANING",
    "SCHEMA",
    "STEP_BY_STEP",
    "Advice",
    "Assessment",
    "Comparison",
    "Confirmation",
    "ConfirmedLayer",
    "FormatInfo",
    "FrozenCounts",
    "Header",
    "Judge",
    "LayerInfo",
    "Meaning",
    "Pair",
    "Predecessor",
    "RecipeInfo",
    "Row",
    "Run",
    "RunAdvice",
    "RunFile",
    "RunFileError",
    "RunReport",
    "StandardErrors",
    "Verdict",
    "agreement",
    "cell_text",
    "confirmation_page",
    "describe_frozen_now",
    "find_confirmation",
    "find_frozen",
    "has_intervals",
    "heat_map",
    "judge_run",
    "kept_map",
    "list_actions",
    "list_legend",
    "list_lost",
    "list_rows",
    "page",
    "png",
    "print_comparison",
    "print_confirmation",
    "print_report",
    "print_verdicts",
    "ranges",
    "rank_layers",
    "read",
    "steps_histogram",
    "svg",
    "write_answer",
    "write_nonfinite",
    "write_sentence",
]

if not TYPE_CHECKING:  # a `__getattr__` would make every name Any for mypy
    __getattr__, __dir__ = _lazy.attach(
        __name__,
        {
            "answers": "INTERVAL STEP_BY_STEP describe_frozen_now has_intervals list_actions "
            "list_rows write_answer",
            "canvas": "png svg",
            "cells": "KEPT_MEANING Meaning cell_text list_legend",
            "comparison": "Comparison",
            "confirmation": "Confirmation ConfirmedLayer FrozenCounts Pair find_confirmation",
            "confirmation_drawing": "agreement",
            "confirmation_table": "print_confirmation",
            "drawings": "heat_map kept_map ranges steps_histogram",
            "judging.judge": "Judge StandardErrors judge_run",
            "ranking": "find_frozen list_lost rank_layers",
            "records.fields": "SCHEMA",
            "records.reading": "read",
            "records.run": "Row Run",
            "records.schema": "FormatInfo Header LayerInfo Predecessor RecipeInfo RunFileError",
            "records.writing": "RunFile",
            "run_report": "RunReport",
            "terminal": "print_comparison print_report print_verdicts",
            "judging.summaries": "write_nonfinite write_sentence",
            "judging.verdicts": "Advice Assessment RunAdvice Verdict",
            "web_page": "confirmation_page page",
        },
        submodules="judging records",
    )
