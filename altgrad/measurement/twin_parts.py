"""`TwinShare`: what one rank has measured of its twins in a step, on the host.

A twin is a sample of a layer that is stored and stepped as a recipe says. A rank is one process of
a torch.distributed run. Where ranks share the parameters, each steps the sampled elements of its
own shard, and the shares of all ranks are added up.

Read `ratio_bins` first; `twin_table` comes next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from altgrad.measurement.numbers import Numbers


class TwinPart(NamedTuple):
    """The sums of the twins of some layers, which all have the same recipes.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Attributes:
        layers: Names of the layers.
        recipes: Names of the recipes.
        states: Names of the optimizer states that are compared.
        values: Sums and medians, float64 (layers, recipes, columns) in the order of `TwinColumns`.
        sizes: Number of sampled elements of each layer.
        populations: Number of elements of each layer.
        blocks: Number of blocks in which the sample of each layer was drawn; 0 for single elements.
        bins: The ratios of each state in bins, by which ranks find a common median, float64
            (layers, recipes, states, numbers). None if one rank has the whole sample.
    """

    layers: Sequence[str]
    recipes: Sequence[str]
    states: Sequence[str]
    values: Numbers
    sizes: Sequence[int]
    populations: Sequence[int]
    blocks: Sequence[int]
    bins: Numbers | None = None


class TwinShare(NamedTuple):
    """The sums of the twins of a step: those of one rank, or those of all ranks together.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Attributes:
        parts: The sums; a layer may be in several parts, with other recipes in each.
        missing: For each recipe, the layers with sampled elements that a rank does not step, such
            as after an error. Their sums do not stand for the layer.
        checks: The result of each layer's self-check, as its place from best to worst in
            `altgrad.twins.self_check.Check`.
    """

    parts: Sequence[TwinPart] = ()
    missing: Mapping[str, Collection[str]] = {}
    checks: Mapping[str, int] = {}
