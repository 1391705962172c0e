"""`HostGroup`: all processes of a run on their hosts, beside all groups that train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor


class LostRankError(RuntimeError):
    """A process does not answer, or answered something else: nothing more can be said together."""


class HostGroup:
    """All processes of torch.distributed, with gloo: made by `meet`.

    What is reduced is on the host by then, an accelerator is given no more memory, and a wait that
    exceeds its limit is an error and not the end. But messages of different lengths that meet are
    the end of the process, so that whoever says something has to know that the others say the
    like. Once one was not heard nothing more is said: what it missed would meet what comes next.

    Attributes:
        rank, size: As of torch.distributed.
        is_lost: Whether that has happened.
    """

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self._group = group
        self.rank = rank
        self.size = size
        self.is_lost = False

    def reduce(self, numbers: Tensor, how: str) -> None:
        """Make each of these numbers what it is over all processes: "SUM", "MAX" or "BOR".

        Raises:
            LostRankError: Not all were heard within the limit.
        """
        operation = getattr(torch.distributed.ReduceOp, how)
        with self._answering():
            self._group.allreduce([numbers], operation).wait()

    def gather(self, numbers: Tensor) -> list[Tensor]:
        """Those of each process, which are as many.

        Raises:
            LostRankError: As above.
        """
        gathered = [torch.empty_like(numbers) for _ in range(self.size)]
        with self._answering():
            self._group.allgather([gathered], [numbers]).wait()
        return gathered

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if self.is_lost:
            raise _lost(self.rank, self.size, "which was found before")
        try:
            yield
        except RuntimeError as fault:
            self.is_lost = True
            raise _lost(self.rank, self.size, str(fault)) from fault


def meet(names: Sequence[str]) -> list[HostGroup]:
    """A new group for each name, once all processes are here.

    They find each other by what each has drawn for this meeting, so that one that came alone and
    went is not met again, and the groups are in no table of torch's: those that a training makes
    are named by how many there were before, which must not differ.

    Where training waits for the other processes too, its limit must not be exceeded while these
    wait here: they do for half of it.

    Raises:
        LostRankError: Not all came within the limit.
    """
    from torch import distributed

    rank, size = distributed.get_rank(), distributed.get_world_size()
    limit = _limit_of(distributed.group.WORLD) / 2
    # torch has no public name for the store through which its own groups find each other.
    c10d: Any = distributed.distributed_c10d
    store = c10d._get_default_store()  # noqa: SLF001
    keys = [f"altgrad/{each}" for each in range(size)]
    try:
        store.set(keys[rank], uuid4().hex)
        try:
            store.wait(keys, limit)
            meeting = sha256(b"".join(store.multi_get(keys))).hexdigest()
            groups = [
                c10d.ProcessGroupGloo(
                    c10d.PrefixStore(f"altgrad/{meeting}/{name}", store), rank, size, limit
                )
                for name in names
            ]
        finally:
            store.delete_key(keys[rank])
    except RuntimeError as fault:
        raise _lost(rank, size, str(fault)) from fault
    return [HostGroup(group, rank, size) for group in groups]


def _lost(rank: int, size: int, why: str) -> LostRankError:
    return LostRankError(
        f"rank {rank} of {size} did not hear from every other one in time; one has ended, is "
        "late, or does not observe what the others observe: every process has to attach, to the "
        f"same steps ({why})"
    )


def _limit_of(world: Any) -> timedelta:
    """How long a group waits, for which torch has no public name."""
    devices: list[torch.device] = world._device_types  # noqa: SLF001
    device = next((each for each in devices if each.type != "cpu"), devices[0])
    options = world._get_backend(device).options  # noqa: SLF001
    limit: timedelta = getattr(options, "_timeout", timedelta(minutes=10))
    return limit
