"""Each snippet runs with the real library, and stores and steps as its recipe says."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from altgrad import Recipe
from altgrad.report.library_lines import (
    explain_no_library,
    find_library,
    write_library_lines,
    write_master_lines,
    write_small_states,
)
from altgrad.report.optimizer_lines import Maker
from tests.report.next_runs import (
    compute_loss,
    describe,
    list_dtypes,
    make_net,
    run_code,
    train,
)

ADAMW = {Maker("torch.optim", "AdamW"): 1}
ADAM = {Maker("torch.optim", "Adam"): 1}
SGD = {Maker("torch.optim", "SGD"): 1}
BF16, FP32 = torch.bfloat16, torch.float32
KEPT = ("blocks.*.norm", "norm")
PACKED = "blocks.0.mlp.weight"


@pytest.fixture
def eager() -> Iterator[None]:
    """Run torchao's step without its compiler, which takes half a minute on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def write(name: str, title: str, makers: Any = None, kept: Any = ()) -> str:
    lines = write_library_lines(describe(name), makers or ADAMW, kept)
    return {each.title: each.code for each in lines}[title]


def require(module: str) -> None:
    pytest.importorskip(module, reason=f"{module} is not installed: see the extra optimizers")


def list_states(optimizer: torch.optim.Optimizer, name: str) -> list[Any]:
    return [state[name] for state in optimizer.state.values() if name in state]


def make_ones() -> nn.Module:
    """Make a model of weights of 1, which an update below 0.002 does not move in bf16."""
    return nn.ParameterDict({"gain": nn.Parameter(torch.ones(64, 64))})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> float:
    """Push all weights down; return the share of the weights that moved."""
    before = [each.detach().clone() for each in model.parameters()]
    for _ in range(steps):
        for each in model.parameters():
            each.grad = torch.ones_like(each)
        optimizer.step()
    pairs = zip(before, model.parameters(), strict=True)
    return float(torch.stack([(a != b).float().mean() for a, b in pairs]).mean())


# --- PyTorch and Lightning


@pytest.mark.parametrize("recipe", ["bf16-true", "bf16-true-fused"])
def test_pytorch_has_all_tensors_in_bf16(recipe: str) -> None:
    net = make_net()
    optimizer = run_code(write(recipe, "PyTorch"), net)["optimizer"]
    train(net, optimizer)
    assert type(optimizer) is torch.optim.AdamW
    assert {*list_dtypes(net).values()} == {BF16}
    assert {each.dtype for each in list_states(optimizer, "exp_avg_sq")} == {BF16}
    assert bool(optimizer.param_groups[0]["fused"]) is (recipe == "bf16-true-fused")
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_fp16_has_its_own_dtype() -> None:
    net = make_net()
    run_code(write("fp16-true", "PyTorch"), net)
    assert {*list_dtypes(net).values()} == {torch.float16}


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_modules_whose_layers_freeze_are_in_float32(dtype: torch.dtype) -> None:
    net = make_net().to(dtype)
    optimizer = run_code(write("bf16-true", "PyTorch", kept=KEPT), net)["optimizer"]
    before = net.norm.weight.detach().clone()
    with torch.autocast("cpu", BF16):
        train(net, optimizer)
    assert list_dtypes(net) == {name: FP32 if "norm" in name else BF16 for name in list_dtypes(net)}
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].dtype is parameter.dtype
    assert not torch.equal(net.norm.weight, before)


def test_many_patterns_are_a_line_each() -> None:
    kept = [f"blocks.{k}.attention.query_norm" for k in range(5)]
    code = write("bf16-true", "PyTorch", kept=kept)
    assert max(map(len, code.splitlines())) < 90
    net = make_net()
    run_code(code, net)
    assert {*list_dtypes(net).values()} == {BF16}


@pytest.mark.parametrize("kept", [(), KEPT])
def test_lightning_trains_as_the_recipe_says(kept: tuple[str, ...]) -> None:
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
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    kept = tuple(f"net.{each}" for each in kept)
    code = write("bf16-true", "Lightning", kept=kept)
    settings = ", ".join(["max_steps=3", 'accelerator="cpu"', *(f"{each}=False" for each in quiet)])
    code = code.replace("Trainer(", f"Trainer({settings}, ")
    trainer = run_code(code, module)["trainer"]
    trainer.fit(module)
    assert trainer.global_step == 3
    for name, parameter in module.named_parameters():
        assert parameter.dtype is (FP32 if kept and "norm" in name else BF16), name
    for parameter, state in trainer.optimizers[0].state.items():
        assert state["exp_avg"].dtype is parameter.dtype


def test_master_weights_and_states_stay_in_float32() -> None:
    plain, lightning, _ = write_master_lines(ADAMW, is_low=True)
    net = make_net().to(BF16)
    optimizer = run_code(plain.code, net)["optimizer"]
    seen = []
    net.head.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.autocast("cpu", BF16):
        train(net, optimizer)
    assert {*list_dtypes(net).values()} == {FP32}
    assert {each.dtype for each in list_states(optimizer, "exp_avg")} == {FP32}
    assert {*seen} == {BF16}
    assert 'Trainer(precision="bf16-mixed")' in lightning.code


