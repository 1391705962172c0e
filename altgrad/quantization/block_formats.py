"""Block formats: elements of 4 to 8 bits, with a shared scale of 8 bits for each block.

A block format defines its own scaling. Therefore `get_formats` accepts the names of block formats,
whereas `quantize` takes an element format and a scale. Read `float_format`, `formats` and
`number_format` first; `scaling` computes the scales, and `format_set` is the next file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from altgrad._messages import check_int, check_type
from altgrad.quantization.float_format import FloatFormat, check_format_name, is_torch_dtype
from altgrad.quantization.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FORMATS,
    find_format,
    get_format,
)
from altgrad.quantization.number_format import NumberFormat
from altgrad.quantization.spellings import describe_unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Formats: TypeAlias = "str | torch.dtype | NumberFormat | Iterable[str | torch.dtype | NumberFormat]"
"""One or several formats or names of formats, as `get_formats` accepts."""

BlockScaleRule: TypeAlias = Literal["e8m0", "e8m0_ceil", "e4m3"]
"""The name of the rule by which a block format computes the scale of each block: a power of two
rounded down (``"e8m0"``) or up (``"e8m0_ceil"``), or an E4M3 number times a scale of the whole
tensor (``"e4m3"``). See `BlockFormat`."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A number format with one scale for each block of neighbouring elements in the last dimension.

    The scales follow one of three rules. Here amax is the largest finite magnitude in the block or
    tensor, and max the largest value of `element`:

    - ``"e8m0"``, from OCP: a power of two, rounded down as in `compute_scale` with
      ``power_of_two="floor"``. The largest elements of a block may be clipped.
    - ``"e8m0_ceil"``: a power of two, rounded up to ``2**ceil(log2(amax / max))``. No element is
      clipped, but blocks that ``"e8m0"`` would clip get a grid twice as coarse. This is torchao's
      rule RCEIL; TransformerEngine, cuBLAS and MLX round up, too. Named formats with this rule end
      in ``_ceil``.
    - ``"e4m3"``, from NVIDIA: an E4M3 number times one float32 scale for the whole tensor. The
      scale of the tensor is amax / (448 · max), where 448 is the largest E4M3 number.

    Args:
        name: The name in log keys and tables: not empty, without ``/`` and white space.
        element: The floating-point format of a single element, before scaling.
        block_size: The number of elements that share a scale, 1 or more. The last block may be
            shorter.
        scale: The rule of the block scales: ``"e8m0"``, ``"e8m0_ceil"`` or ``"e4m3"``.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: The block size is not positive, the rule is unknown, or the name cannot be part
            of a log key.

    Examples:
        >>> import torch
        >>> from altgrad import measure
        >>> from altgrad.quantization import E2M1, BlockFormat
        >>> up = BlockFormat("mine", E2M1, block_size=32, scale="e8m0_ceil")
        >>> before = torch.full((32,), 7.5)
        >>> figures = measure(before, before * 0.9, formats=[up, "mxfp4"])
        >>> figures["saturated_frac/mine"], figures["saturated_frac/mxfp4"]
        (0.0, 1.0)

    References:
        OCP Microscaling Formats (MX) Specification 1.0, sections 5 and 6.3; NVIDIA, "Pretraining
        Large Language Models with NVFP4", arXiv 2509.25149, section 2 and appendix C.
    """

    name: str
    element: FloatFormat
    block_size: int
    scale: BlockScaleRule

    def __post_init__(self) -> None:
        check_format_name(self.name)
        check_type("element", self.element, FloatFormat)
        check_int("block_size", self.block_size, 1)
        if self.scale not in get_args(BlockScaleRule):
            expected = ", ".join(map(repr, get_args(BlockScaleRule)))
            raise ValueError(f"scale={self.scale!r}: expected one of {expected}")

    def __str__(self) -> str:
        return self.name

    @property
    def power_of_two(self) -> bool:
        """True if every scale is a power of two."""
        return self.scale in ("e8m0", "e8m0_ceil")

    @property
    def has_tensor_scale(self) -> bool:
        """True if block scales are multiplied by a second scale for the whole tensor."""
        return self.scale == "e4m3"

    def is_coarser_than(self, other: torch.dtype | FloatFormat) -> bool:
        """Return whether elements have fewer significant bits than another dtype or format.

        If so, weights stored in `other` can show updates that this format would lose.

        Args:
            other: The dtype or format in which weights are stored now.
        """
        return self.element.is_coarser_than(other)

    def scales(self, amax: Tensor, tensor_amax: Tensor | None = None) -> Tensor:
        """Return the scale of each block.

        If an E4M3 scale would round to 0, in a block far below the amax of the tensor, the smallest
        positive E4M3 number, 2**-9, replaces the 0. Otherwise all weights of the block would be 0
        and could not move.

        Args:
            amax: The largest finite magnitude in each block: float32 or float64, any shape.
            tensor_amax: The largest finite magnitude in the tensor that contains each block:
                float32 or float64, a shape that broadcasts to that of `amax`. Formats without a
                tensor scale ignore it. None gives formats with the rule ``"e4m3"`` the scales of
                the rule ``"e8m0"``.

        Returns:
            float64, the shape of `amax`: positive factors from stored numbers to values. The scale
            of a block of zeros is 1.

        Examples:
            >>> import torch
            >>> from altgrad.quantization import BLOCK_FORMATS
            >>> BLOCK_FORMATS["mxfp4"].scales(torch.tensor([7.0, 0.75, 0.0]))
            tensor([1.0000, 0.1250, 1.0000], dtype=torch.float64)
            >>> BLOCK_FORMATS["mxfp4_ceil"].scales(torch.tensor([7.0, 0.75, 0.0]))
            tensor([2.0000, 0.1250, 1.0000], dtype=torch.float64)
        """
        # `scaling` loads torch, which reports do without.
        from altgrad.quantization.scaling import compute_format_scales

        return compute_format_scales(amax, self, tensor_amax)


BLOCK_FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        format.name: format
        for format in (
            # OCP MX 1.0, table 1: blocks of 32 elements, E8M0 scales.
            BlockFormat("mxfp8_e4m3", E4M3, 32, "e8m0"),
            BlockFormat("mxfp8_e5m2", E5M2, 32, "e8m0"),
            BlockFormat("mxfp6_e2m3", E2M3, 32, "e8m0"),
            BlockFormat("mxfp6_e3m2", E3M2, 32, "e8m0"),
            BlockFormat("mxfp4", E2M1, 32, "e8m0"),
            # The same with scales that are rounded up, as most libraries compute them.
            BlockFormat("mxfp8_e4m3_ceil", E4M3, 32, "e8m0_ceil"),
            BlockFormat("mxfp8_e5m2_ceil", E5M2, 32, "e8m0_ceil"),
            BlockFormat("mxfp6_e2m3_ceil", E2M3, 32, "e8m0_ceil"),
            BlockFormat("mxfp6_e3m2_ceil", E3M2, 32, "e8m0_ceil"),
            BlockFormat("mxfp4_ceil", E2M1, 32, "e8m0_ceil"),
            # arXiv 2509.25149, section 2: blocks of 16 elements, E4M3 scales.
            BlockFormat("nvfp4", E2M1, 16, "e4m3"),
        )
    }
)
"""The named formats whose blocks of elements share a scale, by name, such as ``mxfp4``.

