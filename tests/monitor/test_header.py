"""The header of a run file: formats, scaling and layers of a monitor."""

import functools
from typing import Any

import ml_dtypes
import pytest
import torch
from torch import nn

from altgrad import Recipe
from altgrad.monitor.header import (
    describe_format,
    describe_layer,
    describe_recipe,
    describe_run,
)
from altgrad.observation.rules import LayerSampling
from altgrad.quantization.block_formats import get_formats
from altgrad.recipes import get_recipes


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("bf16", ml_dtypes.bfloat16),
        ("fp16", "float16"),
        ("e4m3fn", ml_dtypes.float8_e4m3fn),
        ("e5m2", ml_dtypes.float8_e5m2),
        ("e2m1", ml_dtypes.float4_e2m1fn),
        ("mxfp4", ml_dtypes.float4_e2m1fn),
        ("mxfp8_e5m2", ml_dtypes.float8_e5m2),
    ],
)
def test_descriptions_of_formats_equal_those_of_ml_dtypes(name: str, same) -> None:
    (format,), info = get_formats(name), ml_dtypes.finfo(same)
    described = describe_format(format, "tensor")
    assert described == {
        "bits": info.bits,
        "max": float(info.max),
        "smallest": float(info.smallest_subnormal),
        "smallest_normal": float(info.smallest_normal),
        "eps": float(info.eps),
        "scaled": name not in ("bf16", "fp16"),
    }


def test_without_scaling_only_block_formats_are_scaled() -> None:
    formats = get_formats(["e4m3fn", "mxfp4", "nvfp4"])
    assert [describe_format(format, None)["scaled"] for format in formats] == [False, True, True]


def test_a_layer_is_described_by_its_parameter_and_its_sampling() -> None:
    parameter = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    sampling = LayerSampling("w", None, True, 5, 100, ("bf16", "e4m3fn"), 64)
    assert describe_layer(parameter, sampling, 7) == {
        "shape": (3, 4),
        "dtype": "float64",
        "elements": 7,
        "formats": ("bf16", "e4m3fn"),
        "every_n_steps": 5,
        "states": None,
        "twin_elements": 64,
    }
    states = {"exp_avg": {"elements": 12, "bytes": 96}}
    assert describe_layer(parameter, sampling, 7, states)["states"] == states


def test_a_run_is_described_by_formats_scaling_and_layers_in_their_order() -> None:
    formats, layers = get_formats(["e5m2", "bf16"]), {"b": {"elements": 1}, "a": {"elements": 2}}
    described = describe_run(formats, ("block", 32), layers)
    assert described["scaling"] == ("block", 32)
    assert [*described["formats"]] == ["e5m2", "bf16"]
    assert described["formats"]["e5m2"] == describe_format(formats[0], ("block", 32))
    assert [*described["layers"].items()] == [*layers.items()]
    assert described["layers"] is not layers


def make_lion(parameters: list[nn.Parameter], group: dict[str, object]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=group["lr"])


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (make_lion, f"{__name__}.make_lion"),
        (torch.optim.Adagrad, "torch.optim.adagrad.Adagrad"),
        (functools.partial(make_lion, group={}), "functools.partial"),
        (lambda parameters, group: None, f"{__name__}.<lambda>"),
    ],
)
def test_a_recipe_is_described_by_names(factory: Any, name: str) -> None:
    bf16, e5m2 = get_formats(["bf16", "e5m2"])
    recipe = Recipe(
        "mine",
        weights=bf16,
        rounding="stochastic",
        states={"exp_avg_sq": e5m2},
        optimizer=factory,
        accumulate="bf16",
    )
    described = describe_recipe(recipe, "channel")
    assert described.pop("sizes") == {
        "weights": {"bits": 16, "scaling": None},
        "states": {"exp_avg_sq": {"bits": 8, "scaling": "channel"}},
        "optimizer": {"state_bytes": None, "compensation_bytes": 0, "packed": None},
    }
    assert described.pop("bytes_per_parameter") == pytest.approx(recipe.bytes_per_parameter)
    assert described == {
        "weights": "bf16",
        "rounding": "stochastic",
        "compensation": None,
        "states": {"exp_avg_sq": "e5m2"},
        "dtype": None,
        "optimizer": name,
        "fused": False,
        "accumulate": "bf16",
    }


def test_a_header_has_the_sizes_of_blocks_and_of_packed_states() -> None:
    block, packed = get_recipes(["mxfp8", "torchao-8bit"])
    assert describe_recipe(block, "tensor")["sizes"] == {
        "weights": {"bits": 8, "scaling": ("block", 32)},
        "states": {},
        "optimizer": None,
    }
    assert describe_recipe(packed, None)["sizes"]["optimizer"] == {
        "state_bytes": 2 + 8 / 256,
        "compensation_bytes": 0,
        "packed": {
            "block": 256,
            "least": 4096,
            "only_whole": True,
            "states": 2,
            "table_bytes": 1024,
        },
    }
