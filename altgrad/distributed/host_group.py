"""`HostGroup`: a gloo process group of all ranks, on the CPU, which only AltGrad uses."""

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
    """An error because another rank did not answer in time, or called another AltGrad method."""


class HostGroup:
    """A gloo process group of all ranks, for AltGrad alone; `meet` connects the ranks.

    Gloo reduces tensors on the CPU, and aborts the process unless they have the same length on all
    ranks. Texts of any length go through the key-value store of torch.distributed. The time limit
    is half of the limit of torch's default group, so that waiting for a late rank ends in an error
    of AltGrad first.

    Attributes:
        rank: The number of this rank.
        size: The number of ranks.
        lost: Why the group cannot be used, such as a rank that did not answer; empty if the group
            can be used.

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
        """Wait until all ranks call this method, and connect them in a new gloo group.

        Each rank draws a random name, and the names of all ranks form the prefix of the group's
        keys in the store. A rank that stopped waiting in an earlier call has another prefix, and
        cannot join by mistake. torch.distributed does not number the group, so that the numbers of
        its own groups stay the same.

        Raises:
            LostRankError: A rank has not called this method in time.
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
        """Replace each number, in place, by its sum or maximum over all ranks.

        Args:
            numbers: On the CPU, of the same shape and dtype on every rank; overwritten.
            how: ``"SUM"`` or ``"MAX"``, the name of a `torch.distributed.ReduceOp`.

        Raises:
            LostRankError: A rank does not answer; no later all-reduce succeeds.
        """
        operation = getattr(torch.distributed.ReduceOp, how)
        with self._waiting():
            self._gloo.allreduce([numbers], operation).wait()
        # All ranks are at the same place again, even if one was alone in a call.
        self._place = self._place[0] + 1, 0

    def gather(self, call: str, value: object) -> list[Any]:
        """Return the values that all ranks pass, by rank, once every rank has called this method.

        Args:
            call: Name of the user's call, such as ``state_dict()``, which must be equal on all
                ranks.
            value: Value of this rank, of a type that `json.dumps` accepts.

        Raises:
            LostRankError: A rank does not answer, has made another call, or was lost before.
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
        """Put the text of this rank in the store, and return the texts of all ranks."""
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
        """Run a ``with`` block, in which a RuntimeError becomes a LostRankError and sets `lost`.

        Raises:
            LostRankError: The block has raised a RuntimeError, as gloo does if a rank is missing.
        """
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
    """Return how long operations of a process group wait; torch has no public name for this."""
    devices: list[torch.device] = world._device_types  # noqa: SLF001
    device = next((each for each in devices if each.type != "cpu"), devices[0])
    options = world._get_backend(device).options  # noqa: SLF001
    limit: timedelta = getattr(options, "_timeout", timedelta(minutes=10))
    return limit
