"""`Follower`: have twins keep an average of their weights, as the run keeps one of its own.

The *run* is the training that is watched. It updates an average of its weights after a step, by
code of its own. A *twin*, a sample of the layers that is stored and stepped as a recipe says, makes
the same update with its own weights. Two classes find out which update that was:

- `FunctionFollower` calls the update function of an `AveragedModel`, once for each update that the
  model has counted.
- `ShareFollower` assumes the update s ← s + a · (w − s) of an average s of weights w, and computes
  the share a from how far the average has moved.

Read `average_sample` first; `statistic_follower` comes next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from altgrad.twins.average_sample import AverageSample
from altgrad.twins.run_average import RunAverage
from altgrad.twins.self_check import compare
from altgrad.twins.twin import Twin
from altgrad.twins.writes import count_writes

_ROUNDING = 8.0
"""Difference that counts as rounding when an average has moved, in spacings of the largest number.

The average is rounded at each update, and its updates may have several operations.
"""
_FEW = 0.2
"""Share of the elements of an average that may move in another way than the rest."""
_MOST_OVERWRITTEN = 4
"""Number of steps in a row at which an average may change though no update was counted."""
_NOISE = 4.0
"""Difference of movement that counts as rounding, in spacings times √(number of elements)."""


class Follower(ABC):
    """A way to have twins update averages of their weights when the training updates its own.

    *Twins* are samples of the layers that are stored and stepped as recipes say.

    Args:
        name: Name of the average.
        sample: The sampled elements of the training's average.

    Attributes:
        has_followed: True if twins have updated their averages since the last check, so that one
            without differences shows that they are right. False if they only took averages over.
    """

    def __init__(self, name: str, sample: AverageSample) -> None:
        self.has_followed = False
        self._name = name
        self._sample = sample
        self._must_compare = True  # before the first look, and where a check has found differences

    @property
    def advice(self) -> str:
        """The end of a sentence that says what may help if a check fails; empty if unknown."""
        return ""

    def check(self, reference: Twin, rows: Tensor, mask: Tensor) -> Tensor:
        """Compare the training's average of its weights with that of a twin stepped alike.

        The *reference twin* is a sample of the layers that is stepped as the training is. It
        updates an average of its own weights when the training updates its average.

        Args:
            reference: The reference twin.
            rows: Positions of the elements of each layer, int64 (layers, width).
            mask: bool (layers, width), False where a row has no element of its layer.

        Returns:
            For each layer, float64 (layers, 4) on the device: the number of sampled elements that
            differ, that differ by more than rounding, and that moved, and the largest difference in
            spacings of the dtype. All are 0 if the two averages have different dtypes.
        """
        own, real = reference.averages[self._name], self._sample.gather()
        if own.dtype != real.dtype:
            return torch.zeros((len(rows), 4), dtype=torch.float64, device=rows.device)
        start = reference.tensors.start.to(own.dtype)
        return compare(real[rows], own[rows], start[rows], mask)

    @abstractmethod
    def follow(self, reference: Twin, twins: Sequence[Twin]) -> None:
        """Update the averages of twins if the training has updated its own since the last call.

        A *twin* is a sample of the layers that is stored and stepped as a recipe says. Like the
        training, it keeps an average of its own weights.

        Args:
            reference: The twin that is stepped as the training is.
            twins: The twins that keep the average, the reference twin among them.
        """

    def rearrange(self) -> None:
        """Prepare for other layers, or other places of their samples in the flat tensors.

        At the next call of `follow`, twins (samples of the layers) set their averages of weights to
        the training's average where that of the reference twin differs from it.
        """
        self._must_compare = True

    def begin_anew(self) -> None:
        """Have the next `follow` set the averages of twins to that of the training's weights.

        A *twin* is a sample of the layers; the *reference twin* is stepped as the training is. Only
        elements change at which the average of the reference twin differs from the training's.
        """
        self._must_compare = True

    def _take_over(self, reference: Twin, twins: Sequence[Twin]) -> Tensor:
        """Set the averages that twins keep of their weights to the training's average.

        A *twin* is a sample of the layers that is stored and stepped as a recipe says. Only those
        elements change at which the reference twin has another average than the training.

        Args:
            reference: The twin that is stepped as the training is.
            twins: The twins that keep the average, the reference twin among them.

        Returns:
            True where the reference twin had another average, bool (elements).
        """
        real = self._sample.gather()
        own = reference.averages[self._name]
        differs = (real.to(own.dtype) != own) & ~(real.isnan() & own.isnan())
        for twin in twins:
            twin.replace_average(self._name, differs, real)
        self._must_compare = self.has_followed = False
        return differs


class FunctionFollower(Follower):
    """A way to update the averages of twins by the function of an `AveragedModel`.

    *Twins* are samples of the layers that are stored and stepped as recipes say. The model counts
    its updates in a tensor, and torch counts the writes to this tensor on the host: that many
    updates are repeated. If the average changes without such a write, as after `load_state_dict`,
    twins copy it. If this happens at several steps in a row, other code updates the average, and
    `check` reports a difference.

    Args:
        average: The average of the training's weights.
        sample: Its sampled elements.
    """

    def __init__(self, average: RunAverage, sample: AverageSample) -> None:
        super().__init__(average.name, sample)
        self._average = average
        self._counter = self._find_counter()
        self._writes = count_writes(self._counter)
        self._count = int(self._counter)
        self._overwritten = torch.zeros(1, dtype=torch.int64, device=self._counter.device)

    @property
    def advice(self) -> str:
        return (
            "; call its update_parameters, or, if a loop of yours updates the average, watch the "
            "module inside: watch_average(averaged.module)"
        )

    def check(self, reference: Twin, rows: Tensor, mask: Tensor) -> Tensor:
        counts = super().check(reference, rows, mask)
        is_wrong = self._overwritten.to(counts.device) >= _MOST_OVERWRITTEN
        return counts + mask.sum(1, keepdim=True) * is_wrong

    def _find_counter(self) -> Tensor:
        counter = self._average.counter
        assert counter is not None
        return counter

    def begin_anew(self) -> None:
        super().begin_anew()
        self._count = int(self._counter)

    def follow(self, reference: Twin, twins: Sequence[Twin]) -> None:
        counter, is_written = self._find_counter(), self._sample.take_writes()
        if counter is not self._counter:
            self._counter, self._count = counter, int(counter)
            self._must_compare = True
            updates = 0
        else:
            updates = count_writes(counter) - self._writes
        self._writes = count_writes(counter)
        for _ in range(updates):
            act = partial(self._average.step, count=self._count)
            for twin in twins:
                twin.step_average(self._name, act)
            self._count += 1
        if updates:
            self._overwritten.zero_()
        if self._must_compare:
            self._take_over(reference, twins)
        elif is_written and not updates:
            differs = self._take_over(reference, twins).any()
            self._overwritten += differs.to(self._overwritten.device)
        else:
            self.has_followed |= updates > 0


class ShareFollower(Follower):
    """A way to update the averages of twins by a share that is found from the training's average.

    *Twins* are samples of the layers that are stored and stepped as recipes say. An average s moves
    to s + a · (w − s), for weights w. Each call of `follow` computes the share a, which is
    1 − decay, from all sampled elements by least squares. It is 0 if the average has not moved. If
    no share explains the movement, the average was overwritten, and all twins copy it.

    Args:
        average: The average of the training's weights.
        sample: Its sampled elements.
    """

    def __init__(self, average: RunAverage, sample: AverageSample) -> None:
        super().__init__(average.name, sample)
        self._average = average
        self._last: Tensor | None = None
        self._unexplained: Tensor | None = None  # True if no share explained a movement, bool (1)

    def rearrange(self) -> None:
        super().rearrange()
        self._last = None

    def check(self, reference: Twin, rows: Tensor, mask: Tensor) -> Tensor:
        counts = super().check(reference, rows, mask)
        unexplained, self._unexplained = self._unexplained, None
        return counts if unexplained is None else counts + mask.sum(1, keepdim=True) * unexplained

    def follow(self, reference: Twin, twins: Sequence[Twin]) -> None:
        is_written, real = self._sample.take_writes(), self._sample.gather()
        last, self._last = self._last, real
        if self._must_compare or last is None:
            self._take_over(reference, twins)
            return
        self.has_followed |= is_written
        share, is_update = self._find_share(reference, last, real, is_written=is_written)
        for twin in twins:
            twin.step_average(self._name, partial(_move, share=share))
        was = self._unexplained
        self._unexplained = ~is_update if was is None else ~is_update | was
        written = ~is_update & (real != last)
        # The average of the reference twin is that of the training, so that errors do not add up.
        is_own = reference.averages[self._name].dtype == real.dtype
        for twin in twins:
            outside = torch.ones_like(written) if twin is reference and is_own else written
            twin.replace_average(self._name, outside, real)

    def _find_share(
        self, reference: Twin, last: Tensor, real: Tensor, *, is_written: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the share a with which an average s has moved to s + a · (w − s).

        Args:
            reference: The twin that is stepped as the training is; its weights are w.
            last: The average s at the last call of `follow`, (elements).
            real: The average now, (elements).
            is_written: True if torch has counted a write to the average since that call.

        Returns:
            The share a, float64 (1), and True if it explains the movement, bool (1).
        """
        before, now, weights = last.double(), real.double(), reference.tensors.weights
        step = (now - before).nan_to_num(0.0, 0.0, 0.0)
        way = (weights.double() - before).nan_to_num(0.0, 0.0, 0.0)
        moved = (step != 0).any()
        if self._average.decay is None:
            trust = _find_trust(weights, last)
            share = (trust * step * way).sum() / (trust * way.square()).sum()
            share = share.nan_to_num(0.0, 0.0, 0.0)
        else:
            # Numbers of 16 bits may all have been rounded back to what they were.
            is_due = torch.ones_like(moved) if is_written else moved
            share = torch.where(is_due, 1 - self._average.decay, 0.0).double()
        largest = torch.maximum(before.abs(), now.abs()).nan_to_num(torch.inf)
        # A loop in which weights of 16 bits are multiplied by 1 − decay rounds to their dtype.
        addend = (share * weights.double()).abs().nan_to_num(0.0, 0.0, 0.0)
        spacing = torch.finfo(real.dtype).eps * largest
        rounding = _ROUNDING * spacing + torch.finfo(weights.dtype).eps * addend
        far = (step - share * way).abs() > rounding
        is_update = far.sum() <= _FEW * (step != 0).sum()
        if self._average.decay is not None:
            rounded = (before + share * way).to(real.dtype).double() - before
            is_update &= _move_alike(step, rounded.nan_to_num(0.0, 0.0, 0.0), way, spacing)
        return torch.where(is_update, share, 0.0), is_update


