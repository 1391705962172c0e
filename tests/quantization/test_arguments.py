"""The checks of arguments, and the errors for wrong arguments."""

import itertools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from altgrad.quantization.arguments import (
    INPUT_DTYPES,
    check_input,
    check_out,
    check_pair,
    get_full_dtype,
    prepare_scale,
)

SIZES = (0, 1, 2, 3)
SHAPES = [shape for n in range(4) for shape in itertools.product(SIZES, repeat=n)]


def broadcasts(shape, to):
    try:
        return torch.broadcast_shapes(shape, to) == torch.Size(to)
    except RuntimeError:
        return False


# --- tensors -------------------------------------------------------------------------------------


def test_the_full_dtype_is_float64_for_float64_and_float32_for_narrower_inputs():
    full = {dtype: get_full_dtype(torch.ones(1, dtype=dtype)) for dtype in INPUT_DTYPES}
    float32 = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float32)
    assert full == {**float32, torch.float64: torch.float64}


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_dense_floating_point_tensors_are_accepted(dtype, shape):
    check_input(torch.ones(shape, dtype=dtype))
    check_pair("a", torch.ones(shape, dtype=dtype), "b", torch.ones(shape))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([1.0], "weights: expected a torch.Tensor, got list"),
        (torch.ones(1).to_sparse(), "expected a dense tensor: convert with weights.to_dense()"),
        (torch.ones(1).long(), "weights has dtype torch.int64; expected float16"),
        (torch.ones(1).to(torch.float8_e4m3fn), "convert with weights.float(), which is exact"),
    ],
    ids=["no tensor", "sparse", "int", "8 bits"],
)
def test_the_error_for_another_input_names_the_argument_and_a_remedy(wrong, said):
    with pytest.raises(TypeError, match=re.escape(said)):
        check_input(wrong, "weights")
    for pair in (
        ("weights", wrong, "other", torch.ones(1)),
        ("o", torch.ones(1), "weights", wrong),
    ):
        with pytest.raises(TypeError, match=re.escape(said)):
            check_pair(*pair)


def test_a_pair_of_different_shapes_is_refused_even_if_one_broadcasts():
    with pytest.raises(
        ValueError, match=r"^a has shape \(2, 3\) and b \(1, 3\); expected the same"
    ):
        check_pair("a", torch.ones(2, 3), "b", torch.ones(1, 3))


# --- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, np.float32(0.3), Fraction(1, 3), 2**70, 0.1], ids=repr)
def test_any_type_of_number_becomes_a_float_of_the_same_value(number):
    scale = prepare_scale(number, torch.ones(2))
    assert type(scale) is float
    assert scale == float(number)


@pytest.mark.parametrize("number", [0.0, -0.0, -2.0, math.inf, math.nan, 0, Fraction(-1, 3)])
def test_a_number_that_is_not_positive_and_finite_is_refused(number):
    with pytest.raises(ValueError, match=f"scale={float(number)!r}: expected a positive finite"):
        prepare_scale(number, torch.ones(2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_is_accepted_if_it_broadcasts_to_the_shape_of_x(shape):
    x = torch.ones(shape)
    taken = 0
    for other in SHAPES:
        scale = torch.ones(other)
        if broadcasts(other, shape):
            assert prepare_scale(scale, x) is scale
            taken += 1
        else:
            with pytest.raises(ValueError, match="does not broadcast"):
                prepare_scale(scale, x)
    assert taken == len({*ways_to_broadcast(shape)})


def ways_to_broadcast(shape):
    """Drop leading dimensions, and set any of the others to 1."""
    for start in range(len(shape) + 1):
        for kept in itertools.product((True, False), repeat=len(shape) - start):
            pairs = zip(shape[start:], kept, strict=True)
            yield tuple(size if keep else 1 for size, keep in pairs)


def test_scales_in_a_format_of_8_bits_become_float32():
    scale = torch.tensor([0.5, 448.0, 2.0**-9]).to(torch.float8_e4m3fn)
    checked = prepare_scale(scale, torch.ones(3))
    assert checked.dtype is torch.float32
    assert checked.tolist() == [0.5, 448.0, 2.0**-9]


def test_a_scale_records_no_gradient_and_is_not_copied():
    scale = torch.ones(3, requires_grad=True)
    checked = prepare_scale(scale, torch.ones(2, 3))
    assert not checked.requires_grad
    assert checked.data_ptr() == scale.data_ptr()
    assert scale.requires_grad


# --- out= ----------------------------------------------------------------------------------------


def test_out_with_the_dtype_and_shape_of_the_result_is_accepted_even_if_it_is_x():
    x = torch.ones(2, 3)
    for out in (x, torch.ones(2, 3), torch.ones(3, 2).t()):
        check_out(out, x, 1.0, torch.float32)
    half = torch.ones(2, 3).half()
    check_out(x, half, torch.ones(2, 1), torch.float32)


@pytest.mark.parametrize(
    ("out", "error", "said"),
    [
        (torch.ones(2).double(), TypeError, "out has dtype torch.float64; expected torch.fl"),
        (torch.ones(1), ValueError, "out has shape (1,); expected (2,)"),
        (torch.ones(2, requires_grad=True), ValueError, "out= cannot record a gradient"),
    ],
    ids=["dtype", "shape", "gradient"],
)
def test_the_error_for_a_wrong_out_names_its_dtype_or_shape(out, error, said):
    with pytest.raises(error, match=re.escape(said)):
        check_out(out, torch.ones(2), 1.0, torch.float32)


def test_out_that_is_the_scale_is_refused():
    scale = torch.ones(2)
    with pytest.raises(ValueError, match="out is the same tensor as scale"):
        check_out(scale, torch.ones(2), scale, torch.float32)


def test_out_is_accepted_for_an_x_with_a_gradient_only_under_no_grad():
    x, out = torch.ones(2, requires_grad=True), torch.ones(2)
    with pytest.raises(ValueError, match=r"omit out="):
        check_out(out, x, 1.0, torch.float32)
    with torch.no_grad():
        check_out(out, x, 1.0, torch.float32)
