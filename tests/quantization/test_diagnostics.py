"""One update on a grid: against exact fractions, at the top of the grid, and with NaN and inf.

The oracle lists the values of a format by their codes and finds the nearest value by comparing
fractions, so that the oracle does not round.
"""

import bisect
import functools
import math
from fractions import Fraction

import pytest
import torch

from altgrad.quantization import (
    compute_scale,
    effective_update,
    get_format,
    quantize,
    spacing,
    stall_mask,
    visible_mask,
)

FORMATS = ("e4m3fn", "e5m2", "bf16", "e2m1", "e0m7", "e7m0")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AMAX_ONE = torch.ones(())
SCALES = {
    "1": lambda weights, format: 1,
    "1.0": lambda weights, format: 1.0,
    "number": lambda weights, format: 0.125,
    "tensor of 1": lambda weights, format: AMAX_ONE,
    "tensor": lambda weights, format: torch.tensor(32.0),
    "channel": lambda weights, format: torch.tensor([[0.25], [1.0], [8.0]]),
    "block": lambda weights, format: compute_scale(weights, format, scaling=("block", 16)),
}


def _value(format, code):
    field, significand = divmod(code, 2**format.mantissa_bits)
    if field:
        significand += 2**format.mantissa_bits
    return math.ldexp(significand, max(field, 1) - format.bias - format.mantissa_bits)


@functools.cache
def _values(format, clamped):
    """Return the values from 0 up, by code, and 32 more binades if nothing is clamped."""
    top = len(format.values()) // 2
    last = top if clamped else top + 32 * 2**format.mantissa_bits
    return [_value(format, code) for code in range(last + 1)]


def _nearest(x, format, clamped):
    """Return the nearest value to a fraction; of two, that with the even code."""
    values, magnitude = _values(format, clamped), abs(x)
    upper = bisect.bisect_left(values, magnitude)
    if upper == len(values):
        assert clamped, f"{x} is beyond the oracle"
        upper -= 1
    elif upper and values[upper] != magnitude:
        below, above = magnitude - Fraction(values[upper - 1]), Fraction(values[upper]) - magnitude
        if below < above or (below == above and upper % 2 == 1):
            upper -= 1
    return Fraction(values[upper]) * (1 if x >= 0 else -1)


def _exact_effective(before, update, format, scale, clamped):
    """Return the effective update of one element by the definition, in fractions."""
    before, update, scale = Fraction(before), Fraction(update), Fraction(scale)
    stored = scale * _nearest(before / scale, format, clamped=True)
    return scale * _nearest((stored + update) / scale, format, clamped) - stored


def _steps(format, dtype):
    """Return weights of all magnitudes and updates around the threshold, with ties and tops."""
    generator = torch.Generator().manual_seed(5)

    def random(low, high):
        exponent = torch.rand(3, 48, generator=generator, dtype=torch.float64) * (high - low) + low
        return exponent.exp2() * (torch.randint(0, 2, (3, 48), generator=generator) * 2 - 1)

    weights, updates = random(-9, 9), random(-14, 1)
    top = format.values()[-9:]
    weights[:, :9], updates[:, :9] = top, (top[-1] - top[-2]) * torch.arange(-4, 5) / 2
    weights[:, 9:12] = 0
    updates[:, 12:] *= weights[:, 12:].abs()
    gap = spacing(weights[:, 12:20], format)
    weights[:, 12:20], updates[:, 12:20] = quantize(weights[:, 12:20], format), gap / 2  # ties
    updates[:, 20] = 0
    weights, updates = weights.to(dtype), updates.to(dtype)
    finite = weights.isfinite() & updates.isfinite() & (weights + updates).isfinite()
    return torch.where(finite, weights, 1.5), torch.where(finite, updates, 0.25)


def _each(weights, updates, scale):
    scales = torch.as_tensor(scale, dtype=torch.float64).expand(weights.shape)
    return zip(
        *(x.double().flatten().tolist() for x in (weights, updates)),
        scales.flatten().tolist(),
        strict=True,
    )


def _ids(dtype):
    return str(dtype).removeprefix("torch.")


