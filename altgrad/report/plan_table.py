"""Show a plan, the choice of a recipe for each layer: in the terminal, and as JSON.

A *recipe* says how weights and optimizer states are stored.

Read `planning`, `plan_code` and `printing` first; `plan_command` comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from altgrad._messages import format_count, format_percent
from altgrad.report.exports import begin_json
from altgrad.report.judging.decimals import format_kept
from altgrad.report.memory import format_bytes
from altgrad.report.names import shorten_names
from altgrad.report.plan_code import write_plan_code
from altgrad.report.planning import FP32, Plan, Planned, count_recipes
from altgrad.report.printing import (
    GAP,
    LEAST_WIDTH,
    add_column,
    make_table,
    measure_columns,
    print_line,
    print_text,
    style_text,
)

if TYPE_CHECKING:
    from rich.console import Console

    from altgrad.report.records.run import Run

_NOT_TESTED = (
    "Not tested: each recipe was tried on samples of all layers, with the gradients of this run. "
    "That layers do not depend on each other is an assumption."
)
_COUNTED = "Layers that were not observed are not counted."
_SIMULATED = (
    "WeightStorage simulates formats and rounding: its tensors still take the memory of float32."
)
_UNWEIGHTED = (
    "How far float32 moves each layer is unknown, so that layers count by their number of weights."
)


def print_plan(run: Run, plan: Plan, console: Console, most_layers: int | None = None) -> None:
    """Print a plan: its memory and progress, the recipe of each layer, and code that applies it.

    Args:
        run: The run.
        plan: The plan.
        console: Console to print on.
        most_layers: Maximum number of layers in the table, the largest first. None shows all.
    """
    print_text(console, f"{run.path}: {write_budget(plan)}")
    print_text(console, write_result(plan), "bold")
    console.print()
    _print_table(
        console,
        ["recipe", "layers", "bytes", "of float32"],
        [
            [name, f"{len(each):,}", *_write_sizes(each)]
            for name, each in count_recipes(plan).items()
        ],
    )
    layers = sorted(plan.layers, key=lambda each: -each.fp32_bytes)[:most_layers]
    _print_table(
        console,
        ["layer", "recipe", "kept", "bytes", "of float32"],
        [
            [each.layer, each.option.recipe, format_kept(each.option.kept), *_write_sizes([each])]
            for each in layers
        ],
    )
    if rest := len(plan.layers) - len(layers):
        print_text(console, f"And {format_count(rest, 'smaller layer')}; --layers 0 shows all.")
    for note in list_notes(plan):
        print_text(console, note, "dim")
    if code := write_plan_code(run, plan):
        console.print()
        print_text(console, "To apply it:")
        console.print()
        for line in code.splitlines():
            print_line(line, console)


def plan_as_json(run: Run, plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON values.

    Args:
        run: The run.
        plan: The plan.

    Returns:
        The budget, bytes and progress kept of the model, the recipe of each layer, recipes that
        cannot be chosen by layer, notes, and code that applies the plan.
    """
    return {
        **begin_json("plan"),
        "path": str(run.path),
        "created": run.created,
        "versions": dict(run.versions),
        "budget": plan.budget,
        "bytes": plan.bytes,
        "fp32_bytes": plan.fp32_bytes,
        "progress_kept": plan.kept,
        "weighted_by": "movement" if plan.by_movement else "parameters",
        "layers": {
            each.layer: {
                "recipe": each.option.recipe,
                "progress_kept": each.option.kept,
                "verdict": None if each.option.verdict is None else each.option.verdict.name,
                "bytes": each.option.bytes,
                "fp32_bytes": each.fp32_bytes,
            }
            for each in plan.layers
        },
        "left_out": dict(plan.left_out),
        "notes": list_notes(plan),
        "code": write_plan_code(run, plan),
    }


def write_budget(plan: Plan) -> str:
    """Return the budget of a plan in words, with its bytes."""
    whole, most = (format_bytes(share * plan.fp32_bytes) for share in (1, plan.budget))
    return (
        f"weights and optimizer states take {whole} in float32; the budget is "
        f"{100 * plan.budget:g} % of it, {most}."
    )


def write_result(plan: Plan) -> str:
    """Return the memory that a plan takes, and the progress it keeps, in a sentence."""
    share = f"{plan.bytes / plan.fp32_bytes:.1%}".replace("%", " %")
    stay = sum(each.option.recipe == FP32 for each in plan.layers)
    kept = format_kept(plan.kept)
    return (
        f"The plan takes {format_bytes(plan.bytes)} ({share}) and keeps {kept} of the progress; "
        f"{stay:,} of {format_count(len(plan.layers), 'layer')} "
        f"{'stays' if stay == 1 else 'stay'} in float32."
    )


def list_notes(plan: Plan) -> list[str]:
    """Return what a plan assumes, and which recipes it could not use, in sentences."""
    reasons: dict[str, list[str]] = {}
    for name, why in plan.left_out.items():
        reasons.setdefault(why, []).append(name)
    left_out = [
        f"Cannot be chosen by layer: {', '.join(names)} ({why})." for why, names in reasons.items()
    ]
    simulated = (
        [_SIMULATED] if any(each.weights or each.states for each in plan.recipes.values()) else []
    )
    unweighted = [] if plan.by_movement else [_UNWEIGHTED]
    return [_NOT_TESTED, _COUNTED, *simulated, *unweighted, *left_out]


def _write_sizes(layers: Sequence[Planned]) -> list[str]:
    """Return the bytes that layers take, and their share of those in float32."""
    size, fp32 = sum(each.option.bytes for each in layers), sum(each.fp32_bytes for each in layers)
    return [format_bytes(size), format_percent(size / fp32) if fp32 else ""]


def _print_table(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is shortened to fit, and whose numbers align right."""
    columns = [*zip(headings, *rows, strict=True)]
    width = max(console.width - GAP - measure_columns(columns[1:]), LEAST_WIDTH)
    names = shorten_names([row[0] for row in rows], width)
    table = make_table(headings[:1])
    for heading in headings[1:]:
        add_column(table, style_text(heading), "left" if heading == "recipe" else "right")
    for name, row in zip(names, rows, strict=True):
        table.add_row(style_text(name), *map(style_text, row[1:]))
    console.print(table)
    console.print()
