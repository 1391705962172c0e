"""The named formats and `get_format`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

from altgrad.quantization.float_format import FloatFormat, is_torch_dtype

if TYPE_CHECKING:
    import torch

Scaling: TypeAlias = Literal["tensor", "channel"] | tuple[Literal["block"], int]
"""What shares one scale: the whole tensor, each index of dimension 0, or each run of that many
elements along the last dimension."""

# The only alias: what the first users of such formats called them.
FP8Format: TypeAlias = FloatFormat

# The eight-bit family E + M = 7. E5M2, E4M3 and E3M4 are those of OCP and ml_dtypes, with their
# special codes; the others are finite throughout, so that E alone tells them apart. E1M6 is exactly
# 4 · E0M7: under power-of-two amax scales the two are one format.
E0M7 = FloatFormat("e0m7", 0, 7, 1)
E1M6 = FloatFormat("e1m6", 1, 6, 0)
E2M5 = FloatFormat("e2m5", 2, 5, 1)
E3M4 = FloatFormat("e3m4", 3, 4, 3, num_high_nans=15, has_inf=True)
E4M3 = FloatFormat("e4m3fn", 4, 3, 7, num_high_nans=1)
E5M2 = FloatFormat("e5m2", 5, 2, 15, num_high_nans=3, has_inf=True)
E6M1 = FloatFormat("e6m1", 6, 1, 31)
E7M0 = FloatFormat("e7m0", 7, 0, 63)

# Other readings of eight bits: IEEE 754's rules for E4M3, and the formats without −0.
E4M3_IEEE = FloatFormat("e4m3_ieee", 4, 3, 7, num_high_nans=7, has_inf=True)
E4M3FNUZ = FloatFormat("e4m3fnuz", 4, 3, 8, has_negative_zero=False)
E4M3B11FNUZ = FloatFormat("e4m3b11fnuz", 4, 3, 11, has_negative_zero=False)
E5M2FNUZ = FloatFormat("e5m2fnuz", 5, 2, 16, has_negative_zero=False)

# OCP's element formats of four and six bits (Microscaling Formats specification 1.0).
E2M1 = FloatFormat("e2m1", 2, 1, 1)
E2M3 = FloatFormat("e2m3", 2, 3, 1)
E3M2 = FloatFormat("e3m2", 3, 2, 3)

# Sixteen bits.
FP16 = FloatFormat("fp16", 5, 10, 15, num_high_nans=1023, has_inf=True)
BF16 = FloatFormat("bf16", 8, 7, 127, num_high_nans=127, has_inf=True)

# fmt: off
FORMATS: Mapping[str, FloatFormat] = MappingProxyType({
    format.name: format
    for format in (
        E0M7, E1M6, E2M5, E3M4, E4M3, E5M2, E6M1, E7M0,
        E4M3_IEEE, E4M3FNUZ, E4M3B11FNUZ, E5M2FNUZ,
        E2M1, E2M3, E3M2,
        FP16, BF16,
    )
})
# fmt: on
"""The named formats by their names, which are those of log keys."""

# How ml_dtypes, torch and papers spell them. Note that float8_e4m3 is the IEEE-like one.
_BY_SPELLING: dict[str, FloatFormat] = {
    **FORMATS,
    "e4m3": E4M3,
    "float8_e4m3fn": E4M3,
    "float8_e5m2": E5M2,
    "float8_e3m4": E3M4,
    "float8_e4m3": E4M3_IEEE,
    "float8_e4m3fnuz": E4M3FNUZ,
    "float8_e4m3b11fnuz": E4M3B11FNUZ,
    "float8_e5m2fnuz": E5M2FNUZ,
    "e2m1fn": E2M1,
    "float4_e2m1fn": E2M1,
    "e2m3fn": E2M3,
    "float6_e2m3fn": E2M3,
    "e3m2fn": E3M2,
    "float6_e3m2fn": E3M2,
    "e5m10": FP16,
    "half": FP16,
    "float16": FP16,
    "e8m7": BF16,
    "bfloat16": BF16,
}


def check_scaling(scaling: Scaling) -> None:
    """Raise ValueError unless the value is a `Scaling`."""
    if isinstance(scaling, str):
        if scaling in ("tensor", "channel"):
            return
    elif isinstance(scaling, (tuple, list)) and len(scaling) == 2 and scaling[0] == "block":
        size = scaling[1]
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return
    raise ValueError(
        f"scaling={scaling!r}: expected 'tensor', 'channel' or ('block', size) with a positive "
        "size, such as ('block', 32)"
    )


def get_format(name_or_format: str | torch.dtype | FloatFormat) -> FloatFormat:
    """The format of that name.

    Args:
        name_or_format: A name in `FORMATS` or as torch and ml_dtypes spell it, upper or lower
            case (``"e4m3fn"``, ``"E4M3"``, ``"float8_e4m3fn"``, ``"bfloat16"``), a torch dtype,
            or a `FloatFormat`, which is returned as it is. ``e4m3`` is OCP's (max 448);
            ``float8_e4m3`` is, as in ml_dtypes, the IEEE-like one (max 240).

    Raises:
        ValueError: No format has this name; the nearest names are listed.
        TypeError: Neither a name nor a format.
    """
    if isinstance(name_or_format, FloatFormat):
        return name_or_format
    if not (isinstance(name_or_format, str) or is_torch_dtype(name_or_format)):
        raise TypeError(
            f"expected a format's name or a FloatFormat, got {name_or_format!r} "
            f"({type(name_or_format).__name__})"
        )
    # str() of a string enum's member would be the member's name, not its value.
    name = name_or_format if isinstance(name_or_format, str) else str(name_or_format)
    name = name.lower().removeprefix("torch.")
    if name in _BY_SPELLING:
        return _BY_SPELLING[name]
    near = difflib.get_close_matches(name, _BY_SPELLING, n=3) or list(FORMATS)
    raise ValueError(
        f"unknown format {str(name_or_format)!r}; nearest: {', '.join(near)}. "
        "For a format of your own, pass a FloatFormat"
    )
