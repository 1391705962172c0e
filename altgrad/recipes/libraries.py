"""Recipes that step with optimizers of other libraries: torchao, optimi, bitsandbytes.

Such a recipe has the optimizer's own class, so that nothing of it is modelled. A library is
imported when a recipe of it is asked for by name (`import_library`), and never before.

Read `recipe` first; `names` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad.recipes.optimizer_maker import OptimizerMaker
from altgrad.recipes.recipe import Recipe


class Library(NamedTuple):
    """A library of optimizers.

    Attributes:
        package: The name that ``pip install`` takes.
        modules: The modules that may have its optimizers; the first that exists counts.
        names: The classes that recipes step with.
    """

    package: str
    modules: tuple[str, ...]
    names: tuple[str, ...]


TORCHAO = Library("torchao", ("torchao.optim", "torchao.prototype.low_bit_optim"), ("_AdamW",))
OPTIMI = Library("torch-optimi", ("optimi",), ("AdamW",))


def import_library(recipe: str) -> None:
    """Import the library with which a recipe of `LIBRARY_RECIPES` steps.

    Args:
        recipe: Name of the recipe.

    Raises:
        ImportError: The library is missing, cannot be imported, or has no such optimizer.
    """
    library = _LIBRARIES[recipe]
    try:
        missing = [name for name in library.names if not hasattr(_import(library), name)]
    except ImportError as error:
        raise ImportError(
            f"recipes={recipe!r}: expected the library {library.package} ({error}); run pip "
            f"install {library.package}"
        ) from error
    if missing:
        raise ImportError(
            f"recipes={recipe!r}: expected a version of {library.package} with "
            f"{', '.join(missing)}; run pip install --upgrade {library.package}"
        )


def _import(library: Library) -> Any:
    """Return the first module of a library that exists.

    Raises:
        ImportError: No module can be imported.
    """
    *others, last = library.modules
    for name in others:
        with suppress(ModuleNotFoundError):
            return import_module(name)
    return import_module(last)


# --- functions that make the optimizers


def make_torchao_sr(parameters: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    """Make torchao's AdamW, which rounds weights in bf16 at random.

    Args:
        parameters: The parameters, in bf16.
        group: The hyperparameters of Adam or AdamW.

    Returns:
        The optimizer, ``torchao.optim._AdamW``.

    Raises:
        ValueError: The hyperparameters are not those of AdamW.
    """
    options = _read_options(group)
    made: Optimizer = _import(TORCHAO)._AdamW(  # noqa: SLF001 - torchao has no public name for it
        parameters, **options, amsgrad=bool(group.get("amsgrad")), bf16_stochastic_round=True
    )
    return made


def make_optimi_kahan(parameters: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    """Make optimi's AdamW with Kahan summation.

    Args:
        parameters: The parameters, in bf16.
        group: The hyperparameters of Adam or AdamW.

    Returns:
        The optimizer, ``optimi.AdamW``.

    Raises:
        ValueError: The hyperparameters are not those of AdamW.
    """
    options = _read_options(group, without=("amsgrad",))
    made: Optimizer = _import(OPTIMI).AdamW(parameters, **options, kahan_sum=True)
    return made


def read_optimi(state: Mapping[str, Any], group: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the states of optimi's AdamW as torch's AdamW keeps them: not corrected for bias.

    Args:
        state: The state of a parameter.
        group: Its parameter group, which has the number of steps.

    Returns:
        The states by name, float32 in the shape of the parameter.
    """
    steps = int(group["step"])  # on the host in every version
    return {
        name: state[name].float() * (1 - group[beta] ** steps)
        for name, beta in (("exp_avg", "beta1"), ("exp_avg_sq", "beta2"))
    }


def _read_options(group: Mapping[str, Any], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return lr, betas, eps and weight_decay of a parameter group.

    Args:
        group: The group.
        without: Names of flags of AdamW that the library's optimizer lacks.

    Raises:
        ValueError: The group has no such hyperparameters, or others that the library lacks.
    """
    names = ("lr", "betas", "eps", "weight_decay")
    if missing := [name for name in names if name not in group]:
        raise ValueError(
            f"the run's optimizer has no {', '.join(missing)}: expected the hyperparameters of "
            "AdamW, which this recipe takes over; leave out the recipe, or pass a Recipe with "
            "optimizer=… that chooses them"
        )
    lacking = [name for name in ("maximize", *without) if group.get(name)]
    if group["weight_decay"] and group.get("decoupled_weight_decay") is False:  # Adam of torch
        lacking.append("weight decay within the gradient")
    if lacking:
        raise ValueError(
            f"the run's optimizer has {', '.join(lacking)}, which the AdamW of this recipe lacks: "
            "expected a run with AdamW; leave out the recipe"
        )
    betas = tuple(map(float, group["betas"]))
    others = {name: float(group[name]) for name in names if name != "betas"}
    return {**others, "betas": betas}


# --- recipes

_LIBRARIES: Mapping[str, Library] = {"torchao-sr": TORCHAO, "optimi-kahan": OPTIMI}

LIBRARY_RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "torchao-sr",
            dtype=torch.bfloat16,
            optimizer=OptimizerMaker(make_torchao_sr, state_bytes=4, compiles=True),
        ),
        Recipe(
            "optimi-kahan",
            dtype=torch.bfloat16,
            # exp_avg, exp_avg_sq and the rounding error, in bf16
            optimizer=OptimizerMaker(make_optimi_kahan, state_bytes=6, read=read_optimi),
        ),
    )
}
"""The recipes by name. None of their libraries is imported yet."""
