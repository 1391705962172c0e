"""`EverMovedOfLayers`: what elements have done so far, of layers that lie in no arena."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from altgrad.measurement.kernel import EverMoved

PackedBits = tuple[tuple[int, ...], Tensor]
"""Shape, and eight elements to a byte, on the CPU."""


class EverMovedOfLayers:
    """By layer: bool, (1 + formats, elements), whether each has had an update, and whether one that
    was effective in each format.

    Args:
        tell: Called with what a user is to know.
    """

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self._of: dict[str, Tensor] = {}

    def leave(self, name: str, ever: Tensor) -> None:
        """Keep that of a layer; two that step in two optimizers are put together."""
        known = self._of.get(name)
        if known is not None and known.shape == ever.shape:
            ever = ever | known.to(ever.device)
        self._of[name] = ever

    def take(self, name: str, kinds: int, elements: int) -> Tensor | None:
        """What was left; None if nothing was, or that of another number of elements."""
        ever = self._of.pop(name, None)
        if ever is not None and ever.shape != (kinds, elements):
            self._tell(
                f"has never_moved_frac of {name} begin anew: it has {elements} watched elements, "
                f"and had {ever.shape[-1]}"
            )
            return None
        return ever

    @torch.inference_mode(mode=False)  # what is made in that mode could not be written to later
    def row_of(self, name: str, kinds: int, elements: int, device: torch.device) -> EverMoved:
        """That of a layer which stays in here, to be updated: one row."""
        ever = self.take(name, kinds, elements)
        if ever is None:
            ever = torch.zeros(kinds, elements, dtype=torch.bool)
        self._of[name] = ever = ever.to(device)
        return EverMoved(ever[None, :1], ever[None, 1:])

    def state_dict(self, elsewhere: Iterable[tuple[str, Tensor]]) -> dict[str, PackedBits]:
        """One bit for each; with those that lie elsewhere."""
        together = EverMovedOfLayers(self._tell)
        together._of = dict(self._of)
        for name, ever in elsewhere:
            together.leave(name, ever)
        return {name: _packed(ever) for name, ever in together._of.items()}

    def load_state_dict(self, state: Mapping[str, PackedBits]) -> None:
        """The reverse."""
        self._of = {name: _unpacked(*packed) for name, packed in state.items()}

    def keep_parts(self, parts: Mapping[str, tuple[int, Tensor]]) -> None:
        """Of what was loaded, keep what is about the elements that lie here.

        Args:
            parts: By layer, of how many elements all was, and which of them lie here.
        """
        for name, (elements, positions) in parts.items():
            ever = self.take(name, len(self._of[name]), elements) if name in self._of else None
            if ever is not None:
                self._of[name] = ever[:, positions]


def whole_of(packed: PackedBits | None, shape: tuple[int, int], positions: Tensor) -> Tensor:
    """Bits of a layer of which only the elements at these positions are known; the rest is 0."""
    whole = torch.zeros(shape, dtype=torch.bool)
    if packed is not None and packed[0] == (shape[0], len(positions)):
        whole[:, positions] = _unpacked(*packed)
    return _packed(whole)[1]


def _packed(ever: Tensor) -> PackedBits:
    bits = ever.flatten().cpu().to(torch.uint8)
    bits = torch.cat((bits, bits.new_zeros(-len(bits) % 8))).view(-1, 8)
    return tuple(ever.shape), (bits << _shifts()).sum(1, dtype=torch.uint8)


def _unpacked(shape: tuple[int, ...], bits: Tensor) -> Tensor:
    ever = (bits.cpu()[:, None] >> _shifts() & 1).flatten()
    return ever[: math.prod(shape)].view(shape).bool()


def _shifts() -> Tensor:
    """Where in its byte each of eight elements has its bit; on the CPU, whatever the default is."""
    return torch.arange(8, dtype=torch.uint8, device="cpu")
