"""`Ranks`: the processes of one run, which observe the same steps and come to the same figures.

Each measures what lies in it of the elements that one process alone would measure. Of an observed
step all say together, in one SUM and one MAX over all of them, whatever the number of layers and
formats, what it came to; and with it, what they have to agree on: whether one of them has failed,
how long it took, whether the step was one. Every decision follows from what was said together.

A process that has failed goes on answering until it has said so; then all stop. One that does not
answer at all is waited for no longer than half of the time limit of the process group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from altgrad._messages import few
from altgrad.distributed.host_group import HostGroup, LostRankError, meet
from altgrad.distributed.step_message import Own, StepMessage, Together
from altgrad.measurement.columns import ELEMENTS, POPULATION
from altgrad.observation.observer import FaultElsewhereError

Description = Mapping[str, Sequence[str]]
"""Of what processes have to have alike: a kind, and in words each thing of that kind."""


Call = Literal["attach()", "optimizer.step()", "state_dict()", "weight_octaves()"]
"""In which all processes have to be at once."""

_CALLS: tuple[Call, ...] = ("attach()", "optimizer.step()", "state_dict()", "weight_octaves()")
_REMEDIES = {
    "settings": "give each the same arguments",
    "layers": "processes with different layers, as the stages of a pipeline, cannot be observed",
    "optimizers": "each has to attach to the same optimizers, of the same parameters",
    "state": "load the same state_dict() in each, or begin anew in all",
}


class Expected(NamedTuple):
    """What all processes together are to contribute of a layer."""

    population: int
    elements: int


class Ranks:
    """All processes of torch.distributed, and what one of them has to say to the others.

    They meet in groups of their own, one for steps and one for what is said beside steps: nothing
    of the training can meet something of the observation, nor a step what is not one. A checkpoint
    that one process alone takes is waited for, and missed.

    Attributes:
        rank, size: As of torch.distributed.
    """

    def __init__(self) -> None:
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "there are sharded parameters and no process group: observe them in the processes "
                "that share them, after torch.distributed.init_process_group"
            )
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        self._fault: Exception | None = None
        self._steps: HostGroup | None = None
        self._beside: HostGroup | None = None

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

    @property
    def have_met(self) -> bool:
        """Whether anything can be said."""
        return self._beside is not None

    def meet(self) -> None:
        """Wait for all, and from now on speak in new groups.

        Raises:
            LostRankError: One does not come.
        """
        self._steps, self._beside = meet(("steps", "beside"))

    def check_alike(
        self, description: Description, problem: Exception | None, during: Call = "attach()"
    ) -> None:
        """Refuse to go on unless all processes are ready to observe the same.

        Args:
            description: What has to be alike.
            problem: Why this process is not ready.
            during: What it is doing.

        Raises:
            Exception: The problem.
            ValueError: Another process has one, or another description.
        """
        digest = sha256(json.dumps(description).encode()).hexdigest()
        said = self._gather(during, (digest, None if problem is None else repr(problem)))
        if problem is not None:
            raise problem
        for rank, (_, other) in enumerate(said):
            if other is not None:
                raise ValueError(f"rank {rank} cannot observe this run: {other}")
        if len({each for each, _ in said}) > 1:
            _refuse_different(self._gather(during, description))

    # --- an observed step

    def merge(
        self, message: StepMessage, layers: Mapping[str, Expected], own: Own, index: int
    ) -> Together:
        """What all processes came to in a step: one SUM and one MAX.

        Args:
            message: For this step, empty.
            layers: All that the optimizer may have stepped, everywhere in the same order.
            own: What this process has to contribute; nothing counts if it has failed.
            index: Of the step.

        Raises:
            Exception: What failed here, where no process of lower rank failed too.
            FaultElsewhereError: What failed in another one.
            LostRankError: One does not answer.
        """
        if self._fault is None:
            with self.keeping_faults():
                message.fill(own)
        failed = self.take_fault()
        message.close(own, self.size - self.rank if failed is not None else 0)
        self._reduce(message.sums, "SUM")
        self._reduce(message.maxima, "MAX")
        if message.failed:
            self._raise_fault(failed, self.size - message.failed)
        if not message.is_of_one_step:
            self._raise_everywhere(
                f"processes observe different steps or layers, this one step {index} of "
                f"{len(layers)} layers: every_n_steps and sampling must not depend on the rank"
            )
        together = message.together()
        self._check_counts(together, layers)
        return together

    def largest(self, take: Callable[[], Tensor], count: int) -> Tensor:
        """The largest of each of so many numbers over all processes; one MAX.

        Args:
            take: Gives those of this process, float64 on the host; if it fails, they do not count,
                and the next `merge` tells all.
            count: How many.
        """
        numbers = self._taken(take, count, -math.inf)
        self._reduce(numbers, "MAX")
        return numbers

    # --- beside steps

    def total(self, take: Callable[[], Tensor], count: int) -> Tensor:
        """Likewise, the sum of each.

        Raises:
            LostRankError: Not all have called it. The next `merge` tells all of it.
        """
        return self._reduce_beside("weight_octaves()", take, count, "SUM")

    def largest_beside(self, take: Callable[[], Tensor], count: int) -> Tensor:
        """Likewise, the largest of each, before a step."""
        return self._reduce_beside("optimizer.step()", take, count, "MAX")

    def joined(self, bits: Tensor) -> Tensor:
        """Of uint8, each bit that is set in any process; raises as `total`."""
        return self._reduce_beside("state_dict()", lambda: bits, len(bits), "BOR")

    def _taken(self, take: Callable[[], Tensor], count: int, nothing: float) -> Tensor:
        with self.keeping_faults():
            return take()
        return torch.full((count,), nothing, dtype=torch.float64)

    def _reduce_beside(
        self, during: Call, take: Callable[[], Tensor], count: int, how: str
    ) -> Tensor:
        try:
            lengths = self._begin(during, count)
            if len({*lengths}) > 1:
                self._say_no_more(f"processes say {lengths} numbers to each other in {during}")
            numbers = self._taken(take, count, -math.inf if how == "MAX" else 0.0)
            self._group_beside.reduce(numbers, how)
        except LostRankError as fault:
            self.keep(fault)
            raise
        return numbers

    def _begin(self, during: Call, length: int) -> list[int]:
        """The length of what each is going to say, once all are in the same call."""
        said = self._group_beside.gather(torch.tensor([_CALLS.index(during), length]))
        for rank, (call, _) in enumerate(each.tolist() for each in said):
            if _CALLS[call] != during:
                self._say_no_more(
                    f"rank {rank} is in {_CALLS[call]} while rank {self.rank} is in {during}: all "
                    "processes have to call both, in the same order"
                )
        return [int(each[1]) for each in said]

    def _say_no_more(self, why: str) -> NoReturn:
        """Beside steps, where what comes next would not fit what others say."""
        self._group_beside.is_lost = True
        raise LostRankError(why)

    def _gather(self, during: Call, value: object) -> list[Any]:
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self._begin(during, len(text))
        padded = torch.cat((text, text.new_zeros(max(lengths) - len(text))))
        texts = zip(self._group_beside.gather(padded), lengths, strict=True)
        return [json.loads(bytes(each[:length].tolist())) for each, length in texts]

    # --- else

    @property
    def _group_beside(self) -> HostGroup:
        if self._beside is None:
            raise RuntimeError(
                "the processes that share the parameters have not met yet: attach() in each first"
            )
        return self._beside

    def _reduce(self, numbers: Tensor, how: str) -> None:
        assert self._steps is not None, "attached"
        try:
            self._steps.reduce(numbers, how)
        except LostRankError:
            self._group_beside.is_lost = True  # nobody is to wait there once more
            raise

    def _check_counts(self, together: Together, layers: Mapping[str, Expected]) -> None:
        """Each element once: what was left out or counted twice would pass for the truth."""
        names, vectors = together.names, together.vectors
        counted = vectors[:, ELEMENTS].tolist()
        for name, does in zip(names, counted, strict=True):
            if layers[name].elements != does:
                self._raise_everywhere(
                    f"{name} was measured in {does:.0f} elements by all processes together, and "
                    f"has {layers[name].elements} to be measured: its gradient is missing in some "
                    "of them, or replicas and shards are not what the placements say"
                )
        populations = [layers[name].population for name in names]
        vectors[:, POPULATION] = torch.tensor(populations, dtype=torch.float64)

    def _raise_fault(self, own: Exception | None, first: int) -> None:
        """The first process that has failed says how."""
        if own is not None and first == self.rank:
            raise own
        raise FaultElsewhereError(
            f"rank {first} has failed to observe this step, and says how"
        ) from own

    def _raise_everywhere(self, message: str) -> None:
        raise RuntimeError(message) if self.rank == 0 else FaultElsewhereError(message)


def _refuse_different(each: Sequence[Description]) -> None:
    """ValueError: What the first process that differs has otherwise than rank 0."""
    rank, other = next((r, other) for r, other in enumerate(each) if other != each[0])
    kind = next(kind for kind, here in other.items() if here != each[0][kind])
    first, second = each[0][kind], other[kind]
    fewer, more = ([x for x in a if x not in b] for a, b in ((first, second), (second, first)))
    if not (more or fewer):
        raise ValueError(f"the processes have the same {kind} in different orders: make them alike")
    here, there = few(more, "; ") or "none", few(fewer, "; ") or "none"
    raise ValueError(
        f"rank {rank} has other {kind} than rank 0: {here} of its {len(second)}, where rank 0 has "
        f"{there} of its {len(first)}; {_REMEDIES[kind]}"
    )
