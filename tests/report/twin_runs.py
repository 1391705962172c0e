"""Small runs with twins and known verdicts, and the tallies and layers of made-up ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad import StepRecord, UpdateMonitor
from altgrad.measurement.layer_columns import LayerRow, gather_columns
from altgrad.report import Run, RunFile, read
from altgrad.report.judging.calibration import Outcome
from altgrad.report.judging.run_rules import LayerShare
from altgrad.report.judging.tallies import TwinTally, list_twin_steps
from altgrad.report.judging.verdicts import Advice, RunAdvice, Verdict
from altgrad.report.records.schema import RecipeInfo

NAN = math.nan

# --- runs


def make_layers(dtype: torch.dtype = torch.float32, **weights: Tensor) -> nn.ParameterDict:
    """Make a net without a forward pass, whose layers have these weights."""
    return nn.ParameterDict({name: nn.Parameter(each.to(dtype)) for name, each in weights.items()})


def draw_gradients(net: nn.Module, step: int, scale: float = 1.0) -> None:
    """Give each layer gradients that depend on the number of the step alone."""
    for number, layer in enumerate(net.parameters()):
        random = torch.Generator().manual_seed(1000 * step + number)
        layer.grad = (torch.randn(layer.shape, generator=random) * scale).to(layer.dtype)


def push_gradients(net: nn.Module, step: int, scale: float = 1.0) -> None:
    """Give each layer gradients that push all weights down, so that each step counts."""
    draw_gradients(net, step, scale)
    for layer in net.parameters():
        assert layer.grad is not None
        layer.grad.abs_()


def record(
    folder: Path,
    net: nn.Module,
    optimizer: Optimizer,
    steps: int = 40,
    *,
    every: int = 10,
    prepare: Callable[[nn.Module, int], object] = push_gradients,
    on_record: Callable[[StepRecord], object] | None = None,
    **settings: Any,
) -> Run:
    """Train a net, and return the run that its run file holds.

    Args:
        folder: Folder of the run file.
        net: The net.
        optimizer: Its optimizer.
        steps: Number of steps.
        every: Number of steps from one observed step to the next.
        prepare: Function of the net and the number of the step that sets gradients before it.
        on_record: Function that is called with each record.
        settings: Arguments of `UpdateMonitor`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    monitor = UpdateMonitor(
        net, on_record, every_n_steps=every, strict=True, warn=lambda notice: None, **settings
    )
    with RunFile.create(folder, monitor.run_header()) as file, monitor.attach(optimizer):
        seen = None
        for step in range(steps):
            prepare(net, step)
            optimizer.step()
            if monitor.latest is not None and monitor.latest is not seen:
                seen = monitor.latest
                file.append(step, seen, skipped={}, weights=None)
    return read(file.path)


# --- plain numbers


def figures(recipe: str = "bf16", **values: float) -> dict[str, float]:
    """Make the figures of a layer whose twin is fine, with these figures changed."""
    fine = {
        "progress_kept": 1.0,
        "window_progress_kept": 1.0,
        "frozen_frac": 0.0,
        "still_frac": 0.0,
        "moved_rms": 0.1,
        "drift": 0.0,
        "moved_since_start_frac": 1.0,
        "twin_nonfinite_frac": 0.0,
    }
    return {f"{metric}/{recipe}": value for metric, value in {**fine, **values}.items()} | {
        "weight_rms": 1.0
    }


def add_twin_step(
    tally: TwinTally, step: int, figures: Mapping[str, float], errors: Mapping[str, float]
) -> None:
    """Add the figures of a layer, and their standard errors, to the tally of its twin.

    Args:
        tally: The tally.
        step: Number of the step.
        figures: Figures by key.
        errors: Standard errors by key.
    """
    (columns,) = gather_columns([LayerRow("layer", figures, errors)])
    (twin,), (row,) = list_twin_steps(tally.recipe, columns), columns.rows
    tally.add_step(step, twin, row)


def make_tally(
    *steps: Mapping[str, float], errors: Mapping[str, float] | None = None, recipe: str = "bf16"
) -> TwinTally:
    """Return the tally of steps 0, 10, 20, … with these changes of a fine twin's figures."""
    tally = TwinTally(recipe)
    exact = {"progress_kept": 0.0, "frozen_frac": 0.0, "still_frac": 0.0}
    known = {f"{metric}/{recipe}": each for metric, each in {**exact, **(errors or {})}.items()}
    for number, changes in enumerate(steps):
        own = figures(recipe, **{k: v for k, v in changes.items() if k != "nonfinite_frac"})
        own |= {"nonfinite_frac": changes.get("nonfinite_frac", 0.0)}
        add_twin_step(tally, 10 * number, own, known)
    return tally


def make_recipe(name: str = "bf16", **fields: Any) -> RecipeInfo:
    """Make the description of a recipe; of a name alone, that of rounding to nearest."""
    about: dict[str, Any] = {
        "weights": None if fields else name,
        "rounding": "nearest_even",
        "compensation": None,
        "states": {},
        "dtype": None,
        "optimizer": None,
        "fused": False,
        "bytes_per_parameter": 10.0,
    }
    return RecipeInfo(name, **about | fields)


def make_share(
    kept: float,
    *,
    size: float = 1000.0,
    moved: float = 1.0,
    verdict: Verdict = Verdict.STORES_FINE,
    error: float = 0.0,
    name: str = "layer",
    **figures: float,
) -> LayerShare:
    """Make what a layer with a twin contributes to a run."""
    errors = {"progress_kept": error, "frozen_frac": 0.0, "still_frac": 0.0}
    advice = Advice(name, "bf16", verdict, {"progress_kept": kept, **figures}, errors, "")
    return LayerShare(advice, size, moved)


def make_run_advice(recipe: str, verdict: Verdict, kept: float = 0.5, **fields: Any) -> RunAdvice:
    """Make a verdict on a run, with these fields changed."""
    about: dict[str, Any] = {
        "interval": (kept - 0.125, kept + 0.125),
        "weight_error": 0.0,
        "frozen_frac": 0.0,
        "frozen": (),
        "frozen_share": 0.0,
        "behind_share": 0.0,
        "layers": 3,
        "outcome": Outcome(66, 8),
        "to_do": "Use bf16-sr, which keeps 1.",
        "has_twin": True,
    }
    return RunAdvice(recipe, verdict, kept, **about | fields)
