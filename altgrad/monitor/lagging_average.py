"""`describe_lagging_average`: say how far an average of weights in 16 bits lags behind.

An exponential moving average s of a weight w moves by (1 − decay) · (w − s) at a step. In 16 bits,
this is lost if it is less than half of the spacing of numbers at s, so that the average follows
only once the weight is far away: in bf16 and for a decay of 0.99, by 20 to 39 % of its size.

Read `rounded_factors` first, which has the spacing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel

from altgrad._messages import few
from altgrad.monitor.optimizer_factors import HALF_FORMATS

_HARMLESS = 0.01
"""A lag, relative to the weight, up to which there is no notice.

In `benchmarks/known_losses.py`, averages with a lag of 0.005 are off by 0.3 % of their movement,
those with one of 0.04 by 3 %."""


def describe_lagging_average(averaged: AveragedModel) -> Iterator[str]:
    """Yield a notice if a model's averages of weights are in 16 bits and cannot follow the weights.

    Args:
        averaged: The averaged model, with a function of `get_ema_avg_fn` or `get_ema_multi_avg_fn`
            of torch. The decay of others is not known, and nothing is yielded.

    Returns:
        An iterator over one notice at most, with a remedy.
    """
    if (decay := read_decay(averaged)) is not None:
        kept: dict[str, Tensor] = dict(averaged.module.named_parameters())
        if averaged.use_buffers:
            kept |= averaged.module.named_buffers()
        yield from describe_lags(kept, decay)


def describe_lags(averages: Mapping[str, Tensor], decay: float) -> Iterator[str]:
    """Yield a notice if averages are in 16 bits and cannot follow what they average.

    Args:
        averages: The averages by name. Those of other dtypes, or without elements, are left out.
        decay: The factor of an average at each update, such as 0.999.

    Returns:
        An iterator over one notice at most, with a remedy.
    """
    formats = {
        name: HALF_FORMATS.get(average.dtype)
        for name, average in averages.items()
        if average.numel()
    }
    lags = {
        name: 2.0 ** -(format.mantissa_bits + 1) / (1 - decay)
        for name, format in formats.items()
        if format is not None and decay < 1
    }
    if lagging := {name: lag for name, lag in lags.items() if lag > _HARMLESS}:
        most = max(lagging.values())
        yield (
            f"expects averages of {few([*lagging])} to lag behind: with a decay of {decay:g} in 16 "
            f"bits, an average hardly follows a weight that differs by less than {most / 2:.2g} "
            f"to {most:.2g} times its size. Keep averages in float32, as by AveragedModel(model, "
            # get_ema_avg_fn would round (1 - decay) * w to the 16 bits of w.
            f"avg_fn=lambda s, w, _: s + {1 - decay:.6g} * (w - s)).float()"
        )


def read_decay(averaged: AveragedModel) -> float | None:
    """Return the decay of an exponential moving average by torch; None for other averages."""
    function = averaged.multi_avg_fn or averaged.avg_fn
    for factory in (swa_utils.get_ema_multi_avg_fn, swa_utils.get_ema_avg_fn):
        if function is not None and _is_made_by(factory, function):
            return float(inspect.getclosurevars(inspect.unwrap(function)).nonlocals["decay"])
    return None


def _is_made_by(factory: Callable[..., Any], function: Callable[..., Any]) -> bool:
    """Return True if a function is the result of a function of torch."""
    # torch.no_grad wraps the function that keeps the decay in its closure.
    inner = inspect.unwrap(function)
    made = (getattr(inner, "__module__", None), getattr(inner, "__qualname__", ""))
    return made == (factory.__module__, f"{factory.__qualname__}.<locals>.ema_update")
