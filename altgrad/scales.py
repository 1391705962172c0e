"""`Scales`: for one parameter, the scale of every format, of as many elements as share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from altgrad.quantization.block_formats import BlockFormat, NumberFormat
from altgrad.quantization.scaling import Scaling, amax_of, scale_from_amax

_UNSCALED_BITS = 16
_Sharing: TypeAlias = Literal["tensor", "channel"] | int  # or as many neighbours


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of one parameter.

    Attributes:
        shape: Of the parameter.
        values: For each format its scales, float64, in one dimension.
        sharing: For each format which elements share one.
        together: The values of all formats in one tensor, where that is what they were cut from.
    """

    shape: torch.Size
    values: tuple[Tensor, ...]
    sharing: tuple[_Sharing, ...]
    together: Tensor | None = None

    @property
    def are_single(self) -> bool:
        """Whether every format has one scale for all elements."""
        return all(sharing == "tensor" for sharing in self.sharing)

    @property
    def single(self) -> Tensor:
        """(formats), where they are single."""
        return torch.cat(self.values) if self.together is None else self.together

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain types and tensors."""
        return {"shape": [*self.shape], "values": [*self.values], "sharing": [*self.sharing]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> Scales:
        """The reverse."""
        values = tuple(each.to(device) for each in state["values"])
        return cls(torch.Size(state["shape"]), values, tuple(state["sharing"]))

    def of_elements(self, indices: Tensor) -> Tensor:
        """(formats, elements), of these flat indices in row-major order."""
        each = zip(self.values, self.sharing, strict=True)
        return torch.stack([self._of(indices, values, sharing) for values, sharing in each])

    def _of(self, indices: Tensor, values: Tensor, sharing: _Sharing) -> Tensor:
        if sharing == "tensor" or not self.shape:
            return values.expand(len(indices))
        if sharing == "channel":
            return values[indices // max(self.shape.numel() // max(self.shape[0], 1), 1)]
        length = self.shape[-1]
        blocks = -(-length // int(sharing))
        return values[indices // length * blocks + indices % length // int(sharing)]


def is_scaled(format: NumberFormat, scaling: Scaling | None) -> bool:
    """Whether weights in this format are stored under an amax scale.

    Formats of 16 bits have the exponents to do without one, and are used so.
    """
    if isinstance(format, BlockFormat):
        return True
    return scaling is not None and format.bits < _UNSCALED_BITS


def scales_of(x: Tensor, formats: Sequence[NumberFormat], scaling: Scaling | None) -> Scales:
    """The scales that x sets, from the largest magnitudes in it.

    Powers of two, rounded up, or what a block format brings; 1 for a format that is not scaled.
    """
    amax: Tensor | None = None
    values, sharing = [], []
    for format in formats:
        of_format: _Sharing = "tensor"
        if not is_scaled(format, scaling):
            scale = torch.ones(1, dtype=torch.float64, device=x.device)
        elif isinstance(format, BlockFormat):
            scale, of_format = format.block_scales(x), format.block_size
        else:
            assert scaling is not None
            amax = amax_of(x, scaling) if amax is None else amax
            scale = scale_from_amax(amax, format)
            of_format = scaling if isinstance(scaling, str) else scaling[1]
        values.append(scale.double().flatten())
        sharing.append(of_format if x.shape else "tensor")
    return Scales(x.shape, tuple(values), tuple(sharing))


def scales_of_each(
    parameters: Sequence[Tensor], formats: Sequence[NumberFormat], scaling: Scaling | None
) -> list[Scales]:
    """Those of many parameters, which share what can be shared.

    With one scale for each tensor that is an operation for each and some for all. Whether a value
    is not finite, and the largest finite one must be looked for, is read on the host.
    """
    blocks = any(isinstance(format, BlockFormat) for format in formats)
    if blocks or scaling not in (None, "tensor"):
        return [scales_of(parameter, formats, scaling) for parameter in parameters]
    found: dict[int, Scales] = {}
    # One device and dtype at a time.
    kinds = {(each.dtype == torch.float64, each.device) for each in parameters}
    for is_wide, device in kinds:
        alike = [
            position
            for position, each in enumerate(parameters)
            if (each.dtype == torch.float64, each.device) == (is_wide, device)
        ]
        amax = _amax_of_each([parameters[position] for position in alike])
        one = torch.ones(len(alike), dtype=torch.float64, device=device)
        scaled = [is_scaled(format, scaling) for format in formats]
        columns = [
            scale_from_amax(amax, format.element if isinstance(format, BlockFormat) else format)
            if needed
            else one
            for format, needed in zip(formats, scaled, strict=True)
        ]
        rows = torch.stack([column.double() for column in columns], dim=1) if columns else one
        for position, row in zip(alike, rows.unbind(), strict=True):
            values = torch.split(row, 1) if columns else ()
            sharing = tuple[_Sharing, ...]("tensor" for _ in formats)
            found[position] = Scales(parameters[position].shape, tuple(values), sharing, row)
    return [found[position] for position in range(len(parameters))]


@torch.no_grad()
def _amax_of_each(parameters: Sequence[Tensor]) -> Tensor:
    """The largest finite magnitude of each; float32, or float64 for float64."""
    wide = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=wide, device=parameters[0].device)
    ends = [torch.aminmax(each) if each.numel() else (zero, zero) for each in parameters]
    least, most = (torch.stack([end[side].to(wide) for end in ends]) for side in (0, 1))
    amax = torch.maximum(-least, most)
    if not bool(amax.isfinite().all()):
        finite = amax.isfinite().tolist()
        each = zip(parameters, amax.unbind(), finite, strict=True)
        amax = torch.stack([a if good else amax_of(p, "tensor") for p, a, good in each])
    return amax
