"""Runs that predict a recipe, and runs that are stored so: real ones, and made of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad import Recipe, UpdateMonitor
from altgrad.report import LayerInfo, RecipeInfo, Row, Run, RunFile
from tests.report.runs import make_run

NAN = math.nan
RECIPES = ("bf16", "bf16-sr", "bf16-kahan", "bf16-true", "bf16-true-fused", "e4m3fn")


def make_net() -> nn.Sequential:
    """Return a small net whose gain of a LayerNorm, 1, freezes in bf16 at small learning rates."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 12))


def write_trained(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    recipes: Sequence[str | Recipe] = ("bf16-sr",),
    make: Callable[[Any], Optimizer] | None = None,
    stored: Recipe | None = None,
    steps: int = 20,
    every: int = 5,
    attaches_first: bool = True,
) -> Path:
    """Train the small net on the same batches as every run of this function, and write its file."""
    net = make_net().to(dtype)
    make = make or (lambda each: torch.optim.AdamW(each, lr=1e-4))
    optimizer = make(net.parameters())
    if stored is not None:
        stored.attach(optimizer, module=net)
    monitor = UpdateMonitor(
        net, formats="bf16", recipes=recipes, every_n_steps=every, strict=True, warn=lambda _: None
    )
    header = None if attaches_first else monitor.run_header()
    with (
        monitor.attach(optimizer),
        RunFile.create(folder, header or monitor.run_header()) as file,
    ):
        for step in range(steps):
            inputs = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (net(inputs.to(dtype)).float() - inputs.flip(1)).square().mean().backward()
            optimizer.step()
            if monitor.latest is not None and monitor.latest.index == step:
                file.append(step, monitor.latest, skipped={})
    return file.path


def make_adamw(**options: Any) -> Callable[[list[Tensor]], Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, **options)


# --- plain numbers


def info(name: str = "now", **more: Any) -> RecipeInfo:
    """Describe a recipe or a run: a run in float32 that AdamW steps, with these fields changed."""
    fields: dict[str, Any] = {
        "weights": None,
        "rounding": "nearest_even",
        "compensation": None,
        "states": {},
        "dtype": "float32" if name == "now" else None,
        "optimizer": "torch.optim.adamw.AdamW" if name == "now" else None,
        "fused": False,
        "bytes_per_parameter": NAN,
    }
    return RecipeInfo(name, **(fields | more))


def make_twin_run(
    figures: Mapping[str | None, Mapping[str, float] | None],
    recipe: str = "now",
    *,
    steps: Sequence[int] = (0,),
    letter: str = "a",
    **more: Any,
) -> Run:
    """Make a run with the same figures of a recipe, by layer and metric, at each step.

    A layer whose figures are None is described, and has no figures of the recipe.
    """
    rows = [
        Row(step, layer, {f"{metric}/{recipe}": x for metric, x in (by_metric or {}).items()}, {})
        for step in steps
        for layer, by_metric in figures.items()
    ]
    names = [layer for layer in figures if layer is not None]
    about: dict[str, Any] = {
        "path": Path(letter, "altgrad.jsonl"),
        "layers": {name: LayerInfo((8,), "float32", 8, ("bf16",)) for name in names},
        "recipes": {} if recipe == "now" else {recipe: info(recipe, dtype="bfloat16")},
        "now": info(dtype="bfloat16") if recipe == "now" else info(),
    }
    return replace(make_run(rows, **about), **more)


def share(frozen: float, kept: float, **more: float) -> dict[str, float]:
    return {"frozen_frac": frozen, "progress_kept": kept, **more}
