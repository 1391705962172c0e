"""`TwinMessage`: the sums of twins of a step in arrays, which the all-reduces of a step take along.

A *twin* is a sample of a layer that is stored and stepped as a *recipe* says. Each rank steps the
sampled elements of its local shards. Sums add up, the medians of optimizer states follow from
counts in bins, and of the self-checks of all ranks the worst counts. A layer has figures only if no
rank misses a part of its sample.

Names of states are known after the first step alone, and not on a rank without sampled elements.
They travel as the codes of their letters, as maxima and as minima: ranks with different names have
different ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from altgrad.measurement.numbers import Numbers
from altgrad.measurement.ratio_bins import count_numbers, find_medians
from altgrad.measurement.twin_parts import TwinPart, TwinShare
from altgrad.measurement.twin_sums import SUMS, TwinColumns

MOST_STATES = 3
"""Largest number of optimizer states that are compared if several ranks share the parameters.

Messages have the same length in each step; AMSGrad has three states.
"""
_NAME_LENGTH = 32
"""Largest number of letters in the name of a state; a state with a longer name is left out."""

# Each state adds as many sums to a row of `TwinColumns`.
_STATE_SUMS = (len(TwinColumns(("",)).ratios) - len(TwinColumns().ratios)) * len(SUMS)
_MISSING, _SIZE, _BLOCKS = 0, 1, 2
_HEADER = 3


class TwinPlan(NamedTuple):
    """A plan of the twins that all ranks measure, from which the length of a message follows.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Attributes:
        recipes: Names of the recipes, in the same order on every rank.
        most_elements: Largest number of sampled elements of a layer on all ranks together.
    """

    recipes: Sequence[str] = ()
    most_elements: int = 1

    @property
    def sum_count(self) -> int:
        """The number of sums of a layer."""
        return len(self.recipes) * self.columns

    @property
    def max_count(self) -> int:
        """The number of maxima of a layer: 1, the result of its self-check; 0 without recipes."""
        return 1 if self.recipes else 0

    @property
    def name_count(self) -> int:
        """The number of maxima of a message that encode the names of optimizer states."""
        return 2 * MOST_STATES * _NAME_LENGTH if self.recipes else 0

    @property
    def columns(self) -> int:
        """The number of sums of a layer under one recipe.

        A *recipe* says how weights and optimizer states are stored; it is tried on a sample of each
        layer. First come three numbers: ranks that miss a part of the sample, sampled elements, and
        blocks in which they were drawn. Then come the sums of `TwinColumns`. Last is, for each
        optimizer state, a histogram of its ratio to float32.
        """
        return _HEADER + self.plain + MOST_STATES * count_numbers(self.most_elements)

    @property
    def plain(self) -> int:
        """The number of columns of `TwinColumns`, for three states, that can be added up.

        Medians cannot: they are left out.
        """
        return len(TwinColumns(("",) * MOST_STATES)) - MOST_STATES


class TwinMessage:
    """The arrays with the sums of the twins of a rank; `pack` fills and `unpack` reads them.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Args:
        plan: The recipes and the size of samples.
        sums: float64 (rows, sums), zeros that the caller reduces by SUM.
        maxima: float64 (rows, 1), −inf that the caller reduces by MAX.
        names: float64 (names), −inf that the caller reduces by MAX.
    """

    def __init__(self, plan: TwinPlan, sums: Numbers, maxima: Numbers, names: Numbers) -> None:
        self._plan = plan
        self._sums = sums.reshape(len(sums), len(plan.recipes), plan.columns)  # a view
        self._checks = maxima
        self._names = names.reshape(2, -1, _NAME_LENGTH)

    def pack(self, share: TwinShare, rows: Mapping[str, int]) -> None:
        """Write the sums of this rank's twins to the arrays.

        Args:
            share: The sums of this rank. Layers that have no row are left out.
            rows: The row of each layer.
        """
        if not self._plan.recipes:
            return
        numbers = {recipe: number for number, recipe in enumerate(self._plan.recipes)}
        for recipe, layers in share.missing.items():
            missing = [rows[name] for name in layers if name in rows]
            self._sums[missing, numbers[recipe], _MISSING] = 1
        for name, place in share.checks.items():
            if name in rows:
                self._checks[rows[name]] = place
        for part in share.parts:
            self._pack_part(part, rows, [numbers[recipe] for recipe in part.recipes])

    def _pack_part(self, part: TwinPart, rows: Mapping[str, int], recipes: Sequence[int]) -> None:
        """Write the sums of some layers.

        Args:
            part: The sums.
            rows: The row of each layer.
            recipes: Place of each recipe of the part.
        """
        known = [k for k, name in enumerate(part.layers) if name in rows]
        if not known or not recipes:
            return
        states = [k for k, name in enumerate(part.states) if _can_send(name)][:MOST_STATES]
        self._write_names([part.states[k] for k in states])
        places = np.ix_([rows[part.layers[k]] for k in known], recipes)
        self._sums[places] += self._arrange(part, states)[known]

    def _arrange(self, part: TwinPart, states: Sequence[int]) -> Numbers:
        """Return all sums of a part, with room for the most states.

        Args:
            part: The sums of the twins of some layers, samples that are stepped as recipes say.
            states: Places of the states that are sent.

        Returns:
            float64 (layers, recipes, columns).
        """
        layers, recipes = part.values.shape[:2]
        first = len(TwinColumns().ratios) * len(SUMS)
        by_state = part.values[:, :, first : first + len(part.states) * _STATE_SUMS]
        by_state = by_state.reshape(layers, recipes, len(part.states), _STATE_SUMS)
        sums = np.zeros((layers, recipes, MOST_STATES, _STATE_SUMS))
        sums[:, :, : len(states)] = by_state[:, :, states]
        assert part.bins is not None, "of a rank that shares its layers"
        bins = np.zeros((layers, recipes, MOST_STATES, count_numbers(self._plan.most_elements)))
        bins[:, :, : len(states)] = part.bins[:, :, states]
        header = np.zeros((layers, recipes, _HEADER))
        header[:, :, _SIZE] = np.array(part.sizes)[:, None]
        header[:, :, _BLOCKS] = np.array(part.blocks)[:, None]
        plain = part.values[:, :, :first]
        moved = part.values[:, :, -1]
        each = header, plain, sums, moved, bins
        return np.concatenate([one.reshape(layers, recipes, -1) for one in each], axis=2)

    def _write_names(self, names: Sequence[str]) -> None:
        for place, name in enumerate(names):
            codes = np.array([*map(ord, name.ljust(_NAME_LENGTH))], dtype=np.float64)
            self._names[0, place] = np.maximum(self._names[0, place], codes)
            self._names[1, place] = np.maximum(self._names[1, place], -codes)

    def unpack(self, layers: Mapping[str, int], populations: Mapping[str, int]) -> TwinShare:
        """Read the sums of all ranks' twins from the arrays, once the caller reduced them.

        Args:
            layers: The row of each layer that the optimizer stepped.
            populations: Number of elements of each layer.

        Returns:
            The sums of all ranks. They have no layers if the ranks have states of different names.
        """
        if not self._plan.recipes:
            return TwinShare()
        states = self._read_names()
        missing = {
            recipe: [name for name, row in layers.items() if self._sums[row, number, _MISSING] > 0]
            for number, recipe in enumerate(self._plan.recipes)
        }
        checks = {
            name: int(self._checks[row, 0])
            for name, row in layers.items()
            if self._checks[row, 0] > -math.inf
        }
        parts = []
        for number, recipe in enumerate(self._plan.recipes if states is not None else ()):
            sampled = [
                name
                for name, row in layers.items()
                if self._sums[row, number, _SIZE] > 0 and name not in missing[recipe]
            ]
            rows = self._sums[[layers[name] for name in sampled], number]
            part = self._read_part(rows, sampled, recipe, states or ())
            parts.append(part._replace(populations=[populations[name] for name in sampled]))
        return TwinShare([part for part in parts if part.layers], missing, checks)

    def _read_part(
        self, rows: Numbers, layers: Sequence[str], recipe: str, states: Sequence[str]
    ) -> TwinPart:
        """Return the sums of some layers under one recipe.

        Args:
            rows: The sums of each layer, float64 (layers, columns).
            layers: Names of the layers.
            recipe: Name of the recipe.
            states: Names of the states.
        """
        plain, bins = np.split(rows[:, _HEADER:], [self._plan.plain], axis=1)
        kept = len(TwinColumns().ratios) * len(SUMS) + len(states) * _STATE_SUMS
        shape = len(rows), MOST_STATES, count_numbers(self._plan.most_elements)
        counts = bins.reshape(shape)[:, : len(states)]
        medians = find_medians(counts, self._plan.most_elements)
        values = np.concatenate((plain[:, :kept], medians, plain[:, -1:]), axis=1)
        sizes, blocks = rows[:, _SIZE].astype(int), rows[:, _BLOCKS].astype(int)
        return TwinPart(
            layers, [recipe], states, values[:, None], sizes.tolist(), [], blocks.tolist()
        )

    def _read_names(self) -> list[str] | None:
        """Return the names of the states; None if ranks have states of different names."""
        largest, minus_smallest = self._names
        is_known = largest[:, 0] > -math.inf
        if not np.array_equal(largest[is_known], -minus_smallest[is_known]):
            return None
        return ["".join(map(chr, map(int, codes))).rstrip() for codes in largest[is_known]]


def _can_send(name: str) -> bool:
    return name.isascii() and 0 < len(name) <= _NAME_LENGTH and name == name.strip()
