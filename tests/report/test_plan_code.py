"""The code that applies a plan: it runs, stores each layer as planned, and takes that memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from altgrad.observation.stored import get_stored
from altgrad.report import Run, judge_run
from altgrad.report.plan_code import write_plan_code
from altgrad.report.planning import FP32, Option, Plan, Planned, make_plan
from tests.report.planned_runs import RECIPES, Net, make_optimizer, record, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return record(tmp_path_factory.mktemp("run"), steps=20)


def make(run: Run, **recipes: str) -> Plan:
    """Make a plan with these recipes, by the layer's name with _ for each dot; else float32."""
    chosen = {name: recipes.get(name.replace(".", "_"), FP32) for name in run.layers}
    layers = [Planned(name, Option(each, 1.0, 1.0), 1.0, 1.0) for name, each in chosen.items()]
    used = {name: each for name, each in run.recipes.items() if name in chosen.values()}
    return Plan(0.5, layers, used, {}, by_movement=True)


def apply(run: Run, plan: Plan) -> tuple[Net, torch.optim.Optimizer]:
    """Run the code of a plan on a new net, train the net, and return it with its optimizer."""
    net = Net()
    names: dict[str, Any] = {"model": net, "make_optimizer": make_optimizer}
    exec(write_plan_code(run, plan), names)
    train(net, names["optimizer"], 5)
    return net, names["optimizer"]


def test_each_layer_is_stored_as_planned(run: Run) -> None:
    plan = make(
        run,
        blocks_0_0_weight="bf16-true",
        blocks_1_0_weight="bf16-true",
        blocks_0_1_weight="bf16-sr",
        blocks_0_0_bias="e4m3fn-sr",
        blocks_1_0_bias="bf16-kahan",
        head_bias="low-states",
        blocks_1_1_bias="bf16",
    )
    net, optimizer = apply(run, plan)
    stored = get_stored([optimizer])
    found = {}
    for name, parameter in net.named_parameters():
        each = stored.get(parameter)
        if each is not None:
            states = {key: str(value) for key, value in each.state_formats.items()}
            format = None if each.format is None else str(each.format)
            found[name] = (format, each.rounding, each.compensation, states)
    nearest = "nearest_even"
    assert found == {
        "blocks.0.1.weight": ("bf16", "stochastic", None, {}),
        "blocks.0.0.bias": ("e4m3fn", "stochastic", None, {}),
        "blocks.1.0.bias": ("bf16", nearest, "kahan", {}),
        "head.bias": (None, nearest, None, {"exp_avg_sq": "bf16", "exp_avg": "e5m2"}),
        "blocks.1.1.bias": ("bf16", nearest, None, {}),
    }
    converted = {n for n, each in net.named_parameters() if each.dtype == torch.bfloat16}
    assert converted == {"blocks.0.0.weight", "blocks.1.0.weight"}
    kept = optimizer.state[net.blocks[0][0].weight]["exp_avg_sq"]
    assert kept.dtype == torch.bfloat16
    weight = net.blocks[1][1].bias.detach()
    assert torch.equal(weight, weight.bfloat16().float())


def test_a_plan_of_parameters_in_bfloat16_takes_the_memory_that_it_says(tmp_path: Path) -> None:
    run = record(tmp_path, ["bf16-true"])
    plan = make_plan(run, judge_run(run), 0.6)
    assert {*plan.chosen.values()} == {FP32, "bf16-true"}
    net, optimizer = apply(run, plan)
    tensors = [*net.parameters()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    assert sum(each.numel() * each.element_size() for each in tensors) == plan.bytes


def test_a_run_in_bfloat16_is_converted_before_its_layers_are_stored(run: Run) -> None:
    low = {name: replace(each, dtype="bfloat16") for name, each in run.layers.items()}
    plan = make(run, blocks_0_0_weight="bf16-sr", head_weight="bf16-true")
    net = Net().to(torch.bfloat16)
    names: dict[str, Any] = {"model": net, "make_optimizer": make_optimizer}
    exec(write_plan_code(replace(run, layers=low), plan), names)
    train(net, names["optimizer"], 2)
    dtypes = {name: each.dtype for name, each in net.named_parameters()}
    assert dtypes.pop("head.weight") is torch.bfloat16
    assert {*dtypes.values()} == {torch.float32}


def test_layers_of_equal_names_share_a_pattern(run: Run) -> None:
    both = make(run, blocks_0_0_weight="bf16-sr", blocks_1_0_weight="bf16-sr")
    code = write_plan_code(run, both)
    assert 'SamplingRule("blocks.*.0.weight"),' in code
    true = make(run, blocks_0_0_weight="bf16-true", blocks_1_0_weight="bf16-true")
    assert '    "blocks.*.0.weight",\n]' in write_plan_code(run, true)
    assert "WeightStorage" not in write_plan_code(run, true)
    assert "torch" not in code.replace("# before", "")


def test_a_scaling_other_than_that_of_a_tensor_is_written(run: Run) -> None:
    plan = make(run, head_weight="e4m3fn-sr")
    assert "scaling=" not in write_plan_code(run, plan)
    code = write_plan_code(replace(run, scaling=("block", 8)), plan)
    assert 'scaling=("block", 8),' in code


def test_a_plan_in_float32_needs_no_code(run: Run) -> None:
    assert write_plan_code(run, make(run)) == ""
    assert len(run.recipes) == len(RECIPES)
