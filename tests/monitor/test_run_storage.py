"""The description of how a run itself is stored, by its optimizers and what rounds after them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from altgrad import Recipe, SamplingRule, UpdateMonitor, WeightStorage
from altgrad.monitor.run_storage import describe_storage
from altgrad.report import Header

PLAIN = {
    "weights": None,
    "rounding": "nearest_even",
    "compensation": None,
    "states": {},
    "dtype": "float32",
    "optimizer": "torch.optim.adamw.AdamW",
    "fused": False,
    "accumulate": None,
    "bytes_per_parameter": None,
    "sizes": None,
}


def make_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)).to(dtype)


def describe(net: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what the header of a monitor of these optimizers says, as it comes from JSON."""
    monitor = UpdateMonitor(net, formats="e2m1fn", recipes=(), warn=lambda _: None)
    with monitor.attach(*optimizers):
        header = Header.from_json(monitor.run_header())
    assert header.now is not None
    assert header.now.name == "now"
    described = json.loads(json.dumps(header.as_json(), allow_nan=False))["now"]
    assert Header.from_json(json.loads(json.dumps(header.as_json()))).as_json() == header.as_json()
    return described


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_a_run_is_described_by_its_dtype_and_the_class_of_its_optimizer(
    dtype: torch.dtype, options: dict[str, bool]
) -> None:
    net = make_net(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, **options)
    expected = {"dtype": str(dtype).removeprefix("torch."), "fused": "fused" in options}
    assert describe(net, optimizer) == PLAIN | expected


def test_weights_under_autocast_are_stored_in_float32() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        assert describe(net, optimizer) == PLAIN


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"weights": "bf16"}, {"weights": "bf16"}),
        (
            {"weights": "bf16", "rounding": "stochastic"},
            {"weights": "bf16", "rounding": "stochastic"},
        ),
        (
            {"weights": "e4m3fn", "compensation": "kahan"},
            {"weights": "e4m3fn", "compensation": "kahan"},
        ),
        ({"weights": "mxfp4"}, {"weights": "mxfp4"}),
        (
            {"states": {"exp_avg_sq": "mxfp8_e5m2", "*": "bf16"}, "rounding": "stochastic"},
            {"states": {"exp_avg_sq": "mxfp8_e5m2", "*": "bf16"}, "rounding": "stochastic"},
        ),
        (
            {"weights": "e4m3fn", "states": {"*": "e5m2"}},
            {"weights": "e4m3fn", "states": {"*": "e5m2"}},
        ),
    ],
)
def test_a_run_that_a_recipe_stores_is_described_as_that_recipe(
    arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    with Recipe("mine", **arguments).attach(optimizer, module=net):
        assert describe(net, optimizer) == PLAIN | expected
    assert describe(net, optimizer) == PLAIN


def test_the_most_weights_below_32_bits_decide_where_layers_differ() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    rules = [SamplingRule("0.*", enabled=False), SamplingRule("1.bias", formats=["e5m2"])]
    with WeightStorage("bf16", layers=rules).attach(optimizer, module=net):
        assert describe(net, optimizer) == PLAIN | {"weights": "bf16"}  # 16 of 176 weights each
    net[1].to(torch.bfloat16)
    assert describe(net, optimizer) == PLAIN | {"dtype": "bfloat16"}
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    by_sgd = torch.optim.SGD(other[1].parameters(), lr=0.1)
    by_adam = torch.optim.AdamW(other[0].parameters(), lr=0.1)
    assert describe(other, by_adam, by_sgd) == PLAIN | {"optimizer": "torch.optim.sgd.SGD"}
    assert describe(other, by_adam) == PLAIN


class RoundingOptimizer(torch.optim.SGD):
    """An SGD with the attribute by which torchao's optimizers say that they round at random."""

    bf16_stochastic_round = True


def test_options_by_which_libraries_round_weights_count_in_16_bits_alone() -> None:
    for dtype, is_low in ((torch.bfloat16, True), (torch.float32, False)):
        net = make_net(dtype)
        assert describe(net, RoundingOptimizer(net.parameters(), lr=0.1)) == PLAIN | {
            "dtype": str(dtype).removeprefix("torch."),
            "optimizer": f"{__name__}.RoundingOptimizer",
            "rounding": "stochastic" if is_low else "nearest_even",
        }
        for kahan, has_kahan in ((None, is_low), (True, is_low), (False, False)):
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
            optimizer.param_groups[0]["kahan_sum"] = kahan
            assert describe(net, optimizer)["compensation"] == ("kahan" if has_kahan else None)


def test_a_header_says_nothing_of_the_run_before_its_optimizers_are_known() -> None:
    net = make_net()
    assert UpdateMonitor(net).run_header()["now"] is None
    optimizer = torch.optim.AdamW(net[0].parameters(), lr=1e-3)
    assert describe_storage([optimizer], net[1].parameters()) is None


def test_the_header_counts_the_optimizers_of_each_class() -> None:
    net = make_net()
    first, second, third = (
        torch.optim.AdamW(net[0].parameters()),
        torch.optim.SGD([net[1].weight]),
        torch.optim.SGD([net[1].bias]),
    )
    monitor = UpdateMonitor(net, formats="e2m1fn", recipes=(), warn=lambda _: None)
    assert monitor.run_header()["optimizers"] == {}
    with monitor.attach(first, second, third):
        header = Header.from_json(json.loads(json.dumps(monitor.run_header())))
    assert header.optimizers == {"torch.optim.adamw.AdamW": 1, "torch.optim.sgd.SGD": 2}
    assert header.as_json()["optimizers"] == dict(header.optimizers)
