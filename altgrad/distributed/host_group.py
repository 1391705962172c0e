"""`HostGroup`: all ranks of a run on their hosts, beside the groups that train."""

from __future__ import annotations

import json
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
    """A rank does not answer, or is in another call."""


class HostGroup:
    """A group of all ranks on their hosts, which is empty until they `meet`.

    Gloo reduces numbers; every rank must know their count, or gloo aborts the process. The store of
    the ranks exchanges texts of any length. A wait ends at half of the time limit of the training's
    group: a rank that waits for this one in the training then stays within its own limit.

    Attributes:
        rank, size: The number of this rank, and of all.
        lost: Why texts are refused, such as a rank that did not answer; empty if nothing is wrong.

    Raises:
        RuntimeError: There is no process group.
    """

    def __init__(self) -> None:
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "parameters are sharded, and torch.distributed has no process group: call "
                "torch.distributed.init_process_group() on every rank before attach()"
            )
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.lost = "the ranks that share the parameters have not met yet: attach() on each first"

    def meet(self) -> None:
        """Wait for all ranks, and begin anew.

        Each rank draws a name, and the names of all become the address of what they exchange. A
        rank that was alone and left is therefore not met later. The group is in no table of
        torch.distributed, which numbers the groups of a training.

        Raises:
            LostRankError: A rank did not come.
        """
        c10d: Any = torch.distributed.distributed_c10d
        self._limit = _find_limit(torch.distributed.group.WORLD) / 2
        # torch has no public name for the store through which its own groups find each other: see
        # torch/distributed/distributed_c10d.py, `_get_default_store`.
        store = c10d._get_default_store()  # noqa: SLF001
        with self._waiting():
            try:
                names = self._exchange(store, "altgrad", uuid4().hex)
                prefix = f"altgrad/{sha256(b''.join(names)).hexdigest()}"
                self._store = c10d.PrefixStore(prefix, store)
                self._gloo = c10d.ProcessGroupGloo(self._store, self.rank, self.size, self._limit)
                # All have connected: a rank that ends, or meets again, breaks none that connects.
                self._exchange(self._store, "met", "")
            finally:
                store.delete_key(f"altgrad/{self.rank}")
        self._place, self._last_key, self.lost = (0, 0), "", ""

    def reduce(self, numbers: Tensor, how: str) -> None:
        """Replace each number by its "SUM" or "MAX" over all ranks.

        Args:
            numbers: On the CPU, of the same shape and dtype on every rank.
            how: Name of a `torch.distributed.ReduceOp`.

        Raises:
            LostRankError: A rank does not answer; no later all-reduce succeeds.
        """
        operation = getattr(torch.distributed.ReduceOp, how)
        with self._waiting():
            self._gloo.allreduce([numbers], operation).wait()
        # All ranks are at the same place again, even if one was alone in a call.
        self._place = self._place[0] + 1, 0

    def gather(self, call: str, value: object) -> list[Any]:
        """Return the value of every rank, once all are in the same call.

        Args:
            call: The call that all ranks have to make.
            value: Plain data, for JSON.

        Raises:
            LostRankError: A rank does not answer, is in another call, or was lost before.
        """
        if self.lost:
            raise LostRankError(self.lost)
        reduced, gathered = self._place
        self._place, key = (reduced, gathered + 1), f"{reduced}/{gathered}"
        with self._waiting():
            texts = self._exchange(self._store, key, json.dumps([call, value]))
            # All ranks are here, so that all have read what was exchanged before.
            self._store.delete_key(self._last_key)
        self._last_key = f"{key}/{self.rank}"
        said = [json.loads(text) for text in texts]
        for rank, (other, _) in enumerate(said):
            if other != call:
                self.lost = (
                    f"rank {rank} called {other} while rank {self.rank} called {call}: call both "
                    "on all ranks, in the same order"
                )
                raise LostRankError(self.lost)
        return [each for _, each in said]

    def _exchange(self, store: Any, key: str, text: str) -> list[bytes]:
        """Return the texts of all ranks."""
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        store.set(keys[self.rank], text)
        try:
            store.wait(keys, self._limit)
            texts: list[bytes] = store.multi_get(keys)
        except RuntimeError:
            with suppress(RuntimeError):  # a rank that was alone is not to be met later
                store.delete_key(keys[self.rank])
            raise
        return texts

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of gloo, or of the store
            self.lost = (
                f"rank {self.rank} of {self.size} had no answer from at least one other rank "
                "within the time limit: check whether a rank has ended, is late, or observes other "
                f"steps; every rank has to attach, to the same steps ({error})"
            )
            raise LostRankError(self.lost) from error


def _find_limit(world: Any) -> timedelta:
    """Return how long a group waits, for which torch has no public name."""
    devices: list[torch.device] = world._device_types  # noqa: SLF001
    device = next((each for each in devices if each.type != "cpu"), devices[0])
    options = world._get_backend(device).options  # noqa: SLF001
    limit: timedelta = getattr(options, "_timeout", timedelta(minutes=10))
    return limit
