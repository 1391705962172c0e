"""Arguments, errors, dtypes and gradients of `quantize`; other files test the rounding."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from altgrad.quantization import E4M3, E5M2, E6M1, FORMATS, FloatFormat, quantize
from tests import oracles
from tests.oracles import assert_same_values
from tests.quantization.matrix import EVERY_FORMAT

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ROUNDINGS = [*oracles.DETERMINISTIC, "stochastic"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_numbers(dtype=torch.float32, count=1000):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e4, -1e4])
    return torch.cat([torch.randn(count, generator=seeded()), special]).to(dtype)


# --- the dtype of the result ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0**-8, 2.0**8, 2.0**-130, 2.0**120], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_half_precision_is_kept_exactly_where_it_holds_the_scaled_grid(format, dtype, scale):
    grid = format.values() * scale
    holds = torch.equal(grid.to(dtype).double(), grid)
    expected = dtype if holds else torch.float32
    assert quantize(torch.ones(3, dtype=dtype), format, scale).dtype is expected


def fits_exactly(format, scale, dtype):
    """Return whether all values times the scale are numbers of a dtype, by exact fractions."""
    codes = range(oracles.largest_code(format) + 1)
    exact = [oracles.exact_value(format, code) * Fraction(scale) for code in codes]
    rounded = torch.tensor([float(value) for value in exact], dtype=torch.float64).to(dtype)
    finite = rounded.isfinite().all()
    return bool(finite) and [Fraction(each) for each in rounded.tolist()] == exact


@pytest.mark.parametrize("scale", [1.0, 2.0**-17, 2.0**9, 0.75, 1.5, 3.0, 0.3, 5 * 2.0**-7])
@pytest.mark.parametrize("format", ["e4m3fn", "e5m2", "e2m1", "e0m7"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_is_that_of_half_precision_only_under_a_power_of_two(dtype, format, scale):
    is_power_of_two = math.frexp(scale)[0] == 0.5
    keeps = is_power_of_two and fits_exactly(FORMATS[format], scale, dtype)
    result = quantize(torch.ones(3, dtype=dtype), format, scale)
    assert result.dtype is (dtype if keeps else torch.float32)


@pytest.mark.parametrize("scale", [1.0, 2.0**-4, 2.0**-16, 2.0**-125], ids=repr)
@pytest.mark.parametrize(
    "format",
    [
        *(FloatFormat(f"e0m{m}", 0, m, 1) for m in (8, 9, 11, 12)),  # one bit less than e1m8, …
        *(FloatFormat(f"e4m{m}-ftz", 4, m, 8, has_subnormals=False) for m in (1, 3, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_of_formats_of_ones_own_holds_every_value(dtype, format, scale):
    result = quantize(torch.ones(3, dtype=dtype), format, scale)
    assert result.dtype is (dtype if fits_exactly(format, scale, dtype) else torch.float32)


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float32_and_float64_are_kept(dtype, format):
    for scale in (1.0, 0.3, torch.tensor(0.3), torch.tensor(0.3).double()):
        assert quantize(torch.ones(3, dtype=dtype), format, scale).dtype is dtype


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_a_tensor_scale_gives_float32(dtype, scale_dtype):
    scale = torch.ones((), dtype=scale_dtype)
    assert quantize(torch.ones(3, dtype=dtype), E4M3, scale).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_a_scale_that_is_no_power_of_two_gives_float32(dtype):
    assert quantize(torch.ones(3, dtype=dtype), E4M3, 0.75).dtype is torch.float32


@every_dtype
def test_the_dtype_does_not_depend_on_values(dtype):
    kept = quantize(torch.zeros(3, dtype=dtype), E6M1).dtype
    for x in (torch.ones(3), torch.full((3,), 6e4), torch.empty(0)):
        assert quantize(x.to(dtype), E6M1).dtype is kept


@every_dtype
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_dtypes_of_scales_change_no_value(dtype, scale_dtype):
    x = some_numbers(dtype)
    scale = torch.tensor(0.25, dtype=scale_dtype)
    assert_same_values(quantize(x, E4M3, scale), quantize(x, E4M3, 0.25), x)


# --- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (1, 4), (3, 4), (2, 1, 1), (2, 3, 4)])
def test_any_scale_that_broadcasts_is_accepted(shape):
    x = torch.randn(2, 3, 4, generator=seeded())
    scale = 2.0 ** torch.randint(-4, 4, shape, generator=seeded())
    expected = torch.tensor(
        [
            quantize(value, E4M3, factor.item()).item()
            for value, factor in zip(x.flatten(), scale.expand(x.shape).flatten(), strict=True)
        ]
    )
    assert_same_values(quantize(x, E4M3, scale).flatten(), expected, x.flatten())


@pytest.mark.parametrize("scale", [2, 2.0, torch.tensor(2.0), torch.tensor([2.0])], ids=repr)
def test_a_scale_has_the_same_effect_in_every_type(scale):
    x = some_numbers()
    assert_same_values(quantize(x, E4M3, scale), quantize(x / 2, E4M3) * 2, x)


def test_a_scale_that_is_no_power_of_two_divides_first():
    x, scale = some_numbers(), 0.3
    expected = oracles.round_with_gfloat((x / torch.tensor(scale)).double(), E4M3).float() * scale
    assert_same_values(quantize(x, E4M3, scale), expected, x)
    assert_same_values(quantize(x, E4M3, torch.tensor(scale)), expected, x)


@pytest.mark.parametrize("shape", [(2,), (3,), (4, 3), (1, 1, 1), (5, 4)])
def test_a_scale_that_does_not_broadcast_to_x_names_both_shapes(shape):
    with pytest.raises(ValueError, match=r"scale of shape \(.*does not broadcast.*\(3, 4\)"):
        quantize(torch.ones(3, 4), E4M3, torch.ones(shape))


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, math.inf, -math.inf, math.nan])
def test_a_scale_must_be_positive_and_finite(scale):
    with pytest.raises(
        ValueError, match=f"scale={float(scale)}: expected a positive finite number"
    ):
        quantize(torch.ones(3), E4M3, scale)


@pytest.mark.parametrize("scale", [None, "1", True, [1.0], 1j], ids=repr)
def test_a_scale_must_be_a_number_or_tensor(scale):
    with pytest.raises(TypeError, match=r"scale=.*expected a number or a tensor"):
        quantize(torch.ones(3), E4M3, scale)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_a_scale_tensor_must_be_floating_point(dtype):
    with pytest.raises(TypeError, match=f"scale has dtype {dtype}"):
        quantize(torch.ones(3), E4M3, torch.ones((), dtype=dtype))


# --- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_other_dtypes_are_a_type_error_that_names_a_remedy(dtype):
    with pytest.raises(TypeError, match=rf"x has dtype {dtype}; expected float16.*x\.float\(\)"):
        quantize(torch.zeros(3, dtype=dtype), E4M3)


@pytest.mark.parametrize("x", [1.0, [1.0], None], ids=repr)
def test_x_must_be_a_tensor(x):
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor, got"):
        quantize(x, E4M3)


def test_unknown_formats_and_roundings_are_refused():
    with pytest.raises(ValueError, match="unknown format 'e4m9'"):
        quantize(torch.ones(3), "e4m9")
    with pytest.raises(ValueError, match="rounding='nearest': expected one of nearest_even, "):
        quantize(torch.ones(3), E4M3, rounding="nearest")


@pytest.mark.parametrize("format", [E4M3, "E4M3", torch.float8_e4m3fn], ids=repr)
def test_formats_are_found_by_name_and_dtype(format):
    assert quantize(torch.tensor(1e4), format) == 448


@every_dtype
@every_rounding
@pytest.mark.parametrize("scale", [1.0, torch.full((6, 1), 0.5)], ids=["1", "channels"])
def test_the_layout_of_x_does_not_matter(scale, rounding, dtype):
    contiguous = torch.randn(6, 10, generator=seeded()).to(dtype)
    layouts = {
        "transposed": contiguous.t().contiguous().t(),
        "strided": torch.stack([contiguous, contiguous], dim=-1)[..., 0],
        "expanded": contiguous[:, :1].expand(6, 10),
    }
    for layout, x in layouts.items():
        assert not x.is_contiguous(), layout
        actual = quantize(x, E4M3, scale, rounding=rounding, generator=seeded())
        expected = quantize(x.contiguous(), E4M3, scale, rounding=rounding, generator=seeded())
        assert_same_values(actual, expected)


@every_dtype
@every_rounding
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)], ids=str)
def test_scalars_and_empty_tensors_keep_their_shape(shape, rounding, dtype):
    x = torch.full(shape, 1e4, dtype=dtype)
    for scale in (1.0, torch.tensor(1.0)):
        q = quantize(x, E4M3, scale, rounding=rounding, generator=seeded())
        assert_same_values(q, torch.full(shape, 448.0))


@every_dtype
@every_rounding
@pytest.mark.parametrize("saturate", [True, False])
def test_inputs_do_not_change(saturate, rounding, dtype):
    x, scale = some_numbers(dtype), torch.tensor([0.5], dtype=dtype)
    before = x.clone(), scale.clone()
    for format in (E4M3, E5M2, "bf16", "e7m0", "e4m3fnuz"):
        for factor in (1.0, 4.0, scale):
            q = quantize(
                x, format, factor, rounding=rounding, saturate=saturate, generator=seeded()
            )
            assert q.data_ptr() != x.data_ptr()
    assert_same_values(x, before[0])
    assert_same_values(scale, before[1])


@every_rounding
def test_the_global_generator_does_not_advance(rounding):
    before = torch.get_rng_state()
    quantize(some_numbers(), E4M3, rounding=rounding, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


# --- out= ----------------------------------------------------------------------------------------


@every_dtype
@every_rounding
@pytest.mark.parametrize("saturate", [True, False])
def test_out_gives_the_same_values_new_or_in_place(saturate, rounding, dtype):
    given = some_numbers(dtype, 50)
    options = {"rounding": rounding, "saturate": saturate}
    without_subnormals = FloatFormat("ftz", 3, 2, 3, has_subnormals=False)
    in_place = 0
    for format in (*FORMATS.values(), without_subnormals):
        for scale in (1.0, 0.5, torch.tensor([0.5])):
            x = given.clone()
            expected = quantize(x, format, scale, **options, generator=seeded())
            out = torch.full(x.shape, 7.0, dtype=expected.dtype)
            assert quantize(x, format, scale, **options, generator=seeded(), out=out) is out
            assert_same_values(out, expected, given)
            if expected.dtype == dtype:
                assert quantize(x, format, scale, **options, generator=seeded(), out=x) is x
                assert_same_values(x, expected, given)
                in_place += 1
    assert in_place > 20


def test_out_may_be_strided():
    x = some_numbers()
    storage = torch.zeros(len(x), 2)
    quantize(x, E4M3, out=storage[:, 0])
    assert_same_values(storage[:, 0], quantize(x, E4M3), x)
    assert (storage[:, 1] == 0).all()


def test_out_of_another_dtype_or_shape_is_an_error():
    with pytest.raises(TypeError, match=r"out has dtype torch.float64; expected torch.floa"):
        quantize(torch.ones(3), E4M3, out=torch.ones(3).double())
    with pytest.raises(TypeError, match=r"out has dtype torch.bfloat16; expected torch.flo"):
        quantize(torch.ones(3).bfloat16(), E4M3, torch.ones(()), out=torch.ones(3).bfloat16())
    with pytest.raises(ValueError, match=r"out has shape \(4,\); expected \(3,\)"):
        quantize(torch.ones(3), E4M3, out=torch.ones(4))


@pytest.mark.parametrize("requires_grad", [(True, False), (False, True), (True, True)], ids=str)
def test_out_cannot_record_a_gradient(requires_grad):
    of_x, of_out = requires_grad
    x = torch.full((3,), 1.03).requires_grad_(of_x)
    out = torch.zeros(3).requires_grad_(of_out)
    with pytest.raises(ValueError, match=r"out= cannot record a gradient.*torch\.no_grad\(\)"):
        quantize(x, E4M3, out=out)
    with torch.no_grad():
        quantize(x, E4M3, out=out)
    assert out.tolist() == [1, 1, 1]


def test_parameters_are_rounded_in_place_under_no_grad():
    weight = torch.nn.Parameter(torch.tensor([1.03, 1e6]))
    with torch.no_grad():
        quantize(weight, E4M3, out=weight)
    assert weight.tolist() == [1, 448]
    assert weight.requires_grad


# --- gradients -----------------------------------------------------------------------------------


@every_dtype
@every_rounding
@pytest.mark.parametrize("saturate", [True, False])
def test_the_gradient_is_exactly_one_everywhere(saturate, rounding, dtype):
    for format in (E4M3, E5M2, "bf16", "e6m1", "e0m7"):
        for scale in (1.0, 0.3, torch.tensor(0.5)):
            x = some_numbers(dtype).requires_grad_()
            q = quantize(x, format, scale, rounding=rounding, saturate=saturate, generator=seeded())
            q.backward(torch.ones_like(q))
            assert x.grad.dtype is dtype
            assert_same_values(x.grad, torch.ones_like(x))


def test_the_incoming_gradient_is_passed_on():
    x = torch.tensor([1.03, 1e6, 0.0], requires_grad=True)
    arriving = torch.tensor([0.1, -3.0, 1e-20])
    quantize(x, E4M3).backward(arriving)
    assert_same_values(x.grad, arriving)


def test_the_scale_gets_no_gradient():
    x = torch.randn(3, generator=seeded()).requires_grad_()
    scale = torch.tensor(0.5, requires_grad=True)
    quantize(x, E4M3, scale).sum().backward()
    assert scale.grad is None
    assert not quantize(x.detach(), E4M3, scale).requires_grad


@every_rounding
def test_values_are_the_same_with_and_without_a_gradient(rounding):
    x = some_numbers()
    plain = quantize(x, E4M3, 0.5, rounding=rounding, generator=seeded())
    recorded = quantize(x.requires_grad_(), E4M3, 0.5, rounding=rounding, generator=seeded())
    assert recorded.requires_grad
    assert not plain.requires_grad
    assert_same_values(recorded, plain, x)


def test_no_grad_records_nothing():
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not quantize(x, E4M3).requires_grad
    with torch.inference_mode():
        assert not quantize(x, E4M3).requires_grad


# --- numbers of every kind as a scale, and function transforms -----------------------------------


@pytest.mark.parametrize(
    "scale", [2, 2**70, np.float32(0.5), np.float64(0.5), np.int64(4)], ids=repr
)
def test_a_scale_may_be_any_type_of_number(scale):
    x = torch.tensor([3.3, -0.1])
    assert_same_values(quantize(x, E4M3, scale), quantize(x, E4M3, float(scale)))


def test_a_scale_beyond_float64_is_refused():
    with pytest.raises(ValueError, match="expected a number within float64's range"):
        quantize(torch.ones(1), E4M3, 2**2000)


@pytest.mark.parametrize("scale", ["0.5", True, None, [1.0]], ids=repr)
def test_a_scale_that_is_not_a_number_is_refused(scale):
    with pytest.raises(TypeError, match="expected a number or a tensor"):
        quantize(torch.ones(1), E4M3, scale)


def test_out_must_not_be_the_scale():
    scale = torch.tensor(0.5)
    with pytest.raises(ValueError, match="out is the same tensor as scale"):
        quantize(torch.tensor(3.3), E4M3, scale, out=scale)


def test_torch_func_grad_is_straight_through():
    gradient = torch.func.grad(lambda x: quantize(x, E4M3, 0.5).sum())(torch.tensor([1e6, 0.3]))
    assert gradient.tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_torch_func_jvp_is_an_error_and_not_silently_zero():
    x = torch.tensor([0.3])
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: quantize(x, E4M3), (x,), (x,))


def vmap_can_view() -> bool:
    """Return whether vmap supports views of another dtype, which torch 2.6 does not."""
    try:
        torch.func.vmap(lambda row: row.view(torch.int32))(torch.ones(2, 2))
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not vmap_can_view(), reason="this torch has no batching rule for view.dtype")
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of clamp_, in torch
def test_torch_func_vmap_equals_rounding_row_by_row():
    x = oracles.random_bit_patterns(60).view(6, 10)
    assert_same_values(torch.func.vmap(lambda row: quantize(row, E4M3))(x), quantize(x, E4M3))


def test_the_default_dtype_has_no_effect():
    """`torch.where(mask, 1.0, 2.0**20)` takes the default dtype, and float16 has no 2**20."""
    format = FloatFormat("mine", 3, 20, 3, has_subnormals=False)
    x = torch.tensor([1.3, 0.01, -7.77], dtype=torch.float64)
    expected = quantize(x, format)
    torch.set_default_dtype(torch.float16)
    try:
        assert_same_values(quantize(x, format), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_scale_in_eight_bits_is_accepted():
    scale = torch.tensor(2.0**-3).to(torch.float8_e5m2)
    x = torch.tensor([3.3, -0.01])
    assert_same_values(quantize(x, E4M3, scale), quantize(x, E4M3, 2.0**-3))


def test_sparse_input_is_refused():
    with pytest.raises(TypeError, match=r"layout torch\.sparse_coo; expected a dense tensor"):
        quantize(torch.eye(3).to_sparse(), E4M3)
