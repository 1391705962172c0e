"""States of torchao and bitsandbytes: which are packed, and their parts."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altgrad.recipes.libraries import LIBRARY_RECIPES
from altgrad.recipes.optimizer_maker import OptimizerMaker

NAMES = {
    "torchao-8bit": "torchao.optim",
    "torchao-fp8": "torchao.optim",
    "bnb-8bit": "bitsandbytes",
}
SIZES = (1, 256, 4095, 4096, 4097, 4160, 4352)


@pytest.fixture(params=NAMES)
def maker(request: pytest.FixtureRequest) -> Any:
    pytest.importorskip(NAMES[request.param])
    with torch.compiler.set_stance("force_eager"):
        yield LIBRARY_RECIPES[request.param].maker


def step(maker: OptimizerMaker, numel: int, steps: int = 3) -> tuple[Any, nn.Parameter]:
    """Return an optimizer after some steps, and its parameter."""
    random = torch.Generator().manual_seed(0)
    held = nn.Parameter(torch.randn(numel, generator=random))
    group = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    optimizer = maker.make([held], group)
    for _ in range(steps):
        held.grad = torch.randn(numel, generator=random)
        optimizer.step()
    return optimizer, held


def is_packed(state: dict[str, Any]) -> bool:
    """Return True if the library itself has packed a state, by the class or dtype of a moment."""
    moment = state.get("state1", state.get("exp_avg"))
    return moment.dtype == torch.uint8 or type(moment) is not Tensor


@pytest.mark.parametrize("numel", SIZES)
def test_the_description_says_which_layers_the_library_packs(maker: Any, numel: int) -> None:
    optimizer, held = step(maker, numel, 1)
    assert maker.packed.packs(numel) == is_packed(optimizer.state[held])


@pytest.mark.parametrize("numel", [256, 4096])
def test_a_state_that_is_put_together_from_copied_parts_steps_alike(maker: Any, numel: int) -> None:
    (one, held), (other, same) = step(maker, numel), step(maker, numel, 1)
    parts = maker.packed.take_apart(one.state[held])
    assert bool(parts.blocks) == (numel == 4096)
    copies = [
        {n: v.clone() if isinstance(v, Tensor) else v for n, v in part.items()} for part in parts
    ]
    other.state[same] = maker.packed.put_together(type(parts)(*copies))
    for name, value in one.state[held].items():
        again = other.state[same][name]
        assert type(again) is type(value)
        assert getattr(again, "signed", None) == getattr(value, "signed", None)
    same.data.copy_(held.data)
    for _ in range(2):
        for optimizer, each in ((one, held), (other, same)):
            each.grad = torch.ones(numel)
            optimizer.step()
    assert torch.equal(same, held)


def test_parts_have_one_number_per_element_or_block_and_share_memory(maker: Any) -> None:
    optimizer, held = step(maker, 4096)
    parts = maker.packed.take_apart(optimizer.state[held])
    assert [each.numel() for each in parts.elements.values()] == [4096, 4096]
    assert [each.numel() for each in parts.blocks.values()] == [16, 16]
    assert all(type(each) is Tensor for each in parts.elements.values())
    for each in (*parts.elements.values(), *parts.blocks.values()):
        each.zero_()
    again = maker.packed.take_apart(optimizer.state[held])
    assert not any(each.any() for each in (*again.elements.values(), *again.blocks.values()))


@pytest.mark.parametrize("numel", [256, 4096])
def test_states_are_read_as_the_library_unpacks_them(maker: Any, numel: int) -> None:
    optimizer, held = step(maker, numel)
    state = optimizer.state[held]
    found = maker.read(state, optimizer.param_groups[0])
    for name, end in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        if not is_packed(state):
            expected = state.get(name, state.get(f"state{end}"))
        elif name in state:
            expected = state[name].dequantize()
        else:
            unpack = importlib.import_module("bitsandbytes.functional").dequantize_blockwise
            absmax, code = state[f"absmax{end}"], state[f"qmap{end}"]
            expected = unpack(state[f"state{end}"], absmax=absmax, code=code, blocksize=256)
        assert type(found[name]) is Tensor
        assert torch.equal(found[name], expected)
