"""`OptimizerMaker`: a function that makes an optimizer, and facts about the optimizer.

A recipe may step with an optimizer of any library, which a function makes. What the optimizer keeps
beside the weights, and when it compiles itself, cannot be seen before its first step: an
`OptimizerMaker` says it.

Read `packed_states` first; `recipe` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad._messages import check_type
from altgrad.recipes.packed_states import PackedStates

OptimizerFactory: TypeAlias = Callable[[list[nn.Parameter], dict[str, Any]], Optimizer]
"""A function that makes an optimizer of parameters.

It is called with the parameters, and with the parameter group of the training's optimizer that they
belong to, without ``"params"``. It returns the optimizer.
"""

StateReader: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Tensor]]
"""A function that reads the states that an optimizer keeps of a parameter.

It is called with ``optimizer.state[parameter]`` and with the parameter group of the optimizer. It
returns states by name, floating-point in the shape of the parameter, or with one number.
"""


class CannotMakeError(ValueError):
    """An error that says why an optimizer cannot be made for a parameter group, and the remedy."""


@dataclass(frozen=True)
class OptimizerMaker:
    """A function that makes an optimizer, with facts about that optimizer.

    It can be called as the function itself, and is accepted by `Recipe` in its place.

    Attributes:
        make: The function. It takes parameters, and the training's parameter group without
            ``"params"``.
        state_bytes: Number of bytes that the optimizer keeps for each weight, beside the weight.
            None if unknown: the memory in a report is then unknown, too, and
            `Recipe.bytes_per_parameter` counts two states of the size of the weight, as Adam has.
        compensation_bytes: How many of `state_bytes` are the rounding error of the weight.
        compiles: True if the optimizer compiles its step when it first gets parameters of a shape,
            which takes seconds. It then makes a step on copies before the first step of the
            training, so that no step of the training waits for a compiler.
        read: A function that returns the states of a parameter as ``torch.optim`` would keep them,
            so that figures such as ``exp_avg_sq_ratio`` compare like with like. None if states have
            the names and meaning of those of ``torch.optim``.
        packed: How the optimizer keeps states in blocks of a few bits. None if each state has one
            floating-point number per element, or one number.

    Raises:
        TypeError: An attribute has the wrong type.
        ValueError: `state_bytes` is below 0, or `compensation_bytes` is not a part of it.
    """

    make: OptimizerFactory
    state_bytes: float | None = None
    compiles: bool = False
    read: StateReader | None = None
    packed: PackedStates | None = None
    compensation_bytes: float = 0

    def __post_init__(self) -> None:
        if not callable(self.make):
            raise TypeError(
                f"make={self.make!r}: expected a function of parameters and their group that "
                "returns an optimizer"
            )
        if self.read is not None and not callable(self.read):
            raise TypeError(
                f"read={self.read!r}: expected a function of the state of a parameter and its "
                "group that returns states by name, or None"
            )
        if self.packed is not None:
            check_type("packed", self.packed, PackedStates)
        check_type("compiles", self.compiles, bool)
        if self.state_bytes is not None and not self.state_bytes >= 0:
            raise ValueError(f"state_bytes={self.state_bytes!r}: expected 0 or more bytes, or None")
        if not 0 <= self.compensation_bytes <= (self.state_bytes or 0):
            raise ValueError(
                f"compensation_bytes={self.compensation_bytes!r}: expected a part of state_bytes="
                f"{self.state_bytes!r}"
            )

    def __call__(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
        """Call `make` with parameters and their parameter group, and return the optimizer."""
        return self.make(parameters, group)
