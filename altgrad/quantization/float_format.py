"""Which numbers a format can hold: `FloatFormat`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING

from altgrad._messages import check_type

if TYPE_CHECKING:  # formats are described without torch, so that reports do not load it
    import torch
    from torch import Tensor
    from typing_extensions import TypeIs

_MAX_LISTED_BITS = 24  # values() of a wider format would not fit into memory
_MAX_FIELD_BITS = {"exponent_bits": 32, "mantissa_bits": 256}  # well past binary256 (E19 M236)

# By what decides what each code means: the fields but the name, as `FloatFormat.key` writes them.
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

    A code without its sign bit counts 0, 1, 2, … through the non-negative values in order. With
    exponent field e and mantissa field m it stands for

    - ``m · 2**(emin - M)`` where e = 0: zero and the subnormals, at a constant distance;
    - ``(2**M + m) · 2**(e - bias - M)`` elsewhere: the normal numbers,

    with ``emin = 1 - bias``. The codes at the top may be given to NaN and infinity. E = 0 is a
    fixed-point grid: every value is subnormal. Scale formats (unsigned, without a zero, such as
    e8m0fnu) are not `FloatFormat`s.

    Two formats are equal when all their fields are, the name included. Instances are immutable
    and hashable.

    Args:
        name: How the format is called in log keys and tables; not empty, no ``/``, no space.
        exponent_bits: E, 0 to 32.
        mantissa_bits: M, 0 to 256, without the implicit leading bit; E + M at least 1.
        bias: What is subtracted from the exponent field; any integer. IEEE 754 uses
            ``2**(E - 1) - 1``.
        num_high_nans: How many codes at the top, for each sign, are NaN.
        has_inf: Whether the code below those is infinity.
        has_negative_zero: Whether the code with only the sign bit set is −0; else it is NaN
            (the formats ending in ``fnuz``).
        has_subnormals: Whether exponent field 0 holds the subnormals; else all of it is zero.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: The fields leave no positive value, or the name cannot be part of a log key.

    References:
        IEEE 754-2019, section 3; OCP 8-bit Floating Point Specification (OFP8) 1.0; the words
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
    """All fields as one string, from which `from_key` makes the same format.

    For torch.compile: on every version it takes a string for a constant, on most no object.
    """

    def __post_init__(self) -> None:
        _check_types(self)
        if not self.name or "/" in self.name or any(c.isspace() for c in self.name):
            raise ValueError(
                f"name={self.name!r}: expected a non-empty name without '/' or white space, since "
                "it becomes part of log keys such as stall_frac/e4m3fn"
            )
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
                f"has_inf={self.has_inf} and has_subnormals={self.has_subnormals} leave codes up "
                f"to {self._max_code}, and the first positive one is {lowest}; give it more "
                "exponent or mantissa bits or fewer special codes"
            )
        values = (getattr(self, field.name) for field in fields(self) if field.init)
        object.__setattr__(self, "key", " ".join(str(value) for value in values))

    @classmethod
    def from_key(cls, key: str) -> FloatFormat:
        """The format with this `key`."""
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
        """The code of `max`."""
        codes = 1 << (self.exponent_bits + self.mantissa_bits)
        return codes - 1 - self.num_high_nans - self.has_inf

    def _value(self, code: int) -> float:
        """The value of a code without its sign bit."""
        field, mantissa = divmod(code, 1 << self.mantissa_bits)
        if field > 0:
            mantissa += 1 << self.mantissa_bits
        elif not self.has_subnormals:
            mantissa = 0
        return self._float64(mantissa, max(field, 1) - self.bias - self.mantissa_bits)

    def _float64(self, significand: int, exponent: int) -> float:
        """``significand · 2**exponent``, or an error where float64 cannot hold it."""
        try:
            value = math.ldexp(significand, exponent)
            exact = math.ldexp(value, -exponent) == significand
        except OverflowError:
            exact = False
        if not exact:
            raise ValueError(
                f"{self.name}: {significand} · 2**{exponent} exceeds float64, in which AltGrad "
                "computes; use at most E11 M52 with a bias near 1023"
            )
        return value

    @property
    def element(self) -> FloatFormat:
        """Return the format itself: its numbers are stored without a scale of their own."""
        return self

    @property
    def block_size(self) -> int | None:
        """Return None: the format prescribes no blocks that share a scale."""
        return None

    @property
    def has_tensor_scale(self) -> bool:
        """Return False: the format prescribes no scale of the whole tensor beside others."""
        return False

    @property
    def power_of_two(self) -> bool:
        """Return True: weights in the format are judged under scales that are powers of two."""
        return True

    @property
    def bits(self) -> int:
        """Width of one number, its sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def precision(self) -> int:
        """Bits of the significand, the implicit one included: M + 1."""
        return self.mantissa_bits + 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number: ``1 - bias``."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the binade that holds `max`; never below `emin`, also where E = 0."""
        return max(self._max_code >> self.mantissa_bits, 1) - self.bias

    @property
    def max(self) -> float:
        """Largest finite value. ValueError where float64 cannot hold it."""
        return self._value(self._max_code)

    @property
    def smallest_normal(self) -> float:
        """``2**emin``; with E = 0 no value is this large, and all are subnormal."""
        return self._float64(1, self.emin)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value: ``2**(emin - M)``, or `smallest_normal` without subnormals."""
        return self._float64(1, self.emin - self.mantissa_bits * self.has_subnormals)

    @property
    def eps(self) -> float:
        """``2**-M``: the distance from 1 to the next value where 1 is normal, as in finfo."""
        return self._float64(1, -self.mantissa_bits)

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN."""
        return self.num_high_nans > 0 or not self.has_negative_zero

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The torch dtype with exactly these codes, or None."""
        name = _TORCH_DTYPES.get(self.key.partition(" ")[2])
        if name is None:
            return None
        import torch

        dtype: torch.dtype = getattr(torch, name)
        return dtype

    def is_coarser_than(self, other: torch.dtype | FloatFormat) -> bool:
        """Whether numbers of this dtype or format lie closer together than those of the format.

        Only then can weights stored in it show updates that the format would lose.
        """
        if isinstance(other, FloatFormat):
            return self.eps > other.eps
        import torch

        return self.eps > torch.finfo(other).eps

    def values(self) -> Tensor:
        """Every finite value once, in ascending order, as a float64 tensor on the CPU.

        −0 and 0 are one value. ValueError for a format of more than 24 bits.
        """
        import torch

        if self.bits > _MAX_LISTED_BITS:
            raise ValueError(
                f"{self.name} has {self.bits} bits and so too many values to list; expected at "
                f"most {_MAX_LISTED_BITS}"
            )
        first = 1 if self.has_subnormals else 1 << self.mantissa_bits
        positive = [self._value(code) for code in range(first, self._max_code + 1)]
        positive_tensor = torch.tensor(positive, dtype=torch.float64)
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.cat([-positive_tensor.flip(0), zero, positive_tensor])


def is_torch_dtype(value: object) -> TypeIs[torch.dtype]:
    """Whether a value is a `torch.dtype`, told without an import of torch."""
    kind = type(value)
    return (kind.__module__, kind.__qualname__) == ("torch", "dtype")


def _check_types(format: FloatFormat) -> None:
    check_type("name", format.name, str)
    for name in ("exponent_bits", "mantissa_bits", "bias", "num_high_nans"):
        check_type(name, getattr(format, name), int)
    for name in ("has_inf", "has_negative_zero", "has_subnormals"):
        check_type(name, getattr(format, name), bool)
