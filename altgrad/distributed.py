"""`Ranks`: the processes of one run, which observe the same steps and come to the same figures.

Each measures what lies in it of the elements that one process alone would measure. Of an observed
step all say together, in one SUM and one MAX over all of them, whatever the number of layers and
formats, what it came to; and with it, what they have to agree on: whether one of them has failed,
how long it took, whether the step was one. Every decision follows from what was said together.

A process that has failed goes on answering until it has said so; then all stop. One that does not
answer at all is waited for no longer than the time limit of the group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.observation.faults import FaultElsewhereError
from altgrad.statistics import SUMS, max_count, sum_count

_POPULATION, _ELEMENTS = SUMS.index("population"), SUMS.index("elements")
_MOST_NAMED = 3


class LostRankError(RuntimeError):
    """A process does not answer, or answered something else: nothing more can be said together."""


class Expected(NamedTuple):
    """What all processes together are to contribute of a layer."""

    population: int
    elements: int


class Own(NamedTuple):
    """What one process contributes to an observed step.

    Attributes:
        rows: Of each layer that has elements here, its place in `vectors`.
        vectors: float64 on the host: of each row its sums, then its maxima.
        present: The layers that were stepped.
        seconds: What observing and what training took; NaN where it is not known.
        found_inf: Whether the optimizer skipped the step.
        reason: A number for why the step was none, of which the largest is said; -1 if it was one.
    """

    rows: Mapping[str, int]
    vectors: Tensor
    present: Sequence[str]
    seconds: tuple[float, float]
    found_inf: bool
    reason: int


class Together(NamedTuple):
    """What all came to, equal in every process; as of `Own`."""

    names: list[str]
    vectors: Tensor
    seconds: tuple[float, float]
    found_inf: bool
    reason: int


class Ranks:
    """All processes of torch.distributed, and what one of them has to say to the others.

    It makes process groups of its own, with gloo: what is reduced is on the host by then, an
    accelerator is given no more memory, and a limit that is exceeded is an error and not the end.
    Messages of different lengths that meet would be the end of the process. So nothing of the
    training can meet something of the observation, nor a step what is said beside steps: a
    checkpoint that one process alone takes is waited for, and missed.
    """

    def __init__(self) -> None:
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "there are sharded parameters and no process group: observe them in the processes "
                "that share them, after torch.distributed.init_process_group"
            )
        self._distributed: Any = distributed
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        self._fault: Exception | None = None
        with self._answering():
            self._of_steps, self._beside_steps = _groups_beside(distributed.group.WORLD)

    @contextmanager
    def keeping_faults(self) -> Iterator[None]:
        """Go on after what fails within, until all have been told of it in the next `merge`."""
        try:
            yield
        except LostRankError:
            raise
        except Exception as fault:  # noqa: BLE001 - whatever it is, it is not the training's
            self.keep(fault)

    def keep(self, fault: Exception) -> None:
        """Have all stop at the next `merge`."""
        self._fault = self._fault or fault

    def take_fault(self) -> Exception | None:
        """What has failed here and has not been told, to be told by the caller."""
        fault, self._fault = self._fault, None
        return fault

    # --- before the first step

    def check_alike(self, description: Sequence[str], problem: Exception | None) -> None:
        """Refuse to begin unless all processes are ready to observe the same layers.

        Args:
            description: The layers, one by one.
            problem: Why this process is not ready.

        Raises:
            Exception: The problem.
            ValueError: Another process has one, or has other layers.
        """
        digest = sha256("\n".join(description).encode()).hexdigest()
        said = self._gather((digest, None if problem is None else repr(problem)))
        if problem is not None:
            raise problem
        for rank, (_, other) in enumerate(said):
            if other is not None:
                raise ValueError(f"rank {rank} cannot observe this run: {other}")
        if len({each for each, _ in said}) > 1:
            _refuse_different(self._gather([*description]))

    # --- an observed step

    def merge(self, index: int, formats: int, layers: Mapping[str, Expected], own: Own) -> Together:
        """What all processes came to in a step: one SUM and one MAX.

        Args:
            index: Of the step.
            formats: How many are judged.
            layers: All that the optimizer may have stepped, everywhere in the same order.
            own: What this process has to contribute; nothing counts if it has failed.

        Raises:
            Exception: What failed here, where no process of lower rank failed too.
            FaultElsewhereError: What failed in another one.
            LostRankError: One does not answer.
        """
        sums, maxima = _nothing_of(formats, len(layers))
        if self._fault is None:
            with self.keeping_faults():
                _fill(sums, maxima, layers, own)
        failed = self.take_fault()
        identity = _identity(index, tuple(layers))
        tail = torch.tensor(
            [
                *(self.size - self.rank if failed is not None else 0, own.reason, own.found_inf),
                *(-math.inf if math.isnan(each) else each for each in own.seconds),
                *(identity, -identity),  # the largest of both agree if all have the same one
            ],
            dtype=torch.float64,
        )
        packed = torch.cat((maxima.flatten(), tail))
        self._reduce(sums, "SUM")
        self._reduce(packed, "MAX")
        maxima, tail = packed[: maxima.numel()].view_as(maxima), packed[maxima.numel() :]
        of_failed, reason, found_inf, *rest = tail.tolist()
        if of_failed:
            self._raise_fault(failed, self.size - int(of_failed))
        if rest[2] != -rest[3]:
            self._raise_everywhere(
                f"processes observe different steps or layers, this one step {index} of "
                f"{len(layers)} layers: every_n_steps and sampling must not depend on the rank"
            )
        is_present = maxima[:, -1] > 0
        names = [name for name, here in zip(layers, is_present.tolist(), strict=True) if here]
        vectors = torch.cat((sums[is_present], maxima[is_present, :-1]), dim=1)
        self._check_counts(names, vectors, layers)
        seconds = tuple(math.nan if each == -math.inf else each for each in rest[:2])
        return Together(names, vectors, (seconds[0], seconds[1]), bool(found_inf), int(reason))

    def largest(self, take: Callable[[], Tensor], count: int) -> Tensor:
        """The largest of each of so many numbers over all processes; one MAX.

        Args:
            take: Gives those of this process, on the host; if it fails, they do not count, and
                the next `merge` tells all.
            count: How many.
        """
        return self._of_all(take, torch.full((count,), -torch.inf, dtype=torch.float64), "MAX")

    def total(self, take: Callable[[], Tensor], count: int) -> Tensor:
        """Likewise, the sum of each; one SUM."""
        return self._of_all(take, torch.zeros(count, dtype=torch.float64), "SUM")

    # --- else

    def joined(self, bits: Tensor) -> Tensor:
        """uint8: each bit that is set in any process.

        Raises:
            LostRankError: Not all have called it. The next `merge` tells all of it.
        """
        try:
            with self._answering():
                operation = self._distributed.ReduceOp.BOR
                self._distributed.all_reduce(bits, operation, group=self._beside_steps)
        except LostRankError as fault:
            self.keep(fault)
            raise
        return bits

    def _of_all(self, take: Callable[[], Tensor], numbers: Tensor, how: str) -> Tensor:
        with self.keeping_faults():
            numbers = take()
        self._reduce(numbers, how)
        return numbers

    def _check_counts(
        self, names: Sequence[str], vectors: Tensor, layers: Mapping[str, Expected]
    ) -> None:
        """Each element once: what was left out or counted twice would pass for the truth."""
        expected = [layers[name].elements for name in names]
        counted = vectors[:, _ELEMENTS].tolist()
        for name, should, does in zip(names, expected, counted, strict=True):
            if should != does:
                self._raise_everywhere(
                    f"{name} was measured in {does:.0f} elements by all processes together, and "
                    f"has {should} to be measured: its gradient is missing in some of them, or "
                    "replicas and shards are not what the placements say"
                )
        vectors[:, _POPULATION] = torch.tensor(
            [layers[name].population for name in names], dtype=torch.float64
        )

    def _raise_fault(self, own: Exception | None, first: int) -> None:
        """The first process that has failed says how."""
        if own is not None and first == self.rank:
            raise own
        raise FaultElsewhereError(
            f"rank {first} has failed to observe this step, and says how"
        ) from own

    def _raise_everywhere(self, message: str) -> None:
        raise RuntimeError(message) if self.rank == 0 else FaultElsewhereError(message)

    def _reduce(self, numbers: Tensor, how: str) -> None:
        operation = getattr(self._distributed.ReduceOp, how)
        with self._answering():
            self._distributed.all_reduce(numbers, operation, group=self._of_steps)

    def _gather(self, value: object) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        with self._answering():
            self._distributed.all_gather_object(gathered, value, group=self._beside_steps)
        return gathered

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as fault:
            raise LostRankError(
                f"rank {self.rank} of {self.size} did not hear from every other one in time; one "
                "has ended, is late, or does not observe what the others observe: every process "
                f"has to attach, to the same steps ({fault})"
            ) from fault


# They are never taken down: of two monitors in turn, one could still be in use elsewhere.
@functools.lru_cache(maxsize=1)
def _groups_beside(world: Any) -> tuple[Any, Any]:
    """Two groups of all processes with gloo: for steps, and for what is said beside them.

    Where training waits for the other processes too, its limit must not be exceeded while these
    wait here: they do for half of it. torch has no public name for a group's limit.
    """
    from torch import distributed

    backend = world._get_backend(_device_of(world))  # noqa: SLF001
    limit: timedelta = getattr(backend.options, "_timeout", timedelta(minutes=10))
    first, second = (distributed.new_group(backend="gloo", timeout=limit / 2) for _ in range(2))
    return first, second


def _device_of(world: Any) -> torch.device:
    devices: list[torch.device] = world._device_types  # noqa: SLF001 - nor for this
    return next((d for d in devices if d.type != "cpu"), devices[0])


def _identity(index: int, names: tuple[str, ...]) -> int:
    """A number below 2**52 that no other step or list of layers has."""
    digest = sha256(f"{index} {names}".encode()).digest()
    return int.from_bytes(digest[:6], "big") + 1


def _nothing_of(formats: int, layers: int) -> tuple[Tensor, Tensor]:
    """A row for each layer: its sums; its maxima, and whether it was stepped."""
    sums = torch.zeros(layers, sum_count(formats), dtype=torch.float64)
    return sums, torch.full((layers, max_count(formats) + 1), -torch.inf, dtype=torch.float64)


def _fill(sums: Tensor, maxima: Tensor, layers: Mapping[str, Expected], own: Own) -> None:
    """With what this process contributes."""
    place = {name: row for row, name in enumerate(layers)}
    if unknown := [name for name in own.present if name not in place]:
        raise RuntimeError(f"{unknown[:_MOST_NAMED]} are stepped and were not agreed upon")
    maxima[[place[name] for name in own.present], -1] = 1.0
    if own.rows:
        to, rows, middle = [place[name] for name in own.rows], [*own.rows.values()], sums.shape[1]
        sums[to], maxima[to, :-1] = own.vectors[rows, :middle], own.vectors[rows, middle:]


def _refuse_different(each: Sequence[Sequence[str]]) -> None:
    first = {*each[0]}
    for rank, layers in enumerate(each):
        more, fewer = [x for x in layers if x not in first], [x for x in each[0] if x not in layers]
        if more or fewer:
            raise ValueError(
                f"rank {rank} has {len(layers)} layers, among them {more[:_MOST_NAMED]}, where "
                f"rank 0 has {len(each[0])}, among them {(fewer or [*each[0]])[:_MOST_NAMED]}: "
                "processes with different layers, as the stages of a pipeline, cannot be observed"
            )
    raise ValueError("the ranks have the same layers in different orders, and cannot be observed")
