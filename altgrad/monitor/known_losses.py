"""`KnownLosses`: notices of what rounding to few bits undoes in a run, told without measuring.

Some computations of an optimizer round their result to 16 bits on their own, and come out as if
they had not been made: a weight decay that changes no weight, a second moment that cannot fall, a
counter of steps that stops. Nothing needs to be measured to know this. There is one notice of each
kind.

Read `optimizer_factors` first; `monitor` comes next and asks for the notices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from altgrad._messages import few, format_count
from altgrad.monitor.optimizer_factors import (
    HALF_FORMATS,
    Factor,
    can_move_weights,
    find_factors,
)

_MOST_STEPS = 10_000_000
"""Number of steps within which a factor must halve a number, for a notice that it is lost.

Slower factors matter in no run. Even float32 loses the slowest ones, which need 11.6 million steps
and more. This limit is below, so that float32 is a remedy wherever there is a notice."""


class KnownLosses:
    """A source of notices of what an optimizer loses because its results are rounded to few bits.

    In bf16, say, a weight decay may change no weight, an average such as ``exp_avg_sq`` may not
    fall, and a counter of steps may stop. Dtypes and hyperparameters tell this without measuring.

    Args:
        find_layers: Function that returns the layers which some optimizers step and which are
            measured: the parameters by name.
        warn: Function that is called with each notice for the user.
        has_twins: Function of the name of a layer that returns True if recipes are tried on samples
            of it, the *twins*. A notice then names figures to look at.
    """

    def __init__(
        self,
        find_layers: Callable[[Sequence[Optimizer]], Mapping[str, Tensor]],
        warn: Callable[[str], object],
        has_twins: Callable[[str], bool],
    ) -> None:
        self._find_layers = find_layers
        self._warn = warn
        self._has_twins = has_twins
        self._stepped: WeakSet[Optimizer] = WeakSet()

    def check_attached(self, optimizers: Sequence[Optimizer]) -> None:
        """Warn of weight decay, averages and counters that rounding to few bits will undo or stop.

        It is called when optimizers are attached to the monitor.
        """
        layers = self._name(optimizers)
        for notice in (
            *describe_lost_factors(optimizers, layers, self._has_twins),
            *describe_counters(optimizers, layers),
        ):
            self._warn(notice)

    def check_stepped(self, optimizer: Optimizer) -> None:
        """Warn if ``state["step"]`` is in 16 bits, in which 256 + 1 or 2,048 + 1 is rounded down.

        It is called after each step, and acts after the first, in which the optimizer makes the
        counter.
        """
        if optimizer not in self._stepped:
            self._stepped.add(optimizer)
            for notice in describe_counters([optimizer], self._name([optimizer])):
                self._warn(notice)

    def _name(self, optimizers: Sequence[Optimizer]) -> dict[Tensor, str]:
        """Return the name of each measured layer that some optimizers can move.

        Left out are layers that are frozen, have no elements, or a learning rate of 0.
        """
        groups = [group for each in optimizers for group in each.param_groups]
        moved = {p for group in groups if can_move_weights(group) for p in group["params"]}
        layers = self._find_layers(optimizers).items()
        return {
            layer: name
            for name, layer in layers
            if layer in moved and layer.requires_grad and layer.numel()
        }


def describe_lost_factors(
    optimizers: Iterable[Optimizer],
    layers: Mapping[Tensor, str],
    has_twins: Callable[[str], bool],
) -> Iterator[str]:
    """Yield notices of weight decay that rounding undoes, and of states that it keeps from falling.

    At each step, an optimizer multiplies weights by 1 − lr · weight_decay, and states such as
    ``exp_avg_sq`` by a beta. In few bits, the product may be rounded back to what it was.

    Args:
        optimizers: Torch optimizers.
        layers: The name of each parameter; other parameters are left out.
        has_twins: Function of the name of a layer that returns True if recipes are tried on samples
            of it, the *twins*, so that figures can be named.

    Returns:
        An iterator over two notices at most, each with a remedy.
    """
    factors = [each for optimizer in optimizers for each in find_factors(optimizer, layers)]
    lost = [factor for factor in factors if factor.unchanged is not None and _matters(factor)]
    if decays := [factor for factor in lost if factor.state is None]:
        yield _describe_decays(decays) + _describe_figures(
            [each for each in decays if each.can_be_sampled and has_twins(each.layer)]
        )
    if averages := [factor for factor in lost if factor.state is not None]:
        yield _describe_averages(averages)


def describe_counters(
    optimizers: Iterable[Optimizer], layers: Mapping[Tensor, str]
) -> Iterator[str]:
    """Yield a notice if steps are counted in 16 bits, where 256 + 1 or 2,048 + 1 is rounded down.

    Args:
        optimizers: Torch optimizers. Their states may be empty before the first step.
        layers: The name of each parameter; other parameters are left out.

    Returns:
        An iterator over one notice at most, with a remedy.
    """
    ends: dict[str, str] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            step = state.get("step") if isinstance(state, Mapping) else None
            if parameter in layers and isinstance(step, Tensor) and step.dtype in HALF_FORMATS:
                format = HALF_FORMATS[step.dtype]
                ends[layers[parameter]] = f"{2 ** (format.mantissa_bits + 1):,} in {format.name}"
    if ends:
        yield (
            f"expects the counter of steps of {few([*ends])} to stop at {_join(ends.values())}, "
            "where 1 more is rounded back: bias corrections and schedules that read it then stand "
            "still; keep state['step'] in float32"
        )


def _matters(factor: Factor) -> bool:
    """Return True if a factor halves numbers within the steps that a run may have."""
    return (1 - factor.change) ** _MOST_STEPS < 0.5


def _describe_decays(lost: Sequence[Factor]) -> str:
    """Return a notice of weight decay that rounding to few bits undoes.

    Args:
        lost: The factors 1 − lr · weight_decay by which optimizers multiply weights, without any
            change to some or all of them.
    """
    most = max(lost, key=lambda factor: factor.change)
    steps = format_count(int(float(f"{math.log(2) / most.change:.2g}")), "step")
    return (
        f"expects weight decay to be lost in {few(_list_layers(lost))}: "
        f"{_join(factor.optimizer for factor in lost)} multiplies weights by 1 - {most.change:.3g} "
        f"({most.setting}, or less), {_describe_extent(lost)}. Without rounding, weights without "
        f"gradients would halve in {steps}. Keep weights in float32, or round them "
        f"stochastically or with Kahan summation{_describe_fused(lost)}"
    )


def _describe_fused(lost: Sequence[Factor]) -> str:
    """Return a phrase on when ``fused=True`` helps; empty if no optimizer has this option."""
    if names := [factor.optimizer for factor in lost if factor.has_fused]:
        return f"; fused=True of {_join(names)} helps only where updates are large"
    return ""


def _describe_figures(sampled: Sequence[Factor]) -> str:
    """Return a sentence that names figures which show the loss; empty without factors.

    Args:
        sampled: Factors of layers with *twins*, samples that are stepped as recipes say.
    """
    ways = [
        factor.format.name + way
        for factor in sampled
        for way in ("-sr", "-kahan", *(["-true-fused"] if factor.has_fused else []))
    ]
    names = [*dict.fromkeys(ways)]
    return f". See decay_projection/now, and that of recipes={names}" if names else ""


def _describe_averages(lost: Sequence[Factor]) -> str:
    """Return a notice of states, such as ``exp_avg_sq``, that rounding keeps from falling.

    Args:
        lost: The betas by which optimizers multiply states. While gradients are small, the product
            is rounded back to the state, for some or all of its numbers.
    """
    highest = min(lost, key=lambda factor: factor.change)
    return (
        f"expects {_join(str(factor.state) for factor in lost)} of {few(_list_layers(lost))} to "
        f"stay large after gradients shrink: {_join(factor.optimizer for factor in lost)} "
        f"multiplies by {highest.setting}, {_describe_extent(lost)}. Keep such states in float32, "
        f"or round them stochastically{_describe_lower_beta(lost)}"
    )


def _describe_lower_beta(lost: Sequence[Factor]) -> str:
    """Return the advice to take a lower beta, with which states fall by the right amount.

    A state that is multiplied by beta may stay as it is if the change, 1 − beta, is less than half
    of the format's spacing at 1. If the change is just above this bound, the state falls by a whole
    spacing, which is up to twice too much. A change of 4 times the bound is right to a twentieth
    (`benchmarks/known_losses.py`). For formats of 8 bits, such a beta would be too low to be of
    use, and the text is empty.

    Args:
        lost: The betas by which optimizers multiply states, rounded in few bits.
    """
    beta = 1 - 2.0 ** (1 - min(factor.format.mantissa_bits for factor in lost))
    return f", or take {math.floor(1e4 * beta) / 1e4:g} or less" if beta > 0.9 else ""


def _describe_extent(lost: Sequence[Factor]) -> str:
    """Return which numbers some factors change, such as ``which changes no number in bf16``.

    Args:
        lost: Factors just below 1 by which optimizers multiply weights or states. Numbers that are
            rounded back to what they were do not change.
    """
    extents = {factor.unchanged for factor in lost}
    which = "no number" if extents == {"all"} else "only some numbers"
    if len(extents) == 2:
        which = "no number, or only some,"
    return f"which changes {which} in {_join(factor.format.name for factor in lost)}"


def _list_layers(lost: Sequence[Factor]) -> list[str]:
    """Return the names of the layers whose weights or states are multiplied by factors, each once.

    Args:
        lost: Factors just below 1 by which optimizers multiply weights or states.
    """
    return [*dict.fromkeys(factor.layer for factor in lost)]


def _join(texts: Iterable[str]) -> str:
    """Return texts as a list in words, each once, in order: ``a, b and c``."""
    *first, last = dict.fromkeys(texts)
    return f"{', '.join(first)} and {last}" if first else last
