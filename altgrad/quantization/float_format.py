"""`FloatFormat`: the fields, limits and values of a binary floating-point format.

Read this file first. The module loads without torch, so that ``altgrad report`` starts quickly.
The next file is `formats`, which defines the named formats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from altgrad._messages import check_type

if TYPE_CHECKING:  # formats are described without torch, so that reports do not load it
    import torch
    from torch import Tensor
    from typing_extensions import TypeIs

# values() of 24 bits takes 128 MiB as float64, and several times as much as Python floats.
_MAX_LISTED_BITS = 24
_MAX_FIELD_BITS = {"exponent_bits": 32, "mantissa_bits": 256}  # well past binary256 (E19 M236)

# From the fields after the name, as `FloatFormat.key` writes them, to the torch dtype with the same
# codes: E, M, bias, num_high_nans, has_inf, has_negative_zero, has_subnormals. The suffixes of
# torch mean: f finite (no inf), n NaN in a special code, uz unsigned zero (no −0).
# https://docs.pytorch.org/docs/stable/tensor_attributes.html
_TORCH_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "4 3 7 1 False True True": "float8_e4m3fn",
        "5 2 15 3 True True True": "float8_e5m2",
        "4 3 8 0 False False True": "float8_e4m3fnuz",
        "5 2 16 0 False False True": "float8_e5m2fnuz",
        "5 10 15 1023 True True True": "float16",
        "8 7 127 127 True True True": "bfloat16",
    }
)


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A binary floating-point format: one sign bit, E exponent bits, M mantissa bits.

    A code is the bit pattern of a number: the sign, the exponent field e and the mantissa field m.
    Without the sign, codes 0, 1, 2, … are the non-negative values in ascending order. The value of
    a code is

    - ``m · 2**(emin - M)`` where e = 0: zero and the subnormals, at a constant spacing;
    - ``(2**M + m) · 2**(e - bias - M)`` where e > 0: the normal numbers.

    Here ``emin = 1 - bias``. Codes at the top may be NaN and infinity. For example, in ``e4m3fn``
    (E = 4, M = 3, bias = 7, one NaN)::

        sign | exponent | mantissa | value
        0    | 0000     | 001      | 1 · 2**(-6 - 3) = 2**-9, the smallest subnormal
        0    | 0111     | 000      | (8 + 0) · 2**(7 - 7 - 3) = 1
        0    | 1111     | 110      | (8 + 6) · 2**(15 - 7 - 3) = 448, the largest value
        0    | 1111     | 111      | NaN

    E = 0 is a fixed-point grid, where every value is subnormal. Scale formats such as e8m0fnu,
    which are unsigned and have no zero, are not supported. Two formats are equal if all their
    fields are equal, including the name. Instances are immutable and hashable.

    Args:
        name: The name in log keys and tables: not empty, without ``/`` and white space.
        exponent_bits: E, 0 to 32.
        mantissa_bits: M, 0 to 256, without the implicit leading bit. E + M is at least 1.
        bias: The integer that is subtracted from the exponent field. IEEE 754 uses
            ``2**(E - 1) - 1``.
        num_high_nans: The number of NaN codes at the top, for each sign.
        has_inf: If True, the code below the NaNs is infinity.
        has_negative_zero: If True, the code with only the sign bit set is −0. If False, this code
            is NaN, as in the formats ending in ``fnuz``.
        has_subnormals: If True, codes with exponent field 0 are the subnormals. If False, these
            codes are all zero.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is out of range, the fields leave no positive value, or the name
            cannot be part of a log key.

    Examples:
        >>> from altgrad.quantization import FloatFormat
        >>> e4m3 = FloatFormat("e4m3fn", 4, 3, 7, num_high_nans=1)
        >>> e4m3.max, e4m3.smallest_normal, e4m3.smallest_subnormal
        (448.0, 0.015625, 0.001953125)

    References:
        IEEE 754-2019, section 3; OCP 8-bit Floating Point Specification (OFP8) 1.0; the terms
        follow ``numpy.finfo`` and gfloat's ``FormatInfo``.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    _: KW_ONLY
    num_high_nans: int = 0
    has_inf: bool = False
    has_negative_zero: bool = True
    has_subnormals: bool = True
    key: str = field(init=False, repr=False, compare=False)
    """All fields as one string, from which `from_key` makes an equal format.

    Functions that torch.compile traces take this string: every supported torch version treats a
    string argument as a constant, but few do so with a `FloatFormat`.
    """

    def __post_init__(self) -> None:
        check_format_name(self.name)
        _check_types(self)
        for bits, most in _MAX_FIELD_BITS.items():
            if not 0 <= getattr(self, bits) <= most:
                raise ValueError(f"{bits}={getattr(self, bits)}: expected 0 to {most}")
        if self.num_high_nans < 0:
            raise ValueError(f"num_high_nans={self.num_high_nans}: expected 0 or more")
        lowest = 1 if self.has_subnormals else 1 << self.mantissa_bits
        if self._max_code < lowest:
            raise ValueError(
                f"{self.name} has no positive value: exponent_bits={self.exponent_bits}, "
                f"mantissa_bits={self.mantissa_bits}, num_high_nans={self.num_high_nans}, "
                f"has_inf={self.has_inf} and has_subnormals={self.has_subnormals} leave finite "
                f"codes up to {self._max_code}; expected at least {lowest}, the first positive "
                "code: add exponent or mantissa bits, or lower num_high_nans"
            )
        values = (getattr(self, field.name) for field in fields(self) if field.init)
        # A frozen dataclass sets a derived field through object.__setattr__.
        object.__setattr__(self, "key", " ".join(str(value) for value in values))

    @classmethod
    def from_key(cls, key: str) -> FloatFormat:
        """Return the format with a given `key`, the string that contains all its fields."""
        name, *values = key.split(" ")
        e, m, bias, num_high_nans = map(int, values[:4])
        has_inf, has_negative_zero, has_subnormals = (value == "True" for value in values[4:])
        return cls(
            name,
            e,
            m,
            bias,
            num_high_nans=num_high_nans,
            has_inf=has_inf,
            has_negative_zero=has_negative_zero,
            has_subnormals=has_subnormals,
        )

    def __str__(self) -> str:
        return self.name

    @property
    def _max_code(self) -> int:
        """The largest finite value's code, its bit pattern as an integer, without the sign bit."""
        # From the top: the NaNs, infinity, the largest finite value.
        codes = 1 << (self.exponent_bits + self.mantissa_bits)
        return codes - 1 - self.num_high_nans - self.has_inf

    def _value(self, code: int) -> float:
        """Return the value of a code, a bit pattern as an integer, given without its sign bit."""
        field, mantissa = divmod(code, 1 << self.mantissa_bits)
        if field > 0:
            mantissa += 1 << self.mantissa_bits  # the implicit leading bit of a normal number
        elif not self.has_subnormals:
            mantissa = 0
        return self._float64(mantissa, max(field, 1) - self.bias - self.mantissa_bits)

    def _float64(self, significand: int, exponent: int) -> float:
        """Return ``significand · 2**exponent``, or raise ValueError if float64 cannot hold it."""
        try:
            value = math.ldexp(significand, exponent)
            exact = math.ldexp(value, -exponent) == significand
        except OverflowError:
            exact = False
        if not exact:
            raise ValueError(
                f"{self.name}: the value {significand} · 2**{exponent} exceeds float64, the "
                "widest dtype AltGrad computes in; use at most 11 exponent bits and 52 mantissa "
                "bits, with a bias near 1023"
            )
        return value

    @property
    def element(self) -> FloatFormat:
        """The format of a single element before scaling: this format itself."""
        return self

    @property
    def block_size(self) -> int | None:
        """The number of elements that share a scale: None, because the format has no blocks."""
        return None

    @property
    def scale(self) -> Literal["amax"]:
        """The rule by which AltGrad computes a scale for weights in the format: ``"amax"``.

        The scale is the largest finite magnitude of the weights divided by `max`, rounded up to a
        power of two. No weight is clipped.
        """
        return "amax"

    @property
    def has_tensor_scale(self) -> bool:
        """False, because the format has no block scales that a tensor's scale would multiply."""
        return False

    @property
    def power_of_two(self) -> bool:
        """True, because AltGrad scales weights in the format by powers of two."""
        return True

    @property
    def bits(self) -> int:
        """The width of one number in bits, including the sign."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def precision(self) -> int:
        """The width of the significand in bits, including the implicit bit: M + 1."""
        return self.mantissa_bits + 1

    @property
    def significant_bits(self) -> int:
        """The largest number of significant bits of a value.

        A format with normal numbers has `precision` significant bits. In e0m7, where every value is
        subnormal, the largest value 127 / 128 has 7 significant bits.
        """
        # Codes are integers with an implicit bit on top, so that codes 1, 2, 3 have 1, 1, 2 bits.
        return min(self.precision, max((self._max_code - 1).bit_length(), 1))

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal number: ``1 - bias``."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """The exponent of the largest power of two up to `max`; `emin` if `max` is smaller."""
        return max(self._max_code >> self.mantissa_bits, 1) - self.bias

    @property
    def max(self) -> float:
        """The largest finite value.

        Raises:
            ValueError: float64 cannot hold the value.
        """
        return self._value(self._max_code)

    @property
    def smallest_normal(self) -> float:
        """The smallest normal number, ``2**emin``; for E = 0 all values are smaller than this."""
        return self._float64(1, self.emin)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value: ``2**(emin - M)``, or ``2**emin`` without subnormals."""
        # has_subnormals is 0 or 1 as a factor.
        return self._float64(1, self.emin - self.mantissa_bits * self.has_subnormals)

    @property
    def largest_spacing(self) -> float:
        """The distance between `max` and the value before it, if both lie in one binade."""
        return self._float64(1, self.emax - self.mantissa_bits)

    @property
    def eps(self) -> float:
        """The spacing at 1 if 1 is a normal number: ``2**-M``, as in ``torch.finfo``."""
        return self._float64(1, -self.mantissa_bits)

    @property
    def has_nan(self) -> bool:
        """True if at least one code is NaN."""
        return self.num_high_nans > 0 or not self.has_negative_zero

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype whose bit patterns have the same values; None if torch has none."""
        name = _TORCH_DTYPES.get(self.key.partition(" ")[2])
        if name is None:
            return None
        import torch

        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def is_coarser_than(self, other: torch.dtype | FloatFormat) -> bool:
        """Return whether the format has fewer significant bits than another dtype or format.

        If so, weights stored in `other` can show updates that this format would lose.
        `significant_bits` decides: e0m7 and e1m6, the same grid up to a factor of 4, have equally
        many, although their `mantissa_bits` differ.

        Args:
            other: The dtype or format in which weights are stored now.
        """
        if isinstance(other, FloatFormat):
            return self.significant_bits < other.significant_bits
        import torch

        # The significand of eps = 2**-m is 0.5, its exponent 1 − m; a dtype has m + 1 bits.
        return self.significant_bits < 2 - math.frexp(torch.finfo(other).eps)[1]

    def values(self) -> Tensor:
        """Return every finite value once, in ascending order.

        Returns:
            float64 (values,) on the CPU, from −`max` to `max`. −0 and 0 count as one value, so that
            the number of values is odd.

        Raises:
            ValueError: The format has more than 24 bits, or float64 cannot hold a value.

        Examples:
            >>> from altgrad.quantization import E2M1
            >>> E2M1.values()[7:].tolist()
            [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        """
        import torch

        if self.bits > _MAX_LISTED_BITS:
            raise ValueError(
                f"{self.name} has {self.bits} bits, too many values to list; expected at most "
                f"{_MAX_LISTED_BITS} bits: use a narrower format"
            )
        first = 1 if self.has_subnormals else 1 << self.mantissa_bits
        positive = [self._value(code) for code in range(first, self._max_code + 1)]
        positive_tensor = torch.tensor(positive, dtype=torch.float64, device="cpu")
        zero = torch.zeros(1, dtype=torch.float64, device="cpu")
        return torch.cat([-positive_tensor.flip(0), zero, positive_tensor])


def is_torch_dtype(value: object) -> TypeIs[torch.dtype]:
    """Return whether a value is a `torch.dtype`, without importing torch."""
    kind = type(value)
    return (kind.__module__, kind.__qualname__) == ("torch", "dtype")


def check_format_name(name: object) -> None:
    """Raise TypeError or ValueError unless a value can name a format in log keys."""
    check_type("name", name, str)
    assert isinstance(name, str)
    if not name or "/" in name or any(c.isspace() for c in name):
        raise ValueError(
            f"name={name!r}: expected a non-empty name without '/' or white space, because log "
            "keys such as stall_frac/e4m3fn contain the name"
        )


def _check_types(format: FloatFormat) -> None:
    """Raise TypeError unless every field of a format has the annotated type."""
    for name in ("exponent_bits", "mantissa_bits", "bias", "num_high_nans"):
        check_type(name, getattr(format, name), int)
    for name in ("has_inf", "has_negative_zero", "has_subnormals"):
        check_type(name, getattr(format, name), bool)
