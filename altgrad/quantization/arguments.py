"""Checks of arguments: tensors to round, scales, and the tensor `out` for a result.

Each error names the argument, its value, the expected value, and what to do. `ops`, `scaling` and
the diagnostics call these checks before any computation.
"""

from __future__ import annotations

import math
from typing import SupportsFloat

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes of tensors that can be rounded and measured."""


def get_full_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64 x, otherwise float32: the dtype of results of full precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_input(x: Tensor, name: str = "x") -> None:
    """Raise TypeError unless x is a dense floating-point tensor that can be rounded.

    Args:
        x: The value to check: float16, bfloat16, float32 or float64, any shape.
        name: The name of the argument, for the error.

    Raises:
        TypeError: x is not a tensor, is sparse, or has an unsupported dtype.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {x.layout}; expected a dense tensor: convert with {name}.to_dense()"
        )
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected float16, bfloat16, float32 or float64: convert "
            f"with {name}.float(), which is exact for narrower floating-point dtypes"
        )


def check_pair(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Raise an error unless two arguments are floating-point tensors of the same shape.

    Args:
        first_name: The name of the first argument, for the error.
        first: The first tensor: float16, bfloat16, float32 or float64, any shape.
        second_name: The name of the second argument, for the error.
        second: The second tensor: float16, bfloat16, float32 or float64, the shape of `first`.

    Raises:
        TypeError: An argument is not a tensor, is sparse, or has an unsupported dtype.
        ValueError: The shapes differ.
    """
    check_input(first, first_name)
    check_input(second, second_name)
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} has shape {tuple(first.shape)} and {second_name} "
            f"{tuple(second.shape)}; expected the same shape for both"
        )


def prepare_scale(scale: float | Tensor, x: Tensor) -> float | Tensor:
    """Check a scale, the factor from stored numbers to values, and return it without gradient.

    The values of a scale tensor are accepted unread, because a read would wait for the device.

    Args:
        scale: A positive finite number, or a floating-point tensor that broadcasts to x's shape.
        x: The tensor that the scale applies to.

    Returns:
        A float, or a detached tensor with the shape and device of `scale`. Its dtype is in
        `INPUT_DTYPES`: scales in formats of 8 bits, such as float8_e8m0fnu, become float32.

    Raises:
        TypeError: The scale is neither a number nor a floating-point tensor.
        ValueError: The scale is not positive and finite, or does not broadcast to x's shape.
    """
    if isinstance(scale, float):
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale!r}: expected a positive finite number")
        return scale
    if not isinstance(scale, Tensor):
        return prepare_scale(_to_float(scale), x)
    if not scale.is_floating_point():
        raise TypeError(f"scale has dtype {scale.dtype}; expected a floating-point tensor")
    if scale.dtype not in INPUT_DTYPES:
        scale = scale.float()  # float8_e8m0fnu, the dtype of MX scales, has no arithmetic in torch
    if not _broadcasts(scale, x):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not broadcast to x of shape "
            f"{tuple(x.shape)}; expected one factor, one per channel with shape (channels, 1, …), "
            "or one per element: compute_scale(x, …) returns such tensors"
        )
    return scale.detach() if scale.requires_grad else scale


def _broadcasts(scale: Tensor, x: Tensor) -> bool:
    """Return whether ``scale * x`` has the shape of x."""
    missing = x.dim() - scale.dim()
    return missing >= 0 and all(
        # A list, because torch.compile does not trace a generator in all() on every version.
        [size in (1, x.shape[missing + i]) for i, size in enumerate(scale.shape)]  # noqa: C419
    )


def _to_float(scale: object) -> float:
    """Return a number, such as an int or a numpy scalar, as a float."""
    if isinstance(scale, bool) or not isinstance(scale, SupportsFloat):
        raise TypeError(f"scale={scale!r}: expected a number or a tensor")
    try:
        return float(scale)
    except OverflowError:
        # An int of 10**400, for example.
        raise ValueError(f"scale={scale!r}: expected a number within float64's range") from None


def check_out(out: Tensor, x: Tensor, scale: float | Tensor, dtype: torch.dtype) -> None:
    """Raise an error unless `out` can hold a result with the shape of x.

    Args:
        out: The tensor to write to; it may be x.
        x: The tensor that is rounded.
        scale: The scale, which must be another tensor than `out`.
        dtype: The dtype of the result.

    Raises:
        TypeError: `out` has another dtype than the result.
        ValueError: `out` has another shape than x, `out` is the scale, or a gradient would be
            recorded.
    """
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(
            "out= cannot record a gradient, but x or out requires one; call under torch.no_grad() "
            "or omit out="
        )
    if out is scale:
        raise ValueError("out is the same tensor as scale; expected another tensor")
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}; expected {dtype}, the dtype of the result")
    if out.shape != x.shape:
        raise ValueError(
            f"out has shape {tuple(out.shape)}; expected {tuple(x.shape)}, the shape of x"
        )
