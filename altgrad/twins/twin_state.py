"""`check_twin_state`: check that a state of twins is complete, so that a run can continue with it.

A damaged checkpoint is then an error where it is loaded, and not later in a step of the training. A
*twin* steps a sample of each layer of the training as a recipe says; a *lane* has the twins of
similar layers. The state is a tree: lanes, their twins, and the tensors and optimizer states of
these.

Read `lane` first, which writes it; `lane_pieces` comes next, and `twins` loads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor

from altgrad.recipes.packed_states import StateParts
from altgrad.twins.layout import Bucket, Layout
from altgrad.twins.twin_tensors import TwinTensors

_TENSORS = tuple(field.name for field in fields(TwinTensors))
"""Names of the flat tensors that `TwinTensors` has: weights at several times, and flags."""


def check_twin_state(state: Any) -> None:
    """Raise an error that names the first damaged entry in a state of all twins, if any is.

    It is called before a state from a checkpoint is loaded. *Twins* are samples of the layers that
    are stepped as recipes say.

    Args:
        state: A result of `Twins.state_dict`.

    Raises:
        ValueError: An entry is missing, or is not what `Twins.state_dict` writes.
    """
    place = "state['twins']"
    _expect_mapping(state, place, ("lanes", "resynchronised", "sum_rounding"))
    _expect(state["lanes"], list, f"{place}['lanes']")
    for number, lane in enumerate(state["lanes"]):
        _check_lane(lane, f"{place}['lanes'][{number}]")
    _check_counts(state["resynchronised"], f"{place}['resynchronised']")
    _expect_mapping(state["sum_rounding"], f"{place}['sum_rounding']")
    for name, generators in state["sum_rounding"].items():
        _expect_tensors(generators, f"{place}['sum_rounding'][{name!r}]")


_LANE = {
    "kind": list,
    "buckets": list,
    "samples": Mapping,
    "left_out": list,
    "late": Mapping,
    "recipes": list,
    "follows_updates": bool,
    "rounds_itself": bool,
    "written": list,
    "changed": list,
    "suspicions": int,
    "run": Mapping,
    "state_amaxes": Mapping,
    "averages": Mapping,
    "reference": Mapping,
    "baseline": (Mapping, type(None)),
    "twins": Mapping,
}
"""The keys in the state of a lane, a set of layers that are sampled together, and their types."""


def _check_lane(lane: Any, place: str) -> None:
    """Raise ValueError if the saved state of a lane, as from `Lane.state_dict`, is damaged.

    A *lane* is a set of layers that are sampled together. Its state has the samples, and weights
    and optimizer states of each *twin*: these samples, stepped as a recipe says.

    Args:
        lane: The state.
        place: Where it stands in the whole state, for the error.
    """
    _expect_mapping(lane, place, _LANE)
    for name, kind in _LANE.items():
        _expect(lane[name], kind, f"{place}[{name!r}]")  # type: ignore[arg-type]
    layout = _read_layout(lane["buckets"], f"{place}['buckets']")
    for name, within in layout.places.items():
        inside = f"{place}['samples'][{name!r}]"
        _check_sample(lane["samples"].get(name), inside, within.stop - within.start)
    for number, changes in lane["late"].items():
        _expect_mapping(changes, f"{place}['late'][{number!r}]")
    _check_run(lane["run"], f"{place}['run']", layout)
    for name, amaxes in lane["state_amaxes"].items():
        _expect_tensors(amaxes, f"{place}['state_amaxes'][{name!r}]")
    _check_counts(lane["averages"], f"{place}['averages']")
    keeps_optimizers = not lane["follows_updates"]
    for name in ("reference", "baseline"):
        if lane[name] is not None:
            _check_twin(lane[name], f"{place}[{name!r}]", layout, keeps_optimizers)
    for name, twin in lane["twins"].items():
        inside = f"{place}['twins'][{name!r}]"
        _check_twin(twin, inside, layout, keeps_optimizers)
        is_packed = any(isinstance(each, list) for each in lane["kind"])  # LaneKind.describe
        if keeps_optimizers and is_packed:
            for number, state in enumerate(twin["states"]):
                _check_parts(state, f"{inside}['states'][{number}]")


def _check_parts(state: Mapping[str, Any], place: str) -> None:
    """Raise ValueError if a packed optimizer state, from `packed_state.save_state`, is damaged.

    A packed state keeps blocks of numbers in a few bits; it is saved in parts by kind.
    """
    if not state:
        return
    _expect_mapping(state, place, StateParts._fields)
    for kind in StateParts._fields:
        _expect_mapping(state[kind], f"{place}[{kind!r}]")


def _check_run(run: Any, place: str, layout: Layout) -> None:
    """Raise ValueError if the state of the sampled weights, `RunWeights.state_dict`, is damaged."""
    _expect_mapping(run, place, ("times_changed", "has_gradient", "watched"))
    _expect_tensor(run["times_changed"], f"{place}['times_changed']", len(layout.places))
    _expect_tensor(run["has_gradient"], f"{place}['has_gradient']", layout.length)
    if run["watched"] is not None:
        _expect_tensor(run["watched"], f"{place}['watched']", layout.length)


def _check_sample(sample: Any, place: str, count: int) -> None:
    """Raise ValueError if indices, weights or states of a layer's sample are damaged."""
    if not isinstance(sample, (tuple, list)) or len(sample) != 3:
        _raise_damage(place, sample, "indices, weights and states")
    indices, weights, states = sample
    _expect_tensor(indices, f"{place}[0]", count)
    _expect_tensor(weights, f"{place}[1]", count)
    _expect_tensors(states, f"{place}[2]")


