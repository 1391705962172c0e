"""DIAG-01 to 04 on unusual inputs: empty tensors, NaN and inf, wrong shapes and dtypes."""

import math

import pytest
import torch

from altgrad.quantization import (
    compute_scale,
    compute_stiffness_field,
    compute_ulp_distance,
    get_format,
    gradient_stiffness_correlation,
    grid_alignment_error,
    grid_alignment_statistics,
    ulp_statistics,
)
from tests.contract import CORRELATION_KEYS, DTYPES, GRID_KEYS, ULP_KEYS, dtype_id, random_normal

# Nothing to measure


def test_empty_tensors_give_nan_or_zero():
    empty = torch.zeros(0, 3)
    assert compute_stiffness_field(empty, 3).shape == (0, 3)
    assert compute_stiffness_field(empty, format="bf16").shape == (0, 3)
    assert grid_alignment_error(empty, "e4m3fn").shape == (0, 3)
    assert compute_ulp_distance(empty, empty).shape == (0, 3)
    grid, ulp = grid_alignment_statistics(empty, "e4m3fn"), ulp_statistics(empty, empty)
    assert set(grid) == GRID_KEYS
    assert set(ulp) == ULP_KEYS
    assert all(math.isnan(value) for value in (*grid.values(), *ulp.values()))
    assert gradient_stiffness_correlation(empty, empty, 3) == dict.fromkeys(CORRELATION_KEYS, 0.0)


@pytest.mark.parametrize(
    ("weights", "gradients"),
    [([0.0, -0.0], [1.0, 2.0]), ([math.nan, math.inf], [1.0, 2.0]), ([1.0, 2.0], [math.nan] * 2)],
    ids=["zero weights", "weights not finite", "gradients not finite"],
)
@pytest.mark.parametrize("grid", [{"mantissa_bits": 2}, {"mantissa_bits": 7}, {"format": "bf16"}])
def test_without_valid_weights_all_three_figures_are_zero(weights, gradients, grid):
    result = gradient_stiffness_correlation(torch.tensor(weights), torch.tensor(gradients), **grid)
    assert result == dict.fromkeys(CORRELATION_KEYS, 0.0)


@pytest.mark.parametrize(
    ("weights", "gradients"),
    [([1.0, 1.5, -1.2], [0.1, 0.2, 0.3]), ([1.0, 4.0, 8.0], [0.1, -0.1, 0.1]), ([1.0], [0.1])],
    ids=["stiffness", "gradient", "one weight"],
)
def test_the_correlation_with_a_constant_is_nan(weights, gradients):
    result = gradient_stiffness_correlation(torch.tensor(weights), torch.tensor(gradients), 3)
    assert math.isnan(result["grad_stiff_correlation"])
    assert result["grad_stiff_ratio_mean"] > 0
    assert result["grad_below_stiffness_frac"] > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_and_inf_give_nan_or_inf_at_their_own_element(dtype):
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=dtype)
    one = torch.ones(4, dtype=dtype)
    defined = [False, False, False, True]
    for grid in ({"mantissa_bits": 3}, {"mantissa_bits": 7}, {"format": "e4m3fn"}):
        assert (~compute_stiffness_field(odd, **grid).isnan()).tolist() == defined
    error = grid_alignment_error(odd, "e4m3fn")
    assert error[0].isnan()
    assert error[1:].tolist() == [math.inf, math.inf, 0.0]
    for pair in ((odd, one), (one, odd), (odd, odd)):
        assert (~compute_ulp_distance(*pair).isnan()).tolist() == defined


def test_nan_and_inf_are_left_out_of_statistics():
    weights, after = random_normal(100), random_normal(100) * 1.01
    odd, ones = torch.tensor([math.nan, math.inf, -math.inf]), torch.ones(3)
    assert grid_alignment_statistics(torch.cat([weights, odd]), "e2m1") == (
        grid_alignment_statistics(weights, "e2m1")
    )
    more, more_after = torch.cat([weights, odd, ones]), torch.cat([after, ones, odd])
    assert ulp_statistics(more, more_after) == ulp_statistics(weights, after)
    assert gradient_stiffness_correlation(more, more_after, 3) == (
        gradient_stiffness_correlation(weights, after, 3)
    )


# What is an error


@pytest.mark.parametrize("function", [compute_stiffness_field, gradient_stiffness_correlation])
def test_exactly_one_of_mantissa_bits_and_format_is_required(function):
    tensors = (torch.ones(3),) * (2 if function is gradient_stiffness_correlation else 1)
    with pytest.raises(TypeError, match=r"mantissa_bits=None and format=None.*exactly one"):
        function(*tensors)
    with pytest.raises(TypeError, match=r"mantissa_bits=3 and format='e4m3fn'.*exactly one"):
        function(*tensors, 3, format="e4m3fn")
    with pytest.raises(TypeError, match=r"mantissa_bits=0 and format='e4m3fn'.*exactly one"):
        function(*tensors, mantissa_bits=0, format="e4m3fn")


