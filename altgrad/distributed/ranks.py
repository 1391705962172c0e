"""`Ranks`: how each rank learns of an error on another one, and whether all observe the same.

A rank that has failed goes on answering until the next step, in which it says so. All ranks then
exchange the texts of their errors, and each one stops with the same error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256

import torch
from torch import Tensor

from altgrad._messages import few
from altgrad.distributed.host_group import HostGroup, LostRankError
from altgrad.distributed.peers import Peers, StepSums
from altgrad.distributed.step_message import StepMessage
from altgrad.observation.observer import RankError, describe_error


class DisagreementError(RankError, ValueError):
    """The ranks are not about to observe the same; every one of them raises it."""


class Ranks(Peers):
    """A rank among others, and the errors that all of them report.

    Attributes:
        rank, size: The number of this rank, and of all.
        group: The group of all ranks.
    """

    def __init__(self) -> None:
        self.group = HostGroup()
        self.rank, self.size = self.group.rank, self.group.size
        self._error: Exception | None = None

    @contextmanager
    def hold_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - every rank reports it in the next step
            self._error = self._error or error

    def take_error(self) -> Exception | None:
        error, self._error = self._error, None
        return error

    def total(self, find: Callable[[], Tensor], count: int) -> Tensor:
        numbers = torch.zeros(count, dtype=torch.float64, device="cpu")
        with self.hold_errors():
            numbers = find()
        each = self.group.gather("weight_octaves()", numbers.tolist())
        return torch.tensor(each, dtype=torch.float64, device="cpu").sum(0)

    def maximum(self, find: Callable[[], Tensor], count: int) -> Tensor:
        """Return the maximum of each number over all ranks; one MAX.

        Args:
            find: Returns the numbers of this rank. If it raises, they do not count, and every rank
                reports the error in the next step.
            count: How many there are.

        Returns:
            float64 (count) on the host.

        Raises:
            LostRankError: A rank does not answer.
        """
        numbers = torch.full((count,), -torch.inf, dtype=torch.float64, device="cpu")
        with self.hold_errors():
            numbers = find()
        self.group.reduce(numbers, "MAX")
        return numbers

    def merge(self, message: StepMessage, local: StepSums) -> StepSums:
        """Return the sums of all ranks in a step; one SUM and one MAX.

        Args:
            message: The message of this step, which is empty.
            local: The sums of this rank, or its error.

        Raises:
            RankError: A rank has failed, or ranks do not observe the same.
            LostRankError: A rank does not answer.
        """
        lost = LostRankError(self.group.lost) if self.group.lost else None
        held = self.take_error() or lost
        with self.hold_errors():
            if held is None:
                message.pack(local)
        error = held or self.take_error()
        # Now, since other ranks wait for this text after the all-reduces.
        when = "before" if held else "in"
        text = error and f"failed {when} {message.step}: {describe_error(error)}"
        self.group.reduce(torch.from_numpy(message.sums), "SUM")  # shares its memory
        self.group.reduce(torch.from_numpy(message.maxima), "MAX")
        if message.is_failed:
            self.group.lost = ""  # all ranks are at the same place again
            texts = enumerate(self.group.gather("optimizer.step()", text))
            failed = [f"rank {rank} {each}" for rank, each in texts if each]
            raise RankError(few(failed, "; ")) from error
        return message.unpack(self.rank)

    def check_alike(self, call: str, describe: Callable[[], Sequence[str]]) -> None:
        """Raise an error unless all ranks are about to observe the same.

        Args:
            call: The call in which all ranks are.
            describe: Returns all that has to be alike, each thing in words, or raises why this rank
                cannot observe it.

        Raises:
            DisagreementError: A rank cannot observe it, or has another description.
            LostRankError: A rank does not answer.
        """
        description: Sequence[str] = ()
        problem = None
        try:
            description = describe()
        except Exception as error:  # noqa: BLE001 - raised below, on every rank
            problem = error
        digest = sha256(json.dumps(description).encode()).hexdigest()
        said = self.group.gather(call, [digest, problem and describe_error(problem)])
        for rank, (_, other) in enumerate(said):
            if other is not None:
                message = f"rank {rank} cannot observe this run: {other}"
                raise DisagreementError(message) from problem
        if len({each for each, _ in said}) > 1:
            raise DisagreementError(_describe_difference(self.group.gather(call, description)))


def _describe_difference(descriptions: Sequence[Sequence[str]]) -> str:
    """Say what the first rank that differs has otherwise than rank 0."""
    first = descriptions[0]
    rank, other = next((rank, each) for rank, each in enumerate(descriptions) if each != first)
    missing = few([each for each in first if each not in other], "; ")
    more = few([each for each in other if each not in first], "; ")
    if not (missing or more):
        missing, more = "one order", "another order of layers, optimizers or arguments"
    return (
        f"rank {rank} differs from rank 0: expected {missing or 'nothing more'}, got "
        f"{more or 'nothing'}; give every rank the same arguments, layers, optimizers and "
        "state_dict(). Ranks with different layers, as stages of a pipeline, cannot be observed"
    )
