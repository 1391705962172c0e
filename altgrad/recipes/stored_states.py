"""`StoredStates`: round the states that an optimizer keeps of one layer to number formats.

`UnmatchedNames` warns of state names that no optimizer has.

Read `rounding_generators` first; `storage` comes next, and stores the weights and states of a whole
model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.stored import StoredState
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.devices import editing_on_exact_device
from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import NumberFormat, get_applied_scaling
from altgrad.quantization.scaling import compute_amax, compute_format_scales
from altgrad.recipes.rounding import StorageRounding, store_

_ALL = "*"
COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})
"""Names of the states of torch.optim that are one number for all elements.

They are needed only for layers of one element, where a shape does not tell whether a state is a
number per element. In a coarse format, a counter would stand still.
"""


class StoredStates:
    """The formats in which the optimizer states of one layer are stored after each step.

    Formats of fewer than 16 bits have scales, powers of two. They are computed anew at each step,
    while scales of weights only grow. A second moment may fall by many powers of two, and would
    become 0 under the scale of its largest value ever.

    Args:
        name: The name of the layer.
        formats: The format of each state by its name; ``"*"`` for all others.
        scaling: The elements that share a scale: ``"tensor"``, ``"channel"`` (along dimension 0),
            ``("block", size)``, or None for no scale.

    Attributes:
        formats: The `formats` argument.
        stored: The format and scale of each state at the last `store`, by name of the state.
    """

    def __init__(
        self, name: str, formats: Mapping[str, NumberFormat], scaling: Scaling | None
    ) -> None:
        self.stored: dict[str, StoredState] = {}
        self._name = name
        self.formats = formats
        self._scaling = scaling

    @torch.no_grad()
    def store(
        self,
        parameter: Tensor,
        states: Mapping[str, Any],
        rounding: StorageRounding,
        generator: torch.Generator | None,
    ) -> None:
        """Round the states to their formats, in place.

        Args:
            parameter: The weights of the layer.
            states: What the optimizer keeps of the layer, by name: ``optimizer.state[parameter]``.
            rounding: The way to round.
            generator: The random number generator for ``"stochastic"``, on the device of the
                layer, or on the CPU if that lacks float64.

        Raises:
            ValueError: A state has a dtype that is not finer than its format.
        """
        for name, state, format in self._select(parameter, states):
            with editing_on_exact_device(state) as values:
                scale = self._find_scale(values, format)
                store_(values, format.element, scale, rounding=rounding, generator=generator)
            self.stored[name] = StoredState(format.element, scale)

    def _select(
        self, parameter: Tensor, states: Mapping[str, Any]
    ) -> Iterator[tuple[str, Tensor, NumberFormat]]:
        """Yield name, tensor and format of each state to be stored.

        Raises:
            ValueError: A state has a dtype that is not finer than its format.
        """
        for name in find_names(parameter, states):
            state, format = states[name], self.formats.get(name, self.formats.get(_ALL))
            if format is None:
                continue
            if state.dtype == format.element.torch_dtype and format.block_size is None:
                continue  # stored already
            if state.dtype not in INPUT_DTYPES or not format.is_coarser_than(state.dtype):
                raise ValueError(
                    f"the state {name!r} of {self._name} has dtype {state.dtype}, which is not "
                    f"finer than {format.name}: expected float32; name the states to store, "
                    f"without {name!r}"
                )
            yield name, state, format

    def _find_scale(self, state: Tensor, format: NumberFormat) -> Tensor | None:
        """Return scales that broadcast to the state, float64; None for a format without scales."""
        scaling = get_applied_scaling(format, self._scaling)
        if scaling is None:
            return None
        scales = compute_format_scales(compute_amax(state, scaling), format)
        return expand_scales(scales, state.shape, scaling)


class UnmatchedNames:
    """A record of the state names in a recipe that no optimizer has had yet.

    A *recipe* says how weights and optimizer states are stored.

    Args:
        names: The names of states in the recipe. ``"*"`` is ignored, since it may match nothing.
        optimizers: The optimizers that the recipe is attached to.
    """

    def __init__(self, names: Iterable[str], optimizers: Iterable[Optimizer]) -> None:
        self._names = {*names} - {_ALL}
        self._unstepped = {*optimizers}
        self._found: dict[str, dict[str, None]] = {}  # in order, by the class of the optimizer

    def note_step(self, optimizer: Optimizer, layers: Iterable[Tensor]) -> None:
        """Warn of names without a state, once every optimizer has stepped.

        One recipe may serve several optimizers, such as Adam and SGD, so that a name is wrong only
        if no optimizer has it.

        Args:
            optimizer: The optimizer that has stepped.
            layers: The parameters of the optimizer whose states are stored.
        """
        if not self._names or optimizer not in self._unstepped:
            return
        states = {p: optimizer.state.get(p, {}) for p in layers}
        if not any(state or p.grad is not None for p, state in states.items()):
            return  # a step without gradients, which creates no state
        self._unstepped.discard(optimizer)
        found = dict.fromkeys(name for p, state in states.items() for name in find_names(p, state))
        self._found.setdefault(type(optimizer).__name__, {}).update(found)
        self._names -= {*found}
        if self._names and not self._unstepped:
            self._warn()

    def _warn(self) -> None:
        kept = "; ".join(
            f"{kind} has {', '.join(map(repr, names)) or 'none'}"
            for kind, names in self._found.items()
        )
        warnings.warn(
            f"states={sorted(self._names)}: expected names of floating-point states of the shape "
            f"of their layer, and {kept}. These names store nothing: correct them, or leave them "
            "out",
            stacklevel=4,
        )


def find_names(parameter: Tensor, states: Mapping[str, Any]) -> list[str]:
    """Return the names of the states that can be stored: floating-point, of the layer's shape.

    Args:
        parameter: The weights of the layer.
        states: What the optimizer keeps of the layer, by name: ``optimizer.state[parameter]``.

    Returns:
        The names; counters of steps are left out.
    """
    return [
        name
        for name, state in states.items()
        if isinstance(state, Tensor)
        and state.shape == parameter.shape
        and state.is_floating_point()
        and name not in COUNTERS
    ]


def expand_scales(scales: Tensor, shape: torch.Size, scaling: Scaling) -> Tensor:
    """Return scales in a shape that broadcasts to the tensor which they belong to.

    Args:
        scales: One scale for the tensor, each channel (index of dimension 0) or each block; the
            last dimension counts the blocks.
        shape: The shape of the tensor.
        scaling: The elements that share a scale.

    Returns:
        The scales. Scales of blocks are repeated for each element, to the given shape.
    """
    if isinstance(scaling, str) or not shape:
        return scales
    size = max(min(scaling[1], shape[-1]), 1)
    return scales.repeat_interleave(size, dim=-1)[..., : shape[-1]]