@pytest.mark.parametrize("scale", [2.0, torch.ones(())], ids=["number", "tensor"])
@pytest.mark.parametrize("function", [compute_stiffness_field, gradient_stiffness_correlation])
def test_scale_without_format_is_an_error(function, scale):
    tensors = (torch.ones(3),) * (2 if function is gradient_stiffness_correlation else 1)
    with pytest.raises(TypeError, match="scale is for format="):
        function(*tensors, 3, scale=scale)


@pytest.mark.parametrize(("bits", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_mantissa_bits_is_an_int_from_0_to_256(bits, error):
    with pytest.raises(error, match=f"mantissa_bits={bits}"):
        compute_stiffness_field(torch.ones(3), bits)


ONE_TENSOR = {
    "stiffness": lambda x: compute_stiffness_field(x, 3),
    "stiffness of format": lambda x: compute_stiffness_field(x, format="bf16"),
    "grid error": lambda x: grid_alignment_error(x, "e4m3fn"),
    "grid statistics": lambda x: grid_alignment_statistics(x, "e4m3fn"),
}
TWO_TENSORS = {
    "ulp distance": (compute_ulp_distance, "before", "after"),
    "ulp statistics": (ulp_statistics, "before", "after"),
    "correlation": (
        lambda w, g: gradient_stiffness_correlation(w, g, 3),
        "weights",
        "gradients",
    ),
    "correlation of format": (
        lambda w, g: gradient_stiffness_correlation(w, g, format="bf16", scale=0.5),
        "weights",
        "gradients",
    ),
}


@pytest.mark.parametrize("function", TWO_TENSORS)
def test_the_error_for_different_shapes_names_both(function):
    function, first, second = TWO_TENSORS[function]
    with pytest.raises(ValueError, match=rf"{first} has shape \(2, 3\) and {second} \(3,\)"):
        function(torch.ones(2, 3), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn], ids=dtype_id)
@pytest.mark.parametrize("function", [*ONE_TENSOR, *TWO_TENSORS])
def test_other_dtypes_are_errors_that_name_argument_and_dtype(function, dtype):
    wrong, ones = torch.ones(3).to(dtype), torch.ones(3)
    if function in ONE_TENSOR:
        with pytest.raises(TypeError, match=f"weights has dtype {dtype}; expected float16"):
            ONE_TENSOR[function](wrong)
        return
    function, first, second = TWO_TENSORS[function]
    with pytest.raises(TypeError, match=f"{first} has dtype {dtype}; expected float16"):
        function(wrong, ones)
    with pytest.raises(TypeError, match=f"{second} has dtype {dtype}; expected float16"):
        function(ones, wrong)


@pytest.mark.parametrize("function", [compute_ulp_distance, ulp_statistics])
def test_different_dtypes_are_refused_for_ulps(function):
    message = r"before has dtype torch\.bfloat16 and after torch\.float32"
    with pytest.raises(TypeError, match=message):
        function(torch.ones(3, dtype=torch.bfloat16), torch.ones(3))


# Inputs are left alone


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("function", [*ONE_TENSOR, *TWO_TENSORS])
def test_inputs_do_not_change_and_no_gradient_is_recorded(function, dtype):
    before = torch.tensor([1.05, -700.0, -0.0, 3.0, math.inf], dtype=dtype, requires_grad=True)
    after = torch.tensor([1.25, -7.0, -0.3, 0.1, 1.0], dtype=dtype, requires_grad=True)
    inputs = (before,) if function in ONE_TENSOR else (before, after)
    call = ONE_TENSOR[function] if function in ONE_TENSOR else TWO_TENSORS[function][0]
    copies = [x.detach().clone() for x in inputs]
    result = call(*inputs)
    if isinstance(result, torch.Tensor):
        assert not result.requires_grad
        assert result.data_ptr() not in {x.data_ptr() for x in inputs}
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x, copy)
        assert torch.equal(x.signbit(), copy.signbit())


@pytest.mark.parametrize("scaling", ["tensor", "channel", ("block", 4)], ids=str)
def test_amax_scales_of_every_kind_are_accepted(scaling):
    weights, gradients = random_normal(6, 10) * 1e-4, random_normal(6, 10, seed=1)
    scale = compute_scale(weights, "e4m3fn", scaling=scaling)
    wide = scale.expand(weights.shape).double()
    unscaled = weights.double() / wide
    top = get_format("e4m3fn").max
    assert (unscaled.abs() <= top).all()
    stiffness = compute_stiffness_field(unscaled, format="e4m3fn") * wide
    error = grid_alignment_error(unscaled, "e4m3fn") * wide
    assert torch.equal(
        compute_stiffness_field(weights, format="e4m3fn", scale=scale), stiffness.float()
    )
    assert torch.equal(grid_alignment_error(weights, "e4m3fn", scale), error.float())
    result = gradient_stiffness_correlation(weights, gradients, format="e4m3fn", scale=scale)
    below = (gradients.abs() < stiffness).double().mean().item()
    assert result["grad_below_stiffness_frac"] == below
