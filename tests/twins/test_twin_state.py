"""`check_twin_state`: a damaged state is an error that names the place and the remedy."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from altgrad import UpdateMonitor
from altgrad.recipes import OptimizerMaker, PackedStates, StateParts
from altgrad.recipes.recipe import Recipe
from altgrad.twins.twin_state import check_twin_state
from tests.twins.averaging import train_averaged
from tests.twins.twinning import Watched, make_net, train

pytestmark = pytest.mark.default_twins


def make_adam(held: Any, group: dict[str, Any]) -> Optimizer:
    return AdamW(held, lr=group["lr"])


RECIPES = [
    *("bf16-kahan", "mxfp4", "e4m3fn-sr"),
    Recipe("v8", states={"exp_avg_sq": "e5m2"}),
    Recipe("mine", optimizer=make_adam),
    Recipe("sums", accumulate="bf16", rounding="stochastic"),
]


@functools.cache
def keep_state(kind: str) -> dict[str, Any]:
    net = make_net()
    optimizer = getattr(torch.optim, kind)(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=RECIPES)
    averaged = AveragedModel(net)
    watched.monitor.watch_average(averaged)
    train_averaged(net, optimizer, 8, lambda _: averaged.update_parameters(net))
    return watched.monitor.state_dict()


def make_state(kind: str = "AdamW") -> Any:
    return copy.deepcopy(keep_state(kind)["twins"])


@pytest.mark.parametrize("kind", ["AdamW", "Adafactor"])
def test_a_state_is_complete_before_and_after_it_is_saved_to_a_file(kind: str) -> None:
    check_twin_state(make_state(kind))
    file = io.BytesIO()
    torch.save(make_state(kind), file)
    file.seek(0)
    check_twin_state(torch.load(file, weights_only=True))


def test_the_state_of_a_monitor_that_never_stepped_is_complete() -> None:
    check_twin_state(UpdateMonitor(make_net()).state_dict()["twins"])


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all entries of dicts and lists, but for those that users have filled."""
    if path and path[-1] in ("generators", "options", "chosen"):
        return
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from walk(value[key], (*path, key))


def is_free(path: tuple[Any, ...]) -> bool:
    """Return True for entries that may be there or not: lanes, recipes, groups, states."""
    names = {"states", "state_amaxes", "sum_rounding", "averages"}
    if isinstance(path[-1], int) or names & {*path[:-1]}:
        return True
    return path[-2:-1] in [(each,) for each in ("twins", "resynchronised", "groups")]


def change(state: Any, path: tuple[Any, ...], act: Callable[[Any, Any], None]) -> None:
    for key in path[:-1]:
        state = state[key]
    act(state, path[-1])


def test_every_entry_that_is_missing_is_an_error() -> None:
    whole = make_state()
    paths = [path for path in walk(whole) if not is_free(path)]
    assert len(paths) > 100
    for path in paths:
        state = make_state() if len(path) < 3 else copy_along(whole, path)
        change(state, path, lambda inner, key: inner.pop(key))
        with pytest.raises(ValueError, match=r"state\['twins'\].*: expected .*; load an undamaged"):
            check_twin_state(state)


def copy_along(state: Any, path: tuple[Any, ...]) -> Any:
    """Return a copy of a state in which the objects along a path are copies, and no others."""
    if not path or not isinstance(state, (dict, list)):
        return state
    copied = copy.copy(state)
    copied[path[0]] = copy_along(state[path[0]], path[1:])
    return copied


@pytest.mark.parametrize("wrong", [None, 5, "a", [], {}, torch.zeros(3)], ids=repr)
def test_entries_of_another_kind_raise_no_other_error(wrong: Any) -> None:
    whole, errors = make_state(), 0
    for path in walk(whole):
        state = copy_along(whole, path)
        change(state, path, lambda inner, key: inner.__setitem__(key, wrong))
        try:
            check_twin_state(state)
        except ValueError:
            errors += 1
    assert errors > 50


