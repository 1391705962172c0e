"""`Clock`: what observing takes, and what training takes without it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch.optim import Optimizer


class _Mark(NamedTuple):
    """The end of an observed step of an optimizer."""

    step: int
    end: float
    own: float  # all that was spent on observing until then
    own_of_step: float  # of that, since the mark before


class Clock:
    """Seconds of the host: those spent on observing, and those between observed steps without."""

    def __init__(self) -> None:
        self._own = 0.0
        self._marks: WeakKeyDictionary[Optimizer, _Mark] = WeakKeyDictionary()

    def add(self, seconds: float) -> None:
        """Spent on observing."""
        self._own += seconds

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Count what is done within."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._own += time.perf_counter() - start

    def seconds(self, optimizer: Optimizer, index: int) -> tuple[float, float]:
        """What observing took from one observed step to the last one, of all optimizers, and the
        mean time of a step of training since then; NaN where it is not known.
        """
        mark = self._marks.get(optimizer)
        if mark is None or index <= mark.step:  # counted anew
            return math.nan, math.nan
        training = time.perf_counter() - mark.end - (self._own - mark.own)
        return mark.own_of_step, max(training, 0.0) / (index - mark.step)

    def tick(self, optimizer: Optimizer, index: int) -> None:
        """A step has been observed."""
        mark = self._marks.get(optimizer)
        # The first does what no other has to do: it tells nothing.
        own_of_step = math.nan if mark is None else self._own - mark.own
        self._marks[optimizer] = _Mark(index, time.perf_counter(), self._own, own_of_step)
