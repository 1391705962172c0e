"""Describe one tensor on the grid of a format, by four diagnostics named DIAG-01 to DIAG-04.

- DIAG-01: stiffness, the distance between neighbouring grid points at each weight.
- DIAG-02: distance of each weight from the grid.
- DIAG-03: distance that each weight moved, in units in the last place (ULPs).
- DIAG-04: correlation of gradients with stiffness, which ignores optimizer and learning rate.

Names, parameters and result keys of these functions do not change between versions. `diagnostics`
computes whether an update survives. Read `ops` first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad._messages import check_type
from altgrad.quantization.arguments import check_input, check_pair, get_full_dtype
from altgrad.quantization.devices import on_exact_device
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.kernel import compute_exp2
from altgrad.quantization.ops import quantize, spacing

_E0M7_STIFFNESS = 1 / 128  # the spacing 2**-7 of a fixed-point grid in (−1, 1)


@on_exact_device
@torch.no_grad()
def compute_stiffness_field(
    weights: Tensor,
    mantissa_bits: int | None = None,
    *,
    format: str | torch.dtype | FloatFormat | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Return the stiffness, the distance between representable numbers at each weight (DIAG-01).

    With `format`, the stiffness is what `spacing` returns: the format's subnormals, its largest
    value and the scale count.

    With `mantissa_bits` M, the exponent range is unlimited, and the stiffness at a weight w is
    ``2**(floor(log2(abs(w))) − M)``. The exception is M = 7, which means E0M7: a fixed-point grid
    with the stiffness 1/128 at every weight. For bf16, which has 7 mantissa bits too, pass
    ``format="bf16"``.

    The sign of a weight does not matter. Zero, NaN and infinite weights give NaN.

    Args:
        weights: float16, bfloat16, float32 or float64, any shape.
        mantissa_bits: M, 0 to 256; 7 means E0M7. Give either `mantissa_bits` or `format`.
        format: A `FloatFormat`, or a name or dtype that `get_format` accepts.
        scale: A positive number, or a tensor of positive numbers that broadcasts to the shape of
            `weights`. Only allowed with `format`.

    Returns:
        A tensor with the shape of `weights`, in units of the weights: float32, or float64 for
        float64 weights. A stiffness below the smallest positive number of the dtype becomes 0.

    Raises:
        TypeError: Both or neither of `mantissa_bits` and `format` are given, a scale is given
            without a format, or the weights have an unsupported dtype.
        ValueError: `mantissa_bits` is out of range, the format is unknown or too wide for float64,
            or the scale is not positive and finite, or does not broadcast.

    Examples:
        >>> import torch
        >>> from altgrad.quantization import compute_stiffness_field
        >>> compute_stiffness_field(torch.tensor([0.3, 1.0, 5.0]), mantissa_bits=3).tolist()
        [0.03125, 0.125, 0.5]
    """
    return _stiffness(weights, mantissa_bits, format, scale).to(get_full_dtype(weights))


@on_exact_device
@torch.no_grad()
def grid_alignment_error(
    weights: Tensor, format: str | torch.dtype | FloatFormat, scale: float | Tensor = 1.0
) -> Tensor:
    """Return the distance of each weight w from the grid, ``abs(w − quantize(w))`` (DIAG-02).

    The grid has the values of the format times the scale. A weight on the grid gives exactly 0. A
    weight beyond ±max, the largest values of the format, gives its distance from ±max, which is inf
    for ±inf. A NaN weight gives NaN.

    Args:
        weights: float16, bfloat16, float32 or float64, any shape.
        format: A `FloatFormat`, or a name or dtype that `get_format` accepts.
        scale: A positive number, or a tensor of positive numbers that broadcasts to the shape of
            `weights`.

    Returns:
        A tensor with the shape of `weights`, in units of the weights: float32, or float64 for
        float64 weights.

    Raises:
        TypeError: The weights have an unsupported dtype or are sparse, or the scale is neither a
            number nor a floating-point tensor.
        ValueError: The format is unknown or too wide for float64, or the scale is not positive and
            finite, or does not broadcast.
    """
    check_input(weights, "weights")
    wide = weights.to(get_full_dtype(weights))
    return (wide - quantize(wide, format, scale)).abs_()


