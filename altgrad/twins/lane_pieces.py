"""`join_pieces`: the state of a lane on this rank, from those of all ranks of an earlier run.

A *lane* is a set of layers whose samples are stepped together by *twins*, as recipes say. If ranks
share the layers, each has the state of the elements that it steps: a *piece* of the lane. A run
that goes on with other ranks, or with one, takes the elements that each rank steps now from the
pieces that have them.

Read `twin_state` first; `rank_states` comes next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.recipes.stored_states import COUNTERS
from altgrad.twins.layer_plan import SampledNow
from altgrad.twins.layout import Bucket, Layout


class _CannotJoinError(ValueError):
    """An error for pieces that have no common state, such as optimizers at different steps."""


def join_pieces(
    pieces: Sequence[Mapping[str, Any]], wanted: Mapping[str, SampledNow]
) -> dict[str, Any] | None:
    """Return the state of a lane for the elements that this rank steps now.

    A *lane* is a set of layers of which small samples are stepped together. Scales of formats and
    random numbers are left out, unless one piece has just the wanted elements.

    Args:
        pieces: Results of `Lane.state_dict` on the ranks of an earlier run, on the CPU.
        wanted: The elements of each layer that this rank steps, by name.

    Returns:
        A result of `Lane.state_dict`. It has no layers of which an element is in no piece. None if
        no layer is left, or the pieces do not fit together.
    """
    for piece in pieces:
        if _has_just(piece, wanted) and sum(not _is_apart(p, wanted) for p in pieces) == 1:
            return copy.deepcopy(dict(piece))
    try:
        joined = _Join(pieces, wanted)
        return joined.make_state() if joined.origins else None
    except _CannotJoinError:
        return None


def _has_just(piece: Mapping[str, Any], wanted: Mapping[str, SampledNow]) -> bool:
    """Return True if the samples of a piece are the wanted ones, element by element."""
    return all(
        name in wanted and torch.equal(indices, wanted[name].indices)
        for name, (indices, _, _) in piece["samples"].items()
    )


def _is_apart(piece: Mapping[str, Any], wanted: Mapping[str, SampledNow]) -> bool:
    """Return True if a piece has no wanted element."""
    return not any(
        name in wanted and bool(torch.isin(indices, wanted[name].indices).any())
        for name, (indices, _, _) in piece["samples"].items()
    )


class _Origin(NamedTuple):
    """The place of a layer's wanted elements in the pieces.

    Attributes:
        order: For each element its position among the sampled elements of all pieces, joined.
        pieces: For each element the number of its piece.
        positions: For each element its position in the flat tensors of the piece.
    """

    order: Tensor
    pieces: Tensor
    positions: Tensor


class _Join:
    """The new places of all elements, and the pieces that they are taken from."""

    def __init__(
        self, pieces: Sequence[Mapping[str, Any]], wanted: Mapping[str, SampledNow]
    ) -> None:
        self._pieces = pieces
        self._wanted = wanted
        self._layouts = [Layout(tuple(Bucket(*each) for each in p["buckets"])) for p in pieces]
        found = {name: self._find_origin(name) for name in wanted}
        self.origins = {name: each for name, each in found.items() if each is not None}
        self._layout = Layout(tuple(self._make_buckets()))
        offsets = torch.tensor([0, *(each.length for each in self._layouts)], device="cpu").cumsum(
            0
        )
        self._sources = torch.full((self._layout.length,), -1, device="cpu")
        for name, place in self._layout.places.items():
            origin = self.origins[name]
            self._sources[place] = offsets[origin.pieces] + origin.positions

    def _find_origin(self, name: str) -> _Origin | None:
        """Return where the wanted elements of a layer are; None if one is nowhere."""
        each = [
            (number, layout.places[name], piece["samples"][name][0])
            for number, (layout, piece) in enumerate(zip(self._layouts, self._pieces, strict=True))
            if name in layout.places
        ]
        indices = self._wanted[name].indices
        if not each or not len(indices):
            return None
        known, order = torch.cat([own for _, _, own in each]).sort()
        found = torch.searchsorted(known, indices).clamp(max=len(known) - 1)
        if not torch.equal(known[found], indices):
            return None
        numbers = torch.cat([torch.full_like(own, number) for number, _, own in each])
        positions = torch.cat(
            [torch.arange(place.start, place.stop, device="cpu") for _, place, _ in each]
        )
        order = order[found]
        return _Origin(order, numbers[order], positions[order])

    def _find_buckets(self, name: str) -> set[tuple[int, int]]:
        """Return piece and number of each bucket that a layer's elements come from."""
        pieces = {*self.origins[name].pieces.tolist()}
        return {(piece, self._layouts[piece].bucket_numbers[name]) for piece in pieces}

    def _make_buckets(self) -> list[Bucket]:
        """Return buckets of layers that were in a common bucket of any piece.

        A *bucket* has the samples of layers that step alike.
        """
        groups: list[tuple[set[tuple[int, int]], list[str]]] = []
        for name in self.origins:
            own, names = self._find_buckets(name), [name]
            apart = []
            for other, members in groups:
                is_small = self._wanted[name].shape or self._wanted[members[0]].shape
                if own.isdisjoint(other) or is_small is not None:
                    apart.append((other, members))
                else:
                    own, names = own | other, members + names
            groups = [*apart, (own, names)]
        return [
            Bucket(
                self._wanted[names[0]].group,
                {name: len(self._wanted[name].indices) for name in names},
                self._wanted[names[0]].shape,
            )
            for _, names in groups
        ]

    def _pick(self, flats: Sequence[Tensor]) -> Tensor:
        """Return a flat tensor of the new layout, from one of each piece; 0 at padding."""
        joined = torch.cat([*flats])
        picked = joined[self._sources.clamp(min=0)] if len(joined) else joined
        return torch.where(self._sources < 0, torch.zeros_like(picked), picked)

    # --- the state

    def make_state(self) -> dict[str, Any]:
        """Return one state of a lane, a set of layers, from the pieces that the ranks have saved.

        Returns:
            A dict with the entries of `Lane.state_dict`.

        Raises:
            _CannotJoinError: The pieces do not fit together: samples are stepped by an optimizer on
                some ranks alone, or optimizers differ.
        """
        first, pieces = self._pieces[0], self._pieces
        if len({piece["follows_updates"] for piece in pieces}) > 1:
            raise _CannotJoinError
        names = set.intersection(*({*piece["twins"]} for piece in pieces))
        return {
            **copy.deepcopy({key: first[key] for key in ("kind", "recipes", "late")}),
            "follows_updates": first["follows_updates"],
            "buckets": [(b.group, dict(b.counts), b.shape, b.least) for b in self._layout.buckets],
            "samples": {name: self._take_sample(name) for name in self.origins},
            "rounds_itself": any(piece["rounds_itself"] for piece in pieces),
            "suspicions": max(piece["suspicions"] for piece in pieces),
            "averages": {
                name: max(piece["averages"].get(name, 0) for piece in pieces)
                for name in {name: None for piece in pieces for name in piece["averages"]}
            },
            **{
                key: sorted({name for piece in pieces for name in piece[key]})
                for key in ("left_out", "written", "changed")
            },
            "run": self._take_run(),
            "state_amaxes": {},
            "reference": self._take_twin(lambda piece: piece["reference"]),
            "baseline": self._take_twin(lambda piece: piece["baseline"]),
            "twins": {
                name: self._take_twin(lambda piece, name=name: piece["twins"][name])  # type: ignore[misc]
                for name in first["twins"]
                if name in names
            },
        }

    def _take_sample(self, name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return indices, weights and states of a layer in the training, for its elements."""
        each = [piece["samples"][name] for piece in self._pieces if name in piece["samples"]]
        order = self.origins[name].order
        states = {}
        for key in each[0][2]:
            values = [state[key] for _, _, state in each]
            is_single = key in COUNTERS or any(
                len(value) != len(indices)
                for value, (indices, _, _) in zip(values, each, strict=True)
            )
            states[key] = values[0].clone() if is_single else torch.cat(values)[order]
        weights = torch.cat([own for _, own, _ in each])[order]
        return self._wanted[name].indices.clone(), weights, states

    def _take_run(self) -> dict[str, Tensor | None]:
        """Return what is known of the weights of the training: see `RunWeights.state_dict`."""
        runs = [piece["run"] for piece in self._pieces]
        watched = [run["watched"] for run in runs]
        times = [
            max(
                float(run["times_changed"][[*layout.places].index(name)])
                for run, layout in zip(runs, self._layouts, strict=True)
                if name in layout.places
            )
            for name in self._layout.places
        ]
        return {
            "times_changed": torch.tensor(times, dtype=torch.float64, device="cpu"),
            "has_gradient": self._pick([run["has_gradient"] for run in runs]),
            "watched": None if any(w is None for w in watched) else self._pick(watched),
        }

    def _take_twin(
        self, find: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
    ) -> dict[str, Any] | None:
        """Return the state of one twin: see `OptimizerTwin.state_dict`.

        A *twin* is a sample of the layers that is stepped as a recipe says.

        Args:
            find: Function that takes a piece and returns the twin's state in it; None without.
        """
        twins = [twin for piece in self._pieces if (twin := find(piece)) is not None]
        if len(twins) < len(self._pieces):
            return None
        tensors = {
            name: self._pick([twin["tensors"][name] for twin in twins])
            if any(len(twin["tensors"][name]) for twin in twins)
            else value
            for name, value in twins[0]["tensors"].items()
        }
        known = set.intersection(*({*twin["averages"]} for twin in twins))
        averages = {
            name: self._pick([twin["averages"][name] for twin in twins]) for name in sorted(known)
        }
        state: dict[str, Any] = {
            "tensors": tensors,
            "averages": averages,
            "amaxes": None,
            "generator": None,
        }
        if "states" not in twins[0]:
            return state
        groups: dict[Any, Any] = {}
        for twin in twins:
            groups = {**copy.deepcopy(twin["groups"]), **groups}
        states = self._take_states([twin["states"] for twin in twins])
        return {**state, "states": states, "groups": groups, "generators": {}}

    def _take_states(self, states: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """Return the optimizer state of each new bucket.

        A *bucket* is a parameter of a twin's optimizer.

        Args:
            states: For each piece, the state of each bucket by name.

        Raises:
            _CannotJoinError: A state has neither one number per element nor the same number in all
                pieces.
        """
        flats: dict[str, Tensor] = {}
        taken: list[dict[str, Any]] = []
        for bucket, place in zip(self._layout.buckets, self._layout.slices, strict=True):
            origins = sorted(set().union(*map(self._find_buckets, bucket.counts)))
            each = [
                (states[piece][number], self._layouts[piece].buckets[number])
                for piece, number in origins
            ]
            own: dict[str, Any] = {}
            for name, value in each[0][0].items():
                if all(name in s and _is_elementwise(name, s[name], b) for s, b in each):
                    if name not in flats:
                        flats[name] = self._pick(self._lay_out(name, states))
                    flat = flats[name][place].clone()
                    own[name] = flat if bucket.shape is None else flat.view(bucket.shape)
                elif all(_is_same(s.get(name), value) for s, _ in each):
                    own[name] = copy.deepcopy(value)
                else:
                    raise _CannotJoinError
            taken.append(own)
        return taken

    def _lay_out(self, name: str, states: Sequence[Sequence[Mapping[str, Any]]]) -> list[Tensor]:
        """Return an optimizer state as one flat tensor for each piece; 0 where it is missing."""
        values = [s[name] for piece in states for s in piece if isinstance(s.get(name), Tensor)]
        flats = [
            torch.zeros(layout.length, dtype=values[0].dtype, device="cpu")
            for layout in self._layouts
        ]
        for flat, layout, piece in zip(flats, self._layouts, states, strict=True):
            for bucket, place, state in zip(layout.buckets, layout.slices, piece, strict=True):
                if name in state and _is_elementwise(name, state[name], bucket):
                    flat[place] = state[name].view(-1)
        return flats


def _is_elementwise(name: str, value: object, bucket: Bucket) -> bool:
    """Return True if a state has one number for each element of a bucket, a flat tensor."""
    is_tensor = isinstance(value, Tensor) and name not in COUNTERS
    return is_tensor and value.numel() == bucket.length  # type: ignore[attr-defined]


def _is_same(one: object, other: object) -> bool:
    """Return True if two states are the same single number, such as a count of steps."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.numel() == 1 and torch.equal(one, other)
    return not isinstance(one, Tensor) and one == other
