"""What ranks say to each other of an observed step: a SUM and a MAX, packed and unpacked."""

from __future__ import annotations

import math
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from altgrad._messages import few
from altgrad.distributed.peers import StepSums
from altgrad.measurement.columns import max_count, sum_count
from altgrad.observation.step import SkipReason

_REASONS: tuple[SkipReason, ...] = ("no gradients", "learning rate 0", "inf")
"""Why a step moved no weight, by numbers that ranks can compare; the largest counts."""


class _Header(NamedTuple):
    """The numbers beside those of layers; the largest of all ranks counts."""

    failed: float
    skipped: float  # a position in _REASONS; -1 if the step moved weights
    found_inf: float
    own_seconds: float  # -inf where it is not known
    training_seconds: float
    step: float
    minus_step: float  # the largest of both agree if all ranks have the same one


class StepMessage:
    """A message of one rank on a step; after both tensors are all-reduced, of all ranks.

    The length is that of `rows` layers, whether all are needed or not: messages of ranks in
    different steps can meet, and the difference is found.

    Args:
        formats: Number of formats that are judged.
        rows: Number of layers that any step may have.
        index: Index of this step.
        layers: All layers that the optimizer may step, in the same order on every rank.

    Attributes:
        sums: float64, to be reduced by SUM.
        maxima: float64, to be reduced by MAX: those of the layers, then the header.
    """

    def __init__(self, formats: int, rows: int, index: int, layers: tuple[str, ...]) -> None:
        columns = max_count(formats) + 1  # the last says whether the layer was stepped
        self._layers = layers
        self._step = _number_step(index, layers)
        self.sums = np.zeros((rows, sum_count(formats)))
        self.maxima = np.full(rows * columns + len(_Header._fields), -np.inf)
        self._layer_maxima = self.maxima[: rows * columns].reshape(rows, columns)  # a view

    def pack(self, local: StepSums, error: Exception | None) -> Exception | None:
        """Put in what this rank measured, unless it failed; return the error.

        Args:
            local: What this rank measured.
            error: What failed on this rank before.

        Returns:
            The error, or that of a layer which was not agreed on.
        """
        rows_by_name = {name: row for row, name in enumerate(self._layers)}
        stepped = dict.fromkeys((*local.present, *local.names))
        if error is None and (unknown := [name for name in stepped if name not in rows_by_name]):
            error = RuntimeError(f"{few(unknown)} are stepped and were not agreed upon")
        if error is None:
            self._layer_maxima[[rows_by_name[name] for name in local.present], -1] = 1.0
            rows, middle = [rows_by_name[name] for name in local.names], self.sums.shape[1]
            if rows:
                self.sums[rows] = local.vectors[:, :middle]
                self._layer_maxima[rows, :-1] = local.vectors[:, middle:]
        seconds, training = (-math.inf if math.isnan(each) else each for each in local.seconds)
        skipped = -1 if local.skipped is None else _REASONS.index(local.skipped)
        failed, found_inf = error is not None, local.found_inf
        header = _Header(failed, skipped, found_inf, seconds, training, self._step, -self._step)
        self.maxima[-len(header) :] = header
        return error

    @property
    def is_failed(self) -> bool:
        """True if any rank failed."""
        return bool(self._header.failed)

    @property
    def agrees_on_step(self) -> bool:
        """True if all ranks were in the same step, with the same layers."""
        return self._header.step == -self._header.minus_step

    def unpack(self) -> StepSums:
        """Return the sums of all ranks, for the layers that any rank stepped."""
        said, is_present = self._header, self._layer_maxima[: len(self._layers), -1] > 0
        (rows,) = is_present.nonzero()
        names = [self._layers[row] for row in rows.tolist()]
        own, training = (
            math.nan if each == -math.inf else each
            for each in (said.own_seconds, said.training_seconds)
        )
        return StepSums(
            seconds=(own, training),
            names=names,
            vectors=np.concatenate((self.sums[rows], self._layer_maxima[rows, :-1]), axis=1),
            present=names,
            found_inf=bool(said.found_inf),
            skipped=None if said.skipped < 0 else _REASONS[int(said.skipped)],
        )

    @property
    def _header(self) -> _Header:
        return _Header(*self.maxima[-len(_Header._fields) :].tolist())


def _number_step(index: int, layers: tuple[str, ...]) -> int:
    """Return a number below 2**52 that no other step has."""
    digest = sha256(f"{index} {layers}".encode()).digest()
    return int.from_bytes(digest[:6], "big") + 1
