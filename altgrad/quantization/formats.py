"""The named floating-point formats, `get_format`, and the type `Scaling`.

Read `float_format` first, which explains the arguments that define each format, then `spellings`,
which has the error for an unknown name. Formats with a
scale per block, such as ``mxfp4``, follow in `block_formats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

from altgrad.quantization.float_format import FloatFormat, is_torch_dtype
from altgrad.quantization.spellings import describe_unknown

if TYPE_CHECKING:
    import torch

Scaling: TypeAlias = Literal["tensor", "channel"] | tuple[Literal["block"], int]
"""The elements that share one scale: all elements of a tensor (``"tensor"``), those at one index
of dimension 0 (``"channel"``), or each `size` neighbours in the last dimension
(``("block", size)``)."""

# The former name of the class, kept because user code imports it.
FP8Format: TypeAlias = FloatFormat

# The eight-bit formats, E + M = 7. E5M2 and E4M3 have the special codes of OCP OFP8, E3M4 those of
# ml_dtypes (https://github.com/jax-ml/ml_dtypes). The other formats have neither inf nor NaN and
# differ in E only. The values of E1M6 are those of E0M7 times 4, so that the two formats are equal
# under power-of-two amax scales.
E0M7 = FloatFormat("e0m7", 0, 7, 1)
E1M6 = FloatFormat("e1m6", 1, 6, 0)
E2M5 = FloatFormat("e2m5", 2, 5, 1)
E3M4 = FloatFormat("e3m4", 3, 4, 3, num_high_nans=15, has_inf=True)
E4M3 = FloatFormat("e4m3fn", 4, 3, 7, num_high_nans=1)
E5M2 = FloatFormat("e5m2", 5, 2, 15, num_high_nans=3, has_inf=True)
E6M1 = FloatFormat("e6m1", 6, 1, 31)
E7M0 = FloatFormat("e7m0", 7, 0, 63)

# Variants: E4M3 with the special codes of IEEE 754 (max 240), and formats without −0, in which the
# code with only the sign bit set is NaN ("fnuz": finite, NaN, unsigned zero).
# https://arxiv.org/abs/2206.02915 introduces fnuz with a bias one higher than that of IEEE 754.
E4M3_IEEE = FloatFormat("e4m3_ieee", 4, 3, 7, num_high_nans=7, has_inf=True)
E4M3FNUZ = FloatFormat("e4m3fnuz", 4, 3, 8, has_negative_zero=False)
E4M3B11FNUZ = FloatFormat("e4m3b11fnuz", 4, 3, 11, has_negative_zero=False)
E5M2FNUZ = FloatFormat("e5m2fnuz", 5, 2, 16, has_negative_zero=False)

# Element formats of four and six bits, without inf and NaN, of OCP Microscaling Formats 1.0:
# https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
E2M1 = FloatFormat("e2m1", 2, 1, 1)
E2M3 = FloatFormat("e2m3", 2, 3, 1)
E3M2 = FloatFormat("e3m2", 3, 2, 3)

# Sixteen bits: IEEE 754 binary16, and the upper half of binary32.
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
"""The named floating-point formats by name, such as ``e4m3fn``; log keys contain these names."""

# Spellings of ml_dtypes, torch and papers. In ml_dtypes float8_e4m3 is the IEEE-like format with
# inf and max 240, not OCP's E4M3 (float8_e4m3fn), which papers call e4m3.
_BY_SPELLING: Mapping[str, FloatFormat] = {
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
    """Raise ValueError unless `scaling` is ``"tensor"``, ``"channel"`` or ``("block", size)``."""
    if isinstance(scaling, str):
        if scaling in ("tensor", "channel"):
            return
    elif isinstance(scaling, (tuple, list)) and len(scaling) == 2 and scaling[0] == "block":
        size = scaling[1]
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return
    raise ValueError(
        f"scaling={scaling!r}: expected 'tensor', 'channel' or ('block', size) with a positive int "
        "as size, such as ('block', 32)"
    )


def get_format(name_or_format: str | torch.dtype | FloatFormat) -> FloatFormat:
    """Return the floating-point format with a given name.

    Names are those in `FORMATS` and those of torch and ml_dtypes, in upper or lower case:
    ``"e4m3fn"``, ``"E4M3"``, ``"float8_e4m3fn"``, ``"bfloat16"``. The name ``e4m3`` means OCP's
    format (max 448). The name ``float8_e4m3`` means the IEEE-like format (max 240), as in
    ml_dtypes.

    Args:
        name_or_format: A name, a torch dtype, or a `FloatFormat`, which is returned unchanged.

    Returns:
        The format.

    Raises:
        ValueError: No format has this name. The message lists the nearest names.
        TypeError: The argument is neither a name nor a dtype nor a `FloatFormat`.

    Examples:
        >>> from altgrad.quantization import get_format
        >>> get_format("float8_e5m2").max
        57344.0
    """
    if isinstance(name_or_format, FloatFormat):
        return name_or_format
    if not (isinstance(name_or_format, str) or is_torch_dtype(name_or_format)):
        raise TypeError(
            f"format={name_or_format!r}: expected a format's name, a torch dtype or a FloatFormat, "
            f"got {type(name_or_format).__name__}"
        )
    found = find_format(name_or_format)
    if found is None:
        raise ValueError(describe_unknown(str(name_or_format), _BY_SPELLING, [*FORMATS]))
    return found


def find_format(name: str | torch.dtype) -> FloatFormat | None:
    """Return the floating-point format with a name or dtype; None if there is none."""
    # str() of a member of a string enum is the name of the member; the member itself is its value.
    spelling = name if isinstance(name, str) else str(name)
    return _BY_SPELLING.get(spelling.lower().removeprefix("torch."))
