"""`Ranks`: what the ranks of one run say to each other, and how all of them learn of an error.

Of an observed step all ranks say in one SUM and one MAX, whatever the number of layers and formats,
what it came to; and with it whether one of them has failed, how long it took, and whether the step
moved weights. Every decision follows from what was said together.

A rank that has failed goes on answering until it has said so; then all stop, and each one tells
which rank failed, and how. One that does not answer at all is waited for no longer than half of
the time limit of the process group.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from altgrad._messages import few
from altgrad.distributed.host_group import HostGroup, LostRankError, meet
from altgrad.distributed.peers import StepSums
from altgrad.distributed.step_message import StepMessage
from altgrad.measurement.columns import ELEMENTS, POPULATION
from altgrad.observation.observer import RankError, describe_error

Description = Mapping[str, Sequence[str]]
"""What ranks must have alike: by kind, each thing of that kind in words."""

Call = Literal["attach()", "optimizer.step()", "state_dict()", "weight_octaves()"]
"""A call in which all ranks have to be at once."""

_REMEDIES = {
    "settings": "give each the same arguments",
    "layers": "ranks with different layers, as the stages of a pipeline, cannot be observed",
    "optimizers": "each has to attach to the same optimizers, of the same parameters",
    "state": "load the same state_dict() in each, or begin anew in all",
}


class DisagreementError(RankError, ValueError):
    """The ranks are not about to observe the same; every one of them raises it."""


class Expected(NamedTuple):
    """A count of the elements of a layer that all ranks together are to contribute."""

    population: int
    elements: int


class Ranks:
    """A rank of torch.distributed among the others, and what it exchanges with them.

    Numbers of steps, errors, and calls beside steps go separate ways: a checkpoint that one rank
    takes alone is waited for and missed, and no step meets what is not one.

    Attributes:
        rank, size: As of torch.distributed.

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
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        self._error: Exception | None = None
        self._group: HostGroup | None = None

    def meet(self) -> None:
        """Wait for all ranks, and use a new group from now on.

        Raises:
            LostRankError: One does not come.
        """
        self._group = meet()
        if isinstance(self._error, LostRankError):  # of the group before, and told where it was met
            self._error = None

    @property
    def group(self) -> HostGroup:
        """The group in which the ranks have met.

        Raises:
            RuntimeError: They have not met yet.
        """
        if self._group is None:
            raise RuntimeError(
                "the ranks that share the parameters have not met yet: attach() on each first"
            )
        return self._group

    @property
    def have_met(self) -> bool:
        """True after `meet`."""
        return self._group is not None

    # --- errors

    @contextmanager
    def hold_errors(self) -> Iterator[None]:
        """Keep an error within for the next step, until which other ranks wait."""
        try:
            yield
        except LostRankError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not the training's
            self._error = self._error or error

    def take_error(self) -> Exception | None:
        """Return the error that is kept for the next step, and forget it."""
        error, self._error = self._error, None
        return error

    # --- steps

    def merge(
        self, message: StepMessage, layers: Mapping[str, Expected], local: StepSums, what: str
    ) -> StepSums:
        """Return what all ranks came to in a step: one SUM and one MAX.

        Args:
            message: For this step, empty.
            layers: All that the optimizer may step, everywhere in the same order.
            local: What this rank measured; it does not count if a rank has failed.
            what: The step in words.

        Raises:
            RankError: A rank has failed, or ranks do not observe the same.
            LostRankError: One does not answer.
        """
        held = self.take_error()
        error = message.pack(local, held or local.error)
        when = "before" if held else "in"
        # Now, since after the all-reduces the other ranks wait for this text.
        text = error and f"failed {when} {what}: {describe_error(error)}"
        self.group.reduce(torch.from_numpy(message.sums), "SUM")  # shares its memory
        self.group.reduce(torch.from_numpy(message.maxima), "MAX")
        if message.is_failed:
            texts = map(json.loads, self.group.exchange("errors", json.dumps(text)))
            failed = [f"rank {rank} {each}" for rank, each in enumerate(texts) if each]
            raise RankError(few(failed, "; ")) from error
        if not message.agrees_on_step:
            raise RankError(
                f"ranks observe different steps or layers, rank {self.rank} {what} with "
                f"{len(layers)} layers: every_n_steps and sampling must not depend on the rank"
            )
        merged = message.unpack()
        _check_counts(merged, layers, what)
        return merged

    def maximum(self, take: Callable[[], Tensor], count: int) -> Tensor:
        """Return the largest of each number over all ranks, before a step; one all-reduce.

        Args:
            take: Returns the numbers of this rank, float64 (count) on the host. If it raises, these
                do not count, and the next step reports the error on every rank.
            count: How many there are.

        Returns:
            float64 (count) on the host.

        Raises:
            LostRankError: One does not answer.
        """
        numbers = torch.full((count,), -torch.inf, dtype=torch.float64)
        with self.hold_errors():
            numbers = take()
        self.group.reduce(numbers, "MAX")
        return numbers

    # --- calls beside steps

    def call(self, name: Call, value: object) -> list[Any]:
        """Return the value of every rank, once all are in the same call.

        Args:
            name: The call.
            value: What JSON can write.

        Raises:
            LostRankError: Not all ranks are in it. The next step reports it on every rank.
        """
        try:
            texts = self.group.exchange("calls", json.dumps([name, value]))
            said = [json.loads(text) for text in texts]
            self._check_calls(name, [other for other, _ in said])
        except LostRankError as error:
            self._error = self._error or error
            raise
        return [each for _, each in said]

    def _check_calls(self, name: Call, calls: Sequence[str]) -> None:
        for rank, other in enumerate(calls):
            if other != name:
                self.group.lose("calls")
                raise LostRankError(
                    f"rank {rank} called {other} while rank {self.rank} called {name}: call both "
                    "on all ranks, in the same order"
                )

    def total(self, take: Callable[[], Tensor], count: int) -> Tensor:
        """Return the sum of each number over all ranks.

        Args:
            take: Returns the numbers of this rank, float64 (count) on the host. If it raises, these
                do not count, and the next step reports the error on every rank.
            count: How many there are.

        Returns:
            float64 (count) on the host.

        Raises:
            LostRankError: Not all ranks have called it. The next step reports it on every rank.
        """
        numbers = torch.zeros(count, dtype=torch.float64)
        with self.hold_errors():
            numbers = take()
        each = self.call("weight_octaves()", numbers.tolist())
        return torch.tensor(each, dtype=torch.float64).sum(0)

    def check_alike(
        self, description: Description, problem: Exception | None, name: Call = "attach()"
    ) -> None:
        """Refuse to go on unless all ranks are ready to observe the same.

        Args:
            description: What has to be alike.
            problem: Why this rank is not ready.
            name: The call in which all ranks are.

        Raises:
            DisagreementError: A rank has a problem, or another description.
            LostRankError: One does not answer.
        """
        digest = sha256(json.dumps(description).encode()).hexdigest()
        said = self.call(name, [digest, None if problem is None else repr(problem)])
        for rank, (_, other) in enumerate(said):
            if other is not None:
                message = f"rank {rank} cannot observe this run: {other}"
                raise DisagreementError(message) from problem
        if len({each for each, _ in said}) > 1:
            _refuse_different(self.call(name, description))


