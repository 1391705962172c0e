"""DIAG-01 to 04: the twenty behaviours of the contract, one test each.

What holds bit for bit is in test_advanced_diagnostics_exact.py, errors and odd inputs in
test_advanced_diagnostics_inputs.py.
"""

import math

import pytest
import torch

from altgrad.quantization import (
    compute_stiffness_field,
    compute_ulp_distance,
    gradient_stiffness_correlation,
    grid_alignment_error,
    grid_alignment_statistics,
    stall_mask,
    ulp_statistics,
)
from tests.contract import CORRELATION_KEYS, DTYPES, GRID_KEYS, ULP_KEYS, dtype_id, random_normal

# DIAG-01: stiffness


def test_stiffness_formula_at_one_with_two_mantissa_bits_is_a_quarter():
    assert compute_stiffness_field(torch.tensor([1.0]), 2).tolist() == [0.25]


def test_larger_weight_has_larger_stiffness():
    stiffness = compute_stiffness_field(torch.tensor([0.1, 1.0, 10.0, 100.0]), 2)
    assert stiffness.tolist() == [2.0**-6, 2.0**-2, 2.0**1, 2.0**4]


def test_zero_weight_gives_nan_stiffness():
    stiffness = compute_stiffness_field(torch.tensor([0.0, -0.0, 1.0]), 3)
    assert stiffness.isnan().tolist() == [True, True, False]


def test_e0m7_stiffness_is_constant():
    weights = torch.tensor([1e-30, 0.01, -0.5, 1.0, 100.0, 3e38, 0.0])
    stiffness = compute_stiffness_field(weights, mantissa_bits=7)
    assert stiffness[:-1].tolist() == [1 / 128] * 6
    assert stiffness[-1].isnan()


@pytest.mark.parametrize("mantissa_bits", [0, 2, 7])
def test_sign_of_the_weight_does_not_matter(mantissa_bits):
    weights = random_normal(1000)
    stiffness = compute_stiffness_field(weights, mantissa_bits)
    assert torch.equal(stiffness, compute_stiffness_field(-weights, mantissa_bits))
    assert (stiffness > 0).all()


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4, 5)], ids=str)
def test_stiffness_keeps_the_batch_shape(shape):
    weights = random_normal(*shape) if shape else torch.tensor(3.0)
    stiffness = compute_stiffness_field(weights, 3)
    assert stiffness.shape == shape
    flat = [compute_stiffness_field(weight, 3).item() for weight in weights.flatten()]
    assert stiffness.flatten().tolist() == flat


# DIAG-02: grid alignment


def test_weight_on_the_grid_has_zero_error():
    weights = torch.tensor([0.0, 1.0, -1.125, 448.0, 2.0**-9])
    assert grid_alignment_error(weights, "e4m3fn").tolist() == [0.0] * 5
    assert grid_alignment_statistics(weights, "e4m3fn")["on_grid_frac"] == 1.0


def test_midpoint_has_positive_error():
    """The error is half the spacing, also for negative and subnormal midpoints."""
    error = grid_alignment_error(torch.tensor([1.0625, -1.0625, 2.0**-10]), "e4m3fn")
    assert error.tolist() == [0.0625, 0.0625, 2.0**-10]


def test_grid_alignment_statistics_keys():
    statistics = grid_alignment_statistics(random_normal(10), "e4m3fn")
    assert set(statistics) == GRID_KEYS
    assert all(type(value) is float for value in statistics.values())


def test_clamped_values_have_their_distance_from_max():
    weights = torch.tensor([1000.0, -1000.0, 449.0, 1e30, math.inf])
    error = grid_alignment_error(weights, "e4m3fn")
    top = torch.tensor([552.0, 552.0, 1.0, 1e30, math.inf])
    assert torch.equal(error, top)
    assert grid_alignment_error(weights[:1], "e4m3fn", 2.0).tolist() == [104.0]  # max is 896


# DIAG-03: ULP distance


def test_identical_weights_are_zero_ulp_apart():
    weights = torch.cat([random_normal(1000), torch.tensor([0.0, 1e-45, 3.4e38])])
    assert torch.equal(compute_ulp_distance(weights, weights.clone()), torch.zeros(1003))


