"""Write lines of Python that simulate a recipe on a whole model, in tensors of float32.

A *recipe* says how weights and optimizer states are stored and stepped. In a simulation,
`altgrad.Recipe.attach` rounds them after each step of the optimizer. No other library is needed,
and no memory is saved.

Read `applying` first; `library_lines` and `next_lines` come next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from altgrad.report.applying import can_store, group_by_pattern, quote, write_scaling
from altgrad.report.judging.remedies import find_format
from altgrad.report.library_lines import Lines
from altgrad.report.optimizer_lines import Maker, name_optimizers
from altgrad.report.records.schema import RecipeInfo, RunDescription


def write_simulation(
    run: RunDescription,
    recipe: RecipeInfo,
    makers: Mapping[Maker, int],
    kept: Collection[str] = (),
    *,
    is_low: bool = False,
) -> list[Lines]:
    """Write the lines that round weights and states of a model as a recipe says.

    Args:
        run: The run, for its layers, formats and scaling.
        recipe: The description of the recipe.
        makers: The classes of the run's optimizers, and how many it has of each.
        kept: Names of modules whose layers stay in float32.
        is_low: True if the run itself stores weights below float32.

    Returns:
        The lines for a plain loop, and for Lightning. Empty if a simulation cannot do what the
        recipe says: it has an optimizer of its own, adds up gradients, or changes nothing.
    """
    made = _write_recipe(run, recipe)
    if not made:
        return []
    rules = _write_rules(run, kept)
    scaling = [] if run.scaling == "tensor" else [f"scaling={write_scaling(run.scaling)}"]
    settings = [*scaling, *([f"layers=[{', '.join(rules)}]"] if rules else [])]
    if len(", ".join(settings)) > _LINE:
        listed = "".join(f"\n        {rule}," for rule in rules)
        settings = [*scaling, f"layers=[{listed}\n    ]"]
    names = ", ".join(["Recipe", *(["SamplingRule"] if rules else [])])
    float32 = ["# For a model in float32: call model.float() before the optimizer is made."]
    head = [*(float32 if is_low else []), f"recipe = {made}"]
    attach = _join_call("recipe.attach", [name_optimizers(makers), "module=model", *settings])
    store_as = _join_call("StoreAs", ["recipe", *settings])
    plain = [
        f"from altgrad import {names}",
        "",
        *head,
        f"{attach}  # before the monitor",
    ]
    lightning = [
        f"from altgrad import {names}",
        "from altgrad_lightning import StoreAs",
        "from lightning.pytorch import Trainer",
        "",
        *head,
        f"store_as = {store_as}",
        "trainer = Trainer(callbacks=[store_as])",
    ]
    return [
        Lines("Simulation", "\n".join(plain)),
        Lines("Simulation with Lightning", "\n".join(lightning)),
    ]


_LINE = 60  # characters of settings in one line


def _join_call(function: str, arguments: list[str]) -> str:
    if not any("\n" in each for each in arguments):
        return f"{function}({', '.join(arguments)})"
    return f"{function}(\n" + "".join(f"    {each},\n" for each in arguments) + ")"


def _write_recipe(run: RunDescription, recipe: RecipeInfo) -> str:
    """Return code that makes a `Recipe` of formats; empty if the recipe is not one of formats."""
    weights, states = find_format(recipe), dict(recipe.states)
    if recipe.optimizer is not None or recipe.accumulate is not None:
        return ""
    name = recipe.name
    if recipe.dtype is not None:
        if weights is None:
            return ""
        # Tensors of a dtype hold states in it, too; those with a format of their own are coarser.
        name, states = f"{recipe.name}-simulated", {"*": weights} | states
    formats = [*filter(None, [weights]), *states.values()]
    if not formats or not all(can_store(run, format) for format in formats):
        return ""
    arguments = [quote(name)]
    if weights is not None:
        arguments.append(f"weights={quote(weights)}")
    if recipe.rounding != "nearest_even":
        arguments.append(f"rounding={quote(recipe.rounding)}")
    if recipe.compensation is not None:
        arguments.append(f"compensation={quote(recipe.compensation)}")
    if states:
        each = ", ".join(f"{quote(state)}: {quote(format)}" for state, format in states.items())
        arguments.append(f"states={{{each}}}")
    return f"Recipe({', '.join(arguments)})"


def _write_rules(run: RunDescription, kept: Collection[str]) -> list[str]:
    """Return the code of rules that leave the layers of some modules as they are."""
    chosen = {layer: "kept" if find_module(layer) in kept else None for layer in run.layers}
    return [
        f"SamplingRule({quote(pattern)}, enabled=False)" for pattern in group_by_pattern(chosen)
    ]


def find_module(layer: str) -> str:
    """Return the name of the module that has a layer; empty for the model itself."""
    return layer.rpartition(".")[0]