@on_exact_device
@torch.no_grad()
def grid_alignment_statistics(
    weights: Tensor, format: str | torch.dtype | FloatFormat, scale: float | Tensor = 1.0
) -> dict[str, float]:
    """Return mean, maximum and spread of the distances of weights from a format's grid (DIAG-02).

    The distances are those of `grid_alignment_error`, over the finite weights.

    Args:
        weights: float16, bfloat16, float32 or float64, any shape.
        format: A `FloatFormat`, or a name or dtype that `get_format` accepts.
        scale: A positive number, or a tensor of positive numbers that broadcasts to the shape of
            `weights`.

    Returns:
        A dict of floats. Without finite weights every value is NaN.

        - ``grid_error_mean``: The mean error, in units of the weights.
        - ``grid_error_max``: The largest error, in units of the weights.
        - ``grid_error_std``: The standard deviation of the error, with denominator n − 1, in units
            of the weights; NaN for fewer than two finite weights.
        - ``on_grid_frac``: The share of weights that are exactly on the grid, 0 to 1.

    Raises:
        TypeError: The weights have an unsupported dtype or are sparse, or the scale is neither a
            number nor a floating-point tensor.
        ValueError: The format is unknown or too wide for float64, or the scale is not positive and
            finite, or does not broadcast.
    """
    error = grid_alignment_error(weights, format, scale)[weights.isfinite()].double()
    n = error.numel()
    return {
        "grid_error_mean": error.mean().item(),
        "grid_error_max": error.max().item() if n else torch.nan,
        "grid_error_std": error.std().item() if n > 1 else torch.nan,
        "on_grid_frac": (error == 0).double().mean().item(),
    }


@on_exact_device
@torch.no_grad()
def compute_ulp_distance(before: Tensor, after: Tensor) -> Tensor:
    """Return how far weights moved, in units in the last place (ULPs) of their dtype (DIAG-03).

    The distance is ``abs(after − before) / ulp``. Here ulp is the distance from the weight with the
    larger magnitude, before or after, to the next number toward zero.

    - Neighbouring numbers of the dtype are exactly 1 apart, also across a power of two.
    - A weight that leaves zero has a finite distance.
    - A weight that did not move gives 0; −0 and 0 are equal.
    - NaN or ±inf, before or after, gives NaN.

    Args:
        before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
        after: The weights after the step, with the dtype and shape of `before`.

    Returns:
        A tensor with the shape of `before`, in ULPs: float32, or float64 for float64 weights.

    Raises:
        TypeError: The dtypes differ, or the weights have an unsupported dtype.
        ValueError: The shapes differ.
    """
    check_pair("before", before, "after", after)
    if before.dtype != after.dtype:
        raise TypeError(
            f"before has dtype {before.dtype} and after {after.dtype}; expected the same dtype, "
            "because a ULP is a unit of that dtype"
        )
    larger = torch.maximum(before.abs(), after.abs())
    ulp = larger.double() - _towards_zero(larger).double()
    # The ULP is a power of two, so that dividing first is exact; a difference could overflow.
    distance = (after.double() / ulp - before.double() / ulp).abs_()
    distance = torch.where(before == after, 0.0, distance)
    finite = before.isfinite() & after.isfinite()
    return torch.where(finite, distance, torch.nan).to(get_full_dtype(before))


