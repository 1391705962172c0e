"""DIAG-01 to 04 bit for bit: every exponent, every 16-bit pattern, and the known traps."""

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

from altgrad.quantization import (
    FORMATS,
    compute_stiffness_field,
    compute_ulp_distance,
    get_format,
    gradient_stiffness_correlation,
    grid_alignment_error,
    grid_alignment_statistics,
    ulp_statistics,
)
from tests.contract import DTYPES, dtype_id, random_normal

HALVES = (torch.float16, torch.bfloat16)


def _finite_codes(dtype):
    """Return every finite value from 0 up, in ascending order."""
    infinity = torch.tensor(math.inf, dtype=dtype).view(torch.int16).item()
    return torch.arange(infinity, dtype=torch.int16).view(dtype)


# DIAG-01: stiffness


def _stiffness_by_frexp(weights, mantissa_bits):
    """Return 2**(floor(log2(abs(w))) − M), with the exponent from math.frexp."""

    def one(weight):
        if weight == 0 or not math.isfinite(weight):
            return math.nan
        return math.ldexp(1.0, math.frexp(weight)[1] - 1 - mantissa_bits)

    return torch.tensor([one(w) for w in weights.double().tolist()], dtype=torch.float64)


def _assert_same(result, expected):
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(-1.0), expected.to(result.dtype).nan_to_num(-1.0))


def _powers_and_neighbours(numpy_dtype, lowest, highest):
    powers = np.ldexp(np.ones(1, numpy_dtype), np.arange(lowest, highest + 1))
    assert powers.dtype == numpy_dtype
    below, above = np.nextafter(powers, numpy_dtype(0)), np.nextafter(powers, numpy_dtype(np.inf))
    return torch.from_numpy(np.concatenate([powers, below, above]))


@pytest.mark.parametrize("mantissa_bits", [0, 2, 3, 10, 23, 52])
@pytest.mark.parametrize(
    ("dtype", "lowest", "highest"),
    [(np.float32, -149, 127), (np.float64, -1074, 1023)],
    ids=["float32", "float64"],
)
def test_stiffness_at_every_power_of_two_and_its_neighbours(dtype, lowest, highest, mantissa_bits):
    weights = _powers_and_neighbours(dtype, lowest, highest)
    result = compute_stiffness_field(weights, mantissa_bits)
    assert result.dtype == weights.dtype
    _assert_same(result, _stiffness_by_frexp(weights, mantissa_bits))


@pytest.mark.parametrize("mantissa_bits", [0, 3, 10])
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_stiffness_of_every_16_bit_pattern(dtype, mantissa_bits):
    weights = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    result = compute_stiffness_field(weights, mantissa_bits)
    assert result.dtype == torch.float32
    _assert_same(result, _stiffness_by_frexp(weights, mantissa_bits))


@pytest.mark.parametrize(("exponent", "wrong"), [(-20, 11), (127, 44)])
def test_no_log2_just_below_a_power_of_two(exponent, wrong):
    """floor(log2(x)) in float32 is one too high for the nearest neighbours below."""
    codes = torch.tensor(2.0**exponent).view(torch.int32) - torch.arange(1, 101, dtype=torch.int32)
    weights = codes.view(torch.float32)
    assert (weights.double().log2().float() == exponent).sum() == wrong  # the trap is there
    stiffness = compute_stiffness_field(weights, 2)
    assert torch.equal(stiffness, torch.full((100,), 2.0 ** (exponent - 1 - 2)))


def test_seven_mantissa_bits_are_not_bf16():
    weights = torch.tensor([100.0, 1.0, 0.01], dtype=torch.bfloat16)
    true = [0.5, 2.0**-7, 2.0**-14]
    assert compute_stiffness_field(weights, format="bf16").tolist() == true
    assert compute_stiffness_field(weights, format=torch.bfloat16).tolist() == true
    assert compute_stiffness_field(weights, 7).tolist() == [1 / 128] * 3
    assert compute_stiffness_field(weights, format="e0m7").tolist() == [1 / 128] * 3


