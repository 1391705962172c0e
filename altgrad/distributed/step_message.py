"""What processes say to each other of an observed step: a SUM and a MAX, packed and unpacked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad._messages import few
from altgrad.measurement.columns import max_count, sum_count


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


class _Tail(NamedTuple):
    """What is said beside figures of layers: of each the largest counts."""

    failed: float  # 0, and more the lower the rank of one that has failed
    reason: float
    found_inf: float
    own_seconds: float
    training_seconds: float
    step: float
    minus_step: float  # the largest of both agree if all have the same one


class StepMessage:
    """What one process says of a step; once `sums` and `maxima` are reduced, what all say of it.

    Its length is that of so many rows, one for each layer, whether all are needed or not: whichever
    steps processes are in, those of different ones can meet, and it is told.

    Args:
        formats: How many are judged.
        rows: How many layers any step may have.
        step: The index of this one, and all layers that the optimizer may have stepped.

    Attributes:
        sums: float64, to be reduced by SUM.
        maxima: float64, to be reduced by MAX.
    """

    def __init__(self, formats: int, rows: int, step: tuple[int, tuple[str, ...]]) -> None:
        columns = max_count(formats) + 1  # and whether the layer was stepped
        self._layers, self._step = step[1], _number_of(step)
        self.sums = torch.zeros(rows, sum_count(formats), dtype=torch.float64)
        self.maxima = torch.full((rows * columns + len(_Tail._fields),), -math.inf).double()
        self._of_layers = self.maxima[: rows * columns].view(rows, columns)
        self._tail = self.maxima[rows * columns :]

    def fill(self, own: Own) -> None:
        """Have this process's figures of layers in it.

        Raises:
            RuntimeError: A layer that the optimizer may not have stepped.
        """
        place = {name: row for row, name in enumerate(self._layers)}
        if unknown := [name for name in own.present if name not in place]:
            raise RuntimeError(f"{few(unknown)} are stepped and were not agreed upon")
        self._of_layers[[place[name] for name in own.present], -1] = 1.0
        if own.rows:
            to, rows = [place[name] for name in own.rows], [*own.rows.values()]
            vectors, middle = own.vectors[rows], self.sums.shape[1]
            self.sums[to], self._of_layers[to, :-1] = vectors[:, :middle], vectors[:, middle:]

    def close(self, own: Own, failed: int) -> None:
        """Have the rest in it: `failed` is 0, or more the lower the rank of this process."""
        seconds, training = (-math.inf if math.isnan(each) else each for each in own.seconds)
        number = self._step
        tail = _Tail(failed, own.reason, own.found_inf, seconds, training, number, -number)
        self._tail.copy_(torch.tensor(tail, dtype=torch.float64))

    @property
    def failed(self) -> int:
        """Of those that have failed, the largest that any gave to `close`."""
        return int(self._said().failed)

    @property
    def is_of_one_step(self) -> bool:
        """Whether all were in the same one, with the same layers."""
        said = self._said()
        return said.step == -said.minus_step

    def together(self) -> Together:
        """What all came to, in the order of the layers."""
        said, is_present = self._said(), self._of_layers[: len(self._layers), -1] > 0
        names = [n for n, here in zip(self._layers, is_present.tolist(), strict=True) if here]
        rows = is_present.nonzero().flatten()
        vectors = torch.cat((self.sums[rows], self._of_layers[rows, :-1]), dim=1)
        own, training = (
            math.nan if each == -math.inf else each
            for each in (said.own_seconds, said.training_seconds)
        )
        return Together(names, vectors, (own, training), bool(said.found_inf), int(said.reason))

    def _said(self) -> _Tail:
        return _Tail(*self._tail.tolist())


def _number_of(step: tuple[int, tuple[str, ...]]) -> int:
    """Below 2**52, and that of no other step."""
    digest = sha256(f"{step[0]} {step[1]}".encode()).digest()
    return int.from_bytes(digest[:6], "big") + 1
