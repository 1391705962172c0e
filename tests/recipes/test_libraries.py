"""Recipes of other libraries' optimizers: when they are imported, and what is made of a group."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from altgrad import Recipe, UpdateMonitor
from altgrad.recipes import get_recipes
from altgrad.recipes.libraries import LIBRARY_RECIPES

MODULES = {
    "torchao-sr": "torchao.optim",
    "torchao-8bit": "torchao.optim",
    "torchao-fp8": "torchao.optim",
    "optimi-kahan": "optimi",
    "bnb-8bit": "bitsandbytes.optim",
}
CLASSES = {
    "torchao-sr": "_AdamW",
    "torchao-8bit": "AdamW8bit",
    "torchao-fp8": "AdamWFp8",
    "optimi-kahan": "AdamW",
    "bnb-8bit": "AdamW8bit",
}
PACKAGES = {
    "torchao.optim": "torchao",
    "optimi": "torch-optimi",
    "bitsandbytes.optim": "bitsandbytes",
}


def test_all_recipes_are_tested() -> None:
    assert LIBRARY_RECIPES.keys() == MODULES.keys() == CLASSES.keys()


# --- imports


def test_no_library_is_imported_unless_its_recipe_is_asked_for() -> None:
    script = (
        "import sys; from altgrad.recipes import get_recipes; get_recipes(['bf16', 'bf16-true']);"
        "print([n for n in ('torchao', 'optimi', 'bitsandbytes') if n in sys.modules])"
    )
    printed = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert printed.strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_library_is_one_sentence_when_the_monitor_is_made(name, monkeypatch) -> None:
    for module in (MODULES[name].split(".")[0], MODULES[name]):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ImportError) as caught:
        UpdateMonitor(nn.Linear(2, 2), recipes=["bf16", name])
    text = str(caught.value)
    assert text.startswith(f"recipes={name!r}: expected the library {PACKAGES[MODULES[name]]} (")
    assert text.endswith(f"; run pip install --upgrade {PACKAGES[MODULES[name]]}")
    assert "\n" not in text


@pytest.mark.parametrize("name", MODULES)
def test_a_version_without_the_optimizer_is_an_error_that_names_it(name, monkeypatch) -> None:
    for module in (MODULES[name].split(".")[0], MODULES[name]):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    with pytest.raises(ImportError, match=f"{CLASSES[name]}.*; run pip install --upgrade"):
        get_recipes(name)


def test_a_recipe_of_the_user_may_not_have_such_a_name() -> None:
    with pytest.raises(ValueError, match="name='torchao-sr': expected a name other than this"):
        get_recipes(Recipe("torchao-sr", weights="bf16"))


@pytest.mark.parametrize("name", MODULES)
def test_upper_case_is_accepted(name: str) -> None:
    pytest.importorskip(MODULES[name])
    assert get_recipes(name.upper()) == (LIBRARY_RECIPES[name],)


# --- what is made of a group


def make_group(kind: Any, **options: Any) -> dict[str, Any]:
    optimizer = kind([nn.Parameter(torch.ones(4))], **{"lr": 0.25, **options})
    return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}


def read(optimizer: Any) -> list[float]:
    group = optimizer.param_groups[0]
    betas = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
    return [float(x) for x in (group["lr"], *betas, group["eps"], group["weight_decay"])]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25)])
def test_the_optimizer_has_the_hyperparameters_of_the_group(name: str, lr: Any) -> None:
    library = pytest.importorskip(MODULES[name])
    options = {"betas": (0.5, 0.75), "eps": 0.125, "weight_decay": 0.0625}
    group = make_group(AdamW, lr=lr, foreach=False, **options)
    made = LIBRARY_RECIPES[name].optimizer([nn.Parameter(torch.ones(4))], group)
    assert type(made) is getattr(library, CLASSES[name])
    assert read(made) == [0.25, 0.5, 0.75, 0.125, 0.0625]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("group", "message"),
    [
        (make_group(SGD), "no betas, eps: expected the hyperparameters of AdamW"),
        (make_group(AdamW, maximize=True), "has maximize, which"),
        (make_group(Adam, weight_decay=0.1), "has weight decay within the gradient, which"),
    ],
)
def test_a_group_that_the_optimizer_cannot_follow_is_an_error(name, group, message) -> None:
    pytest.importorskip(MODULES[name])
    with pytest.raises(ValueError, match=message):
        LIBRARY_RECIPES[name].optimizer([nn.Parameter(torch.ones(4))], group)


@pytest.mark.parametrize("name", MODULES)
def test_amsgrad_is_passed_on_or_an_error(name: str) -> None:
    pytest.importorskip(MODULES[name])
    held, group = [nn.Parameter(torch.ones(4))], make_group(AdamW, amsgrad=True)
    if name.startswith("torchao"):
        assert LIBRARY_RECIPES[name].optimizer(held, group).param_groups[0]["amsgrad"] is True
    else:
        with pytest.raises(ValueError, match="has amsgrad, which"):
            LIBRARY_RECIPES[name].optimizer(held, group)


def test_adam_without_weight_decay_is_followed() -> None:
    pytest.importorskip("optimi")
    made = LIBRARY_RECIPES["optimi-kahan"].optimizer(
        [nn.Parameter(torch.ones(4))], make_group(Adam)
    )
    assert read(made)[-1] == 0.0