`get_formats` also accepts ``mxfp8`` for ``mxfp8_e4m3``, OCP's first choice, and ``mxfp8_ceil`` for
``mxfp8_e4m3_ceil``.
"""

_BY_SPELLING: Mapping[str, BlockFormat] = {
    **BLOCK_FORMATS,
    "mxfp8": BLOCK_FORMATS["mxfp8_e4m3"],
    "mxfp8_ceil": BLOCK_FORMATS["mxfp8_e4m3_ceil"],
}


def get_formats(formats: Formats) -> tuple[NumberFormat, ...]:
    """Look up number formats by name, and drop repetitions.

    Args:
        formats: A name, a torch dtype, a `FloatFormat`, a `BlockFormat`, or an iterable of these.
            Names are those in `BLOCK_FORMATS` and those that `get_format` accepts, in upper or
            lower case.

    Returns:
        The formats in the order given. A single format gives a tuple with one item.

    Raises:
        ValueError: A name is unknown, or two different formats have the same name and would have
            the same log keys.
        TypeError: An item is neither a name nor a dtype nor a format.

    Examples:
        >>> from altgrad.quantization import get_formats
        >>> [format.name for format in get_formats(["e4m3", "mxfp4", "E4M3"])]
        ['e4m3fn', 'mxfp4']
    """
    if isinstance(formats, (str, NumberFormat)) or is_torch_dtype(formats):
        formats = (formats,)
    found: dict[str, NumberFormat] = {}
    for format in map(_get, formats):
        if found.setdefault(format.name, format) != format:
            raise ValueError(
                f"two different formats are named {format.name!r}: {found[format.name]!r} and "
                f"{format!r}; expected unique names: rename one of the formats"
            )
    return tuple(found.values())


def _get(format: str | torch.dtype | NumberFormat) -> NumberFormat:
    """Return the format with a given name or dtype; return a `NumberFormat` unchanged.

    Raises:
        ValueError: No format has this name. The message lists the nearest names.
    """
    if isinstance(format, NumberFormat):
        return format
    if not isinstance(format, str):
        return get_format(format)
    found = _BY_SPELLING.get(format.lower()) or find_format(format)
    if found is None:
        known = (*_BY_SPELLING, *FORMATS)
        raise ValueError(describe_unknown(format, known, [*FORMATS, *BLOCK_FORMATS]))
    return found
