"""The ways in which a run is repeated, each with the recipe by which a twin predicts the repeat.

There are two sets, and in both a control in float32:

- **stored**: the weights are kept on the grid of a format by a `WeightStorage`, in float32 tensors.
- **real**: `model.to(torch.bfloat16)` with torch's own optimizer; the optimizers of torchao and
  optimi; optimizer states in few bits; and weights in bf16 that a `WeightStorage` keeps.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from altgrad import Recipe
from altgrad.recipes import get_recipes
from benchmarks.calibration.configs import Config, make_optimizer

FORMATS = ("fp16", "bf16", "e3m4", "e4m3fn", "e5m2", "mxfp4")
"""Formats of the first set, each rounded to nearest."""
_UNSCALED = ("e3m4", "e4m3fn", "e5m2")
_REMEDIED = ("bf16", "e4m3fn", "e5m2")
_CHANCE = 1e-6


class Way(NamedTuple):
    """A way to repeat a run in low precision.

    Attributes:
        recipe: The recipe that describes it, by which a twin predicts.
        family: The kind of storage: ``"nearest"``, ``"stochastic"``, ``"kahan"``, ``"true"`` (all
            tensors in 16 bits) or ``"states"`` (of the optimizer alone). ``"control"`` is a run in
            float32 whose weights start one millionth apart: what becomes of it is chance.
        scaling: ``"tensor"``, or ``"none"`` for 8 bits without a scale.
    """

    recipe: Recipe
    family: str
    scaling: str = "tensor"

    @property
    def is_true(self) -> bool:
        """True if the net is in bf16 and no `WeightStorage` is needed."""
        return self.recipe.dtype is not None or self.recipe.optimizer is not None

    def suits(self, config: Config) -> bool:
        """Return True if a run can be repeated so: libraries have AdamW alone."""
        is_adamw = config.optimizer.startswith("adamw")
        if self.recipe.optimizer is not None:
            return is_adamw
        return not self.recipe.fused or is_adamw

    def start(self, config: Config, net: nn.Module) -> tuple[nn.Module, Optimizer]:
        """Convert a net to this way, and make the optimizer that really steps it.

        Args:
            config: The way to train.
            net: The net in float32, which may be changed.

        Returns:
            The net and the optimizer.
        """
        if self.family == "control":
            generator = torch.Generator().manual_seed(config.seed)
            with torch.no_grad():
                for parameter in net.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.mul_(1 + _CHANCE * noise)
            return net, make_optimizer(config, net.parameters())
        if not self.is_true:
            optimizer = make_optimizer(config, net.parameters())
            scaling = None if self.scaling == "none" else "tensor"
            self.recipe.attach(optimizer, module=net, scaling=scaling, seed=config.seed)
            return net, optimizer
        net = net.to(torch.bfloat16)
        if self.recipe.optimizer is not None:
            return net, _make_library(self.recipe.name, config, net.parameters())
        options = {"fused": True} if self.recipe.fused else {"foreach": True}
        return net, make_optimizer(config, net.parameters(), **options)


_BETAS = {"adamw": (0.9, 0.99), "adamw-95": (0.9, 0.95), "adamw-999": (0.9, 0.999)}
_DECAYS = {"adamw": 0.1, "adamw-95": 0.1, "adamw-999": 0.01}


def _make_library(name: str, config: Config, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Make the optimizer of a library as its users do, without AltGrad."""
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": _BETAS[config.optimizer],
        "weight_decay": _DECAYS[config.optimizer],
    }
    if name == "torchao-sr":
        library = importlib.import_module("torchao.optim")
        return library._AdamW(parameters, **options, bf16_stochastic_round=True)  # noqa: SLF001
    library = importlib.import_module("optimi")
    return library.AdamW(parameters, **options, kahan_sum=True)


def _list_stored() -> list[Way]:
    (*nearest,) = (Way(recipe, "nearest") for recipe in get_recipes(FORMATS))
    (*unscaled,) = (Way(recipe, "nearest", "none") for recipe in get_recipes(_UNSCALED))
    (*random,) = (Way(r, "stochastic") for r in get_recipes([f"{f}-sr" for f in _REMEDIED]))
    (*kahan,) = (Way(r, "kahan") for r in get_recipes([f"{f}-kahan" for f in _REMEDIED]))
    return [*nearest, *unscaled, *random, *kahan]


def _list_real() -> list[Way]:
    true = get_recipes(["bf16-true", "bf16-true-fused"])
    states = [
        Recipe(f"{letter}-{format}", states={state: format})
        for letter, state, formats in (
            ("v", "exp_avg_sq", ("bf16", "fp16", "e4m3fn", "e5m2")),
            ("m", "exp_avg", ("e4m3fn", "e5m2")),
        )
        for format in formats
    ]
    others = {"torchao-sr": "stochastic", "optimi-kahan": "kahan"}
    others |= {"bf16": "nearest", "bf16-sr": "stochastic"}
    return [
        *(Way(recipe, "true") for recipe in true),
        *(Way(recipe, others[recipe.name]) for recipe in get_recipes([*others])),
        *(Way(recipe, "states") for recipe in states),
    ]


CONTROL = Way(*get_recipes("fp32"), "control")
WAYS: Mapping[str, list[Way]] = {
    "stored": [*_list_stored(), CONTROL],
    "real": [*_list_real(), CONTROL],
}
