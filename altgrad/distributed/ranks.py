"""`Ranks`: share errors between ranks, and check that all ranks have the same layers and settings.

If AltGrad fails on a rank, the rank still takes part in all-reduces until the next observed step,
whose message carries a flag for the failure. All ranks then exchange the texts of their errors, and
each one raises the same error.
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
    """An error that every rank raises if the ranks have different layers, settings or states."""


class Ranks(Peers):
    """The base class of `Together`: a rank that shares its errors with all others.

    In `merge` and `check_alike` every rank raises the error of one. `Peers` documents the other
    methods.

    Attributes:
        rank: The number of this rank.
        size: The number of ranks.
        group: The gloo group by which the ranks communicate.
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

    def maximum(self, find: Callable[[], Tensor], count: int) -> Tensor:
        """Return the maximum of each of this rank's numbers over all ranks, by one MAX all-reduce.

        Args:
            find: Function that returns the numbers of this rank, float64 (count) on the host. If
                the function fails, this rank's numbers are left out, and every rank reports the
                error in the next step.
            count: How many numbers each rank has.

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
        """Return the sums and maxima of a step over all ranks, by one SUM and one MAX all-reduce.

        Args:
            message: The empty message of this step. `merge` writes `local` to it, reduces it over
                all ranks, and reads the result from it.
            local: The sums and maxima of this rank, or its error.

        Returns:
            The sums and maxima over all ranks, for each layer that any rank stepped.

        Raises:
            RankError: A rank has failed, or ranks observe different steps or layers.
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
        """Raise an error on all ranks unless `describe` returns the same texts on each.

        Args:
            call: Name of the call that all ranks make, such as ``attach()``, for errors.
            describe: Function that returns a text for each layer, setting and state, or raises an
                error if this rank cannot observe the run.

        Raises:
            DisagreementError: A rank cannot observe the run, or its texts differ from rank 0's.
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
    """Return the text of an error: what rank 0 and the first rank that differs from it describe.

    `descriptions` has for each rank its texts of layers, settings and states.
    """
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
