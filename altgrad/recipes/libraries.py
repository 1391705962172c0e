"""Recipes that step with optimizers of other libraries: torchao, optimi, bitsandbytes.

A *recipe* says how weights and optimizer states are stored and stepped. AltGrad tries it on a small
sample of the layers, beside the training. The recipes here step that sample with the library's own
class, such as torchao's AdamW8bit. A library is imported when a recipe of it is asked for by name
(`import_library`), and never before.

Read `libraries_8bit` first; `names` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad.recipes.libraries_8bit import (
    BNB_STATES,
    TORCHAO_FP8_STATES,
    TORCHAO_STATES,
    read_bnb,
    read_torchao,
)
from altgrad.recipes.optimizer_maker import CannotMakeError, OptimizerFactory, OptimizerMaker
from altgrad.recipes.packed_states import PackedStates
from altgrad.recipes.recipe import Recipe


class Library(NamedTuple):
    """A library of optimizers.

    Attributes:
        package: The name that ``pip install`` takes.
        module: The module that has its optimizers.
        names: The classes that recipes step with.
    """

    package: str
    module: str
    names: tuple[str, ...]


TORCHAO = Library("torchao", "torchao.optim", ("_AdamW", "AdamW8bit", "AdamWFp8"))
OPTIMI = Library("torch-optimi", "optimi", ("AdamW",))
BNB = Library("bitsandbytes", "bitsandbytes.optim", ("AdamW8bit",))


def import_library(recipe: str) -> None:
    """Import the library with which a recipe of `LIBRARY_RECIPES` steps.

    Args:
        recipe: Name of the recipe.

    Raises:
        ImportError: The library is missing, cannot be imported, or has no such optimizer.
    """
    library = _LIBRARIES[recipe]
    remedy = f"run pip install --upgrade {library.package}"
    try:
        module = import_module(library.module)
    except ImportError as error:
        raise ImportError(
            f"recipes={recipe!r}: expected the library {library.package} ({error}); {remedy}"
        ) from error
    if missing := [name for name in library.names if not hasattr(module, name)]:
        raise ImportError(
            f"recipes={recipe!r}: expected a version of {library.package} with "
            f"{', '.join(missing)}; {remedy}"
        )


# --- functions that make the optimizers


def make_torchao_sr(parameters: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    """Make torchao's AdamW, which rounds weights in bf16 at random.

    Args:
        parameters: The parameters, in bf16.
        group: The hyperparameters of Adam or AdamW.

    Returns:
        The optimizer, ``torchao.optim._AdamW``.

    Raises:
        CannotMakeError: The hyperparameters are not those of AdamW.
    """
    return _make_torchao("_AdamW", parameters, group, bf16_stochastic_round=True)


def make_torchao_8bit(parameters: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    """Make torchao's AdamW with states in 8 bits.

    Args:
        parameters: The parameters.
        group: The hyperparameters of Adam or AdamW.

    Returns:
        The optimizer, ``torchao.optim.AdamW8bit``.

    Raises:
        CannotMakeError: The hyperparameters are not those of AdamW.
    """
    return _make_torchao("AdamW8bit", parameters, group)


def make_torchao_fp8(parameters: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    """Make torchao's AdamW with states in E4M3.

    Args:
        parameters: The parameters.
        group: The hyperparameters of Adam or AdamW.

    Returns:
        The optimizer, ``torchao.optim.AdamWFp8``.

    Raises:
        CannotMakeError: The hyperparameters are not those of AdamW.
    """
    return _make_torchao("AdamWFp8", parameters, group)


def _make_torchao(
    name: str, parameters: list[nn.Parameter], group: dict[str, Any], **flags: bool
) -> Optimizer:
    """Return an optimizer of torchao.

    Raises:
        CannotMakeError: The hyperparameters are not those of AdamW.
    """
    options = {**_read_options(group), "amsgrad": bool(group.get("amsgrad"))}
    made: Optimizer = getattr(import_module(TORCHAO.module), name)(parameters, **options, **flags)
    return made


def make_bnb_8bit(parameters: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    """Make bitsandbytes' AdamW with states in 8 bits.

    Args:
        parameters: The parameters.
        group: The hyperparameters of Adam or AdamW.

    Returns:
        The optimizer, ``bitsandbytes.optim.AdamW8bit``.

    Raises:
        CannotMakeError: The hyperparameters are not those of AdamW.
    """
    options = _read_options(group, without=("amsgrad",))
    made: Optimizer = import_module(BNB.module).AdamW8bit(parameters, **options)
    return made


def make_optimi_kahan(parameters: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    """Make optimi's AdamW with Kahan summation.

    Args:
        parameters: The parameters, in bf16.
        group: The hyperparameters of Adam or AdamW.

    Returns:
        The optimizer, ``optimi.AdamW``.

    Raises:
        CannotMakeError: The hyperparameters are not those of AdamW.
    """
    options = _read_options(group, without=("amsgrad",))
    made: Optimizer = import_module(OPTIMI.module).AdamW(parameters, **options, kahan_sum=True)
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
        CannotMakeError: The group has no such hyperparameters, or others that the library lacks.
    """
    names = ("lr", "betas", "eps", "weight_decay")
    if missing := [name for name in names if name not in group]:
        raise CannotMakeError(
            f"the run's optimizer has no {', '.join(missing)}: expected the hyperparameters of "
            "AdamW, which this recipe takes over; leave out the recipe, or pass a Recipe with "
            "optimizer=… that chooses them"
        )
    lacking = [name for name in ("maximize", *without) if group.get(name)]
    if group["weight_decay"] and group.get("decoupled_weight_decay") is False:  # Adam of torch
        lacking.append("weight decay within the gradient")
    if lacking:
        raise CannotMakeError(
            f"the run's optimizer has {', '.join(lacking)}, which the AdamW of this recipe lacks: "
            "expected a run with AdamW; leave out the recipe"
        )
    betas = tuple(map(float, group["betas"]))
    others = {name: float(group[name]) for name in names if name != "betas"}
    return {**others, "betas": betas}