def test_fsdp2_keeps_float32_and_computes_in_bf16() -> None:
    """FSDP2 runs on gloo with one process."""
    code = {each.title: each.code for each in write_master_lines(ADAMW, is_low=False)}["FSDP2"]
    store = Path(tempfile.mkdtemp()) / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    try:
        net, seen = make_net(), []
        optimizer = run_code(code, net)["optimizer"]
        net.head.register_forward_hook(lambda *call: seen.append(call[2].dtype))
        before = net.head.weight.full_tensor().clone()
        train(net, optimizer)
        assert {*list_dtypes(net).values()} == {FP32}
        assert {*seen} == {BF16}
        assert {each.dtype for each in list_states(optimizer, "exp_avg")} == {FP32}
        assert not torch.equal(net.head.weight.full_tensor(), before)
    finally:
        torch.distributed.destroy_process_group()


# --- torchao, optimi, bitsandbytes


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("makers", [ADAMW, ADAM])
@pytest.mark.parametrize("recipe", ["torchao-sr", "bf16-sr"])
def test_torchao_moves_weights_that_rounding_to_nearest_would_not(recipe, makers) -> None:
    require("torchao")
    arguments = {"lr": 5e-4, "weight_decay": 0.0} if makers is ADAMW else {"lr": 5e-4}
    model = make_ones()
    torch.manual_seed(0)
    optimizer = run_code(write(recipe, "torchao", makers), model, arguments=arguments)["optimizer"]
    moved = step(model, optimizer)
    assert model["gain"].dtype is BF16
    assert 0.2 < moved < 0.6  # 3 steps, each of an eighth of the spacing
    assert optimizer.param_groups[0]["weight_decay"] == 0
    nearest = make_ones().to(BF16)
    assert step(nearest, torch.optim.AdamW(nearest.parameters(), **arguments)) == 0


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", ["bf16-sr", "torchao-8bit", "optimi-kahan", "bnb-8bit"])
def test_lines_of_a_fused_run_say_which_argument_the_library_lacks(name: str) -> None:
    (lines,) = write_library_lines(describe(name), ADAMW, is_fused=True)
    require(lines.title)
    with pytest.raises(TypeError, match="fused"):
        run_code(lines.code, make_net(), arguments={"lr": 1e-3, "fused": True})
    assert "# Leave out of the arguments: fused." in lines.code.splitlines()
    assert "Leave out" not in write_library_lines(describe(name), ADAMW)[0].code


def test_lines_leave_out_what_only_the_library_of_the_run_has() -> None:
    torchao = {Maker("torchao.optim", "_AdamW"): 1}
    for lines in (*write_library_lines(describe("bf16-sr"), torchao), *write_small_states(torchao)):
        assert "# Leave out of the arguments: bf16_stochastic_round." in lines.code
    optimi = {Maker("optimi", "AdamW"): 1}
    assert "arguments: kahan_sum." in write_library_lines(describe("bnb-8bit"), optimi)[0].code


def test_comments_fit_sgd_which_has_no_betas_and_no_recipe_of_optimi() -> None:
    code = write("bf16-kahan", "optimi", SGD)
    assert "betas" not in code
    assert "# States are in bf16, too, untested." in code
    assert 'the recipe "optimi-kahan" judges that.' in write("bf16-kahan", "optimi", ADAM)


@pytest.mark.usefixtures("eager")
def test_torchao_keeps_modules_in_float32() -> None:
    require("torchao")
    net = make_net()
    optimizer = run_code(write("torchao-sr", "torchao", kept=KEPT), net)["optimizer"]
    with torch.autocast("cpu", BF16):
        train(net, optimizer)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].dtype is parameter.dtype
    assert list_dtypes(net)["norm.weight"] is FP32


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("makers", [ADAMW, ADAM])
@pytest.mark.parametrize(
    ("recipe", "kind"), [("torchao-8bit", "OptimState8bit"), ("torchao-fp8", "OptimStateFp8")]
)
def test_torchao_packs_states_and_leaves_weights(recipe: str, kind: str, makers: Any) -> None:
    require("torchao")
    net = make_net()
    optimizer = run_code(write(recipe, "torchao", makers), net)["optimizer"]
    train(net, optimizer)
    state = optimizer.state[net.get_parameter(PACKED)]
    assert type(state["exp_avg"]).__name__ == type(state["exp_avg_sq"]).__name__ == kind
    assert {*list_dtypes(net).values()} == {FP32}
    assert (optimizer.param_groups[0]["weight_decay"] == 0) is (makers is ADAM)


