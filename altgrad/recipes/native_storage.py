"""Round tensors in place by the native code of `native_rounding`, where it can.

`store_natively` does what `store_` does with tensors, in one pass over the weights and to the same
bits. It needs the extra ``altgrad[fast]``, and weights that are float32 and lie in the host's
memory: the samples of twins, and the layers of a training on the CPU. All else is left to `store_`.

Read `altgrad.quantization.ops` first; `rounding` comes next. `altgrad.measurement.native_rounding`
is the code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.measurement.native_code import native_code
from altgrad.measurement.native_rows import can_measure
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.kernel import draw_numbers, get_arithmetic_dtype

MOST_ELEMENTS = 2**20
"""Number of weights up to which one pass on one thread is faster than many on all threads."""
_LEAST = 2.0**-1000  # spacings below it would need subnormal numbers


def store_natively(
    weights: Tensor,
    element: FloatFormat,
    scale: float | Tensor | None,
    *,
    is_stochastic: bool,
    generator: torch.Generator | None,
    lost: Tensor | None,
) -> bool:
    """Round a tensor to the values of a format in place, unless this is left to `store_`.

    Args:
        weights: As in `store_`.
        element: As in `store_`.
        scale: As in `store_`.
        is_stochastic: True to round at random, False to round to nearest.
        generator: The random number generator, from which as many numbers are drawn as by `store_`.
        lost: As in `store_`.

    Returns:
        True if the weights are rounded, and False if nothing has changed.
    """
    function = native_code.rounding
    if function is None or not (_can_store(weights, torch.float32) and _is_simple(element)):
        return False
    if weights.numel() > MOST_ELEMENTS or torch.compiler.is_compiling():
        return False
    errors = scales = draws = None
    if lost is not None:
        if scale is not None or is_stochastic or not _can_store(lost, torch.bfloat16):
            return False
        errors = lost
    if scale is not None:
        if not (isinstance(scale, Tensor) and can_measure(scale) and scale.dtype == torch.float32):
            return False
        scales = scale.expand(weights.shape).contiguous()
    if is_stochastic:
        draws = draw_numbers(weights, generator)
    arithmetic = get_arithmetic_dtype(torch.float32, element.key, scale is not None)
    function(
        weights.data_ptr(),
        weights.numel(),
        0 if scales is None else scales.data_ptr(),
        arithmetic == torch.float32,
        0 if draws is None else draws.data_ptr(),
        0 if errors is None else errors.data_ptr(),
        element.has_negative_zero,
        element.largest_spacing,
        element.max,
        element.eps,
        element.smallest_subnormal,
    )
    # Autograd, and AltGrad's search for writes, learn that the tensors have changed.
    torch.autograd.graph.increment_version([weights] if errors is None else [weights, errors])
    return True


def _can_store(x: Tensor, dtype: torch.dtype) -> bool:
    return can_measure(x) and x.dtype == dtype and x.is_contiguous() and x.numel() > 0


def _is_simple(element: FloatFormat) -> bool:
    """Return True unless a format lacks subnormals or mantissa bits, or has tiny spacings."""
    is_usual = element.has_subnormals and element.mantissa_bits > 0
    return is_usual and element.smallest_subnormal >= _LEAST
