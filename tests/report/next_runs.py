"""Reports whose recipes are those of AltGrad, with made-up verdicts; and the lines they propose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from altgrad.monitor.header import describe_recipe
from altgrad.recipes import Recipe, get_recipes
from altgrad.recipes.libraries import LIBRARY_RECIPES
from altgrad.report import Assessment, LayerInfo, RunAdvice, RunReport, Verdict
from altgrad.report.judging.verdicts import Advice
from altgrad.report.records.schema import RecipeInfo
from tests.report.runs import make_run
from tests.report.twin_runs import make_recipe, make_run_advice

FINE, WATCH, REMEDY = Verdict.STORES_FINE, Verdict.WATCH, Verdict.NEEDS_REMEDY
ADAMW = {"torch.optim.adamw.AdamW": 1}
ROWS = 64  # so that a matrix has the 4,096 elements from which on states are packed


def describe(name: str | Recipe) -> RecipeInfo:
    """Return what the header of a run file says of a recipe; no library is imported."""
    known = name if isinstance(name, Recipe) else LIBRARY_RECIPES.get(name)
    (recipe,) = (known,) if known is not None else get_recipes(name)
    return RecipeInfo(recipe.name, **describe_recipe(recipe, "tensor"))


def make_advice(name: str, verdict: Verdict = FINE, **fields: Any) -> RunAdvice:
    return make_run_advice(name, verdict, **{"kept": 1.0, **fields})


def make_report(
    *advice: RunAdvice,
    recipes: Sequence[str | Recipe] | None = None,
    layers: Sequence[str] = (),
    dtype: str = "float32",
    by_layer: Sequence[Advice] = (),
    optimizers: Mapping[str, int] = ADAMW,
    **fields: Any,
) -> RunReport:
    """Make the report of a run with these verdicts; it tried the recipes with a twin."""
    names = [each.recipe for each in advice if each.has_twin and each.recipe != "now"]
    described = [describe(each) for each in (names if recipes is None else recipes)]
    names = [*layers] or list_layers()
    known: dict[str, Any] = {
        "layers": {name: LayerInfo((ROWS, ROWS), dtype, 16, ()) for name in names},
        "recipes": {each.name: each for each in described},
        "optimizers": optimizers,
        "now": make_recipe("now", dtype=dtype, optimizer=next(iter(optimizers), None)),
    }
    run = make_run([], **known | fields)
    return RunReport(run, Assessment({a.recipe: a for a in advice}, by_layer, {}, ""))


# --- a model for the lines


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(ROWS)
        self.mlp = nn.Linear(ROWS, ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, ROWS)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(ROWS)
        self.head = nn.Linear(ROWS, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))))


def list_layers() -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in Net().named_parameters()]


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def compute_loss(net: nn.Module) -> Tensor:
    classes = torch.arange(8)
    return cross_entropy(net(classes).float(), classes)


def run_code(code: str, model: nn.Module, **names: Any) -> dict[str, Any]:
    """Run lines of Python with a model, and return all names that they leave."""
    found: dict[str, Any] = {"model": model, "arguments": {"lr": 1e-3}, **names}
    exec(compile(code, "lines", "exec"), found)
    return found


def train(net: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 3) -> None:
    """Make some steps, under autocast if the code says so."""
    for _ in range(steps):
        compute_loss(net).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def list_dtypes(net: nn.Module) -> dict[str, torch.dtype]:
    return {name: each.dtype for name, each in net.named_parameters()}