# --- recipes

_LIBRARIES: Mapping[str, Library] = {
    "torchao-sr": TORCHAO,
    "torchao-8bit": TORCHAO,
    "torchao-fp8": TORCHAO,
    "optimi-kahan": OPTIMI,
    "bnb-8bit": BNB,
}
_PACKED_BYTES = 2 * (1 + 4 / 256)
"""Bytes per weight of two moments in 8 bits, with a scale in float32 for 256 of them."""


def _pack_torchao(make: OptimizerFactory, packed: PackedStates) -> OptimizerMaker:
    return OptimizerMaker(make, _PACKED_BYTES, compiles=True, read=read_torchao, packed=packed)


LIBRARY_RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "torchao-sr",
            dtype=torch.bfloat16,
            optimizer=OptimizerMaker(make_torchao_sr, state_bytes=4, compiles=True),
        ),
        Recipe("torchao-8bit", optimizer=_pack_torchao(make_torchao_8bit, TORCHAO_STATES)),
        Recipe("torchao-fp8", optimizer=_pack_torchao(make_torchao_fp8, TORCHAO_FP8_STATES)),
        Recipe(
            "optimi-kahan",
            dtype=torch.bfloat16,
            # exp_avg, exp_avg_sq and the rounding error, in bf16
            optimizer=OptimizerMaker(
                make_optimi_kahan, state_bytes=6, compensation_bytes=2, read=read_optimi
            ),
        ),
        Recipe(
            "bnb-8bit",
            optimizer=OptimizerMaker(
                make_bnb_8bit, _PACKED_BYTES, read=read_bnb, packed=BNB_STATES
            ),
        ),
    )
}
"""The recipes by name. None of their libraries is imported yet.

A *recipe* says how weights and optimizer states are stored.
"""
