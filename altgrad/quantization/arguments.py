"""What the functions here accept: dtypes, scales and `out`, with errors that say what to do."""

from __future__ import annotations

import math
from typing import SupportsFloat

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What can be rounded and measured."""


def full_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 x, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_input(x: Tensor, name: str = "x") -> None:
    """TypeError unless x is a tensor of a dtype that is rounded here."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {x.layout}; expected a dense tensor ({name}.to_dense())"
        )
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected float16, bfloat16, float32 or float64 "
            f"(convert with {name}.float(), which is exact for narrower floating-point dtypes)"
        )


def check_pair(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """TypeError or ValueError unless both are floating-point tensors of one shape."""
    check_input(first, first_name)
    check_input(second, second_name)
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} has shape {tuple(first.shape)} and {second_name} "
            f"{tuple(second.shape)}; expected the same shape"
        )


def checked_scale(scale: float | Tensor, x: Tensor) -> float | Tensor:
    """The scale as a float, or as a tensor that broadcasts to x and records no gradient."""
    if isinstance(scale, float):
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale!r}: expected a positive finite number")
        return scale
    if not isinstance(scale, Tensor):
        return checked_scale(_float_of(scale), x)
    if not scale.is_floating_point():
        raise TypeError(f"scale has dtype {scale.dtype}; expected a floating-point tensor")
    if scale.dtype not in INPUT_DTYPES:
        scale = scale.float()  # scales kept in a format of 8 bits, such as MX's e8m0fnu
    if not _broadcasts(scale, x):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not broadcast to x of shape "
            f"{tuple(x.shape)}; expected one factor, one per channel of shape (channels, 1, …), "
            "or one per element, as compute_scale returns them"
        )
    return scale.detach() if scale.requires_grad else scale


def _broadcasts(scale: Tensor, x: Tensor) -> bool:
    """Whether scale · x has x's shape."""
    missing = x.dim() - scale.dim()
    return missing >= 0 and all(
        # A list, not a generator: torch.compile can follow it on every version.
        [size in (1, x.shape[missing + i]) for i, size in enumerate(scale.shape)]  # noqa: C419
    )


def _float_of(scale: object) -> float:
    """A number of another kind, such as an int or numpy's, as a float."""
    if isinstance(scale, bool) or not isinstance(scale, SupportsFloat):
        raise TypeError(f"scale={scale!r}: expected a number or a tensor")
    try:
        return float(scale)
    except OverflowError:
        raise ValueError(f"scale={scale!r}: expected a number within float64's range") from None


def check_out(out: Tensor, x: Tensor, scale: float | Tensor, dtype: torch.dtype) -> None:
    """TypeError or ValueError unless a result of x's shape and this dtype can be written to out."""
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(
            "out= cannot record a gradient: x or out requires one; call under torch.no_grad() or "
            "leave out= away"
        )
    if out is scale:
        raise ValueError("out is the scale, which is still needed; give another tensor")
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}; the result has {dtype}")
    if out.shape != x.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; the result has {tuple(x.shape)}")
