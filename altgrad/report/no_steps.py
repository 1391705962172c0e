"""`explain_no_step`: why a run has no observed step, and what to change, as its file says.

A run that ends without an observed step writes how many steps it made, and why they were skipped.
`run_report` puts the explanation in the place of the verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping

from altgrad._messages import format_count
from altgrad.report.records.run import Run
from altgrad.report.records.schema import Unobserved

_HEADING = "No step was observed: there are no verdicts."
_REASONS: Mapping[str, tuple[str, str]] = {
    "learning rate 0": (
        "had a learning rate of 0",
        "Train beyond the warm-up, or with a learning rate above 0.",
    ),
    "inf": (
        "had gradients with inf or NaN, and were skipped by the GradScaler",
        "Train for more steps, until the scale is found, or lower its init_scale.",
    ),
    "no gradients": (
        "had no gradients",
        "Call backward() before each step, and pass the monitor the model that is trained.",
    ),
}
"""By reason why steps were skipped: a phrase that describes these steps, and one on what to do."""


def explain_no_step(run: Run) -> str:
    """Return why no step of a run was observed, and what to change, in a few sentences."""
    found = run.unobserved
    if found is None:
        return f"{_HEADING} {_explain_missing(run)}"
    if any(found.skipped.values()):
        return f"{_HEADING} {_explain_skipped(found)}"
    return f"{_HEADING} {_explain_not_due(found, run)}"


def _explain_skipped(found: Unobserved) -> str:
    skipped = {reason: count for reason, count in found.skipped.items() if count}
    total = format_count(sum(skipped.values()), "step")
    whats = [
        f"{count:,} {_REASONS[reason][0] if reason in _REASONS else reason}"
        for reason, count in skipped.items()
    ]
    remedies = [_REASONS[reason][1] for reason in skipped if reason in _REASONS]
    return " ".join([f"No weight moved in {total}: {', '.join(whats)}.", *remedies])


def _explain_not_due(found: Unobserved, run: Run) -> str:
    """Return that none of the steps was due, with the number of steps from one to the next."""
    every = _find_interval(run) if found.every_n_steps is None else found.every_n_steps
    if every == 0:
        return "This Trainer logs at no step, and the monitor follows it: pass every_n_steps."
    made = f"The run made {format_count(found.steps, 'step')}, and none was due"
    if every == 1:  # or a function of the user decides
        return f"{made} by its every_n_steps. Train for longer, or pass every_n_steps=1."
    return f"{made} (every_n_steps={every:,}). Train for longer, or pass every_n_steps=1."


def _explain_missing(run: Run) -> str:
    """Return what may have happened to a run that did not write why no step was observed."""
    every = _find_interval(run)
    often = f" (every_n_steps={every:,})" if every > 1 else ""
    return (
        f"Its file ends before the first one{often}: the run is still there, was stopped there, or "
        "its monitor was attached after the training, or to an optimizer that never stepped. "
        "Attach before the first step, train for longer, or pass every_n_steps=1."
    )


def _find_interval(run: Run) -> int:
    """Return the smallest number of steps from one observed step of a layer to the next."""
    return min((layer.every_n_steps for layer in run.layers.values()), default=1)
