"""`FormatSet`: the number formats that a run measures, their scaling, and their block sizes.

Read `number_format` and `block_formats` first; the next file is `scale_groups`, which computes the
scales of a `FormatSet`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from altgrad.quantization.block_formats import Formats, get_formats
from altgrad.quantization.formats import Scaling, check_scaling
from altgrad.quantization.number_format import NumberFormat, get_applied_scaling

if TYPE_CHECKING:
    import torch

    from altgrad.quantization.float_format import FloatFormat


class FormatSet:
    """The number formats that a training run is measured for, and how each is scaled; immutable.

    An amax scale fits the largest finite magnitude of a group of weights to the largest value of a
    format. A layer is one parameter tensor, a channel an index of its dimension 0.

    Args:
        formats: One or several formats or names, as `get_formats` accepts.
        scaling: The weights that share an amax scale in formats of fewer than 16 bits:
            ``"tensor"``, ``"channel"`` or ``("block", size)``. None for no scale. Block formats
            ignore it.

    Attributes:
        formats: The formats in the order given, without repetitions.
        scaling: The `scaling` argument.
        names: The names of the formats.
        applied: For each format the `Scaling` that applies; None for a format without scales.
        block_sizes: The sizes in elements of all blocks that share a scale, in ascending order.
        block: The least common multiple of `block_sizes`. So many neighbours in the last dimension
            must be measured together, from a multiple of this number on, to have whole blocks.
        needs_tensor_amax: Whether a format needs the amax of the whole tensor in addition to the
            amaxes of blocks.
        needs_amax: Whether a format needs the amax of layers or of their channels.
        is_single: Whether every format has at most one scale for a whole layer.
        fitted: The names of formats with one amax scale for each layer or channel.

    Raises:
        ValueError: A name is unknown, two different formats have the same name, or the scaling is
            invalid.
        TypeError: An item of `formats` is neither a name nor a dtype nor a format.
    """

    def __init__(self, formats: Formats, scaling: Scaling | None = "tensor") -> None:
        if scaling is not None:
            check_scaling(scaling)
        self.formats = get_formats(formats)
        self.scaling = scaling
        self.names = tuple(format.name for format in self.formats)
        self.applied = tuple(get_applied_scaling(format, scaling) for format in self.formats)
        self.block_sizes = tuple(sorted({*self._block_sizes.values()}))
        self.block = math.lcm(*self.block_sizes)
        pairs = zip(self.names, self.applied, strict=True)
        self.fitted = tuple(name for name, each in pairs if isinstance(each, str))
        self.needs_tensor_amax = any(format.has_tensor_scale for format in self.formats)
        self.needs_amax = bool(self.fitted) or self.needs_tensor_amax
        self.is_single = all(each in (None, "tensor") for each in self.applied)

    @property
    def _block_sizes(self) -> dict[str, int]:
        """The sizes in elements of the blocks that share a scale, by name of each block format."""
        pairs = zip(self.names, self.applied, strict=True)
        return {
            name: applied[1]
            for name, applied in pairs
            if applied is not None and not isinstance(applied, str)
        }

    def find_block(self, names: Collection[str]) -> int:
        """Return the least common multiple of some formats' block sizes; 1 without blocks.

        This many neighbouring elements are measured together, so that each block is complete.

        Args:
            names: Names of the formats.
        """
        sizes = self._block_sizes
        return math.lcm(*(sizes[name] for name in names if name in sizes))

    def __len__(self) -> int:
        return len(self.formats)

    def __iter__(self) -> Iterator[NumberFormat]:
        return iter(self.formats)

    def __repr__(self) -> str:
        return f"FormatSet({self.names!r}, scaling={self.scaling!r})"

    def judged(self, dtype: torch.dtype | FloatFormat) -> list[bool]:
        """Return for each format whether it has fewer significant bits than the stored weights.

        If so, the format can be judged: updates of these weights show what the format would lose.

        Args:
            dtype: The dtype or format in which the weights are stored now.

        Returns:
            One bool for each format, in the order of `formats`.
        """
        return [format.is_coarser_than(dtype) for format in self.formats]