def _read_layout(buckets: Sequence[Any], place: str) -> Layout:
    """Return the places of samples in flat tensors, from the buckets in a state.

    A *bucket* has the samples of layers that step alike.

    Raises:
        ValueError: A bucket is damaged.
    """
    read = []
    for number, bucket in enumerate(buckets):
        if not _is_bucket(bucket):
            expected = "a group, counts of layers by name, a shape or None, and the least length"
            _raise_damage(f"{place}[{number}]", bucket, expected)
        read.append(Bucket(*bucket))
    return Layout(tuple(read))


def _is_bucket(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) not in (3, 4):
        return False
    group, counts, shape, *least = value  # checkpoints of earlier versions lack the last one
    if not isinstance(counts, Mapping):
        return False
    has_counts = all(isinstance(each, int) for each in (group, *counts.values(), *least))
    return has_counts and len(counts) > 0 and (shape is None or isinstance(shape, (tuple, list)))


def _check_twin(twin: Any, place: str, layout: Layout, keeps_optimizers: bool) -> None:
    """Raise ValueError if the saved state of a twin, as from `Twin.state_dict`, is damaged.

    A *twin* is a sample of the layers that is stepped as a recipe says.

    Args:
        twin: The state.
        place: Where it stands in the whole state, for the error.
        layout: The places of the samples in the twin's flat tensors.
        keeps_optimizers: True if the twin steps optimizers of its own, whose states it keeps.
    """
    _expect_mapping(twin, place, ("tensors", "averages", "amaxes", "generator"))
    _expect_mapping(twin["tensors"], f"{place}['tensors']", _TENSORS)
    for name in _TENSORS:
        value, inside = twin["tensors"][name], f"{place}['tensors'][{name!r}]"
        if name != "lost" or not isinstance(value, Tensor) or value.numel():
            _expect_tensor(value, inside, layout.length)
    _expect_tensors(twin["averages"], f"{place}['averages']")
    for name, average in twin["averages"].items():
        _expect_tensor(average, f"{place}['averages'][{name!r}]", layout.length)
    if twin["amaxes"] is not None:
        _expect_tensor(twin["amaxes"], f"{place}['amaxes']", layout.length)
    if twin["generator"] is not None:
        _expect(twin["generator"], Tensor, f"{place}['generator']")
    if keeps_optimizers:
        _check_optimizers(twin, place, len(layout.buckets))


def _check_optimizers(twin: Mapping[str, Any], place: str, buckets: int) -> None:
    """Raise ValueError if a twin's optimizer states, from `OptimizerTwin.state_dict`, are damaged.

    A *twin* is a sample of the layers that an optimizer steps as a recipe says.

    Args:
        twin: The state of the twin.
        place: Where it stands in the whole state, for the error.
        buckets: Number of parameters of the optimizers.
    """
    _expect_mapping(twin, place, ("states", "groups", "generators"))
    states = twin["states"]
    if not isinstance(states, list) or len(states) != buckets:
        _raise_damage(f"{place}['states']", states, f"a list of {buckets}")
    for number, state in enumerate(states):
        _expect_mapping(state, f"{place}['states'][{number}]")
    _expect_mapping(twin["generators"], f"{place}['generators']")
    _expect_mapping(twin["groups"], f"{place}['groups']")
    for number, group in twin["groups"].items():
        inside = f"{place}['groups'][{number!r}]"
        _expect_mapping(group, inside, ("options", "chosen"))
        for name in ("options", "chosen"):
            _expect(group[name], list, f"{inside}[{name!r}]")
            for index, each in enumerate(group[name]):
                _expect_mapping(each, f"{inside}[{name!r}][{index}]")
        if len(group["chosen"]) != len(group["options"]):
            _raise_damage(f"{inside}['chosen']", group["chosen"], "as many as in 'options'")


# --- single values


def _expect(value: Any, kind: type | tuple[type, ...], place: str) -> None:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        _raise_damage(place, value, " or ".join(each.__name__ for each in kinds))


def _expect_mapping(value: Any, place: str, names: Sequence[str] | Mapping[str, Any] = ()) -> None:
    """Raise ValueError if a value is not a mapping, or some names are missing in it."""
    _expect(value, Mapping, place)
    if missing := [name for name in names if name not in value]:
        _raise_damage(place, sorted(map(str, value)), f"the entries {missing}, too")


def _check_counts(counts: Any, place: str) -> None:
    """Raise ValueError if a value is not a mapping of integers."""
    _expect_mapping(counts, place)
    for name, count in counts.items():
        _expect(count, int, f"{place}[{name!r}]")


def _expect_tensors(value: Any, place: str) -> None:
    """Raise ValueError if a value is not a mapping of tensors."""
    _expect_mapping(value, place)
    for name, each in value.items():
        _expect(each, Tensor, f"{place}[{name!r}]")


def _expect_tensor(value: Any, place: str, length: int) -> None:
    """Raise ValueError if a value is not a tensor of one dimension and this length."""
    _expect(value, Tensor, place)
    if value.shape != torch.Size([length]):
        _raise_damage(place, f"a tensor of shape {tuple(value.shape)}", f"shape ({length},)")


def _raise_damage(place: str, value: Any, expected: str) -> NoReturn:
    """Raise the error for a damaged entry of a state.

    Args:
        place: The place of the entry in the state.
        value: The entry, or words for it.
        expected: Words for what was expected.

    Raises:
        ValueError: Always.
    """
    text = value if isinstance(value, str) else repr(value)
    raise ValueError(
        f"{place}={text[:80]}: expected {expected}, as UpdateMonitor.state_dict() writes it; load "
        "an undamaged checkpoint, or remove the entry 'twins' so that twins begin anew"
    )
