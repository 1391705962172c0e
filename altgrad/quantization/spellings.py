"""The formats that a user may have meant by an unknown name, such as ``fp8``, and the error of it.

Names such as ``fp8`` stand for several formats, and none of them can be taken in silence. Read
`float_format` first; `formats` and `block_formats` raise the error.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

_MOST = 3  # names that are nearest by their letters
_BLOCK = ("mx", "nv")  # beginnings of the names of block formats, whose blocks share a scale

_FP8 = ("e4m3fn", "e5m2", "mxfp8")
_FP6 = ("mxfp6_e2m3", "mxfp6_e3m2", "e2m3", "e3m2")
_FP4 = ("mxfp4", "nvfp4", "e2m1")
_MEANT = {
    **dict.fromkeys(("fp8", "float8", "f8", "fp8_e4m3", "mxfp8"), _FP8),
    "fp8_e5m2": ("e5m2", "mxfp8_e5m2"),
    **dict.fromkeys(("fp6", "float6", "mxfp6"), _FP6),
    **dict.fromkeys(("fp4", "float4", "f4", "mxfp4", "nvfp4"), _FP4),
    # Not floating-point: those of the same size.
    **dict.fromkeys(("nf4", "int4"), _FP4),
    # 8-bit integers with a scale are evenly spaced, as numbers without exponent bits are.
    "int8": ("e0m7",),
    **dict.fromkeys(("bf", "bfloat", "bfp16"), ("bf16",)),
    **dict.fromkeys(("f16", "float", "fp"), ("fp16", "bf16")),
    **dict.fromkeys(("fp32", "float32", "f32", "tf32"), ("fp32", "bf16")),
}
"""Names that users try, in lower case, and the formats that each may stand for."""


def find_near(name: str, known: Collection[str]) -> list[str]:
    """Return the names that a user may have meant by an unknown name, the most likely first.

    ``fp8`` stands for ``e4m3fn``, ``e5m2`` and ``mxfp8``, and ``fp8-sr`` for these with ``-sr``.
    Other names are compared by their letters.

    Args:
        name: The unknown name.
        known: The names that are accepted.

    Returns:
        Names of `known`; empty if none is near.
    """
    name = name.strip().lower()
    base, dash, way = name.partition("-")
    meant = [f"{format}{dash}{way}" for format in _MEANT.get(base, ())]
    accepted = [each for each in meant if each in known]
    return accepted or difflib.get_close_matches(name, known, n=_MOST)


def describe_unknown(name: str, known: Collection[str], others: Sequence[str]) -> str:
    """Return the message of the error for the name of a format that is unknown.

    Args:
        name: The name.
        known: The names that are accepted.
        others: The names to list if none is near.
    """
    spelling = name.strip().lower().removeprefix("torch.")
    near = ", ".join(find_near(spelling, known) or others)
    meant = _MEANT.get(spelling, ())
    if blocks := [each for each in meant if each.startswith(_BLOCK) and each not in known]:
        near += f", and for get_formats {', '.join(blocks)}"
    return (
        f"unknown format {name!r}; nearest: {near}. For a custom format, pass a FloatFormat; "
        "'altgrad formats' lists all"
    )
