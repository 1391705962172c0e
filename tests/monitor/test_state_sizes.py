"""Sizes of what an optimizer keeps of a layer, against the bytes of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altgrad
from altgrad.monitor.state_sizes import find_owners, measure_states
from altgrad.report import Header, read


def step(optimizer: torch.optim.Optimizer, *parameters: nn.Parameter) -> None:
    for each in parameters:
        each.grad = torch.ones_like(each)
    optimizer.step(lambda: torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options", "elements"),
    [
        (torch.optim.AdamW, {}, {"step": 0, "exp_avg": 35, "exp_avg_sq": 35}),
        (
            torch.optim.Adam,
            {"amsgrad": True},
            {"step": 0, "exp_avg": 35, "exp_avg_sq": 35, "max_exp_avg_sq": 35},
        ),
        (torch.optim.SGD, {}, {}),
        (torch.optim.SGD, {"momentum": 0.9}, {"momentum_buffer": 35}),
        (torch.optim.Adafactor, {}, {"step": 0, "row_var": 5, "col_var": 7}),
    ],
)
def test_each_state_has_its_elements_and_bytes(
    kind: Any, options: dict[str, Any], elements: dict[str, int], dtype: torch.dtype
) -> None:
    parameter = nn.Parameter(torch.ones(5, 7, dtype=dtype))
    optimizer = kind([parameter], lr=1e-3, **options)
    assert measure_states(optimizer, parameter, has_stepped=False) is None
    step(optimizer, parameter)
    found = measure_states(optimizer, parameter, has_stepped=True)
    assert found is not None
    assert {name: each["elements"] for name, each in found.items()} == elements
    assert {name: each["bytes"] for name, each in found.items()} == {
        name: each.numel() * each.element_size()
        for name, each in optimizer.state[parameter].items()
    }


def test_a_counter_of_a_layer_of_one_element_is_no_number_to_store() -> None:
    parameter = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([parameter])
    step(optimizer, parameter)
    found = measure_states(optimizer, parameter, has_stepped=True)
    assert found == {
        "step": {"elements": 0, "bytes": 4},
        "exp_avg": {"elements": 1, "bytes": 4},
        "exp_avg_sq": {"elements": 1, "bytes": 4},
    }


def test_the_tensors_of_a_list_count_together() -> None:
    parameter = nn.Parameter(torch.ones(6))
    optimizer = torch.optim.LBFGS([parameter], max_iter=3, history_size=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = measure_states(optimizer, parameter, has_stepped=True)
    assert found is not None
    kept = optimizer.state[parameter]["old_dirs"]
    assert found["old_dirs"] == {"elements": 6 * len(kept), "bytes": 24 * len(kept)}


def test_states_of_one_of_several_layers_that_are_missing_are_unknown() -> None:
    here, elsewhere = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([here, elsewhere])
    step(optimizer, here)  # the other has no gradient, or its state lies on another rank
    assert measure_states(optimizer, here, has_stepped=True)
    assert measure_states(optimizer, elsewhere, has_stepped=True) is None
    assert measure_states(None, here, has_stepped=True) is None


def test_each_layer_has_the_optimizer_that_steps_it() -> None:
    one, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    first, second = torch.optim.SGD([one], lr=1.0), torch.optim.AdamW([other])
    step(second, other)
    owners = find_owners([first, second])
    assert owners == {one: first, other: second}
    assert measure_states(owners[one], one, has_stepped=True) == {}


def test_the_run_file_has_the_states_of_each_layer_after_its_first_observed_step(
    tmp_path: Path,
) -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    optimizer = torch.optim.AdamW(net.parameters())
    with altgrad.watch(net, optimizer, tmp_path, every_n_steps=1) as watch:
        header = Header.from_json(watch.monitor.run_header())
        assert [each.states for each in header.layers.values()] == [None] * 4
        for _ in range(2):
            step(optimizer, *net.parameters())
    layers = read(tmp_path).layers
    for name, parameter in net.named_parameters():
        states = layers[name].states
        assert states is not None
        assert {key: each.bytes for key, each in states.items()} == {
            key: each.numel() * each.element_size()
            for key, each in optimizer.state[parameter].items()
        }
