"""DIAG-01 to 04: stiffness, grid alignment, ULP distance, gradient against stiffness.

Descriptive figures of one tensor. Whether an update survives is told by `diagnostics`: the figures
here that use the gradient ignore the optimizer and the learning rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad._messages import check_type
from altgrad.quantization.arguments import check_input, check_pair, full_dtype
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.kernel import exact_exp2
from altgrad.quantization.ops import quantize, spacing

_E0M7_STIFFNESS = 1 / 128


@torch.no_grad()
def compute_stiffness_field(
    weights: Tensor,
    mantissa_bits: int | None = None,
    *,
    format: str | torch.dtype | FloatFormat | None = None,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """DIAG-01, the distance between representable numbers at each weight.

    With `mantissa_bits`, ``S = 2**(floor(log2(abs(w))) − M)``, for a format whose exponent has no
    end; 7 means the fixed-point grid E0M7 and gives 1/128 for every weight. With `format`, the
    true `spacing` of that format: its subnormals, its top and its scale; bf16, which also has
    M = 7, is right there.

    Zero, NaN and infinite weights give NaN. The sign does not matter.

    Args:
        weights: float16, bfloat16, float32 or float64, any shape.
        mantissa_bits: M, 0 to 256.
        format: A `FloatFormat` or the name of one, instead of `mantissa_bits`.
        scale: As in `quantize`; with `format` only.

    Returns:
        A tensor of the same shape, float32, or float64 for float64 weights. A stiffness below
        the dtype's smallest number becomes 0.

    Raises:
        TypeError: Both or neither of `mantissa_bits` and `format`, a scale without a format, or
            weights of another dtype.
        ValueError: `mantissa_bits` out of range, an unknown format or a wrong scale.
    """
    return _stiffness(weights, mantissa_bits, format, scale).to(full_dtype(weights))


@torch.no_grad()
def grid_alignment_error(
    weights: Tensor, format: str | torch.dtype | FloatFormat, scale: float | Tensor = 1.0
) -> Tensor:
    """DIAG-02, the distance of each weight from its grid: ``abs(w − quantize(w))``.

    0 exactly for a weight on the grid. A weight beyond the top has its distance from ±max: inf
    for ±inf. NaN gives NaN.

    Args:
        weights: float16, bfloat16, float32 or float64, any shape.
        format: A `FloatFormat` or the name of one.
        scale: As in `quantize`.

    Returns:
        A tensor of the same shape, float32, or float64 for float64 weights.

    Raises:
        TypeError, ValueError: As `quantize`.
    """
    check_input(weights, "weights")
    wide = weights.to(full_dtype(weights))
    return (wide - quantize(wide, format, scale)).abs_()


@torch.no_grad()
def grid_alignment_statistics(
    weights: Tensor, format: str | torch.dtype | FloatFormat, scale: float | Tensor = 1.0
) -> dict[str, float]:
    """DIAG-02 in four figures, over the finite weights.

    Args:
        weights: float16, bfloat16, float32 or float64, any shape.
        format: A `FloatFormat` or the name of one.
        scale: As in `quantize`.

    Returns:
        ``grid_error_mean``, ``grid_error_max`` and ``grid_error_std`` (with n − 1) of
        `grid_alignment_error`, in the weights' unit, and ``on_grid_frac``, the share of weights
        that equal a grid point: equal, not near. NaN where there is none to average: no finite
        weight, for the standard deviation fewer than two.

    Raises:
        TypeError, ValueError: As `quantize`.
    """
    error = grid_alignment_error(weights, format, scale)[weights.isfinite()].double()
    n = error.numel()
    return {
        "grid_error_mean": error.mean().item(),
        "grid_error_max": error.max().item() if n else torch.nan,
        "grid_error_std": error.std().item() if n > 1 else torch.nan,
        "on_grid_frac": (error == 0).double().mean().item(),
    }


@torch.no_grad()
def compute_ulp_distance(before: Tensor, after: Tensor) -> Tensor:
    """DIAG-03, how many units in the last place of their own dtype the weights moved.

    ``abs(after − before) / gap``, where gap is the distance from whichever of the two has the
    larger magnitude to its neighbour towards zero. Two neighbouring numbers are exactly 1 apart,
    also across a power of two; a weight that leaves zero gets a finite distance; the sign does not
    matter. 0 for an unmoved weight (−0 and 0 are equal), NaN where either is NaN or infinite.

    Args:
        before: float16, bfloat16, float32 or float64, any shape.
        after: The same dtype and shape.

    Returns:
        A tensor of that shape in ULPs, float32, or float64 for float64 weights.

    Raises:
        TypeError: Different dtypes, or not one of those.
        ValueError: Different shapes.
    """
    check_pair("before", before, "after", after)
    if before.dtype != after.dtype:
        raise TypeError(
            f"before has dtype {before.dtype} and after {after.dtype}; expected the same, since a "
            "ULP is a unit of their own dtype"
        )
    larger = torch.maximum(before.abs(), after.abs())
    gap = larger.double() - _towards_zero(larger).double()
    # The gap is a power of two, so that dividing first is exact; a difference could overflow.
    distance = (after.double() / gap - before.double() / gap).abs_()
    distance = torch.where(before == after, 0.0, distance)
    finite = before.isfinite() & after.isfinite()
    return torch.where(finite, distance, torch.nan).to(full_dtype(before))


@torch.no_grad()
def ulp_statistics(before: Tensor, after: Tensor) -> dict[str, float]:
    """DIAG-03 in four figures, over the weights that are finite before and after.

    Args:
        before: float16, bfloat16, float32 or float64, any shape.
        after: The same dtype and shape.

    Returns:
        ``ulp_mean``, ``ulp_median`` and ``ulp_max`` of `compute_ulp_distance`, in ULPs, and
        ``ulp_zero_frac``, the share of weights that did not move. NaN where there is no such
        weight. The median of an even number is the mean of the middle two.

    Raises:
        TypeError, ValueError: As `compute_ulp_distance`.
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