def _move_alike(step: Tensor, expected: Tensor, way: Tensor, spacing: Tensor) -> Tensor:
    """Return True if averages move about as far as the user's decay lets expect.

    The sum over all elements must be from a third of the expected sum to three times as much. In 16
    bits a single element moves by a whole spacing or not at all, and says nothing about the decay.

    Args:
        step: The movement, float64 (elements).
        expected: The movement with the decay that the user states, float64 (elements).
        way: The weights minus the averages, float64 (elements).
        spacing: About the distance of neighbouring numbers, float64 (elements).

    Returns:
        bool, of no dimension.
    """
    is_known = spacing.isfinite() & (spacing > 0)
    sign = torch.where(is_known, way.sign() / spacing, 0.0).nan_to_num(0.0, 0.0, 0.0)
    found, wanted = (sign * step).sum(), (sign * expected).sum()
    noise = _NOISE * is_known.sum().sqrt()
    return (found - wanted).abs() <= torch.maximum(found.abs(), wanted.abs()) * 2 / 3 + noise


def _find_trust(weights: Tensor, averages: Tensor) -> Tensor:
    """Return the weight of each element in the least squares by which a share is found.

    If the weights have fewer digits than their averages, a training loop may round a · w to the
    dtype of the weights. An element counts for less, the larger this rounding error can be.

    Args:
        weights: The weights, (elements).
        averages: Their averages before the update, (elements).

    Returns:
        float64 (elements).
    """
    rough, fine = (torch.finfo(each.dtype).eps for each in (weights, averages))
    if rough <= fine:
        return torch.ones_like(averages, dtype=torch.float64)
    noise = (rough * weights.double()).square() + (fine * averages.double()).square()
    return (1 / noise).nan_to_num(0.0, 0.0, 0.0)


def _move(averages: Tensor, weights: Tensor, *, share: Tensor) -> None:
    """Move averages, (elements), by a share of the way to the weights; they are rounded once."""
    wide = averages.double()
    averages.copy_(wide + share * (weights.double() - wide))
