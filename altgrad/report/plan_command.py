"""The command `altgrad plan`: which recipe for which layer, within a budget of memory.

`altgrad.cli` makes the function a command. ``--help`` prints its docstring and the help texts of
its arguments. `commands` has the functions that commands share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Both modules are the command line, and have the same arguments, outputs and errors.
from altgrad.report.commands import (
    _fail,
    _Force,
    _format_json,
    _Layers,
    _Run,
    _show,
    exit_if_damaged,
)
from altgrad.report.judging.judge import judge_run
from altgrad.report.plan_table import plan_as_json, print_plan
from altgrad.report.planning import PlanError, make_plan
from altgrad.report.records.reading import read


@exit_if_damaged()
def plan(
    run: _Run,
    budget: Annotated[
        float,
        typer.Option(
            "--budget",
            metavar="SHARE",
            help="Share of the bytes of weights and states in float32, above 0 and up to 1.",
        ),
    ],
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="[FILE]", help="Write the plan as JSON.")
    ] = None,
    layers: _Layers = 40,
    force: _Force = False,
) -> None:
    """Choose a recipe for each layer, so that all fit a budget of memory.

    Each layer stays in float32, or is stored by a recipe that the run tried and
    in which the layer goes on to move. The code below the table applies the
    plan. With - as FILE, only the JSON is shown.

    \f
    Args:
        run: Log directory of a run, or its run file.
        budget: Share of the bytes of weights, states and rounding errors in float32.
        as_json: File for the plan as JSON.
        layers: Maximum number of layers in the table; 0 shows all.
        force: If True, replace files of any kind.
    """  # noqa: D301 - typer's help ends at the form feed; the options have their own help
    found = read(run)
    try:
        made = make_plan(found, judge_run(found), budget)
    except PlanError as error:
        _fail(str(error))
    _show(
        lambda console: print_plan(found, made, console, layers or None),
        [(as_json, lambda: _format_json(plan_as_json(found, made)))],
        (found,),
        force=force,
    )