# Against the oracle


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("format", FORMATS)
def test_update_and_stall_equal_exact_fractions(format, dtype, scale):
    clamped, format = scale in {"1", "1.0"}, get_format(format)
    weights, updates = _steps(format, dtype)
    scale = SCALES[scale](weights, format)
    exact = [
        _exact_effective(*element, format, factor, clamped)
        for *element, factor in _each(weights, updates, scale)
    ]
    result = effective_update(weights, updates, format, scale)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.tensor([float(x) for x in exact], dtype=torch.float64).view_as(weights)
    assert torch.equal(result, expected.to(result.dtype))
    stalled = torch.tensor([x == 0 for x in exact]).view_as(weights) & (updates != 0)
    assert torch.equal(stall_mask(weights, updates, format, scale), stalled)
    assert 0 < stalled.sum() < stalled.numel()  # the cases hold both


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("format", FORMATS)
def test_visible_mask_equals_exact_fractions(format, dtype, scale):
    clamped, format = scale in {"1", "1.0"}, get_format(format)
    weights, updates = _steps(format, dtype)
    scale = SCALES[scale](weights, format)
    if not clamped:  # an amax scale holds every weight
        weights = torch.where(weights.abs() > format.max * scale, 0.0, weights)
    after = (weights + updates).to(dtype)
    expected = [
        _nearest(Fraction(first) / Fraction(factor), format, clamped=True)
        != _nearest(Fraction(second) / Fraction(factor), format, clamped)
        for first, second, factor in _each(weights, after, scale)
    ]
    result = visible_mask(weights, after, format, scale)
    assert torch.equal(result, torch.tensor(expected).view_as(weights))
    assert 0 < result.sum() < result.numel()


def test_half_precision_weights_may_have_a_wider_update():
    weights = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
    updates = torch.tensor([2**-4 * (1 + 2**-20), 2**-4])
    for wider in (updates, updates.double()):
        result = effective_update(weights, wider, "e4m3fn")
        assert result.dtype == wider.dtype
        assert result.tolist() == [0.125, 0.0]


# The definition


def test_weight_is_rounded_before_the_update_is_added():
    """1.05 is stored as 1, and the effective update is counted from 1."""
    before, update = torch.tensor([1.05]), torch.tensor([0.05])
    assert quantize(before + update, "e4m3fn").item() == 1.125  # 1.1 alone would reach it
    assert effective_update(before, update, "e4m3fn").item() == 0.0


def test_effective_update_may_overshoot():
    assert effective_update(torch.tensor([1.0]), torch.tensor([0.07]), "e4m3fn").item() == 0.125


