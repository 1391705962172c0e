"""Block formats: numbers of few bits that share a scale, itself a number of few bits.

They bring their own scaling, so they are judged as they are: `get_formats` knows them, `quantize`,
which takes the scale as an argument, does not.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

from altgrad.quantization.float_format import FloatFormat, is_torch_dtype
from altgrad.quantization.formats import E2M1, E2M3, E3M2, E4M3, E5M2, get_format
from altgrad.quantization.number_format import NumberFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Formats: TypeAlias = "str | torch.dtype | NumberFormat | Iterable[str | torch.dtype | NumberFormat]"
"""Formats or their names, one or several: what `get_formats` takes."""


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A format for the elements, and a scale for each block of neighbours in the last dimension.

    Attributes:
        name: How it is called in log keys.
        element: The format of the numbers.
        block_size: How many share a scale; a last block may be shorter.
        scale: ``"e8m0"``, a power of two by OCP's rule, which rounds it down so that the largest of
            a block may be clipped; or ``"e4m3"``, NVIDIA's: an E4M3 number times one float32 for
            the whole tensor, amax / (448 · 6).

    References:
        OCP Microscaling Formats (MX) Specification 1.0, sections 5 and 6.3; NVIDIA, "Pretraining
        Large Language Models with NVFP4", arXiv 2509.25149, section 2 and appendix C.
    """

    name: str
    element: FloatFormat
    block_size: int
    scale: Literal["e8m0", "e4m3"]

    def __str__(self) -> str:
        return self.name

    @property
    def power_of_two(self) -> bool:
        """Whether every scale is a power of two."""
        return self.scale == "e8m0"

    @property
    def has_tensor_scale(self) -> bool:
        """Whether the scales of blocks are relative to one of the whole tensor."""
        return self.scale == "e4m3"

    def is_coarser_than(self, other: torch.dtype | FloatFormat) -> bool:
        """Return whether numbers of a dtype or format lie closer together within a block.

        See `FloatFormat.is_coarser_than`.
        """
        return self.element.is_coarser_than(other)

    def scales(self, amax: Tensor, tensor_amax: Tensor | None) -> Tensor:
        """Return the scale of blocks, float64; 1 for a block of zeros.

        An E4M3 scale that would round to 0, in a block far below the tensor's amax, is the smallest
        one, 2**-9: a format whose weights are all 0 has no grid to move on.

        Args:
            amax: The largest magnitude in each block.
            tensor_amax: The largest magnitude in the whole tensor of each block, of a shape that
                broadcasts; for formats that have a tensor scale.
        """
        from altgrad.quantization.scaling import format_scales

        return format_scales(amax, self, tensor_amax)


BLOCK_FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        format.name: format
        for format in (
            BlockFormat("mxfp8_e4m3", E4M3, 32, "e8m0"),
            BlockFormat("mxfp8_e5m2", E5M2, 32, "e8m0"),
            BlockFormat("mxfp6_e2m3", E2M3, 32, "e8m0"),
            BlockFormat("mxfp6_e3m2", E3M2, 32, "e8m0"),
            BlockFormat("mxfp4", E2M1, 32, "e8m0"),
            BlockFormat("nvfp4", E2M1, 16, "e4m3"),
        )
    }
)
"""The named block formats. OCP prefers ``mxfp8_e4m3``, which is also meant by ``mxfp8``."""

_BY_SPELLING: Mapping[str, BlockFormat] = {**BLOCK_FORMATS, "mxfp8": BLOCK_FORMATS["mxfp8_e4m3"]}


def get_formats(formats: Formats) -> tuple[NumberFormat, ...]:
    """Return the formats of these names, each once, in their order; a single one as a tuple of one.

    Raises:
        ValueError: An unknown name, or two different formats of one name, whose figures would
            have the same key.
        TypeError: Neither names nor formats.
    """
    if isinstance(formats, (str, NumberFormat)) or is_torch_dtype(formats):
        formats = (formats,)
    found: dict[str, NumberFormat] = {}
    for format in map(_get, formats):
        if found.setdefault(format.name, format) != format:
            raise ValueError(
                f"two different formats are named {format.name!r}: {found[format.name]!r} and "
                f"{format!r}; give one of them another name"
            )
    return tuple(found.values())


def _get(format: str | torch.dtype | NumberFormat) -> NumberFormat:
    if isinstance(format, NumberFormat):
        return format
    if isinstance(format, str):
        name = format.lower()
        if name in _BY_SPELLING:
            return _BY_SPELLING[name]
        if name.startswith(("mx", "nv")):
            near = difflib.get_close_matches(name, _BY_SPELLING, n=3) or list(BLOCK_FORMATS)
            raise ValueError(f"unknown format {format!r}; nearest: {', '.join(near)}")
    return get_format(format)
