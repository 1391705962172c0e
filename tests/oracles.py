"""Slow references for the fast code.

They are independent of each other and of altgrad's kernel: gfloat in float64, the dtypes of
ml_dtypes (and numpy's float16), and a search through all values of a format in exact fractions.
"""

import functools
import itertools
import math
from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from altgrad.quantization import FloatFormat

DETERMINISTIC = ("nearest_even", "toward_zero", "up", "down")

_ML_DTYPES = {
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3_ieee": ml_dtypes.float8_e4m3,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}

_GFLOAT_ROUNDING = {
    "nearest_even": gfloat.RoundMode.TiesToEven,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
}


# --- comparing -----------------------------------------------------------------------------------


def assert_same_values(actual: Tensor, expected: Tensor, inputs: Tensor | None = None) -> None:
    """Assert equal numbers in any dtypes: NaN equals NaN, 0 and −0 differ."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    actual, expected = actual.detach().double().flatten(), expected.detach().double().flatten()
    same = (actual == expected) & (actual.signbit() == expected.signbit())
    same |= actual.isnan() & expected.isnan()
    if same.all():
        return
    wrong = (~same).nonzero().flatten()
    shown = inputs.detach().double().expand(actual.shape) if inputs is not None else None
    lines = [f"{len(wrong)} of {len(actual)} values differ; the first are"]
    for i in wrong[:5].tolist():
        of = "" if shown is None else f" for {shown[i].item()!r} ({shown[i].item().hex()})"
        lines.append(f"  [{i}]{of}: got {actual[i].item()!r}, expected {expected[i].item()!r}")
    raise AssertionError("\n".join(lines))


# --- gfloat --------------------------------------------------------------------------------------


@functools.cache
def gfloat_info(format: FloatFormat) -> gfloat.FormatInfo:
    """Return a format in gfloat's terms. Formats without subnormals differ in gfloat."""
    assert format.has_subnormals
    return gfloat.FormatInfo(
        format.name,
        k=1 + format.exponent_bits + format.mantissa_bits,
        precision=1 + format.mantissa_bits,
        bias=format.bias,
        is_signed=True,
        domain=gfloat.Domain.Extended if format.has_inf else gfloat.Domain.Finite,
        has_nz=format.has_negative_zero,
        num_high_nans=format.num_high_nans,
        has_subnormals=True,
        is_twos_complement=False,
    )


def round_with_gfloat(
    x: Tensor,
    format: FloatFormat,
    rounding: str = "nearest_even",
    *,
    saturate: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Return ``scale · RN(x / scale)`` in float64; exact for a power-of-two scale within range."""
    info = gfloat_info(format)
    # With neither inf nor NaN to go to, overflow can only saturate.
    saturate = saturate or not (format.has_inf or info.num_nans)
    chunks = (x.detach().double().flatten() / scale).split(65_536)  # small enough for the cache
    with np.errstate(over="ignore"):  # the spacing above float64's largest value
        rounded = [
            torch.from_numpy(
                gfloat.round_ndarray(info, chunk.numpy(), _GFLOAT_ROUNDING[rounding], saturate)
            )
            for chunk in chunks
        ]
    return torch.cat(rounded).view(x.shape) * scale


def decode_with_gfloat(format: FloatFormat) -> list[float]:
    """The value of every code, NaN and infinities included, in the order of the codes."""
    info = gfloat_info(format)
    return [gfloat.decode_float(info, code).fval for code in range(1 << info.k)]


# --- ml_dtypes -----------------------------------------------------------------------------------


def ml_dtypes_of(format: FloatFormat) -> type | None:
    """Return the numpy scalar type with these codes, or None for AltGrad's own formats."""
    return _ML_DTYPES.get(format.name)


def round_with_ml_dtypes(x: Tensor, format: FloatFormat, *, saturate: bool = True) -> Tensor:
    """Round to nearest even and return float64; x has at most float32.

    ml_dtypes would round float64 twice. The all-finite dtypes have no NaN: x must not contain it.
    """
    assert x.dtype != torch.float64
    array = (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()
    with np.errstate(all="ignore"):
        rounded = array.astype(ml_dtypes_of(format)).astype(np.float64)
    result = torch.from_numpy(rounded)
    if saturate:  # ml_dtypes has no saturating mode
        overflow = ~result.isfinite() & ~x.isnan()
        result = torch.where(overflow, torch.full_like(result, format.max).copysign(x), result)
    return result


def decode_with_ml_dtypes(format: FloatFormat) -> list[float]:
    """The value of every code, NaN and infinities included, in the order of the codes."""
    unsigned = np.uint8 if format.bits <= 8 else np.uint16
    codes = np.arange(1 << format.bits).astype(unsigned)
    with np.errstate(all="ignore"):  # signalling NaNs
        return codes.view(ml_dtypes_of(format)).astype(np.float64).tolist()


# --- exact fractions -----------------------------------------------------------------------------


def exact_value(format: FloatFormat, code: int) -> Fraction:
    """Return the value of a code without its sign bit; beyond the last code, the grid goes on."""
    field, mantissa = code >> format.mantissa_bits, code % (1 << format.mantissa_bits)
    if field == 0:
        field, hidden = 1, 0
        mantissa *= format.has_subnormals
    else:
        hidden = 1 << format.mantissa_bits
    return (hidden + mantissa) * Fraction(2) ** (field - format.bias - format.mantissa_bits)


def largest_code(format: FloatFormat) -> int:
    """Return the code of the largest finite value."""
    codes = 1 << (format.exponent_bits + format.mantissa_bits)
    return codes - 1 - format.num_high_nans - int(format.has_inf)


@functools.lru_cache(maxsize=64)
def exact_magnitudes(format: FloatFormat) -> tuple[tuple[int, Fraction], ...]:
    """Return (code, value) for 0, all positive values and the first value beyond the top."""
    first = 1 if format.has_subnormals else 1 << format.mantissa_bits
    codes = [0, *range(first, largest_code(format) + 2)]
    return tuple((code, exact_value(format, code)) for code in codes)


def neighbours(x: float, format: FloatFormat, scale: float = 1.0) -> tuple[Fraction, Fraction]:
    """Return the scaled grid values just below and above x, both x if x is one; x within ±max."""
    y = Fraction(x) / Fraction(scale)
    positive = [value for _, value in exact_magnitudes(format)[:-1]]
    grid = [-value for value in reversed(positive[1:])] + positive
    low = max(value for value in grid if value <= y)
    high = min(value for value in grid if value >= y)
    return low * Fraction(scale), high * Fraction(scale)


def round_by_brute_force(
    x: float,
    format: FloatFormat,
    rounding: str = "nearest_even",
    *,
    saturate: bool = True,
    scale: float = 1.0,
) -> float:
    """Return ``scale · RN(x / scale)`` by comparing with every value of the format."""
    if math.isnan(x):
        return math.nan
    sign = math.copysign(1.0, x)
    overflow = math.inf if format.has_inf else math.nan
    if saturate or not (format.has_inf or format.num_high_nans or not format.has_negative_zero):
        overflow = float(exact_value(format, largest_code(format))) * scale
    if math.isinf(x):
        return math.copysign(overflow, sign)
    magnitude = abs(Fraction(x)) / Fraction(scale)
    table = exact_magnitudes(format)
    away = {"up": sign > 0, "down": sign < 0, "toward_zero": False}.get(rounding)
    if magnitude >= table[-1][1]:
        code = table[-1][0] if away is not False else table[-2][0]
    else:
        code = _rounded_code(magnitude, table, away)
    if code > largest_code(format):
        return math.copysign(overflow, sign)
    value = float(exact_value(format, code) * Fraction(scale))
    return math.copysign(value, sign) if value or format.has_negative_zero else 0.0


def _rounded_code(
    magnitude: Fraction, table: tuple[tuple[int, Fraction], ...], away: bool | None
) -> int:
    """Return the code away from zero, toward it, or (None) nearest with ties to the even code.

    Without subnormals, 0 and the smallest value both have even codes: a tie goes to 0.
    """
    for (code, value), (next_code, next_value) in itertools.pairwise(table):
        if magnitude == value:
            return code
        if magnitude < next_value:
            if away is None:
                below, above = magnitude - value, next_value - magnitude
                away = above < below or (above == below and code % 2 == 1)
            return next_code if away else code
    return table[-1][0]


def nearest_by_brute_force(x: float, format: FloatFormat) -> float:
    """Round to nearest, ties to the even code, saturating."""
    return round_by_brute_force(x, format)


def exact_spacing(x: float, format: FloatFormat, scale: float = 1.0) -> Fraction:
    """Return ``scale · 2**(clamp(floor(log2(abs(x) / scale)), emin, emax) − M)``; x is no NaN.

    A format without subnormals has no value between 0 and ``2**emin``.
    """
    emin = 1 - format.bias
    emax = max(largest_code(format) >> format.mantissa_bits, 1) - format.bias
    y = None if math.isinf(x) else abs(Fraction(x)) / Fraction(scale)
    if y is None or y >= Fraction(2) ** emax:
        exponent = emax
    elif y < Fraction(2) ** emin:
        if not format.has_subnormals:
            return Fraction(2) ** emin * Fraction(scale)
        exponent = emin
    else:
        exponent = floor_log2(y)
    return Fraction(2) ** (exponent - format.mantissa_bits) * Fraction(scale)


def floor_log2(x: Fraction) -> int:
    """Return the exponent of the largest power of two up to x > 0."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


# --- inputs --------------------------------------------------------------------------------------


def every_value_of(dtype: torch.dtype) -> Tensor:
    """Return all 65,536 bit patterns of float16 or bfloat16."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def random_bit_patterns(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw uniform bit patterns: every magnitude, subnormals, infinities and NaNs."""
    generator = torch.Generator().manual_seed(seed)
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    info = torch.iinfo(integer)
    return torch.randint(info.min, info.max, (count,), dtype=integer, generator=generator).view(
        dtype
    )


def critical_inputs(format: FloatFormat, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return every value, every midpoint, the overflow threshold, their neighbours; ±inf, ±0, NaN.

    Values that the dtype cannot hold are rounded to it, and are less critical then.
    """
    magnitudes = torch.tensor(
        [float(value) for _, value in exact_magnitudes(format)], dtype=torch.float64
    )
    points = torch.cat([magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2]).to(dtype)
    # In float16 and bfloat16, nextafter would skip points between values.
    infinity = torch.tensor(math.inf, dtype=dtype)
    points = torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)])
    special = torch.tensor([math.inf, math.nan, torch.finfo(dtype).max], dtype=dtype)
    positive = torch.cat([points, special])
    return torch.cat([positive, -positive])
