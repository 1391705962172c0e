"""Reports of a training run: its run file, verdicts, tables, pictures and pages.

A verdict says whether a run, or a layer of it, would make its progress if it were stored as a
*recipe* says. The package works on plain numbers, without a model and without torch.

Read it in this order:

1. `records` writes and reads the run file.
2. `judging` judges a run, and each of its layers.
3. `run_report` combines a run with its verdicts, and `ranking` orders its layers. `drawings`, on
   figures of `canvas`, draws its pictures, and `applying` writes Python code that applies its
   suggestions. `next_lines` proposes the lines to train with next: those of `library_lines`, with
   the optimizers of `optimizer_lines`, and those of `simulation_lines`. `memory` computes what each
   recipe takes, and `planning` chooses a recipe for each layer within a budget; `memory_table`,
   `plan_table` and `plan_code` show both.
4. `terminal`, which prints `terminal_runs`, `layer_table` and `terminal_next`, `web_page`,
   `markdown` and `exports` show the report; `answers`, `cells`, `colours`, `names` and `printing`
   hold what they share.
5. `comparison` compares two runs, and `comparison_table` shows it. If one of them predicted how the
   other is stored, which `matching` finds out, `confirmation` sets the prediction beside what
   happened; `confirmation_table` and `confirmation_drawing` show it.
6. `commands` and `plan_command` are the command line.
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
    from altgrad.report.comparison_table import print_comparison
    from altgrad.report.confirmation import (
        Confirmation,
        ConfirmedLayer,
        FrozenCounts,
        Pair,
        find_confirmation,
    )
    from altgrad.report.confirmation_drawing import agreement
    from altgrad.report.confirmation_table import print_confirmation
    from altgrad.report.drawings import ranges, steps_histogram
    from altgrad.report.judging.decimals import format_kept
    from altgrad.report.judging.judge import Judge, StandardErrors, judge_run
    from altgrad.report.judging.summaries import write_nonfinite, write_sentence, write_word
    from altgrad.report.judging.verdicts import Advice, Assessment, RunAdvice, Verdict
    from altgrad.report.maps import heat_map, kept_map
    from altgrad.report.markdown import write_comment, write_verdicts
    from altgrad.report.memory import (
        Bytes,
        Memory,
        describe_saved,
        format_saved,
        measure_memory,
    )
    from altgrad.report.memory_table import print_memory
    from altgrad.report.next_lines import NextLine, list_next_lines
    from altgrad.report.plan_code import write_plan_code
    from altgrad.report.planning import Option, Plan, PlanError, Planned, make_plan
    from altgrad.report.ranking import find_frozen, list_lost, rank_layers
    from altgrad.report.records.fields import SCHEMA
    from altgrad.report.records.reading import read
    from altgrad.report.records.rows import Row
    from altgrad.report.records.run import Run
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
    from altgrad.report.terminal import print_first_screen, print_report
    from altgrad.report.web_page import confirmation_page, page

__all__ = [
    "INTERVAL",
    "KEPT_MEANING",
    "SCHEMA",
    "STEP_BY_STEP",
    "Advice",
    "Assessment",
    "Bytes",
    "Comparison",
    "Confirmation",
    "ConfirmedLayer",
    "FormatInfo",
    "FrozenCounts",
    "Header",
    "Judge",
    "LayerInfo",
    "Meaning",
    "Memory",
    "NextLine",
    "Option",
    "Pair",
    "Plan",
    "PlanError",
    "Planned",
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
    "describe_saved",
    "find_confirmation",
    "find_frozen",
    "format_kept",
    "format_saved",
    "has_intervals",
    "heat_map",
    "judge_run",
    "kept_map",
    "list_actions",
    "list_legend",
    "list_lost",
    "list_next_lines",
    "list_rows",
    "make_plan",
    "measure_memory",
    "page",
    "png",
    "print_comparison",
    "print_confirmation",
    "print_first_screen",
    "print_memory",
    "print_report",
    "ranges",
    "rank_layers",
    "read",
    "steps_histogram",
    "svg",
    "write_answer",
    "write_comment",
    "write_nonfinite",
    "write_plan_code",
    "write_sentence",
    "write_verdicts",
    "write_word",
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
            "comparison_table": "print_comparison",
            "confirmation": "Confirmation ConfirmedLayer FrozenCounts Pair find_confirmation",
            "confirmation_drawing": "agreement",
            "confirmation_table": "print_confirmation",
            "drawings": "ranges steps_histogram",
            "judging.decimals": "format_kept",
            "judging.judge": "Judge StandardErrors judge_run",
            "maps": "heat_map kept_map",
            "markdown": "write_comment write_verdicts",
            "next_lines": "NextLine list_next_lines",
            "memory": "Bytes Memory describe_saved format_saved measure_memory",
            "memory_table": "print_memory",
            "plan_code": "write_plan_code",
            "planning": "Option Plan PlanError Planned make_plan",
            "ranking": "find_frozen list_lost rank_layers",
            "records.fields": "SCHEMA",
            "records.reading": "read",
            "records.rows": "Row",
            "records.run": "Run",
            "records.schema": "FormatInfo Header LayerInfo Predecessor RecipeInfo RunFileError",
            "records.writing": "RunFile",
            "run_report": "RunReport",
            "terminal": "print_first_screen print_report",
            "judging.summaries": "write_nonfinite write_sentence write_word",
            "judging.verdicts": "Advice Assessment RunAdvice Verdict",
            "web_page": "confirmation_page page",
        },
        submodules="judging records",
    )
