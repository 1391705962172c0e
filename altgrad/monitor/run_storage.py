"""Describe how a run itself keeps its weights and optimizer states, for the header of its run file.

The description is like that of a *recipe*, which says how weights and optimizer states are stored
and stepped. A report can then find out which recipe another run had tried, and compare.

Read `header` first; `run_header` comes next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from altgrad.monitor.header import describe_name
from altgrad.observation.stored import Stored, get_stored


class _Way(NamedTuple):
    """A way in which a layer is stored and stepped, as names and flags; equal ways are equal.

    The fields are those of `altgrad.report.RecipeInfo`.
    """

    weights: str | None
    rounding: str
    compensation: str | None
    states: tuple[tuple[str, str], ...]
    dtype: str
    optimizer: str
    fused: bool

    @property
    def is_low(self) -> bool:
        """True if weights or states have fewer bits than float32."""
        return self.weights is not None or bool(self.states) or self.dtype in _LOW


_LOW = ("bfloat16", "float16")


def describe_storage(
    optimizers: Sequence[Optimizer], layers: Iterable[Tensor]
) -> dict[str, Any] | None:
    """Describe how optimizers store and step some layers: dtype, formats, rounding and class.

    If layers differ, the description is that of the most weights: of the layers that have fewer
    bits than float32, or of all if there are none. Ranks that share parameters agree without
    asking each other.

    Args:
        optimizers: The optimizers, without the wrappers of trainers.
        layers: The parameters that count; others are left out.

    Returns:
        A dict that JSON can hold, with the keys of `altgrad.monitor.header.describe_recipe`; None
        if the optimizers step none of the layers.
    """
    counts = _count_weights(optimizers, set(layers))
    if not counts:
        return None
    way = max(counts, key=lambda each: (each.is_low, counts[each]))
    return {
        **way._asdict(),
        "states": dict(way.states),
        "accumulate": None,
        "bytes_per_parameter": None,
    }


def count_classes(optimizers: Iterable[Optimizer]) -> dict[str, int]:
    """Return how many optimizers there are of each class, by module and name of the class."""
    return dict(Counter(describe_name(type(optimizer)) for optimizer in optimizers))


def _count_weights(optimizers: Sequence[Optimizer], layers: set[Tensor]) -> Counter[_Way]:
    """Return the number of weights that are stored and stepped in each way, in order."""
    counts: Counter[_Way] = Counter()
    stored = get_stored(optimizers)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in layers:
                    way = _find_way(optimizer, group, parameter, stored.get(parameter))
                    counts[way] += math.prod(parameter.shape)
    return counts


def _find_way(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor, stored: Stored | None
) -> _Way:
    """Return the way in which an optimizer, and what rounds after its steps, store a parameter.

    Args:
        optimizer: The optimizer.
        group: Its parameter group with the parameter.
        parameter: The parameter.
        stored: The format in which a `WeightStorage` keeps the parameter; None without one.
    """
    dtype = str(parameter.dtype).removeprefix("torch.")
    rounding, compensation = "nearest_even", None
    if dtype in _LOW:
        rounding, compensation = _find_own_rounding(optimizer, group)
    weights, states = None, {}
    if stored is not None:
        weights = None if stored.format is None else str(stored.format)
        states = {name: str(format) for name, format in stored.state_formats.items()}
        rounding, compensation = stored.rounding, stored.compensation
    return _Way(
        weights,
        rounding,
        compensation,
        tuple(sorted(states.items())),
        dtype,
        describe_name(type(optimizer)),
        bool(group.get("fused")),
    )


def _find_own_rounding(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return by which rounding and compensation an optimizer itself stores weights in 16 bits.

    Known are the options of two libraries: ``bf16_stochastic_round`` of torchao, and ``kahan_sum``
    of optimi, whose default None stands for True if weights have 16 bits.
    """
    is_stochastic = getattr(optimizer, "bf16_stochastic_round", False)
    has_kahan = group.get("kahan_sum", False) is not False
    return "stochastic" if is_stochastic else "nearest_even", "kahan" if has_kahan else None