@pytest.mark.parametrize("scale", [1.0, 2.0**-12, torch.tensor(2.0**5)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_stiffness_of_a_format_is_the_distance_of_its_neighbours(format, scale):
    """Check every value and midpoint; above the top the last spacing applies."""
    format = get_format(format)
    values = format.values()[format.values() >= 0]
    gaps = values.diff()
    between = (values[:-1] + values[1:]) / 2
    for sign in (1, -1):
        result = compute_stiffness_field(sign * between * scale, format=format, scale=scale)
        assert torch.equal(result, gaps * scale)
        result = compute_stiffness_field(sign * values[1:-1] * scale, format=format, scale=scale)
        assert torch.equal(result, gaps[1:] * scale)
    top = torch.tensor([1.0, 1.5, 1e6], dtype=torch.float64) * format.max * scale
    last = 2.0 ** (format.emax - format.mantissa_bits) * scale
    result = compute_stiffness_field(top, format=format, scale=scale)
    assert torch.equal(result, torch.ones(3, dtype=torch.float64) * last)


def test_stiffness_of_a_format_is_constant_among_subnormals_unlike_the_formula():
    weights = torch.tensor([2.0**-9, 2.0**-7, 2.0**-6, 2.0**-5])
    formula = [2.0**-12, 2.0**-10, 2.0**-9, 2.0**-8]
    assert compute_stiffness_field(weights, 3).tolist() == formula
    true = [2.0**-9, 2.0**-9, 2.0**-9, 2.0**-8]
    assert compute_stiffness_field(weights, format="e4m3fn").tolist() == true


# DIAG-02: grid alignment


@pytest.mark.parametrize("scale", [1.0, 2.0**-12, torch.tensor(2.0**5)], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_grid_error_at_every_value_quarter_and_midpoint(format, scale):
    values = get_format(format).values()
    gaps = values.diff()
    assert not grid_alignment_error(values * scale, format, scale).any()
    for part, distance in ((0.25, 0.25), (0.5, 0.5), (0.75, 0.25)):
        weights = (values[:-1] + gaps * part) * scale
        error = grid_alignment_error(weights, format, scale)
        assert torch.equal(error, gaps * distance * scale)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_grid_error_of_every_16_bit_value_is_not_rounded_to_16_bits(dtype):
    weights = torch.cat([_finite_codes(dtype), -_finite_codes(dtype)])
    error = grid_alignment_error(weights, "e4m3fn")
    assert error.dtype == torch.float32
    assert torch.equal(error, grid_alignment_error(weights.double(), "e4m3fn").float())


def test_on_grid_means_equal_not_near():
    """All weights are about 1e-12 off the bf16 grid; `error < 1e-10` would count them as on it."""
    weights = random_normal(4096) * 1e-9
    off_grid = weights[weights.bfloat16().float() != weights]
    assert off_grid.numel() > 4000
    assert grid_alignment_error(off_grid, "bf16").max() < 1e-10
    assert grid_alignment_statistics(off_grid, "bf16")["on_grid_frac"] == 0.0
    half = torch.cat([off_grid, off_grid.bfloat16().float()])
    assert grid_alignment_statistics(half, "bf16")["on_grid_frac"] == 0.5


def test_grid_statistics_equal_those_of_fractions():
    """The standard deviation is that of a sample, with n − 1."""
    weights = random_normal(7) / 16
    errors = [abs(Fraction(w) - Fraction(round(Fraction(w) * 512), 512)) for w in weights.tolist()]
    result = grid_alignment_statistics(weights, "e0m7", 0.25)  # k / 512
    # Sums in float64: relative errors of a few times 2**-53.
    assert result["grid_error_mean"] == pytest.approx(float(statistics.mean(errors)), rel=1e-14)
    assert result["grid_error_std"] == pytest.approx(float(statistics.stdev(errors)), rel=1e-14)
    assert result["grid_error_max"] == float(max(errors))


def test_grid_error_std_of_one_weight_is_nan():
    result = grid_alignment_statistics(torch.tensor([1.03]), "e4m3fn")
    assert math.isnan(result["grid_error_std"])
    assert result["grid_error_mean"] == result["grid_error_max"] > 0


# DIAG-03: ULP distance


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_every_adjacent_pair_is_one_ulp_apart(dtype, sign):
    values = sign * _finite_codes(dtype)
    one = torch.ones(len(values) - 1)
    assert len(one) > 31_000
    assert torch.equal(compute_ulp_distance(values[:-1], values[1:]), one)
    assert torch.equal(compute_ulp_distance(values[1:], values[:-1]), one)


@pytest.mark.parametrize(
    ("dtype", "lowest", "highest"),
    [(np.float32, -149, 127), (np.float64, -1074, 1023)],
    ids=["float32", "float64"],
)
def test_neighbours_of_every_power_of_two_are_one_ulp_apart(dtype, lowest, highest):
    powers, below, above = _powers_and_neighbours(dtype, lowest, highest).chunk(3)
    for neighbour in (below, above):
        for sign in (1, -1):
            one = torch.ones_like(powers)
            assert torch.equal(compute_ulp_distance(sign * powers, sign * neighbour), one)
            assert torch.equal(compute_ulp_distance(sign * neighbour, sign * powers), one)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_minus_one_and_one_are_symmetric(dtype):
    """nextafter towards +inf alone would count 2 ULP outwards from −1 and 0.5 inwards from 1."""
    one, eps = torch.ones(4, dtype=dtype), torch.finfo(dtype).eps
    after = 1 + torch.tensor([-eps / 2, eps, -eps, 2 * eps], dtype=dtype)
    for sign in (1, -1):
        distance = compute_ulp_distance(sign * one, sign * after)
        assert distance.tolist() == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_ulp_distance_itself_is_not_rounded_to_16_bits(dtype):
    """A count across zero needs one bit more than the significand of the dtype has."""
    eps = torch.finfo(dtype).eps
    before, after = torch.tensor([-1.0], dtype=dtype), torch.tensor([1.0 + eps], dtype=dtype)
    distance = compute_ulp_distance(before, after)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert distance.dtype == wide
    assert torch.equal(distance, torch.tensor([2 / eps + 1], dtype=torch.float64).to(wide))


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_a_weight_that_leaves_zero_moves_a_finite_distance(sign):
    after = torch.tensor([1e-3]) * sign
    expected = after.abs().double() * 2.0**33  # 1e-3 lies in [2**-10, 2**-9)
    for pair in ((torch.zeros(1), after), (after, -torch.zeros(1))):
        distance = compute_ulp_distance(*pair)
        assert torch.equal(distance.double(), expected)
        assert distance.item() == pytest.approx(8.6e6, rel=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_largest_finite_weight_has_a_neighbour(dtype):
    top = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    below = torch.nextafter(top, torch.zeros_like(top))
    assert compute_ulp_distance(top, below).tolist() == [1.0]
    assert compute_ulp_distance(-below, -top).tolist() == [1.0]
    assert compute_ulp_distance(top, torch.zeros_like(top)).item() == (
        2 / torch.finfo(dtype).eps - 1
    )


@pytest.mark.parametrize(
    "dtype",
    [
        *DTYPES[:3],
        torch.float64,
    ],
    ids=dtype_id,
)
def test_the_distance_from_the_lowest_to_the_largest_weight_is_finite(dtype):
    top = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
    expected = 2 * (2 / torch.finfo(dtype).eps - 1)
    assert compute_ulp_distance(-top, top).item() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_zeros_of_both_signs_are_equal_and_subnormals_count(dtype):
    zero, tiny = torch.zeros(1, dtype=dtype), torch.finfo(dtype).smallest_normal
    smallest = torch.tensor([tiny * torch.finfo(dtype).eps], dtype=dtype)
    assert compute_ulp_distance(zero, -zero).tolist() == [0.0]
    assert compute_ulp_distance(-zero, smallest).tolist() == [1.0]
    assert compute_ulp_distance(-smallest, smallest).tolist() == [2.0]


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError])
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_the_distance_is_the_same_if_nextafter_lacks_the_dtype(monkeypatch, dtype, error):
    values = _finite_codes(dtype)
    before = torch.cat([values, -values])
    after = before[torch.randperm(len(before), generator=torch.Generator().manual_seed(0))]
    expected = compute_ulp_distance(before, after)
    pair = compute_ulp_distance(values[1:], values[:-1])

    def lacking(start, end):
        assert start.dtype == dtype
        raise error(f'"nextafter_cpu" not implemented for {dtype}')

    monkeypatch.setattr(torch, "nextafter", lacking)
    assert torch.equal(compute_ulp_distance(before, after), expected)
    assert torch.equal(compute_ulp_distance(values[1:], values[:-1]), pair)
    assert compute_ulp_distance(values[:1], -values[:1]).tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_another_error_of_nextafter_is_raised(monkeypatch, dtype):
    """Out of memory is a RuntimeError, too, and the fallback is for 16 bits only."""

    def failing(start, end):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "nextafter", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        compute_ulp_distance(torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype))


def test_ulp_statistics_of_known_distances():
    """The median of an even count is the mean of the middle two, unlike that of torch.median."""
    eps = torch.finfo(torch.float32).eps
    ulps = torch.tensor([10.0, 0.0, 3.0, 1.0])
    result = ulp_statistics(torch.ones(4), 1 + ulps * eps)
    assert result == {"ulp_mean": 3.5, "ulp_median": 2.0, "ulp_max": 10.0, "ulp_zero_frac": 0.25}
    odd = ulp_statistics(torch.ones(3), 1 + ulps[:3] * eps)
    assert odd["ulp_median"] == 3.0


# DIAG-04: gradient against stiffness


def _pearson(weights, gradients, mantissa_bits):
    stiffness = _stiffness_by_frexp(weights, mantissa_bits).numpy()
    return scipy.stats.pearsonr(gradients.double().abs().numpy(), stiffness).statistic


@pytest.mark.parametrize("factor", [1.0, 1e-7, 1e-12, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_correlation_does_not_depend_on_the_size_of_the_gradients(dtype, factor):
    """A denominator + 1e-10 would turn 0.7 into 0.03 at 1e-9."""
    weights = random_normal(5000, dtype=dtype)
    gradients = weights * (1 + 0.5 * random_normal(5000, seed=1, dtype=dtype))
    scaled = gradients * factor
    result = gradient_stiffness_correlation(weights, scaled, 3)["grad_stiff_correlation"]
    assert 0.6 < result < 0.9
    assert result == pytest.approx(_pearson(weights, scaled, 3), rel=1e-12)
    # The scaled gradients themselves are rounded, at most by eps / 2 each.
    same = torch.finfo(dtype).eps * 10
    assert result == pytest.approx(_pearson(weights, gradients, 3), rel=same)


@pytest.mark.parametrize("factors", [(1, -900), (1, 900), (-900, 1), (900, 1)], ids=str)
def test_correlation_is_right_where_squares_exceed_float64(factors):
    weights = random_normal(1000, dtype=torch.float64)
    gradients = weights * (1 + 0.5 * random_normal(1000, seed=1, dtype=torch.float64))
    scaled = [x * 2.0**factor for x, factor in zip((weights, gradients), factors, strict=True)]
    result = gradient_stiffness_correlation(*scaled, 3)["grad_stiff_correlation"]
    assert result == pytest.approx(_pearson(weights, gradients, 3), rel=1e-12)


@pytest.mark.parametrize("mean", [1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_correlation_is_right_where_the_mean_is_far_above_the_deviation(dtype, mean):
    """Deviations from the mean lose mean / deviation in precision, sums of squares its square."""
    weights = 1 + random_normal(5000, dtype=dtype).abs()
    gradients = mean + weights + 0.5 * random_normal(5000, seed=1, dtype=dtype)
    result = gradient_stiffness_correlation(weights, gradients, 3)["grad_stiff_correlation"]
    assert 0.5 < result < 0.9
    assert result == pytest.approx(_pearson(weights, gradients, 3), rel=mean * 1e-15)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_ratio_and_fraction_equal_those_of_fractions(dtypes):
    weights, gradients = (
        random_normal(50).to(dtypes[0]),
        (random_normal(50, seed=1) * 0.1).to(dtypes[1]),
    )
    stiffness = _stiffness_by_frexp(weights, 3).tolist()
    ratios = [
        abs(Fraction(g)) / Fraction(s)
        for g, s in zip(gradients.double().tolist(), stiffness, strict=True)
    ]
    result = gradient_stiffness_correlation(weights, gradients, 3)
    mean = float(sum(ratios) / len(ratios))
    assert result["grad_stiff_ratio_mean"] == pytest.approx(mean, rel=1e-14)  # a float64 sum
    assert result["grad_below_stiffness_frac"] == sum(ratio < 1 for ratio in ratios) / len(ratios)
