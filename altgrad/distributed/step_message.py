"""`StepMessage`: a measured step in two arrays, for a SUM and a MAX all-reduce between ranks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from altgrad._messages import few, format_count
from altgrad.distributed.peers import StepSums
from altgrad.distributed.twin_message import TwinMessage, TwinPlan
from altgrad.measurement.columns import ELEMENTS, POPULATION, max_count, sum_count
from altgrad.observation.observer import RankError
from altgrad.observation.step import SkipReason

_REASONS: tuple[SkipReason, ...] = ("no gradients", "learning rate 0", "inf")
"""Reasons why a step moved no weight. Of different reasons on several ranks, the last one in this
tuple counts."""

_HEADER = 7
"""Number of entries in a message's header: whether the rank failed, checksum of the step's name and
layers, the negative checksum, two times in seconds, found_inf, index in `_REASONS`."""


class Expected(NamedTuple):
    """The number of elements of a layer, and how many of them all ranks together measure."""

    population: int
    elements: int


class StepMessage:
    """The arrays that a rank exchanges in an observed step: its sums, maxima and a header.

    `pack` fills the arrays, the caller reduces them over all ranks, and `unpack` reads the result.
    Every step has a message of the same length: ranks in different steps can reduce their messages,
    and the header then shows that the steps differ. Until `pack` is called, the header says that
    the rank failed.

    Args:
        step: The step in words, such as ``step 3 of AdamW``.
        layers: For each layer (parameter tensor) that the optimizer may step, by name, its size and
            how many elements all ranks together measure, in the same order on every rank.
        rows: Number of rows for layers, enough for a step of every optimizer.
        formats: Number of formats.
        twins: The recipes whose twins, samples that are stepped as the recipes say, ranks measure;
            by default none.

    Attributes:
        step: The `step` argument.
        sums: float64 (numbers), to be reduced by SUM: those of the layers, then those of twins.
        maxima: float64 (numbers), to be reduced by MAX: the maxima of the layers, those of twins,
            then the header.
    """

    def __init__(
        self,
        step: str,
        layers: Mapping[str, Expected],
        rows: int,
        formats: int,
        twins: TwinPlan = TwinPlan(),  # noqa: B008 - a constant
    ) -> None:
        columns = max_count(formats) + 1  # the last says whether the layer was stepped
        self.step = step
        self.sums = np.zeros(rows * (sum_count(formats) + twins.sum_count))
        lengths = (rows * columns, rows * twins.max_count, twins.name_count, _HEADER)
        self.maxima = np.full(sum(lengths), -math.inf)
        self._layers = layers
        self._rows = {name: row for row, name in enumerate(layers)}
        # Views of the two arrays:
        layer_sums, twin_sums = np.split(self.sums, [rows * sum_count(formats)])
        maxima, checks, names, self._header = np.split(self.maxima, np.cumsum(lengths[:-1]))
        self._layer_sums = layer_sums.reshape(rows, sum_count(formats))
        self._layer_maxima = maxima.reshape(rows, columns)
        self._twins = TwinMessage(
            twins,
            twin_sums.reshape(rows, twins.sum_count),
            checks.reshape(rows, twins.max_count),
            names,
        )
        self._header[0] = True

    def pack(self, local: StepSums) -> None:
        """Write the sums and maxima that this rank measured to the arrays `sums` and `maxima`.

        Args:
            local: The sums of this rank, or its error.

        Raises:
            Exception: The error of this rank, if it has failed.
            RuntimeError: A layer is unknown to the other ranks.
        """
        if local.error is not None:
            raise local.error
        names = dict.fromkeys((*local.present, *local.names))
        if unknown := [name for name in names if name not in self._rows]:
            raise RuntimeError(
                f"layers={few(unknown)}: expected layers that all ranks knew before the step; add "
                "parameters to an optimizer between steps"
            )
        rows, middle = [self._rows[name] for name in local.names], self._layer_sums.shape[1]
        self._layer_maxima[[self._rows[name] for name in local.present], -1] = 1.0
        if rows:
            self._layer_sums[rows] = local.vectors[:, :middle]
            self._layer_maxima[rows, :-1] = local.vectors[:, middle:]
        self._twins.pack(local.twins, self._rows)
        step = zlib.crc32(f"{self.step} {[*self._layers]}".encode())
        skipped = math.nan if local.skipped is None else _REASONS.index(local.skipped)
        header = [False, step, -step, *local.seconds, local.found_inf, skipped]
        # The maximum of NaN is not defined: −inf stands for what is not known.
        self._header[:] = [-math.inf if math.isnan(each) else each for each in header]

    @property
    def is_failed(self) -> bool:
        """True if any rank failed, once `maxima` has been reduced over all ranks."""
        return bool(self._header[0])

    def unpack(self, rank: int) -> StepSums:
        """Read the sums and maxima over all ranks from the arrays, once the caller reduced them.

        Args:
            rank: The number of this rank, for errors.

        Returns:
            The sums and maxima of each layer that any rank stepped.

        Raises:
            RankError: Ranks are in different steps, or elements were not measured exactly once.
        """
        header = [math.nan if each == -math.inf else each for each in self._header.tolist()]
        _, step, minus_step, own_seconds, training_seconds, found_inf, skipped = header
        if step != -minus_step:
            raise RankError(
                f"ranks observe different steps or layers, rank {rank} {self.step} with "
                f"{format_count(len(self._layers), 'layer')}: give every rank the same "
                "every_n_steps and sampling"
            )
        is_present = self._layer_maxima[:, -1] > 0
        names = [name for name, row in self._rows.items() if is_present[row]]
        vectors = np.hstack((self._layer_sums, self._layer_maxima[:, :-1]))[is_present]
        # Sums alone do not show whether every element was measured exactly once.
        for name, measured in zip(names, vectors[:, ELEMENTS].tolist(), strict=True):
            if measured != self._layers[name].elements:
                expected = format_count(self._layers[name].elements, "measured element")
                raise RankError(
                    f"{name}, {self.step}: expected {expected} on all ranks together, got "
                    f"{measured:.0f}: check that its gradient is present on every rank, and that "
                    "shards and replicas are as the placements say"
                )
        vectors[:, POPULATION] = [self._layers[name].population for name in names]
        return StepSums(
            seconds=(own_seconds, training_seconds),
            vectors=vectors,
            names=names,
            present=names,
            found_inf=found_inf > 0,
            skipped=None if math.isnan(skipped) else _REASONS[int(skipped)],
            twins=self._twins.unpack(
                {name: self._rows[name] for name in names},
                {name: self._layers[name].population for name in names},
            ),
        )
