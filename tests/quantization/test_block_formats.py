"""MX and NVFP4 against their definitions, written with numpy and gfloat."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import gfloat
import numpy as np
import pytest
import torch
from gfloat.formats import (
    format_info_ocp_e2m1,
    format_info_ocp_e2m3,
    format_info_ocp_e3m2,
    format_info_ocp_e4m3,
    format_info_ocp_e5m2,
)

from altgrad import WeightStorage, measure
from altgrad.quantization import BLOCK_FORMATS, E2M1, E4M3, BlockFormat, FloatFormat, get_formats
from altgrad.quantization.scaling import compute_amax

INFOS = {
    "mxfp8_e4m3": format_info_ocp_e4m3,
    "mxfp8_e5m2": format_info_ocp_e5m2,
    "mxfp6_e2m3": format_info_ocp_e2m3,
    "mxfp6_e3m2": format_info_ocp_e3m2,
    "mxfp4": format_info_ocp_e2m1,
    "nvfp4": format_info_ocp_e2m1,
}
INFOS |= {f"{name}_ceil": info for name, info in INFOS.items() if name.startswith("mx")}


def oracle_scales(x: np.ndarray, name: str) -> np.ndarray:
    """Return the scale of each block by the definitions."""
    info, size = INFOS[name], BLOCK_FORMATS[name].block_size
    blocks = [x[:, start : start + size] for start in range(0, x.shape[1], size)]
    amax = np.stack([np.abs(block).max(axis=1) for block in blocks], axis=1)
    if name.endswith("_ceil"):
        return np.vectorize(lambda each: smallest_fitting(each, float(info.max)))(amax)
    if name != "nvfp4":
        exponents = np.floor(np.log2(np.where(amax == 0, 1, amax))) - math.floor(
            math.log2(info.max)
        )
        return np.where(amax == 0, 1, 2.0 ** exponents.clip(-127, 127))
    tensor_scale = float(np.float32(amax.max() / (448 * 6)))
    raw = gfloat.round_ndarray(format_info_ocp_e4m3, amax / 6 / tensor_scale)
    return np.where(amax == 0, 1, np.maximum(raw, 2.0**-9) * tensor_scale)


def smallest_fitting(amax: float, top: float) -> float:
    """Return the smallest power of two, within e8m0, under which an amax does not clip."""
    exponent = -127
    while Fraction(top) * Fraction(2) ** exponent < Fraction(amax) and exponent < 127:
        exponent += 1
    return 2.0**exponent if amax else 1.0


@pytest.fixture
def weights() -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(12, 100) * 2.0 ** torch.randint(-20, 4, (12, 1))  # a last block of 4
    x[3, :32] = 0
    return x


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_scales_equal_those_of_the_specifications(name: str, weights: torch.Tensor) -> None:
    amax = compute_amax(weights, ("block", BLOCK_FORMATS[name].block_size))
    scales = BLOCK_FORMATS[name].scales(amax, compute_amax(weights, "tensor")).numpy()
    assert np.array_equal(scales, oracle_scales(weights.double().numpy(), name))
    assert (scales > 0).all()
    if name == "nvfp4":
        largest = scales[scales != 1].max()  # 1 is that of the block of zeros
        assert (scales == 2.0**-9 * largest / 448).any()  # the smallest one is used


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_figures_equal_those_of_rounding_each_block(name: str, weights: torch.Tensor) -> None:
    updates = weights * torch.randn_like(weights) * 0.3
    after = weights + updates
    figures = measure(weights, after, formats=name)
    w, v = weights.double().numpy(), after.double().numpy()
    size, info = BLOCK_FORMATS[name].block_size, INFOS[name]
    scale = oracle_scales(w, name).repeat(size, axis=1)[:, : w.shape[1]]
    wide = gfloat.FormatInfo(  # going on above the top
        "wide", 1 + 9 + info.precision - 1, info.precision, bias=info.bias, is_signed=True,
        domain=gfloat.Domain.Finite, has_nz=True, num_high_nans=0, has_subnormals=True,
        is_twos_complement=False,
    )  # fmt: skip
    stored = gfloat.round_ndarray(wide, (w / scale).clip(-info.max, info.max)) * scale
    d = v - w
    effective = gfloat.round_ndarray(wide, (stored + d) / scale) * scale - stored
    moved = d != 0
    assert figures[f"stall_frac/{name}"] == ((effective == 0) & moved).sum() / moved.sum()
    assert figures[f"kept_update_ratio/{name}"] == pytest.approx(
        (effective * d).sum() / (d * d).sum(), rel=1e-12
    )
    unclipped = gfloat.round_ndarray(wide, w / scale) * scale
    assert figures[f"saturated_frac/{name}"] == (unclipped != stored).mean()
    assert figures[f"grid_error_max/{name}"] == pytest.approx(np.abs(w - stored).max(), rel=1e-15)
    assert 0 < figures[f"stall_frac/{name}"] < 1


def test_the_rule_of_ocp_rounds_the_scale_down_so_that_some_weights_clip(
    weights: torch.Tensor,
) -> None:
    figures = measure(weights, weights * 1.01, formats=["mxfp8_e4m3", "mxfp8_ceil", "e4m3fn"])
    assert figures["saturated_frac/mxfp8_e4m3"] > 0
    assert figures["saturated_frac/mxfp8_e4m3_ceil"] == 0
    assert figures["saturated_frac/e4m3fn"] == 0


def test_scales_of_e8m0_round_as_their_rule_says() -> None:
    """E2M1 ends at 6: 6.0 fits a scale of 1 exactly, and 6.1 clips unless the scale is raised."""
    amax = torch.tensor([4.0, 6.0, 6.1, 7.9, 8.0, 2.0**-140, 2.0**127, 0.0], dtype=torch.float64)
    down = BlockFormat("down", E2M1, 32, "e8m0").scales(amax)
    up = BlockFormat("up", E2M1, 32, "e8m0_ceil").scales(amax)
    assert down.tolist() == [1.0, 1.0, 1.0, 1.0, 2.0, 2.0**-127, 2.0**125, 1.0]
    assert up.tolist() == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0**-127, 2.0**125, 1.0]


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"scale": "e8m0_floor"}, ValueError, "scale='e8m0_floor': .*'e8m0', 'e8m0_ceil', 'e4m3'"),
        ({"scale": None}, ValueError, "scale=None: expected one of"),
        ({"scale": ["e8m0"]}, ValueError, r"scale=\['e8m0'\]: expected one of"),
        ({"block_size": -4}, ValueError, "block_size=-4: expected 1 or more"),
        ({"block_size": 0}, ValueError, "block_size=0: expected 1 or more"),
        ({"block_size": True}, TypeError, "block_size=True: expected int"),
        ({"block_size": 32.0}, TypeError, "block_size=32.0: expected int"),
        ({"block_size": None}, TypeError, "block_size=None: expected int"),
        ({"name": "a/b"}, ValueError, "name='a/b': .* without '/'"),
        ({"name": ""}, ValueError, "non-empty name"),
        ({"name": 4}, TypeError, "name=4: expected str"),
        ({"element": "e4m3"}, TypeError, "element='e4m3': expected FloatFormat"),
    ],
    ids=repr,
)
def test_invalid_fields_are_an_error_that_lists_what_is_allowed(
    fields: dict[str, Any], error: type[Exception], said: str
) -> None:
    valid = {"name": "mine", "element": E4M3, "block_size": 32, "scale": "e8m0"}
    with pytest.raises(error, match=said):
        BlockFormat(**valid | fields)
    with pytest.raises(error, match=said):
        dataclasses.replace(BLOCK_FORMATS["mxfp4"], **fields)


@pytest.mark.parametrize("name", [name for name in BLOCK_FORMATS if name.endswith("_ceil")])
def test_a_storage_rounds_scales_up_as_the_format_says(name: str) -> None:
    layer = torch.nn.Linear(64, 4, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    original = layer.weight.detach().double().numpy()
    scale = oracle_scales(original, name).repeat(32, axis=1)
    with WeightStorage(name).attach(optimizer):
        stored = layer.weight.detach().double().numpy()
    assert np.array_equal(stored, gfloat.round_ndarray(INFOS[name], original / scale) * scale)


def test_names_are_found_in_any_case_and_in_lists() -> None:
    assert get_formats(["MXFP8", "nvfp4", "bf16"])[0] is BLOCK_FORMATS["mxfp8_e4m3"]
    own = BlockFormat("mine", E4M3, 8, "e8m0")
    assert get_formats(own) == (own,)
    with pytest.raises(ValueError, match=r"'mxfp5'; nearest: .*mxfp4"):
        get_formats("mxfp5")
    with pytest.raises(ValueError, match="two different formats are named 'nvfp4'"):
        get_formats(["nvfp4", FloatFormat("nvfp4", 2, 1, 1)])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 5)])
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_every_shape_has_blocks(name: str, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.7)
    figures = measure(x, x * 1.5, formats=name)
    assert math.isnan(figures[f"stall_frac/{name}"]) is (x.numel() == 0)
