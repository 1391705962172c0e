"""`find_factors`: the numbers just below 1 by which an optimizer multiplies what it stores.

At each step AdamW multiplies a weight by 1 − lr · weight_decay, and its second moment by beta2. The
tables of this file say for each optimizer of torch what is multiplied, by which option.

Two kinds of weight decay are left out, since their loss depends on the gradients: decay that is
added to the gradient, as in SGD and Adam; and that of fused optimizers and of a `WeightStorage`,
which round a weight once, after decay and update. States that are averages are included for all
optimizers: while gradients are small, an average is multiplied by its beta and nothing is added.

Read `rounded_factors` first; `known_losses` comes next.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.monitor.rounded_factors import Extent, find_unchanged
from altgrad.observation.stored import Stored, get_stored
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import BF16, FP16

HALF_FORMATS: Mapping[torch.dtype, FloatFormat] = {torch.bfloat16: BF16, torch.float16: FP16}
"""The dtypes for which notices of losses are given, and their formats.

What float32 loses is too small to matter.
"""

_RATES = ("lr", "initial_lr", "max_lr")
"""The entries of a parameter group that are learning rates, also those of schedules."""


class Factor(NamedTuple):
    """A number just below 1 by which an optimizer multiplies weights or a state at each step.

    Attributes:
        optimizer: Name of the optimizer's class.
        layer: Name of the layer.
        state: Name of the state that is multiplied; None for the weights.
        setting: The options that the factor comes from, such as ``betas[1]=0.999``.
        change: 1 minus the factor.
        format: The format of the products.
        is_rounded: True if the factor itself is rounded to the format before it multiplies.
    """

    optimizer: str
    layer: str
    state: str | None
    setting: str
    change: float
    format: FloatFormat
    is_rounded: bool

    @property
    def unchanged(self) -> Extent | None:
        """The extent of numbers that stay as they are when multiplied by the factor and rounded.

        ``"all"``, ``"some"``, or None if all numbers change.
        """
        extent = find_unchanged(self.change, self.format.mantissa_bits)
        # The number below 1 is half a spacing away, and moves all numbers.
        return None if self.is_rounded and extent == "some" else extent

    @property
    def has_fused(self) -> bool:
        """True if the optimizer has the option ``fused``, which rounds weights only once."""
        return "fused" in inspect.signature(getattr(torch.optim, self.optimizer)).parameters

    @property
    def can_be_sampled(self) -> bool:
        """True if the optimizer can step a sample of the layer, as a *twin* needs."""
        return self.optimizer not in _WHOLE


class _Average(NamedTuple):
    """A state that is an average, and the option with its beta.

    Attributes:
        state: Name of the state.
        option: Name of the option.
        place: Index of beta in the option; None if the option is a number.
        is_lerped: True if `Tensor.lerp_` steps the state, which does not round the factor.
    """

    state: str
    option: str
    place: int | None = None
    is_lerped: bool = False


_SWITCHES: Mapping[str, str | None] = {
    "Adafactor": None,
    "Adam": "decoupled_weight_decay",
    "AdamW": None,
    "Muon": None,
    "NAdam": "decoupled_weight_decay",
    "RAdam": "decoupled_weight_decay",
}
"""By class of torch.optim that multiplies weights by 1 − lr · weight_decay, apart from the update:
the option that switches this on; None if it is always so."""

_WHOLE = frozenset({"Adafactor", "Muon"})
"""Classes of torch.optim with weight decay whose update of an element depends on the others."""

_FIRST_MOMENT = _Average("exp_avg", "betas", 0, is_lerped=True)
_MOMENTS = (_FIRST_MOMENT, _Average("exp_avg_sq", "betas", 1))
_AVERAGES: Mapping[str, tuple[_Average, ...]] = {
    "Adadelta": (_Average("square_avg", "rho"), _Average("acc_delta", "rho")),
    "Adam": _MOMENTS,
    "Adamax": (_FIRST_MOMENT, _Average("exp_inf", "betas", 1)),
    "AdamW": _MOMENTS,
    "Muon": (_Average("momentum_buffer", "momentum", is_lerped=True),),
    "NAdam": _MOMENTS,
    "RAdam": _MOMENTS,
    "RMSprop": (_Average("square_avg", "alpha"), _Average("momentum_buffer", "momentum")),
    "SGD": (_Average("momentum_buffer", "momentum"),),
}
"""By class of torch.optim, the states that are averages, each multiplied by its beta at a step."""


def find_factors(optimizer: Optimizer, layers: Mapping[Tensor, str]) -> Iterator[Factor]:
    """Yield the factors by which an optimizer multiplies weights and states in low precision.

    Weights are multiplied by 1 − lr · weight_decay, states such as ``exp_avg_sq`` by a beta.

    A learning rate is the highest that the parameter group names: its own, or the one that a
    learning rate schedule has kept there. What is lost at this rate is lost at each lower one.

    Args:
        optimizer: An optimizer. Classes outside of torch.optim have no known factors.
        layers: The name of each parameter; other parameters are left out.

    Returns:
        An iterator over factors, also those of which nothing is lost.
    """
    kind = _find_class(optimizer)
    stored = get_stored([optimizer])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in layers:
                layer = _Layer(layers[parameter], parameter, optimizer.state.get(parameter, {}))
                yield from _find_decay(kind, group, layer)
                yield from _find_betas(kind, group, layer, stored.get(parameter))


class _Layer(NamedTuple):
    """A layer: its name, its parameter, and the optimizer's states by name, if it has stepped."""

    name: str
    parameter: Tensor
    states: Mapping[str, Any]


