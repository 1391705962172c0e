"""`store_`: round a tensor to the values of a number format, in place.

A training that stores its weights in a format (`storage`), and the samples that predict such a
training (`twin`), round with this one function.

Read `native_storage` first; `rounding_generators` comes next.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.ops import quantize_checked
from altgrad.recipes.native_storage import store_natively

StorageRounding: TypeAlias = Literal["nearest_even", "stochastic"]
"""The ways to round stored weights and states: to nearest, or at random with an exact mean."""
Compensation: TypeAlias = Literal["kahan"]
"""The ways to make up for rounding errors: Kahan summation keeps them and adds them next time."""


@torch.inference_mode()  # under no_grad, each view of the exponent bits is two operations
def store_(
    weights: Tensor,
    element: FloatFormat,
    scale: float | Tensor | None,
    *,
    rounding: StorageRounding = "nearest_even",
    generator: torch.Generator | None = None,
    lost: Tensor | None = None,
    stays: Tensor | None = None,
) -> None:
    """Round a tensor to the values of a format, in place.

    A value beyond the largest value of the format becomes the largest value. NaN and ±inf stay.

    Args:
        weights: Weights or states, float16, bfloat16, float32 or float64, any shape. The dtype must
            be finer than the format.
        element: The format of a single element.
        scale: A positive number, or a tensor of positive numbers that broadcasts to the shape of
            the weights. Weights become scale times a value of the format; None stands for 1. A
            float64 tensor makes the arithmetic float64.
        rounding: The way to round.
        generator: The random number generator for ``"stochastic"``, on the device of the weights.
        lost: The rounding errors that Kahan summation keeps, bfloat16, the shape of the weights.
            They are added before the weights are rounded, and replaced by the new errors.
        stays: A mask of weights that no step has changed since they were rounded, bool, the shape
            of the weights: they and their errors stay. An error of almost half a spacing is half a
            spacing in bfloat16; added again, it would move the weight. None if all may change.
    """
    if stays is None and store_natively(
        weights,
        element,
        scale,
        is_stochastic=rounding == "stochastic",
        generator=generator,
        lost=lost,
    ):
        return
    before = weights.clone() if stays is not None else None
    if lost is not None:
        weights.add_(lost.to(weights.dtype))
    divisor = 1.0 if scale is None else scale
    # Without the checks of `quantize`, which would cost operations in each step. It turns ±inf into
    # the largest value, so that they are put back below.
    rounded = quantize_checked(weights, element.key, divisor, rounding, True, generator, None)
    is_inf = weights.isinf()
    if lost is not None:
        rounded = torch.where(is_inf, weights, rounded)
        errors = _limit(weights - rounded, element, scale).nan_to_num_(0.0)  # inf − inf is NaN
        if stays is not None and before is not None:
            rounded, errors = torch.where(stays, before, rounded), torch.where(stays, lost, errors)
        lost.copy_(errors)
        weights.copy_(rounded)
    elif rounded.dtype == weights.dtype:
        torch.where(is_inf, weights, rounded, out=weights)
    else:
        weights.copy_(torch.where(is_inf, weights, rounded))


def check_rounding(rounding: object, compensation: object) -> None:
    """Raise ValueError unless weights can be rounded and compensated in this way.

    Args:
        rounding: A `StorageRounding`.
        compensation: A `Compensation` or None.

    Raises:
        ValueError: An argument has another value, or the two contradict each other.
    """
    if rounding not in get_args(StorageRounding):
        raise ValueError(f"rounding={rounding!r}: expected 'nearest_even' or 'stochastic'")
    if compensation not in (None, *get_args(Compensation)):
        raise ValueError(f"compensation={compensation!r}: expected None or 'kahan'")
    if compensation is not None and rounding == "stochastic":
        raise ValueError(
            "rounding='stochastic' and compensation='kahan': expected only one of them, "
            "because rounding a kept error at random would move weights that have no update; "
            "use compensation=None or rounding='nearest_even'"
        )


def _limit(errors: Tensor, element: FloatFormat, scale: float | Tensor | None) -> Tensor:
    """Return rounding errors, clamped in place to ± the largest spacing of a format.

    Rounding to nearest loses at most half a spacing, but a weight beyond the largest value loses
    more. To keep all of that would hold the weight there long after its updates turned back.
    """
    most: Any = element.largest_spacing
    if scale is not None:
        most = most * scale
    return errors.clamp_(-most, most)