@torch.no_grad()
def gradient_stiffness_correlation(
    weights: Tensor,
    gradients: Tensor,
    mantissa_bits: int | None = None,
    *,
    format: str | torch.dtype | FloatFormat | None = None,
    scale: float | Tensor = 1.0,
) -> dict[str, float]:
    """DIAG-04, how gradients relate to the distance they would have to cross.

    Descriptive only: a gradient is not an update. Taken over the weights that are finite and not
    zero (nor so small that their stiffness underflows) and whose gradient is finite. Nothing is
    added to a denominator, so that the correlation does not change with the size of the gradients.

    Args:
        weights: float16, bfloat16, float32 or float64, any shape.
        gradients: Of those dtypes too, of the same shape.
        mantissa_bits: M, or instead
        format: a `FloatFormat` or the name of one; both as in `compute_stiffness_field`.
        scale: As in `quantize`; with `format` only.

    Returns:
        ``grad_stiff_correlation``, the Pearson correlation of abs(gradient) and stiffness, in
        [−1, 1], NaN where one of them is constant; ``grad_stiff_ratio_mean``, the mean of
        abs(gradient) / stiffness; ``grad_below_stiffness_frac``, the share of gradients smaller
        than the stiffness. All three are 0.0 where no weight is valid.

    Raises:
        TypeError, ValueError: As `compute_stiffness_field`, and for shapes that differ.
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
    """The stiffness field in float64, which holds that of every narrower weight."""
    check_input(weights, "weights")
    if (mantissa_bits is None) == (format is None):
        raise TypeError(
            f"mantissa_bits={mantissa_bits!r} and format={format!r}: expected exactly one of them"
        )
    defined = weights.isfinite() & (weights != 0)
    if format is not None:
        return torch.where(defined, spacing(weights.double(), format, scale), torch.nan)
    if isinstance(scale, Tensor) or scale != 1:
        raise TypeError("scale is for format=; mantissa_bits alone describes an unscaled grid")
    check_type("mantissa_bits", mantissa_bits, int)
    assert isinstance(mantissa_bits, int)
    if not 0 <= mantissa_bits <= 256:
        raise ValueError(f"mantissa_bits={mantissa_bits}: expected 0 to 256")
    if mantissa_bits == 7:  # the contract of DIAG-01; nothing else may ask this, bf16 has M = 7
        return torch.where(defined, _E0M7_STIFFNESS, torch.nan).double()
    exponent = torch.frexp(torch.where(defined, weights.double(), 1.0)).exponent
    return torch.where(defined, _exp2(exponent - 1 - mantissa_bits), torch.nan)


def _exp2(exponent: Tensor) -> Tensor:
    """2**exponent in float64, also where that is subnormal: there one factor is not enough."""
    normal = exponent.clamp(-1022, 1023)
    rest = (exponent - normal).clamp(-1022, 0)
    return exact_exp2(normal, torch.float64) * exact_exp2(rest, torch.float64)


def _towards_zero(magnitude: Tensor) -> Tensor:
    """The neighbour of each non-negative number on the side of zero; zero for zero."""
    try:
        return torch.nextafter(magnitude, torch.zeros_like(magnitude))
    except RuntimeError:
        # Not every torch and device has it for 16 bits: there, take one off the code instead.
        if magnitude.element_size() != 2:
            raise
        return (magnitude.view(torch.int16) - 1).clamp_(min=0).view(magnitude.dtype)


def _pearson(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two float64 vectors; NaN where one is constant."""
    if a.min() == a.max() or b.min() == b.max():
        return torch.nan
    a, b = _normalised_deviation(a), _normalised_deviation(b)
    correlation = (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
    return correlation.clamp(-1, 1).item()


def _normalised_deviation(values: Tensor) -> Tensor:
    """Deviation from the mean, over its maximum: squares of 1e-200 would underflow."""
    values = values / values.abs().max()
    deviation = values - values.mean()
    return deviation / deviation.abs().max()