def _check_counts(merged: StepSums, layers: Mapping[str, Expected], what: str) -> None:
    """Check that every element was measured exactly once, which sums alone do not show.

    Raises:
        RankError: Elements of a layer are missing, or were counted twice.
    """
    counted = merged.vectors[:, ELEMENTS].tolist()
    for name, elements in zip(merged.names, counted, strict=True):
        if layers[name].elements != elements:
            raise RankError(
                f"{name}, {what}: expected {layers[name].elements} measured elements on all ranks "
                f"together, got {elements:.0f}: check that its gradient is present on every rank, "
                "and that shards and replicas are as the placements say"
            )
    merged.vectors[:, POPULATION] = [layers[name].population for name in merged.names]


def _refuse_different(each: Sequence[Description]) -> NoReturn:
    """Raise what the first rank that differs has otherwise than rank 0."""
    rank, other = next((r, other) for r, other in enumerate(each) if other != each[0])
    kind = next(kind for kind, here in other.items() if here != each[0][kind])
    first, second = each[0][kind], other[kind]
    fewer, more = ([x for x in a if x not in b] for a, b in ((first, second), (second, first)))
    if not (more or fewer):
        raise DisagreementError(
            f"the ranks have the same {kind} in different orders: make them alike"
        )
    here, there = few(more, "; ") or "none", few(fewer, "; ") or "none"
    raise DisagreementError(
        f"rank {rank} has other {kind} than rank 0: {here} of its {len(second)}, where rank 0 has "
        f"{there} of its {len(first)}; {_REMEDIES[kind]}"
    )