@pytest.mark.parametrize("scale", [2.0**-3, 0.1], ids=["power of two", "0.1"])
def test_scale_recomputed_each_step_is_no_evidence_of_movement(scale):
    """With separate amax scales before and after, nearly all values differ, but not their codes."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(4096, generator=generator) * scale
    after = before * (1 + 1e-3 * torch.randn(4096, generator=generator))
    scales = [compute_scale(x, "e4m3fn", power_of_two=False) for x in (before, after)]
    sides = [quantize(x, "e4m3fn", s) for x, s in zip((before, after), scales, strict=True)]
    assert (sides[0] != sides[1]).float().mean() > 0.95  # the trap
    codes = [quantize(x.double() / scales[0].double(), "e4m3fn") for x in (before, after)]
    visible = visible_mask(before, after, "e4m3fn", scales[0])
    assert torch.equal(visible, codes[0] != codes[1])
    assert visible.float().mean() < 0.03
    assert stall_mask(before, after - before, "e4m3fn", scales[0]).float().mean() > 0.97


# The threshold


@pytest.mark.parametrize("direction", [1, -1], ids=["up", "down"])
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("format", ["e4m3fn", "e5m2", "bf16", "e2m1", "e0m7"])
def test_weight_on_the_grid_stalls_below_half_a_spacing(format, sign, direction):
    """Check weights inside a binade with even and odd codes; a tie goes to the even code."""
    format = get_format(format)
    # E0M7 has only one binade, with codes 0 to 127; the others begin at 1 with an even code.
    first = 0.0 if format.exponent_bits == 0 else 1.0
    step = spacing(torch.tensor(1.0), format).item()
    inside = first + step * torch.arange(1, 2**format.mantissa_bits - (first == 0))
    half = torch.tensor(step / 2)
    odd = torch.arange(1, len(inside) + 1) % 2 == 1
    sizes = {
        "below": torch.nextafter(half, torch.tensor(0.0)),
        "tie": half,
        "above": torch.nextafter(half, torch.tensor(1.0)),
    }
    stalled = {
        name: stall_mask(sign * inside, (sign * direction * size).expand_as(inside), format)
        for name, size in sizes.items()
    }
    assert stalled["below"].all()
    assert torch.equal(stalled["tie"], ~odd)
    assert not stalled["above"].any()


@pytest.mark.parametrize("format", ["e4m3fn", "e5m2", "bf16", "e2m1", "e7m0"])
def test_power_of_two_moves_down_from_a_quarter_spacing(format):
    """The grid below a power of two is twice as fine."""
    format = get_format(format)
    quarter = spacing(torch.tensor(2.0), format) / 4
    updates = -torch.stack([quarter * (1 - 2**-20), quarter, quarter * (1 + 2**-20)])
    # Each of these formats gives 2 an even code, to which the tie goes.
    assert stall_mask(torch.full((3,), 2.0), updates, format).tolist() == [True, True, False]


# The top of the grid


@pytest.mark.parametrize("one", [1, 1.0], ids=repr)
def test_the_number_one_clamps_at_the_top(one):
    before, update = torch.tensor([448.0, -448.0, 416.0]), torch.tensor([32.0, -1000.0, 100.0])
    assert effective_update(before, update, "e4m3fn", one).tolist() == [0.0, 0.0, 32.0]
    assert stall_mask(before, update, "e4m3fn", one).tolist() == [True, True, False]
    assert visible_mask(before, before + update, "e4m3fn", one).tolist() == [False, False, True]


@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=["0-d", "one", "block"])
@pytest.mark.parametrize("factor", [1.0, 2.0**-10], ids=["one", "2**-10"])
def test_an_amax_scale_does_not_clamp(factor, shape):
    """A tensor equal to 1 is an amax scale, too: the grid continues from 448 to 480."""
    before = torch.tensor([448.0, -448.0, 416.0]) * factor
    update = torch.tensor([32.0, -1000.0, 100.0]) * factor
    scale = torch.full(shape, factor)
    # Beyond 512 the spacing is 64: −1448 lies in [1024, 2048), where it is 128.
    expected = torch.tensor([32.0, -960.0, 96.0]) * factor
    assert torch.equal(effective_update(before, update, "e4m3fn", scale), expected)
    assert not stall_mask(before, update, "e4m3fn", scale).any()
    assert visible_mask(before, before + update, "e4m3fn", scale).all()


def test_a_number_other_than_one_is_an_amax_scale():
    assert effective_update(torch.tensor([224.0]), torch.tensor([16.0]), "e4m3fn", 0.5).item() == 16


def test_the_update_counts_from_the_clamped_weight():
    """A weight beyond the top is stored as max, and the update is added to max."""
    before, update = torch.tensor([1000.0]), torch.tensor([32.0])
    assert effective_update(before, update, "e4m3fn", AMAX_ONE).item() == 32.0


@pytest.mark.parametrize("format", ["e4m3fn", "e2m1"])
def test_clamping_makes_false_stalls(format):
    """An update of one spacing moves every weight; with a clamp the largest of a block stalls."""
    weights = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    false_stalls = {}
    for power_of_two in (False, "floor", True):
        scale = compute_scale(weights, format, scaling=("block", 32), power_of_two=power_of_two)
        stored = quantize(weights.double(), format, scale)
        update = spacing(stored, format, scale) * stored.sign()
        update[stored == 0] = 0
        clamped = (quantize(stored + update, format, scale) == stored) & (update != 0)
        false_stalls[power_of_two] = clamped.double().mean().item()
        assert not stall_mask(stored, update, format, scale).any()
    assert false_stalls[False] > false_stalls["floor"] > false_stalls[True] > 0.001


@pytest.mark.parametrize("scale", [AMAX_ONE, 0.5], ids=["tensor", "number"])
def test_an_unmoved_weight_beyond_the_top_is_not_visible(scale):
    """OCP's floor rule clips weights, and so does a scale that is kept while weights grow."""
    weights = torch.tensor([500.0, -1e6, 448.0])
    assert not visible_mask(weights, weights, "e4m3fn", scale).any()


