"""Write and show the verdicts on a training: in some lines at its end, in a phrase in mid-run.

`write_summary` and `show_summary` are for the end of a training, `write_state` for a progress bar.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path

from altgrad.measurement.catalogue import NOW
from altgrad.measurement.figures import Figures
from altgrad.report import RunAdvice, format_kept, list_actions, write_answer

_NOTHING_OBSERVED = "No step was observed, so there are no verdicts."
_MOST_RECIPES = 3
"""Maximum number of recipes, ways to store weights, that a progress bar shows."""


def write_summary(
    runs: Mapping[str, RunAdvice], path: Path | None, *, has_observed: bool = True
) -> str:
    """Return in which formats a run could be stored, what to do, and the command for a report.

    Args:
        runs: Verdicts on the run, by recipe.
        path: Path of the run file; None without one.
        has_observed: False if no step was observed, so that there are no verdicts.

    Returns:
        Some lines. The first says what the run could be stored as, and the last is the command
        ``altgrad report`` with the path.
    """
    answer = write_answer(runs) if runs or has_observed else _NOTHING_OBSERVED
    lines = [f"[AltGrad] {answer}", *list_actions(runs)]
    return "\n".join([*lines, *([f"altgrad report {path}"] if path else [])])


def show_summary(summary: str) -> None:
    """Print the text of `write_summary`, with colours if rich is installed."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        sys.stdout.write(f"{summary}\n")
        return
    answer, *others = summary.splitlines()
    console = Console()
    # A path that is wrapped cannot be copied.
    console.print(Text(answer, "bold"), soft_wrap=True)
    for line in others:
        console.print(Text(line), soft_wrap=True)


def write_state(figures: Figures) -> str:
    """Return the share of the progress kept, for a progress bar: “bf16 0.97, bf16-sr 1.00”.

    Each number belongs to a recipe, a way to store weights and optimizer states.

    Args:
        figures: Figures of the model in the last observed step.

    Returns:
        The share of the run itself, ``now``, if its weights are stored below float32; otherwise
        those of up to three recipes. Empty if no share is known.
    """
    names = [NOW] if NOW in figures.recipes else figures.recipes
    kept = {name: figures.twins[f"progress_kept/{name}"] for name in names}
    known = [f"{name} {format_kept(share)}" for name, share in kept.items() if math.isfinite(share)]
    return ", ".join(known[:_MOST_RECIPES])