def test_one_ulp_is_one():
    weights = random_normal(1000)
    up = torch.nextafter(weights, torch.tensor(math.inf))
    assert torch.equal(compute_ulp_distance(weights, up), torch.ones(1000))


def test_ulp_statistics_keys():
    statistics = ulp_statistics(random_normal(10), random_normal(10, seed=1))
    assert set(statistics) == ULP_KEYS
    assert all(type(value) is float for value in statistics.values())


def test_ulp_zero_fraction_is_the_share_of_stalled_weights():
    """Updates far below the ULP are lost when added in the weights' own dtype."""
    before = torch.ones(8, dtype=torch.bfloat16)
    update = torch.tensor([1e-3] * 6 + [0.1] * 2, dtype=torch.bfloat16)
    assert ulp_statistics(before, before + update)["ulp_zero_frac"] == 0.75
    assert stall_mask(before, update, "bf16").float().mean() == 0.75


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_ulp_distance_uses_nextafter(monkeypatch, dtype):
    calls, nextafter = [], torch.nextafter

    def spy(start, end):
        calls.append((start.dtype, start.tolist(), end.tolist()))
        return nextafter(start, end)

    monkeypatch.setattr(torch, "nextafter", spy)
    distance = compute_ulp_distance(
        torch.tensor([1.0, -2.0], dtype=dtype), torch.tensor([1.5, 0.5], dtype=dtype)
    )
    # From the larger magnitude towards zero.
    assert calls == [(dtype, [1.5, 2.0], [0.0, 0.0])]
    eps = torch.finfo(dtype).eps
    assert distance.tolist() == [0.5 / eps, 2.5 / eps]


# DIAG-04: gradient against stiffness


@pytest.mark.parametrize("seed", range(5))
def test_correlation_lies_between_minus_one_and_one(seed):
    """A perfect correlation must not round to 1 + 2**-52."""
    weights = random_normal(200, seed=seed)
    stiffness = compute_stiffness_field(weights, 3)
    for gradients in (random_normal(200, seed=seed + 9), stiffness * 0.3, 2 - stiffness * 0.3):
        correlation = gradient_stiffness_correlation(weights, gradients, 3)
        assert set(correlation) == CORRELATION_KEYS
        assert all(type(value) is float for value in correlation.values())
        assert -1 <= correlation["grad_stiff_correlation"] <= 1


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_correlation_is_positive_when_aligned(sign):
    """The magnitudes are aligned; the sign of gradients does not matter."""
    weights = torch.tensor([0.1, 0.5, 1.0, 2.0, 8.0])
    gradients = sign * torch.tensor([0.01, 0.05, 0.1, 0.2, 0.8])
    correlation = gradient_stiffness_correlation(weights, gradients, 2)["grad_stiff_correlation"]
    assert correlation > 0.99
    opposed = gradient_stiffness_correlation(weights, gradients.flip(0), 2)
    assert opposed["grad_stiff_correlation"] < 0


def test_zero_weights_are_masked():
    weights, gradients = random_normal(100), random_normal(100, seed=1)
    holes = torch.cat([weights, torch.zeros(50)]), torch.cat([gradients, torch.full((50,), 1e6)])
    expected = gradient_stiffness_correlation(weights, gradients, 2)
    assert gradient_stiffness_correlation(*holes, 2) == expected


def test_ratio_below_one_means_stall():
    weights, gradients = torch.ones(4), torch.tensor([0.01, -0.02, 0.03, 0.04])
    result = gradient_stiffness_correlation(weights, gradients, 3)
    assert result["grad_stiff_ratio_mean"] == pytest.approx(0.025 * 8)
    assert result["grad_below_stiffness_frac"] == 1.0
    assert stall_mask(weights, gradients, "e4m3fn").all()


def test_below_stiffness_fraction():
    """The stiffness at 1 is 1/8, and a gradient equal to it is not below."""
    gradients = torch.tensor([0.1, -0.1, 0.125, 0.2, -0.0])
    result = gradient_stiffness_correlation(torch.ones(5), gradients, 3)
    assert result["grad_below_stiffness_frac"] == pytest.approx(3 / 5)
