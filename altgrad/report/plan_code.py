"""Write Python code that stores each layer as a plan says.

Parameters of a recipe with a dtype are converted before the optimizer is created. Formats of
weights and states are kept by a `WeightStorage` for each way to round, with rules for its layers.

Read `planning` and `applying` first; `plan_table` and `plan_command` show the code.
"""

from __future__ import annotations

from collections.abc import Mapping

from altgrad.report.answers import is_low

# `write_code` uses these for the formats of single layers; they have no public name.
from altgrad.report.applying import (
    group_by_pattern,
    quote,
    write_rules,
    write_scaling,
)
from altgrad.report.planning import FP32, Plan
from altgrad.report.records.run import Run
from altgrad.report.records.schema import RecipeInfo


def write_plan_code(run: Run, plan: Plan) -> str:
    """Return Python code that stores each layer as a plan says; empty if all stay in float32.

    The code takes the ``model`` of the run, and a function ``make_optimizer`` of its parameters.
    If the run stores weights lower, the code converts all to float32 first.

    Args:
        run: The run, for the scaling of its formats.
        plan: The plan.
    """
    groups = _group(plan)
    is_lower = is_low(run.layers, {})
    if not (groups or is_lower):
        return ""
    converted = [recipe for recipe in plan.recipes.values() if recipe.dtype == "bfloat16"]
    storages = {way: each for way, each in groups.items() if way[0] is None}
    lines = []
    if converted:
        lines += ["from fnmatch import fnmatchcase\n", "import torch\n"]
    if storages:
        lines.append("from altgrad import SamplingRule, WeightStorage\n")
    if is_lower:
        lines.append("model.float()  # the run stores weights lower")
    if converted:
        lines += _write_conversion(plan)
    lines.append("optimizer = make_optimizer(model.parameters())")
    for number, (way, recipes) in enumerate(storages.items()):
        lines += _write_storage(run, plan, way, recipes, seed=number)
    if converted:
        lines.append("# Run each forward pass under torch.autocast(device_type, torch.bfloat16).")
    return "\n".join(lines)


_Way = tuple[str | None, str, str | None, tuple[tuple[str, str], ...]]
"""What layers of one storage share: dtype, rounding, compensation, and formats of states."""


def _group(plan: Plan) -> dict[_Way, Mapping[str, RecipeInfo]]:
    """Return the recipes of a plan in groups that share dtype, rounding and formats of states.

    One `WeightStorage` can store the layers of a group.

    Returns:
        By what a group shares, its recipes by their names.
    """
    groups: dict[_Way, dict[str, RecipeInfo]] = {}
    for name, each in plan.recipes.items():
        dtype = each.dtype if each.dtype == "bfloat16" else None
        states = tuple(sorted(each.states.items()))
        if dtype or each.weights or states:
            way = (dtype, each.rounding, each.compensation, states)
            groups.setdefault(way, {})[name] = each
    return dict(groups)


def _write_conversion(plan: Plan) -> list[str]:
    """Return code that converts parameters to bfloat16, by patterns of their names."""
    converted = {
        layer: "bfloat16" if recipe != FP32 and plan.recipes[recipe].dtype == "bfloat16" else None
        for layer, recipe in plan.chosen.items()
    }
    return [
        "# In bfloat16, together with their gradients and optimizer states:",
        "bfloat16 = [",
        *(f"    {quote(each)}," for each in group_by_pattern(converted)),
        "]",
        "for name, parameter in model.named_parameters():",
        "    if any(fnmatchcase(name, pattern) for pattern in bfloat16):",
        "        parameter.data = parameter.data.to(torch.bfloat16)",
        "",
    ]


def _write_storage(
    run: Run, plan: Plan, way: _Way, recipes: Mapping[str, RecipeInfo], *, seed: int
) -> list[str]:
    """Return code of a `WeightStorage` for the layers of recipes that round in one way."""
    _, rounding, compensation, states = way
    formats = {name: recipe.weights or "" for name, recipe in recipes.items()}
    chosen = {layer: formats.get(recipe) for layer, recipe in plan.chosen.items()}
    default = next(iter(formats.values()))
    settings = [quote(default) if default else "None"]
    if run.scaling != "tensor":
        settings.append(f"scaling={write_scaling(run.scaling)}")
    if rounding != "nearest_even":
        settings.append(f"rounding={quote(rounding)}")
    if compensation is not None:
        settings.append(f"compensation={quote(compensation)}")
    if states:
        pairs = ", ".join(f"{quote(name)}: {quote(format)}" for name, format in states)
        settings.append(f"states={{{pairs}}}")
    if seed:
        settings.append(f"seed={seed}")
    return [
        f"# {', '.join(recipes)}:",
        "storage = WeightStorage(",
        *(f"    {each}," for each in settings),
        "    layers=[",
        *(f"        {rule}," for rule in write_rules(chosen, default)),
        '        SamplingRule("*", enabled=False),',
        "    ],",
        ")",
        "storage.attach(optimizer, module=model)  # before the monitor",
    ]
