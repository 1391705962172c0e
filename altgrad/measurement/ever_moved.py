"""`EverMovedStore`: remember which elements of each layer have moved in any observed step.

The metric `never_moved_frac` needs flags for each element. One says whether the element has had an
update other than 0. There is one more for each format, which says whether the format's grid would
have kept a part of such an update. The flags of a layer are bool (1 + formats, elements), one bit
each in a `state_dict`::

    row 0       had an update
    row 1 + k   had an update of which format k keeps a part

Small layers, which a monitor measures together, have their flags in `altgrad.monitor.arena`, next
to the copies of their weights. The store has all other flags: those of large layers, of layers
whose memory in the arena was freed, and flags from a checkpoint.

Read `kernel` first, where the flags are updated; `altgrad.monitor.arena` comes next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from altgrad._messages import format_count
from altgrad.measurement.kernel import EverMoved

Part = tuple[int, Tensor]
"""The part of a sharded layer that is on this rank.

It is a pair: the number of measured elements of the layer on all ranks, and the positions among
them of those on this rank, int64 (elements on this rank).
"""

PackedBits = tuple[tuple[int, ...], Tensor]
"""A layer's ever-moved flags: their shape, and the bits as uint8 (bytes) on the CPU, 8 in a byte.

The flags say which elements have had an update so far, and of which updates each format would have
kept a part.
"""


class EverMovedStore:
    """A store of flags that say which elements of each layer have moved in any observed step.

    The flags of a layer are bool (1 + formats, elements). The first row says whether an element had
    an update other than 0. The other rows say for each format whether its grid would have kept a
    part of such an update.

    Args:
        warn: Function that is called with the text of each notice for the user.
    """

    def __init__(self, warn: Callable[[str], object]) -> None:
        self._warn = warn
        self._flags: dict[str, Tensor] = {}

    def keep(self, name: str, ever: Tensor) -> None:
        """Keep the flags that say which elements of a layer have moved so far.

        If the store has flags of this layer with the same shape, the two are combined by OR. That
        happens for a layer that two optimizers step. Flags with another shape are replaced.

        Args:
            name: The layer's name.
            ever: The layer's flags, bool (1 + formats, elements).
        """
        known = self._flags.get(name)
        if known is not None and known.shape == ever.shape:
            ever = ever | known.to(ever.device)
        self._flags[name] = ever

    def take(self, name: str, kinds: int, elements: int) -> Tensor | None:
        """Return the flags that say which elements of a layer have moved, and delete them here.

        Args:
            name: The layer's name.
            kinds: Number of flags for each element, 1 + formats.
            elements: Number of measured elements of the layer.

        Returns:
            The flags, bool (kinds, elements). None if the store has no flags of the layer, or flags
            with another shape. In the second case, a notice says that never_moved_frac begins anew.
        """
        ever = self._flags.pop(name, None)
        if ever is not None and ever.shape != (kinds, elements):
            self._warn(
                f"has never_moved_frac of {name} begin anew: it has "
                f"{format_count(elements, 'measured element')}, and had {ever.shape[-1]}"
            )
            return None
        return ever

    # Tensors made in inference mode could not be updated outside of it:
    # https://docs.pytorch.org/docs/stable/notes/autograd.html#inference-mode
    @torch.inference_mode(mode=False)
    def get_row(self, name: str, kinds: int, elements: int, device: torch.device) -> EverMoved:
        """Return the flags that say which elements of a layer have moved, for the kernel to update.

        The store keeps the flags, and updates of the returned views change them. New flags, all
        False, are made if the store has none of the layer or if their shape differs.

        Args:
            name: The layer's name.
            kinds: Number of flags for each element, 1 + formats.
            elements: Number of measured elements of the layer.
            device: Device on which the layer is measured.

        Returns:
            Views of the flags in the store, bool (1, 1, elements) and bool (1, formats, elements).
        """
        ever = self.take(name, kinds, elements)
        if ever is None:
            ever = torch.zeros(kinds, elements, dtype=torch.bool, device="cpu")
        self._flags[name] = ever = ever.to(device)
        return EverMoved(ever[None, :1], ever[None, 1:])

    def state_dict(self, elsewhere: Iterable[tuple[str, Tensor]]) -> dict[str, PackedBits]:
        """Return the flags that say which elements of each layer have moved, packed to bits.

        Args:
            elsewhere: Pairs of name and flags, for layers whose flags are in an
                `altgrad.monitor.arena.Arena` instead of this store. The result includes them.

        Returns:
            The packed flags by name of the layer. Layers whose flags are all False are left out.
        """
        together = EverMovedStore(self._warn)
        together._flags = dict(self._flags)
        for name, ever in elsewhere:
            together.keep(name, ever)
        return {name: _pack(ever) for name, ever in together._flags.items() if ever.any()}

    def load_state_dict(self, state: Mapping[str, PackedBits], parts: Mapping[str, Part]) -> None:
        """Restore the flags that say which elements of each layer have moved, from a `state_dict`.

        A layer that is not sharded keeps the flags of all its elements; a sharded layer keeps those
        of the elements on this rank.

        Args:
            state: The packed flags of all measured elements, by name of the layer.
            parts: For each sharded layer, by name, its part on this rank.
        """
        self._flags = {name: _unpack(*packed) for name, packed in state.items()}
        for name, (elements, positions) in parts.items():
            known = self._flags.get(name)
            ever = None if known is None else self.take(name, len(known), elements)
            if ever is not None:
                self._flags[name] = ever[:, positions]


def check_packed_bits(state: Mapping[str, PackedBits]) -> None:
    """Raise an error if the packed flags that say which elements have moved are damaged.

    Args:
        state: The packed flags by name of the layer, as `EverMovedStore.state_dict` returns them.

    Raises:
        ValueError: The flags of a layer are not a pair of a shape and as many bits.
    """
    for name, packed in state.items():
        try:
            shape, bits = packed
            is_whole = bits.dtype == torch.uint8 and bits.shape == (-(-math.prod(shape) // 8),)
        except (AttributeError, TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise ValueError(
                f"ever_moved of {name} is {str(packed)[:60]}: expected a shape and its bits, uint8 "
                "(bytes); leave out load_state_dict() to begin anew"
            )


def scatter_packed_bits(
    packed: PackedBits | None, shape: tuple[int, int], positions: Tensor
) -> Tensor:
    """Put the packed ever-moved flags of this rank's shard into those of the whole layer.

    The flags say which elements have had an update so far, and of which updates each format would
    have kept a part.

    Elements on other ranks get 0, so that the flags of the layer are the OR of the results of all
    ranks.

    Args:
        packed: The packed flags of the elements on this rank; None if it has no flags.
        shape: Shape of the flags of the whole layer, (1 + formats, elements).
        positions: Positions of the elements on this rank among those of the whole layer, int64
            (elements on this rank).

    Returns:
        The packed flags, uint8 (bytes) on the CPU. All are 0 if `packed` has another number of
        formats or elements than expected.
    """
    whole = torch.zeros(shape, dtype=torch.bool, device="cpu")
    if packed is not None and packed[0] == (shape[0], len(positions)):
        whole[:, positions] = _unpack(*packed)
    return _pack(whole)[1]


def _pack(ever: Tensor) -> PackedBits:
    # Flag k of a byte is its bit k, least significant first, as numpy.packbits does with
    # bitorder="little":  flags 1 0 1 1 0 0 0 0  ->  0b00001101
    # https://numpy.org/doc/stable/reference/generated/numpy.packbits.html
    bits = ever.flatten().cpu().to(torch.uint8)
    bits = torch.cat((bits, bits.new_zeros(-len(bits) % 8))).view(-1, 8)  # pad to whole bytes
    return tuple(ever.shape), (bits << _bit_positions()).sum(1, dtype=torch.uint8)


def _unpack(shape: tuple[int, ...], bits: Tensor) -> Tensor:
    ever = (bits.cpu()[:, None] >> _bit_positions() & 1).flatten()
    return ever[: math.prod(shape)].view(shape).bool()


def _bit_positions() -> Tensor:
    """Return the position of each of eight flags in its byte, uint8 (8) on the CPU."""
    # The device is named because the user may have set another default device.
    return torch.arange(8, dtype=torch.uint8, device="cpu")
