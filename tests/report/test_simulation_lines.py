"""The lines of a simulation run, and round weights and states as the recipe says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from altgrad import FloatFormat, Recipe, SamplingRule
from altgrad.recipes import get_recipes
from altgrad.report import RunReport
from altgrad.report.optimizer_lines import list_makers
from altgrad.report.simulation_lines import find_module, write_simulation
from tests.report.next_runs import (
    compute_loss,
    describe,
    list_layers,
    make_net,
    make_report,
    run_code,
    train,
)

TWO = {"torch.optim.adamw.AdamW": 1, "torch.optim.sgd.SGD": 1}


def write(recipe: Any, kept: Any = (), report: RunReport | None = None, **more: Any) -> list[str]:
    run = (report or make_report()).run
    return [
        each.code
        for each in write_simulation(run, describe(recipe), list_makers(run), kept, **more)
    ]


def is_on_grid(tensor: torch.Tensor) -> bool:
    return torch.equal(tensor.bfloat16().to(tensor.dtype), tensor)


@pytest.mark.parametrize("recipe", ["bf16", "bf16-sr", "bf16-kahan", "bf16-true"])
def test_weights_stay_on_the_grid(recipe: str) -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    code, _ = write(recipe)
    run_code(code, net, optimizer=optimizer)
    train(net, optimizer)
    assert all(is_on_grid(each) for each in net.parameters())
    assert all(each.dtype is torch.float32 for each in net.parameters())
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(map(is_on_grid, moments)) is (recipe == "bf16-true")


def test_the_recipe_is_that_of_the_run() -> None:
    own = Recipe("mine", weights="e4m3fn", rounding="stochastic", states={"exp_avg_sq": "e5m2"})
    for recipe in (own, *get_recipes(["bf16-sr", "e4m3fn-kahan", "mxfp4"])):
        (plain, _), net = write(recipe), make_net()
        made = run_code(plain, net, optimizer=torch.optim.AdamW(net.parameters()))["recipe"]
        assert made == recipe


def test_layers_of_kept_modules_are_left_alone() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    code, _ = write("bf16", {"blocks.0.norm", "blocks.1.norm", "norm"})
    assert 'SamplingRule("blocks.*.norm.weight", enabled=False)' in code
    run_code(code, net, optimizer=optimizer)
    train(net, optimizer)
    for name, parameter in net.named_parameters():
        assert is_on_grid(parameter) is (find_module(name).rpartition(".")[2] != "norm"), name


def test_all_optimizers_are_named() -> None:
    """Without the second one, its layers were not stored, and rules about them raised."""
    net = make_net()
    head = [*net.head.parameters()]
    rest = [each for each in net.parameters() if not any(each is own for own in head)]
    both = {
        "optimizer_1": torch.optim.AdamW(rest, lr=1e-3),
        "optimizer_2": torch.optim.SGD(head, lr=1e-3),
    }
    code, _ = write("bf16", {"norm"}, make_report(optimizers=TWO))
    run_code(code, net, **both)
    train(net, *both.values())
    names = {name for name, each in net.named_parameters() if not is_on_grid(each)}
    assert names == {"norm.weight", "norm.bias"}


def test_lightning_stores_as_the_recipe_says() -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="the test extra has lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def training_step(self, *_: Any) -> torch.Tensor:
            return compute_loss(self.net)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.arange(3))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Module()
    names = [f"net.{name}" for name in list_layers()]
    _, code = write("bf16", {"net.norm"}, make_report(layers=names))
    settings = 'max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False'
    settings += ", enable_progress_bar=False, enable_model_summary=False"
    code = code.replace("Trainer(callbacks", f"Trainer({settings}, callbacks")
    run_code(code, module)["trainer"].fit(module)
    assert {n for n, each in module.named_parameters() if not is_on_grid(each)} == {
        "net.norm.weight",
        "net.norm.bias",
    }


@pytest.mark.parametrize("scaling", [None, "channel", ("block", 32)])
def test_the_scaling_is_that_of_the_run(scaling: Any) -> None:
    code, store_as = write("e4m3fn", report=make_report(scaling=scaling))
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    lines = code.replace("recipe.attach", "storage = recipe.attach")
    assert run_code(lines, net, optimizer=optimizer)["storage"].scaling == scaling
    assert "scaling=" in store_as
    assert not any("scaling" in each for each in write("e4m3fn"))


def test_a_run_stored_low_is_simulated_in_float32() -> None:
    code, _ = write("bf16-sr", is_low=True)
    assert "model.float() before the optimizer is made" in code
    net = make_net().bfloat16()
    with pytest.raises(ValueError, match="is not finer than bf16"):
        run_code(code, net, optimizer=torch.optim.SGD(net.parameters()))
    net.float()
    run_code(code, net, optimizer=torch.optim.SGD(net.parameters()))


@pytest.mark.parametrize(
    "recipe",
    [
        *("fp32", "torchao-sr", "optimi-kahan", "bnb-8bit"),
        Recipe("added", dtype="bfloat16", accumulate="fp32"),
        Recipe("own", weights="bf16", optimizer=make_net),
        Recipe("wide", dtype="float64"),
        Recipe("mine", weights=FloatFormat("mine", exponent_bits=3, mantissa_bits=2, bias=3)),
    ],
)
def test_recipes_that_are_no_formats_are_not_simulated(recipe: Any) -> None:
    assert write(recipe) == []


@pytest.mark.parametrize("name", ['a"b.c', "a\nimport os.w", "w[0].x", "a*b.c", "é.0.ü"])
def test_names_are_quoted_as_python_strings(name: str) -> None:
    code, _ = write("bf16", {find_module(name)}, make_report(layers=[name, "other.weight"]))
    rules: list[SamplingRule] = []

    class Note:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def attach(self, *_: Any, layers: list[SamplingRule], **__: Any) -> None:
            rules.extend(layers)

    lines = code[code.index("recipe =") :]
    names = {"Recipe": Note, "SamplingRule": SamplingRule, "optimizer": None}
    run_code(lines, make_net(), **names)
    (rule,) = rules
    assert rule.matches(name)
    assert not rule.matches("other.weight")
    assert rule.enabled is False


def test_a_module_is_what_stands_before_the_last_dot() -> None:
    assert find_module("blocks.0.norm.weight") == "blocks.0.norm"
    assert find_module("scale") == ""