@pytest.mark.usefixtures("eager")
def test_torchao_has_both_in_one_optimizer() -> None:
    require("torchao")
    (lines,) = write_small_states(ADAMW)
    assert "Not tried together" in lines.code
    model = make_ones()
    optimizer = run_code(lines.code, model, arguments={"lr": 5e-4, "weight_decay": 0.0})[
        "optimizer"
    ]
    assert 0.2 < step(model, optimizer) < 0.6
    assert model["gain"].dtype is BF16
    (state,) = optimizer.state.values()
    assert type(state["exp_avg"]).__name__ == "OptimState8bit"
    assert write_small_states(SGD) == []


@pytest.mark.slow
def test_torchao_compiles_the_step() -> None:
    require("torchao")
    model = make_ones()
    arguments = {"lr": 5e-4, "weight_decay": 0.0}
    optimizer = run_code(write("torchao-sr", "torchao"), model, arguments=arguments)["optimizer"]
    assert 0.2 < step(model, optimizer) < 0.6


@pytest.mark.parametrize("recipe", ["optimi-kahan", "bf16-kahan"])
@pytest.mark.parametrize("makers", [ADAMW, ADAM, SGD])
def test_optimi_adds_up_what_rounding_takes(recipe: str, makers: Any) -> None:
    require("optimi")
    arguments = {"lr": 1e-3, "weight_decay": 0.0}
    model = make_ones()
    optimizer = run_code(write(recipe, "optimi", makers), model, arguments=arguments)["optimizer"]
    assert step(model, optimizer) == 1  # three updates of 0.001 are over half of the spacing
    assert model["gain"].dtype is BF16
    assert [each.dtype for each in list_states(optimizer, "kahan_comp")] == [BF16]
    nearest = make_ones().to(BF16)
    plain = getattr(torch.optim, next(iter(makers)).name)
    assert step(nearest, plain(nearest.parameters(), **arguments)) == 0


@pytest.mark.parametrize("makers", [ADAMW, ADAM])
def test_bitsandbytes_packs_states(makers: Any) -> None:
    require("bitsandbytes")
    net = make_net()
    optimizer = run_code(write("bnb-8bit", "bitsandbytes", makers), net)["optimizer"]
    train(net, optimizer)
    state = optimizer.state[net.get_parameter(PACKED)]
    assert state["state1"].dtype is state["state2"].dtype is torch.uint8
    assert {*list_dtypes(net).values()} == {FP32}


# --- which library has what


def test_the_lines_of_a_recipe_nearly_like_it_say_so() -> None:
    assert 'the recipe "torchao-sr" judges that' in write("bf16-sr", "torchao")
    assert 'the recipe "optimi-kahan" judges that' in write("bf16-kahan", "optimi")
    assert "judges that" not in write("torchao-sr", "torchao")


@pytest.mark.parametrize(
    "recipe",
    [
        *("bf16", "e4m3fn", "e4m3fn-sr", "fp16-sr", "mxfp4-kahan"),
        Recipe("states", weights="bf16", rounding="stochastic", states={"exp_avg": "e5m2"}),
        Recipe("added", dtype="bfloat16", accumulate="fp32"),
        Recipe("own", optimizer=make_net),
        Recipe("wide", dtype="float64"),
    ],
)
def test_recipes_without_a_library_have_no_lines(recipe: Any) -> None:
    described = describe(recipe)
    assert find_library(described) is None
    assert write_library_lines(described, ADAMW) == []
    assert explain_no_library(described, ADAMW).startswith("No known ")


@pytest.mark.parametrize("name", ["Muon", "Adafactor", "SGD"])
@pytest.mark.parametrize("recipe", ["torchao-sr", "bf16-sr", "torchao-8bit", "bnb-8bit"])
def test_optimizers_that_a_library_lacks_are_named(recipe: str, name: str) -> None:
    makers = {Maker("torch.optim", name): 1}
    assert write_library_lines(describe(recipe), makers) == []
    text = explain_no_library(describe(recipe), makers)
    assert text.endswith(f"alone, and this run has {name}.")
    assert "Adam and AdamW" in text


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_any_optimizer_can_have_all_tensors_in_bf16(name: str) -> None:
    makers = {Maker("torch.optim", name): 1}
    assert f"torch.optim.{name}(model.parameters()" in write("bf16-true", "PyTorch", makers)
    assert write_library_lines(describe("bf16-true-fused"), makers) == []


def test_several_optimizers_have_a_line_each() -> None:
    require("optimi")
    net = make_net()
    rest = [each for name, each in net.named_parameters() if name != PACKED]
    names = {
        "parameters_1": [net.get_parameter(PACKED)],
        "arguments_1": {"lr": 1e-3},
        "parameters_2": rest,
        "arguments_2": {"lr": 1e-2},
    }
    code = write("bf16-kahan", "optimi", {**ADAMW, **SGD})
    found = run_code(code, net, **names)
    both = [found["optimizer_1"], found["optimizer_2"]]
    train(net, *both)
    optimi = importlib.import_module("optimi")
    assert [type(each) for each in both] == [optimi.AdamW, optimi.SGD]
    assert {*list_dtypes(net).values()} == {BF16}
    assert write_library_lines(describe("bf16-sr"), {**ADAMW, **SGD}) == []
