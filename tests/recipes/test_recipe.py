"""`Recipe`: its checks, its size in bytes, and its spelling in YAML."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import jsonargparse
import pytest
import torch

from altgrad import FloatFormat, Recipe, get_format
from altgrad.quantization import BLOCK_FORMATS
from tests.recipes.storing import make_sgd


def test_names_and_dtypes_become_formats() -> None:
    recipe = Recipe("mine", weights="BFloat16", states={"*": torch.float16, "exp_avg": "mxfp8"})
    assert recipe.weights == recipe.weights_format == get_format("bf16")
    expected = {"*": get_format("fp16"), "exp_avg": BLOCK_FORMATS["mxfp8_e4m3"]}
    assert recipe.states == recipe.state_formats == expected
    assert Recipe("mine", dtype="torch.bfloat16").tensor_dtype is torch.bfloat16
    assert Recipe("mine", accumulate="float16").sum_format == get_format("fp16")
    fp32 = [Recipe("mine", accumulate=each) for each in ("fp32", "float32", torch.float32)]
    assert {each.sum_format.name for each in (*fp32, copy.deepcopy(fp32[0]))} == {"fp32"}


def test_recipes_with_equal_fields_are_equal_hashed_alike_and_can_be_copied() -> None:
    recipe = Recipe("mine", weights="bf16", states={"a": "e5m2", "b": "fp16"}, accumulate="bf16")
    states = {"b": "float16", "a": "float8_e5m2"}
    same = Recipe("mine", weights=torch.bfloat16, states=states, accumulate=torch.bfloat16)
    for other in (same, copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert other == recipe
        assert hash(other) == hash(recipe)
    assert recipe != Recipe("mine", weights="bf16")


def test_a_recipe_cannot_be_changed() -> None:
    given = {"exp_avg": "bf16"}
    recipe = Recipe("mine", states=given)
    given["exp_avg_sq"] = "bf16"
    assert [*recipe.states] == ["exp_avg"]
    with pytest.raises(TypeError):
        recipe.states["exp_avg"] = "fp16"
    with pytest.raises(AttributeError):
        recipe.name = "other"


@pytest.mark.parametrize(
    ("fields", "bits"),
    [
        ({}, 32 * 3),
        ({"weights": "bf16"}, 16 + 64),
        ({"weights": "bf16", "compensation": "kahan"}, 16 + 16 + 64),
        ({"weights": "mxfp4"}, 4 + 8 / 32 + 64),
        ({"dtype": torch.bfloat16}, 16 * 3),
        ({"dtype": torch.float64}, 64 * 3),
        ({"weights": "e4m3fn", "dtype": torch.bfloat16}, 8 + 16 * 2),
        ({"states": {"exp_avg_sq": "e5m2"}}, 32 + 32 + 8),
        ({"states": {"exp_avg_sq": "e5m2", "*": "bf16"}}, 32 + 16 + 8),
        ({"states": {"momentum_buffer": "mxfp8"}}, 32 + 8 + 8 / 32),
        ({"accumulate": "bf16"}, 32 * 3),
    ],
)
def test_bytes_are_those_of_weights_errors_and_states(fields, bits) -> None:
    assert Recipe("mine", **fields).bytes_per_parameter == bits / 8


def test_blocks_are_those_that_all_formats_share() -> None:
    assert Recipe("mine", weights="bf16").needs_blocks is None
    assert Recipe("mine", weights="mxfp4").needs_blocks == 32
    wide = BLOCK_FORMATS["mxfp8_e4m3"].__class__("wide", get_format("e4m3"), 48, "e8m0")
    assert Recipe("mine", weights="mxfp4", states={"*": wide}).needs_blocks == 96


def test_only_recipes_of_weights_alone_need_no_optimizer() -> None:
    assert Recipe("mine", weights="bf16", compensation="kahan").only_weights
    others = ({"states": {"*": "bf16"}}, {"dtype": "bfloat16"}, {"optimizer": make_sgd})
    for fields in (*others, {"fused": True}, {"accumulate": "bf16"}):
        assert not Recipe("mine", **fields).only_weights


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": "a/b"}, ValueError, r"name='a/b': expected letters, digits, '-' and '_'"),
        ({"name": ""}, ValueError, "name='': expected"),
        ({"name": "é"}, ValueError, "name='é': expected"),
        ({"name": 3}, TypeError, "name"),
        ({"weights": "bf61"}, ValueError, "weights='bf61': unknown format.*bf16"),
        ({"weights": "nvfp4"}, ValueError, "weights='nvfp4' has scales .* not powers of two"),
        ({"weights": 16}, TypeError, "weights=16: expected"),
        ({"states": {"v": "bf61"}}, ValueError, r"states\['v'\]='bf61': unknown format"),
        ({"states": {"v": None}}, TypeError, r"states\['v'\]=None: expected"),
        ({"states": {3: "bf16"}}, TypeError, "states has the key 3: expected the name"),
        ({"states": "bf16"}, TypeError, "states"),
        ({"rounding": "up", "weights": "bf16"}, ValueError, "rounding='up': expected"),
        ({"rounding": "stochastic"}, ValueError, "without weights= and states=: expected"),
        ({"compensation": "kahan"}, ValueError, "without weights=: expected"),
        ({"dtype": "int8"}, ValueError, "dtype='int8': expected 'float16'"),
        ({"dtype": "bf16"}, ValueError, "dtype='bf16': expected 'float16', 'bfloat16'"),
        ({"dtype": torch.float8_e5m2}, ValueError, "dtype=torch.float8_e5m2: expected"),
        ({"dtype": "bfloat16", "weights": "fp16"}, ValueError, "fewer significant bits"),
        ({"dtype": "float16", "states": {"*": "fp16"}}, ValueError, r"states\['\*'\]='fp16'"),
        ({"optimizer": "SGD"}, TypeError, "optimizer='SGD': expected a function"),
        ({"optimizer": make_sgd, "fused": True}, ValueError, "expected only one of them"),
        ({"fused": 1}, TypeError, "fused"),
        ({"accumulate": "bf61"}, ValueError, "accumulate='bf61': unknown format"),
        ({"accumulate": 16}, TypeError, "accumulate=16: expected a format's name"),
        ({"accumulate": "e4m3"}, ValueError, "accumulate='e4m3fn': expected a format of 16 bits"),
        ({"accumulate": "mxfp8"}, ValueError, "accumulate='mxfp8_e4m3': expected a format of 16"),
    ],
)
def test_a_wrong_field_is_an_error_with_its_name(fields, error, message) -> None:
    with pytest.raises(error, match=message):
        Recipe(**{"name": "mine", **fields})


class Watching:
    """A callback with recipes in its configuration."""

    def __init__(self, recipes: str | Recipe | Sequence[str | Recipe] = "fp32") -> None:
        self.recipes = recipes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16-sr", "bf16-sr"),
        ("[bf16, bf16-true]", ["bf16", "bf16-true"]),
        (
            "{name: small-v, weights: bf16, rounding: stochastic, states: {exp_avg_sq: e5m2}}",
            Recipe("small-v", weights="bf16", rounding="stochastic", states={"exp_avg_sq": "e5m2"}),
        ),
        (
            "[fp32, {name: low, dtype: bfloat16, fused: true}]",
            ["fp32", Recipe("low", dtype=torch.bfloat16, fused=True)],
        ),
        (
            "{name: sgd, optimizer: tests.recipes.storing.make_sgd}",
            Recipe("sgd", optimizer=make_sgd),
        ),
        (
            "[{name: sums, accumulate: bf16, rounding: stochastic}]",
            [Recipe("sums", accumulate="bf16", rounding="stochastic")],
        ),
    ],
)
def test_yaml_names_formats_and_dtypes(text, expected, tmp_path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"watching:\n  recipes: {text}\n")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Watching, "watching")
    parsed = parser.instantiate(parser.parse_args([f"--config={config}"]))
    assert parsed.watching.recipes == expected


def test_a_format_of_ones_own_can_be_stored() -> None:
    mine = FloatFormat("my.format", 4, 5, 7)
    assert Recipe("mine", weights=mine).bytes_per_parameter == 10 / 8 + 8
