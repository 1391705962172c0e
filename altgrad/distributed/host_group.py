"""`HostGroup`: all ranks of a run on their hosts, beside all groups that train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import sha256
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from altgrad.observation.observer import RankError


class LostRankError(RankError):
    """A rank does not answer, or is in another call; nothing more can be agreed on."""


class HostGroup:
    """A group of all ranks on their hosts, beside the groups that train.

    Gloo reduces numbers, and the store in which the ranks met exchanges texts. Both work on the
    host, so that an accelerator needs no more memory, and a wait that exceeds the limit raises an
    error. Gloo aborts the process if ranks pass buffers of different sizes, so that every rank
    must know what is reduced next; texts may have any length. After a rank was missed nothing
    more is said: messages would meet the wrong ones.

    Args:
        store: The store in which the ranks met.
        rank, size: As of torch.distributed.
        limit: How long a rank is waited for.

    Attributes:
        rank, size: As given.
    """

    def __init__(self, store: Any, rank: int, size: int, limit: timedelta) -> None:
        c10d: Any = torch.distributed.distributed_c10d
        self._gloo = c10d.ProcessGroupGloo(store, rank, size, limit)
        self._store = store
        self._limit = limit
        self._exchanges: Counter[str] = Counter()
        self._lost: set[str] = set()  # "numbers", and channels of texts
        self.rank = rank
        self.size = size

    def reduce(self, numbers: Tensor, how: str) -> None:
        """Replace each number by its "SUM" or "MAX" over all ranks.

        Args:
            numbers: On the CPU, of the same shape and dtype on every rank.
            how: Name of a `torch.distributed.ReduceOp`.

        Raises:
            LostRankError: Not all ranks were heard within the limit.
        """
        operation = getattr(torch.distributed.ReduceOp, how)
        with self._answering("numbers"):
            self._gloo.allreduce([numbers], operation).wait()

    def exchange(self, channel: str, text: str) -> list[str]:
        """Return the text of every rank.

        Args:
            channel: Texts of different channels do not meet; one may be lost and the others not.
            text: Not empty.

        Raises:
            LostRankError: Not all ranks were heard within the limit.
        """  # noqa: DOC501 - RuntimeError is raised inside alone
        number = self._exchanges[channel]
        self._exchanges[channel] += 1
        keys = [f"{channel} {number} of {rank}" for rank in range(self.size)]
        with self._answering(channel):
            self._store.set(keys[self.rank], text)
            try:
                self._store.wait(keys, self._limit)
                texts = [each.decode() for each in self._store.multi_get(keys)]
            except RuntimeError:  # which `_answering` makes a LostRankError
                with suppress(RuntimeError):  # who came alone is not to be met later
                    self._store.delete_key(keys[self.rank])
                raise
            # All are here, so that all have read what was exchanged before.
            self._store.delete_key(f"{channel} {number - 1} of {self.rank}")
        return texts

    def lose(self, channel: str) -> None:
        """Say nothing more in a channel: other ranks are somewhere else."""
        self._lost.add(channel)

    @contextmanager
    def _answering(self, channel: str) -> Iterator[None]:
        if {channel, "numbers"} & self._lost:
            why = "an earlier call has timed out"
            raise LostRankError(_describe_lost(self.rank, self.size, why))
        try:
            yield
        except RuntimeError as error:
            self.lose(channel)
            raise LostRankError(_describe_lost(self.rank, self.size, str(error))) from error


def meet() -> HostGroup:
    """Return a new group, once all ranks are here.

    The ranks find each other by what each has drawn for this meeting: a rank that came alone and
    went is not met again. The group is in no table of torch.distributed, which names the groups of
    a training by their number. A wait is limited to half of the limit of the training's group: a
    training that waits for this rank then stays within its own limit.

    Raises:
        LostRankError: Not all came within the limit.
    """
    from torch import distributed

    rank, size = distributed.get_rank(), distributed.get_world_size()
    limit = _find_limit(distributed.group.WORLD) / 2
    # torch has no public name for the store through which its own groups find each other: see
    # torch/distributed/distributed_c10d.py, `_get_default_store`.
    c10d: Any = distributed.distributed_c10d
    store = c10d._get_default_store()  # noqa: SLF001
    keys = [f"altgrad/{each}" for each in range(size)]
    try:
        store.set(keys[rank], uuid4().hex)
        try:
            store.wait(keys, limit)
            meeting = sha256(b"".join(store.multi_get(keys))).hexdigest()
            meeting_store = c10d.PrefixStore(f"altgrad/{meeting}", store)
            group = HostGroup(meeting_store, rank, size, limit)
            # All have connected: a rank that ends, or meets again, breaks none that still connects.
            group.exchange("calls", "met")
            return group
        finally:
            store.delete_key(keys[rank])
    except RuntimeError as error:
        raise LostRankError(_describe_lost(rank, size, str(error))) from error


def _describe_lost(rank: int, size: int, why: str) -> str:
    return (
        f"rank {rank} of {size} had no answer from at least one other rank within the time limit: "
        "check whether a rank has ended, is late, or observes other steps; every rank has to "
        f"attach, to the same steps ({why})"
    )


def _find_limit(world: Any) -> timedelta:
    """Return how long a group waits, for which torch has no public name."""
    devices: list[torch.device] = world._device_types  # noqa: SLF001
    device = next((each for each in devices if each.type != "cpu"), devices[0])
    options = world._get_backend(device).options  # noqa: SLF001
    limit: timedelta = getattr(options, "_timeout", timedelta(minutes=10))
    return limit