def _find_class(optimizer: Optimizer) -> str:
    """Return the name of the class of torch.optim whose `step` runs; empty for others."""
    step = inspect.unwrap(type(optimizer).step)
    for kind in type(optimizer).__mro__:
        is_public = getattr(torch.optim, kind.__name__, None) is kind
        # The first optimizer of a class puts a wrapper around the `step` that the class inherits.
        if is_public and inspect.unwrap(getattr(kind, "step", step)) is step:
            return kind.__name__
    return ""


def _find_decay(kind: str, group: Mapping[str, Any], layer: _Layer) -> Iterator[Factor]:
    """Yield the factor 1 − lr · weight_decay if a layer's weights are multiplied by it."""
    format, switch = HALF_FORMATS.get(layer.parameter.dtype), _SWITCHES.get(kind)
    if kind not in _SWITCHES or format is None or group.get("fused"):
        return
    if switch is not None and not group.get(switch):
        return
    rate, decay = _find_highest_rate(group), float(group["weight_decay"])
    setting = f"lr={rate:g} and weight_decay={decay:g}"
    is_rounded = _rounds_factors(group, layer)
    yield Factor(kind, layer.name, None, setting, rate * decay, format, is_rounded)


def can_move_weights(group: Mapping[str, Any]) -> bool:
    """Return False if all learning rates that a parameter group names are 0.

    A tensor on an accelerator counts as a rate above 0, since the host would wait for its value.
    """
    rates = [group[key] for key in _RATES if key in group]
    return not rates or any(map(_may_be_nonzero, rates))


def _may_be_nonzero(rate: object) -> bool:
    return (isinstance(rate, Tensor) and rate.device.type != "cpu") or bool(rate != 0)


def _find_highest_rate(group: Mapping[str, Any]) -> float:
    """Return the highest learning rate that a parameter group names.

    Schedules of torch keep the rate that they start from as ``initial_lr``, which after a warm-up
    is the highest, and OneCycleLR the highest as ``max_lr``.
    """
    return max(float(group[key]) for key in _RATES if key in group)


def _find_betas(
    kind: str, group: Mapping[str, Any], layer: _Layer, stored: Stored | None
) -> Iterator[Factor]:
    """Yield the beta of each state of a layer that is an average and is kept in low precision."""
    # On a CPU, a fused SGD in 16 bits moves only the last elements of a layer and of its state:
    # https://github.com/pytorch/pytorch/issues/191763
    if kind == "SGD" and group.get("fused"):
        return
    for average in _AVERAGES.get(kind, ()):
        format = _find_state_format(average.state, layer, stored)
        if format is None:
            continue
        beta, option = group[average.option], average.option
        if average.place is not None:
            beta, option = beta[average.place], f"{option}[{average.place}]"
        setting = f"{option}={float(beta):g}"
        is_rounded = _rounds_factors(group, layer) and not average.is_lerped
        change = 1 - float(beta)
        yield Factor(kind, layer.name, average.state, setting, change, format, is_rounded)


def _find_state_format(name: str, layer: _Layer, stored: Stored | None) -> FloatFormat | None:
    """Return the format in which a state is rounded to nearest; None if it is in float32."""
    # Before the first step there is no state: torch makes it in the dtype of the layer.
    dtype = getattr(layer.states.get(name), "dtype", layer.parameter.dtype)
    formats = [HALF_FORMATS.get(dtype)]
    if stored is not None and stored.rounding == "nearest_even":
        formats.append(stored.find_state_format(name))
    return min(
        (format for format in formats if format is not None),
        key=lambda format: format.mantissa_bits,
        default=None,
    )


def _rounds_factors(group: Mapping[str, Any], layer: _Layer) -> bool:
    """Return True if a beta, or 1 − lr · weight_decay, is rounded to a layer's dtype before use.

    By such factors an optimizer multiplies states and weights. ``foreach`` on a CPU rounds them. On
    other devices, and without ``foreach``, they are float32.

    Args:
        group: The parameter group of the optimizer.
        layer: The layer.
    """
    return bool(group.get("foreach")) and layer.parameter.device.type == "cpu"
