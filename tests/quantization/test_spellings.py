"""Names that users try for a format or recipe, and the names that the error proposes."""

import pytest
from torch import nn

from altgrad import UpdateMonitor
from altgrad.quantization import get_format, get_formats
from altgrad.quantization.spellings import find_near
from altgrad.recipes import get_recipes

FP8, FP4 = ["e4m3fn", "e5m2", "mxfp8"], ["mxfp4", "nvfp4", "e2m1"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((name, FP8) for name in ("fp8", "FP8", "float8", "fp8_e4m3")),
        *((name, FP4) for name in ("fp4", "float4", "nf4", "int4")),
        ("fp8_e5m2", ["e5m2", "mxfp8_e5m2"]),
        ("mxfp6", ["mxfp6_e2m3", "mxfp6_e3m2", "e2m3", "e3m2"]),
        ("int8", ["e0m7"]),
        ("torch.float32", ["bf16"]),
        ("mxfp5", ["mxfp8", "mxfp4", "mxfp8_e5m2"]),
    ],
)
def test_an_unknown_format_is_answered_with_formats_that_exist(name: str, meant: list[str]) -> None:
    with pytest.raises(ValueError, match="unknown format") as raised:
        get_formats(name)
    assert f"unknown format '{name}'; nearest: {', '.join(meant)}. For" in str(raised.value)
    assert len(get_formats(meant)) == len(meant)


@pytest.mark.parametrize("name", ["bfloat16", "fp16", "half", "mxfp4", "nvfp4", "mxfp8", "E4M3"])
def test_other_spellings_of_a_format_are_no_errors(name: str) -> None:
    assert len(get_formats(name)) == 1


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fp8", FP8),
        ("fp8-sr", ["e4m3fn-sr", "e5m2-sr", "mxfp8-sr"]),
        ("fp4-kahan", ["mxfp4-kahan", "e2m1-kahan"]),  # no recipe stores weights in nvfp4
        ("float32", ["fp32", "bf16"]),
    ],
)
def test_an_unknown_recipe_is_answered_with_recipes_that_exist(name: str, meant: list[str]) -> None:
    with pytest.raises(ValueError, match="expected a short name") as raised:
        get_recipes(name)
    assert f"nearest: {', '.join(meant)}. For another" in str(raised.value)
    assert len(get_recipes(meant)) == len(meant)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp8", "nearest: e4m3fn, e5m2, and for get_formats mxfp8. For"),
        ("fp4", "nearest: e2m1, and for get_formats mxfp4, nvfp4. For"),
        ("nvfp4", "nearest: e2m1, and for get_formats mxfp4, nvfp4. For"),
    ],
)
def test_a_single_element_format_names_block_formats_apart(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_format(name)


def test_a_monitor_answers_alike() -> None:
    for argument in ("formats", "recipes"):
        with pytest.raises(ValueError, match="e4m3fn, e5m2, mxfp8"):
            UpdateMonitor(nn.Linear(2, 2), **{argument: ["fp8"]})


def test_names_far_from_all_others_are_near_to_none() -> None:
    assert find_near("zzzzz", ["bf16"]) == []
    assert find_near("bf61", ["bf16", "fp16"])[0] == "bf16"
    assert find_near("fp8", ["bf16"]) == []
