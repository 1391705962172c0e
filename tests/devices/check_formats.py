"""Formats round tensors of a device to the bits that the CPU gives, and keep them there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from altgrad import measure, quantization
from altgrad.quantization import FORMATS, FloatFormat
from tests.devices.simulated import is_on_device
from tests.devices.training import make_pairs, make_slow_but

EVERY = (*FORMATS.values(), FloatFormat("ftz", 3, 2, 3, has_subnormals=False))
DTYPES = torch.float16, torch.bfloat16, torch.float32
SCALINGS = "tensor", "channel", ("block", 16)


def make_values(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return values of all magnitudes with zeros, infinities and NaN, (24, 40)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(24, 40, generator=generator)
    values *= 2.0 ** torch.randint(-20, 20, (24, 1), generator=generator)
    values[0, :4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    values[1] = 0
    return values.to(dtype)


def assert_alike(compute: Callable[..., Any], device: torch.device, *inputs: Any) -> None:
    """Assert that a function gives the same on the device as on the CPU, and leaves it there."""
    there = [each.to(device) if isinstance(each, Tensor) else each for each in inputs]
    expected, found = compute(*inputs), compute(*there)
    if isinstance(expected, Tensor):
        assert is_on_device(found)
        assert found.dtype == expected.dtype
        found = found.cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("format", "dtype"),
    make_pairs((EVERY[-1], torch.float32), EVERY, DTYPES),
    ids=str,
)
def test_rounding_and_spacing_are_those_of_the_cpu(
    device: torch.device, format: FloatFormat, dtype: torch.dtype
) -> None:
    x = make_values(dtype)
    for rounding in ("nearest_even", "toward_zero", "up", "down"):
        for scale in (1.0, 2.0**-3, 0.3, 1e-30):
            assert_alike(
                lambda x, s=scale, r=rounding: quantization.quantize(x, format, s, rounding=r),
                device,
                x,
            )
    assert_alike(lambda x: quantization.spacing(x, format, 0.3), device, x)


@pytest.mark.parametrize("name", make_slow_but(["e4m3fn"], ["e4m3fn", "e2m1", "bf16"]))
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_scales_and_what_they_round_are_those_of_the_cpu(
    device: torch.device, name: str, scaling: Any
) -> None:
    def scale_and_round(x: Tensor) -> Tensor:
        return quantization.quantize(x, name, quantization.compute_scale(x, name, scaling=scaling))

    for dtype in DTYPES:
        assert_alike(scale_and_round, device, make_values(dtype))
        for rule in (True, False, "floor"):
            assert_alike(
                lambda x, r=rule: quantization.compute_scale(
                    x, name, scaling=scaling, power_of_two=r
                ),
                device,
                make_values(dtype),
            )


@pytest.mark.parametrize("name", make_slow_but(["e4m3fn"], ["e4m3fn", "e2m1", "e0m7"]))
def test_diagnostics_are_those_of_the_cpu(device: torch.device, name: str) -> None:
    before = make_values(torch.float32)
    update = make_values(torch.float32, seed=1) * 1e-3
    scale = torch.tensor(0.25)
    one = quantization.grid_alignment_error, quantization.grid_alignment_statistics
    two = quantization.effective_update, quantization.stall_mask, quantization.visible_mask
    for compute in one:
        assert_alike(compute, device, before, name)
    for compute in two:
        assert_alike(compute, device, before, update, name)
        assert_alike(compute, device, before, update, name, scale)
    for options in ({"format": name, "scale": 0.5}, {"mantissa_bits": 3}, {"mantissa_bits": 0}):
        stiffness = partial(quantization.compute_stiffness_field, **options)
        assert_alike(stiffness, device, before)
        correlation = partial(quantization.gradient_stiffness_correlation, **options)
        assert_alike(correlation, device, before, update)
    assert_alike(quantization.compute_ulp_distance, device, before, before + update)
    assert_alike(quantization.ulp_statistics, device, before, before + update)


@pytest.mark.parametrize("scaling", make_slow_but(["channel"], [*SCALINGS, None]), ids=str)
def test_a_measured_step_has_the_figures_of_the_cpu(device: torch.device, scaling: Any) -> None:
    formats = "bf16", "e4m3fn", "nvfp4", "mxfp8_e4m3", "e0m7"
    for dtype in DTYPES:
        before = make_values(dtype)
        gradient = make_values(dtype, seed=1)
        after = before - 1e-3 * gradient
        assert_alike(lambda *x: measure(*x, formats, scaling), device, before, after, gradient)


def test_gradients_pass_straight_through(device: torch.device) -> None:
    x = torch.tensor([0.3, 1e6, -2.0]).to(device).requires_grad_()
    (quantization.quantize(x, "e4m3fn", 0.3) * 3).sum().backward()
    assert is_on_device(x.grad)
    assert x.grad.cpu().tolist() == [3, 3, 3]


def test_a_result_is_written_to_out(device: torch.device) -> None:
    x = make_values(torch.float32).to(device)
    out = torch.empty_like(x)
    assert quantization.quantize(x, "e4m3fn", 0.3, out=out) is out
    expected = quantization.quantize(x.cpu(), "e4m3fn", 0.3)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_stochastic_rounding_draws_on_the_host_without_float64(limited: torch.device) -> None:
    def draw(x: Tensor) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(3)
        return quantization.quantize(x, "e4m3fn", 0.3, rounding="stochastic", generator=generator)

    assert_alike(draw, limited, make_values(torch.float32))
