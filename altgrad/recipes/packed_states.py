"""`PackedStates`: how an optimizer keeps its states in blocks of a few bits.

Optimizers such as AdamW8bit of torchao and bitsandbytes *pack* their states: neighbouring elements
of the flattened parameter form a block, which has one scale, and 8 bits for each element. They pack
large parameters only, and leave the states of others in the dtype of the weights.

A program that steps a part of a parameter, and means to get the states that the whole would have,
needs to know which layers are packed, and to keep blocks whole.

Read `storage` first; `optimizer_maker` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from altgrad._messages import check_int, check_type


class StateParts(NamedTuple):
    """The tensors of the state that an optimizer keeps of a parameter, by how long they are.

    Attributes:
        elements: Tensors with one number per element of the parameter, by name.
        blocks: Tensors with one number per block, such as scales, (blocks), by name; empty if the
            state is not packed.
        shared: What is the same for all elements, such as a count of steps or a table, by name.
    """

    elements: Mapping[str, Tensor]
    blocks: Mapping[str, Tensor]
    shared: Mapping[str, Any]


@dataclass(frozen=True)
class PackedStates:
    """A description of how an optimizer packs states: in blocks of a few bits with one scale.

    Attributes:
        take_apart: Function that returns the parts of a state, ``optimizer.state[parameter]``. The
            tensors share their memory with the state, and have dtypes that torch can index.
        put_together: Function that returns the state that has these parts.
        block: Number of neighbours in the flattened parameter that share a scale, a power of two.
        least: Fewest elements of a parameter whose states are packed, at least 128.
        only_whole: True if parameters are packed only if they consist of whole blocks.
        states: Number of states of a parameter, 2 for the two moments of Adam.
        table_bytes: Number of bytes of a table of values that each packed state has of its own.

    Raises:
        TypeError: An attribute has the wrong type.
        ValueError: A number is out of range.
    """

    take_apart: Callable[[Mapping[str, Any]], StateParts]
    put_together: Callable[[StateParts], dict[str, Any]]
    block: int = 256
    least: int = 4096
    only_whole: bool = False
    states: int = 2
    table_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("take_apart", "put_together"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected a function")
        check_int("block", self.block, 2)
        check_int("least", self.least, 128)
        check_int("states", self.states, 1)
        check_int("table_bytes", self.table_bytes, 0)
        check_type("only_whole", self.only_whole, bool)
        if self.block & (self.block - 1):
            raise ValueError(f"block={self.block}: expected a power of two, such as 256")

    def packs(self, numel: int) -> bool:
        """Return True if the optimizer packs the states of a parameter of this size.

        A packed state has a few bits for each element, and one scale for each block of elements.
        States of small parameters are not packed.

        Args:
            numel: Number of elements of the parameter.
        """
        return numel >= self.least and not (self.only_whole and numel % self.block)