# Zero updates, NaN and inf, wrong tensors


@pytest.mark.parametrize("scale", [1.0, AMAX_ONE], ids=["number", "amax"])
@pytest.mark.parametrize("zero", [0.0, -0.0], ids=repr)
def test_zero_update_does_not_stall(zero, scale):
    before = torch.tensor([1.0, 0.0, -0.0, 1.03, 1000.0])
    update = torch.full((5,), zero)
    assert effective_update(before, update, "e4m3fn", scale).tolist() == [0.0] * 5
    assert not stall_mask(before, update, "e4m3fn", scale).any()


@pytest.mark.parametrize("scale", [1.0, AMAX_ONE], ids=["number", "amax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
def test_nan_and_inf_are_neither_stalled_nor_visible(dtype, scale):
    nan, inf = math.nan, math.inf
    before = torch.tensor([nan, inf, -inf, 1.0, 1.0, 1.0, inf, 1.0], dtype=dtype)
    update = torch.tensor([1.0, 1.0, 1.0, nan, inf, -inf, -inf, 1.0], dtype=dtype)
    effective = effective_update(before, update, "e4m3fn", scale)
    assert effective.isnan().tolist() == [True] * 7 + [False]
    assert not stall_mask(before, update, "e4m3fn", scale).any()
    visible = visible_mask(before, update, "e4m3fn", scale)
    assert not visible[:7].any()
    assert visible_mask(update[:1], update[:1] + 1, "e4m3fn", scale).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("scale", [1.0, AMAX_ONE], ids=["number", "amax"])
def test_empty_tensors_keep_their_shape(shape, scale):
    empty = torch.zeros(shape, dtype=torch.float16)
    effective = effective_update(empty, empty, "e4m3fn", scale)
    assert (effective.shape, effective.dtype) == (shape, torch.float32)
    for mask in (stall_mask, visible_mask):
        result = mask(empty, empty, "e4m3fn", scale)
        assert (result.shape, result.dtype) == (shape, torch.bool)


FUNCTIONS = {
    "effective_update": (effective_update, "update"),
    "stall_mask": (stall_mask, "update"),
    "visible_mask": (visible_mask, "after"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_error_for_different_shapes_names_both(function):
    function, second = FUNCTIONS[function]
    with pytest.raises(ValueError, match=rf"before has shape \(2, 3\) and {second} \(3,\)"):
        function(torch.ones(2, 3), torch.ones(3), "e4m3fn")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e5m2], ids=_ids)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_other_dtypes_are_errors_that_name_argument_and_dtype(function, dtype):
    function, second = FUNCTIONS[function]
    ones, wrong = torch.ones(3), torch.ones(3).to(dtype)
    with pytest.raises(TypeError, match=rf"before has dtype {dtype}; expected float16, bfloat16"):
        function(wrong, ones, "e4m3fn")
    with pytest.raises(TypeError, match=rf"{second} has dtype {dtype}; expected float16, bfloat16"):
        function(ones, wrong, "e4m3fn")


@pytest.mark.parametrize("scale", [1.0, AMAX_ONE], ids=["number", "amax"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_ids)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs_do_not_change_and_no_gradient_is_recorded(function, dtype, scale):
    function, _ = FUNCTIONS[function]
    before = torch.tensor([1.05, -700.0, -0.0, 3.0], dtype=dtype, requires_grad=True)
    second = torch.tensor([0.05, -7.0, 0.3, 1e-3], dtype=dtype, requires_grad=True)
    copies = before.detach().clone(), second.detach().clone()
    result = function(before, second, "e4m3fn", scale)
    assert not result.requires_grad
    assert torch.equal(before, copies[0])
    assert torch.equal(second, copies[1])
    assert result.data_ptr() not in {before.data_ptr(), second.data_ptr()}