@pytest.mark.parametrize("wrong", [None, {}, {"lanes": None}, [], 5])
def test_a_monitor_names_what_it_expected(wrong: Any) -> None:
    state = keep_state("AdamW") | {"twins": wrong}
    with pytest.raises(ValueError, match=r"state\['twins'\].*: expected .*, as UpdateMonitor"):
        UpdateMonitor(make_net(), formats=["bf16", "e4m3fn"]).load_state_dict(state)


def test_an_average_that_was_cut_names_its_twin() -> None:
    state = make_state()
    averages = state["lanes"][0]["reference"]["averages"]
    averages["average"] = averages["average"][:10]
    with pytest.raises(ValueError, match=r"\['reference'\]\['averages'\]\['average'\]=a tensor"):
        check_twin_state(state)


def test_a_tensor_that_was_cut_names_its_lane_and_twin() -> None:
    state = make_state()
    tensors = state["lanes"][0]["twins"]["bf16-kahan"]["tensors"]
    tensors["weights"] = tensors["weights"][:10]
    expected = (
        r"state\['twins'\]\['lanes'\]\[0\]\['twins'\]\['bf16-kahan'\]\['tensors'\]\['weights'\]"
        r"=a tensor of shape \(10,\): expected shape \(960,\)"
    )
    with pytest.raises(ValueError, match=expected):
        check_twin_state(state)


# --- snapshots


def list_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    is_tree = isinstance(value, (dict, list, tuple))
    return [each for one in inner for each in list_tensors(one)] if is_tree else []


def test_the_state_of_a_monitor_does_not_change_with_the_training() -> None:
    net = make_net()
    optimizer = AdamW(net.parameters(), torch.tensor(1e-3), foreach=False)
    watched = Watched(net, optimizer, recipes=RECIPES)
    train(net, optimizer, 8)
    state = watched.monitor.state_dict()
    before = [each.clone() for each in list_tensors(state["twins"])]
    train(net, optimizer, 8, first=8)
    assert len(before) > 50
    assert all(map(torch.equal, before, list_tensors(state["twins"])))


def test_a_state_that_is_restored_and_trained_with_does_not_change() -> None:
    state = copy.deepcopy(keep_state("AdamW"))
    before = [each.clone() for each in list_tensors(state["twins"])]
    net = make_net()
    optimizer = AdamW(net.parameters(), 1e-3)
    monitor = UpdateMonitor(net, recipes=RECIPES, formats=["bf16", "e4m3fn"])
    monitor.load_state_dict(state)
    for each in list_tensors(state["twins"]):  # the caller may reuse the memory
        each.zero_()
    monitor.attach(optimizer)
    restored = list_tensors(monitor.state_dict()["twins"])
    assert all(map(torch.equal, before, restored))


def test_damaged_parts_of_packed_states_are_found() -> None:
    packed = PackedStates(
        lambda state: StateParts({"v": state["momentum_buffer"]}, {}, {}),
        lambda parts: {"momentum_buffer": parts.elements["v"]},
    )

    def make(held: Any, group: dict[str, Any]) -> Optimizer:
        return torch.optim.SGD(held, lr=group["lr"], momentum=0.9)

    net = make_net()
    optimizer = AdamW(net.parameters(), 1e-3)
    recipe = Recipe("mine", optimizer=OptimizerMaker(make, packed=packed))
    watched = Watched(net, optimizer, recipes=recipe)
    train(net, optimizer, 3)
    state: Any = watched.monitor.state_dict()["twins"]
    check_twin_state(state)
    damaged = 0
    for lane in state["lanes"]:
        for parts in lane["twins"]["mine"]["states"]:
            kept = parts.pop("blocks")
            with pytest.raises(ValueError, match=r"\['states'\]\[0\]=.*'blocks'"):
                check_twin_state(state)
            parts["blocks"] = kept
            damaged += 1
    assert damaged == 2  # layers with packed states, and others
