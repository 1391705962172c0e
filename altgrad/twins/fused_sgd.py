"""`describe_fused_sgd`: warn of weights that the fused SGD of torch does not move.

On a CPU it moves only the last elements of a tensor in 16 bits. A twin, which steps a sample of the
training, does the same, and looks as if its format had frozen every weight.

Read `lane_averages` first; `stored_layers` comes next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import SGD, Optimizer

from altgrad._messages import few
from altgrad.recipes.recipe import Recipe


def describe_fused_sgd(
    optimizer: Optimizer, recipes: Sequence[Recipe], dtype: torch.dtype, device: torch.device
) -> str:
    """Return a notice that names the training and the twins that a fused SGD does not move.

    On a CPU, it moves only the last elements of a tensor in 16 bits. A *twin* is a sample of the
    training that is stepped as a recipe says.

    Args:
        optimizer: The optimizer of the training.
        recipes: The recipes whose twins are stepped.
        dtype: The dtype of the weights of the training.
        device: The device of the weights.

    Returns:
        The notice; empty if all weights can move.
    """
    # https://github.com/pytorch/pytorch/issues/191763, open in torch 2.13: a test asserts it.
    if not isinstance(optimizer, SGD) or device.type != "cpu":
        return ""
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    still = [f"the twin {each.name}" for each in recipes if _is_still(each, is_fused)]
    if is_fused and dtype.itemsize == torch.float16.itemsize:
        still.insert(0, "the run")
    if not still:
        return ""
    return (
        "finds fused SGD on a CPU with weights in 16 bits, of which torch moves only the last ones "
        f"(https://github.com/pytorch/pytorch/issues/191763): {few(still)}; create the optimizer "
        "with foreach=True instead of fused=True, or leave out recipes with fused=True"
    )


def _is_still(recipe: Recipe, is_fused: bool) -> bool:
    """Return True if a twin has weights in 16 bits and a fused SGD, which leaves most as they are.

    A *twin* is a sample of the layers that is stepped and stored as a recipe says. The training's
    optimizer, of which the twin's is a copy unless the recipe makes another, is an SGD on a CPU.

    Args:
        recipe: The recipe of the twin.
        is_fused: True if the training's optimizer is fused.
    """
    dtype = recipe.tensor_dtype
    runs_own_class = recipe.optimizer is None and (is_fused or recipe.fused)
    return runs_own_class and dtype is not None and dtype.itemsize == torch.float16.itemsize