@on_exact_device
@torch.no_grad()
def ulp_statistics(before: Tensor, after: Tensor) -> dict[str, float]:
    """Return mean, median and maximum of how far weights moved, in ULPs (DIAG-03).

    The distances are those of `compute_ulp_distance`, in units in the last place of the dtype, over
    the weights that are finite before and after the step.

    Args:
        before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
        after: The weights after the step, with the dtype and shape of `before`.

    Returns:
        A dict of floats. Without weights that are finite before and after, every value is NaN.

        - ``ulp_mean``: The mean distance in ULPs.
        - ``ulp_median``: The median distance in ULPs; for an even number of weights the mean of the
            middle two.
        - ``ulp_max``: The largest distance in ULPs.
        - ``ulp_zero_frac``: The share of weights that did not move, 0 to 1.

    Raises:
        TypeError: The dtypes differ, or the weights have an unsupported dtype.
        ValueError: The shapes differ.
    """
    distance = compute_ulp_distance(before, after)
    distance = distance[distance.isfinite()].double().sort().values
    n = distance.numel()
    return {
        "ulp_mean": distance.mean().item(),
        "ulp_median": distance[(n - 1) // 2 : n // 2 + 1].mean().item(),
        "ulp_max": distance[-1].item() if n else torch.nan,
        "ulp_zero_frac": (distance == 0).double().mean().item(),
    }


@on_exact_device
@torch.no_grad()
def gradient_stiffness_correlation(
    weights: Tensor,
    gradients: Tensor,
    mantissa_bits: int | None = None,
    *,
    format: str | torch.dtype | FloatFormat | None = None,
    scale: float | Tensor = 1.0,
) -> dict[str, float]:
    """Return how the magnitudes of gradients relate to the stiffness of weights (DIAG-04).

    Stiffness is the distance between representable numbers at a weight. A gradient ignores
    optimizer and learning rate; `altgrad.quantization.stall_mask` says whether an update survives.
    A weight is valid if the weight and its gradient are finite and its stiffness is greater than 0;
    weights of 0 are therefore invalid. The denominators contain no epsilon, so that scaling all
    gradients leaves the correlation as it is.

    Args:
        weights: float16, bfloat16, float32 or float64, any shape.
        gradients: float16, bfloat16, float32 or float64, with the shape of `weights`.
        mantissa_bits: M, 0 to 256; 7 means E0M7. Give either `mantissa_bits` or `format`.
        format: A `FloatFormat`, or a name or dtype that `get_format` accepts.
        scale: A positive number, or a tensor of positive numbers that broadcasts to the shape of
            `weights`. Only allowed with `format`.

    Returns:
        A dict of floats over the valid weights. Without valid weights every value is 0.0.

        - ``grad_stiff_correlation``: The Pearson correlation of abs(gradient) and stiffness, −1 to
            1; NaN if abs(gradient) or the stiffness is constant.
        - ``grad_stiff_ratio_mean``: The mean of abs(gradient) / stiffness.
        - ``grad_below_stiffness_frac``: The share of gradients whose magnitude is below the
            stiffness, 0 to 1.

    Raises:
        TypeError: Both or neither of `mantissa_bits` and `format` are given, a scale is given
            without a format, or a tensor has an unsupported dtype.
        ValueError: The shapes differ, `mantissa_bits` is out of range, the format is unknown or too
            wide for float64, or the scale is not positive and finite, or does not broadcast.
    """
    check_pair("weights", weights, "gradients", gradients)
    stiffness = _stiffness(weights, mantissa_bits, format, scale)
    valid = (stiffness > 0) & stiffness.isfinite() & gradients.isfinite()
    stiffness, magnitude = stiffness[valid], gradients[valid].double().abs_()
    if magnitude.numel() == 0:
        return {
            "grad_stiff_correlation": 0.0,
            "grad_stiff_ratio_mean": 0.0,
            "grad_below_stiffness_frac": 0.0,
        }
    return {
        "grad_stiff_correlation": _pearson(magnitude, stiffness),
        "grad_stiff_ratio_mean": (magnitude / stiffness).mean().item(),
        "grad_below_stiffness_frac": (magnitude < stiffness).double().mean().item(),
    }


def _stiffness(
    weights: Tensor,
    mantissa_bits: int | None,
    format: str | torch.dtype | FloatFormat | None,
    scale: float | Tensor,
) -> Tensor:
    """Return the float64 stiffness at each weight: the distance between representable numbers."""
    check_input(weights, "weights")
    if (mantissa_bits is None) == (format is None):
        raise TypeError(
            f"mantissa_bits={mantissa_bits!r} and format={format!r}: expected exactly one"
        )
    defined = weights.isfinite() & (weights != 0)
    if format is not None:
        return torch.where(defined, spacing(weights.double(), format, scale), torch.nan)
    if isinstance(scale, Tensor) or scale != 1:
        raise TypeError(
            "scale is for format=; expected no scale with mantissa_bits: pass format= instead"
        )
    check_type("mantissa_bits", mantissa_bits, int)
    assert isinstance(mantissa_bits, int)
    if not 0 <= mantissa_bits <= 256:
        raise ValueError(f"mantissa_bits={mantissa_bits}: expected 0 to 256")
    if mantissa_bits == 7:  # required by the contract of DIAG-01, although bf16 has M = 7, too
        return torch.where(defined, _E0M7_STIFFNESS, torch.nan).double()
    exponent = torch.frexp(torch.where(defined, weights.double(), 1.0)).exponent
    return torch.where(defined, _exp2(exponent - 1 - mantissa_bits), torch.nan)


def _exp2(exponent: Tensor) -> Tensor:
    """Return ``2**exponent`` in float64, including subnormal results.

    `compute_exp2` needs a normal result. Thus a subnormal power is the product of two normal
    powers.
    """
    normal = exponent.clamp(-1022, 1023)
    rest = (exponent - normal).clamp(-1022, 0)
    return compute_exp2(normal, torch.float64) * compute_exp2(rest, torch.float64)


def _towards_zero(magnitude: Tensor) -> Tensor:
    """Return the next number of the dtype toward zero for each non-negative number; 0 for 0."""
    try:
        return torch.nextafter(magnitude, torch.zeros_like(magnitude))
    except RuntimeError:
        # Some torch versions and devices have no nextafter for 16 bits. The codes of non-negative
        # floats are ordered like integers, so that the code minus 1 is the next number toward zero.
        if magnitude.element_size() != 2:
            raise
        return (magnitude.view(torch.int16) - 1).clamp_(min=0).view(magnitude.dtype)


def _pearson(a: Tensor, b: Tensor) -> float:
    """Return the Pearson correlation of two float64 vectors; NaN if a vector is constant."""
    if a.min() == a.max() or b.min() == b.max():
        return torch.nan
    a, b = _normalised_deviation(a), _normalised_deviation(b)
    correlation = (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
    return correlation.clamp(-1, 1).item()


def _normalised_deviation(values: Tensor) -> Tensor:
    """Return each value's deviation from the mean, divided by the largest such deviation.

    Without the division the squares of deviations such as 1e-200 would underflow.
    """
    values = values / values.abs().max()
    deviation = values - values.mean()
    return deviation / deviation.abs().max()
