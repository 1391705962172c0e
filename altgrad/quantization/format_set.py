"""`FormatSet`: the formats of a run with their scaling, and what both ask of a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from altgrad.quantization.block_formats import Formats, get_formats
from altgrad.quantization.formats import Scaling, check_scaling
from altgrad.quantization.number_format import NumberFormat, applied_scaling

if TYPE_CHECKING:
    import torch

    from altgrad.quantization.float_format import FloatFormat


class FormatSet:
    """The formats that a run judges, with the scaling that it judges them under; immutable.

    Args:
        formats: Formats or their names, one or several, as `get_formats` takes them.
        scaling: Which weights share an amax scale in formats of fewer than 16 bits; None for no
            scale. Block formats bring their own.

    Attributes:
        formats: The formats, each once, in their order.
        scaling: The `scaling` argument.
        names: Names of the formats.
        applied: Which weights share a scale in each format; None where they are not scaled.
        block_sizes: Sizes of all blocks that share a scale, in ascending order.
        block: Number of neighbours along the last dimension, counted from a multiple of it, that
            have to be measured together: the least common multiple of `block_sizes`.
        needs_tensor_amax: Whether a scale needs the amax of a whole tensor beside those of blocks.
        needs_amax: Whether a scale needs the amax of layers or of their channels.
        is_single: Whether every format has one scale, or none, for a whole layer.
        fitted: Names of the formats whose amax scale is to fit all weights of a layer or channel.

    Raises:
        ValueError: An unknown name, two different formats of one name, or a wrong scaling.
        TypeError: Neither names nor formats.
    """

    def __init__(self, formats: Formats, scaling: Scaling | None = "tensor") -> None:
        if scaling is not None:
            check_scaling(scaling)
        self.formats = get_formats(formats)
        self.scaling = scaling
        self.names = tuple(format.name for format in self.formats)
        self.applied = tuple(applied_scaling(format, scaling) for format in self.formats)
        blocks = (each for each in self.applied if each is not None and not isinstance(each, str))
        self.block_sizes = tuple(sorted({size for _, size in blocks}))
        self.block = math.lcm(*self.block_sizes)
        pairs = zip(self.names, self.applied, strict=True)
        self.fitted = tuple(name for name, each in pairs if isinstance(each, str))
        self.needs_tensor_amax = any(format.has_tensor_scale for format in self.formats)
        self.needs_amax = bool(self.fitted) or self.needs_tensor_amax
        self.is_single = all(each in (None, "tensor") for each in self.applied)

    def __len__(self) -> int:
        return len(self.formats)

    def __iter__(self) -> Iterator[NumberFormat]:
        return iter(self.formats)

    def __repr__(self) -> str:
        return f"FormatSet({self.names!r}, scaling={self.scaling!r})"

    def judged(self, dtype: torch.dtype | FloatFormat) -> list[bool]:
        """Return for each format whether weights stored in a dtype show what it would lose.

        Args:
            dtype: The dtype or format in which the weights are stored now.

        Returns:
            One bool for each format, in their order: True where the format is coarser.
        """
        return [format.is_coarser_than(dtype) for format in self.formats]
