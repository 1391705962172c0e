"""`StatisticFollower`: have twins keep BatchNorm's running statistics as the run keeps its own.

A *twin* is a sample of the layers of the *run*, the training that is watched. The mean and variance
of the batches are those of the run, found from its running statistics in float32. A twin adds them
to its own statistics, in its own dtype and format.

Read `average_followers` first; `lane_averages` comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from altgrad.quantization.devices import find_exact_device
from altgrad.twins.average_followers import Follower
from altgrad.twins.average_sample import AverageSample
from altgrad.twins.batch_norm import BatchStatistic, move_statistic
from altgrad.twins.twin import Twin
from altgrad.twins.writes import count_writes_to_each

_MOST_BATCHES = 64
"""Number of batches between two steps that twins add one by one; any before are added at once.

It bounds the cost of a step that follows many batches, such as those of a warm-up of statistics.
"""


class StatisticFollower(Follower):
    """A way to update the running statistics of twins with those of the training's batches.

    *Twins* are samples of the layers that are stored and stepped as recipes say. A statistic s
    becomes s + m · (x − s) with each batch, so that the x of a batch follows from s before and
    after it. If there were several batches between two steps, all get the mean of their x. The last
    64 are added one by one, those before at once: 16 bits then lose less than in a real training.

    Args:
        statistic: The running mean or variance of the training's BatchNorm modules.
        sample: Its sampled elements.
    """

    def __init__(self, statistic: BatchStatistic, sample: AverageSample) -> None:
        super().__init__(statistic.name, sample)
        self._statistic = statistic
        self._counts = dict(statistic.noted)  # of batches, int64 on the device, by layer
        self._writes = dict(statistic.noted_writes)  # to each module's count of batches, by layer
        self._momenta: tuple[list[float], Tensor] | None = None

    def rearrange(self) -> None:
        super().rearrange()
        self._momenta = None

    def follow(self, reference: Twin, twins: Sequence[Twin]) -> None:
        most, is_written = self._find_most_batches(), self._sample.take_writes()
        # torch counts no write of BatchNorm to its statistics, but those to its count of batches.
        if not most and not is_written and not self._must_compare:
            return
        self._must_compare = False
        # The statistic of the reference twin is that of the training at the last look.
        last, real = reference.averages[self._name].clone(), self._sample.gather()
        times, momentum = self._count_batches(), self._find_momenta()
        batch = _find_batch(last.double(), real.double(), momentum, times)
        early = (times - _MOST_BATCHES).clamp(min=0)
        if most > _MOST_BATCHES:
            act = partial(_move_at_once, batch=batch, share=1 - (1 - momentum) ** early)
            for twin in twins:
                twin.step_average(self._name, act)
        for number in range(min(most, _MOST_BATCHES)):
            when = times - early > number
            act = partial(self._move, batch=batch, momentum=momentum, when=when)
            for twin in twins:
                twin.step_average(self._name, act)
        is_new = last.isnan() & ~real.isnan()
        # Without a momentum, a module takes the mean of all batches, which is taken over.
        written = ((times == 0) | (momentum == 0)) & (real != last) & ~real.isnan()
        for twin in twins:
            outside = torch.ones_like(is_new) if twin is reference else is_new | written
            twin.replace_average(self._name, outside, real)

    def _move(
        self, values: Tensor, _: Tensor, *, batch: Tensor, momentum: Tensor, when: Tensor
    ) -> None:
        move_statistic(self._name, values, batch, momentum, when)

    def _find_most_batches(self) -> int:
        """Return the largest number of batches that a module can have got since the last call.

        The host knows how often torch has written to the module's count. A write need not be a
        batch: DistributedDataParallel copies the count from one rank to all.
        """
        counters = self._statistic.find_counters()
        writes = count_writes_to_each([*counters.values()])
        before, self._writes = self._writes, dict(zip(counters, writes, strict=True))
        return max(
            (n - before[each] for each, n in self._writes.items() if each in before), default=0
        )

    def _count_batches(self) -> Tensor:
        """Return how many batches each element's module has got since the last call, (elements)."""
        counters = self._statistic.find_counters()
        names = [*self._sample.tensors]
        now = {name: counters[name].clone() for name in names if name in counters}
        before, self._counts = self._counts, now
        none = torch.zeros((), dtype=torch.int64, device=self._sample.tensors[names[0]].device)
        counts = [now[n] - before.get(n, now[n]) if n in now else none for n in names]
        return self._sample.spread(torch.stack(counts)).clamp(min=0)

    def _find_momenta(self) -> Tensor:
        """Return the momentum of each element's module, float64 (elements); 0 elsewhere."""
        known = self._statistic.find_momenta()
        momenta = [known.get(layer, 0.0) for layer in self._sample.tensors]
        if self._momenta is None or self._momenta[0] != momenta:
            device = find_exact_device(next(iter(self._sample.tensors.values())).device)
            numbers = torch.tensor(momenta, dtype=torch.float64, device=device)
            self._momenta = momenta, self._sample.spread(numbers)
        return self._momenta[1]


def _move_at_once(values: Tensor, _: Tensor, *, batch: Tensor, share: Tensor) -> None:
    """Move running statistics by a share of the way to those of the batch, and round them once."""
    wide = values.double()
    values.copy_(torch.where(share > 0, wide + share * (batch - wide), wide))


def _find_batch(before: Tensor, after: Tensor, momentum: Tensor, times: Tensor) -> Tensor:
    """Return the mean or variance of the batches that moved a running statistic, float64.

    All arguments are float64 (elements): the statistic before and after, the momentum, and the
    number of batches.
    """
    share = 1 - (1 - momentum) ** times
    return torch.where(share > 0, before + (after - before) / share, before)
