"""`join_pieces`: the state of a lane is cut into pieces, and joined again, element by element."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from altgrad.twins.lane_pieces import join_pieces
from altgrad.twins.layer_plan import SampledNow
from altgrad.twins.layout import Bucket, Layout
from altgrad.twins.twin_state import check_twin_state
from tests.twins.twinning import Watched, make_net, one_thread, train

on_one_thread = one_thread()


@pytest.fixture(scope="module")
def lane() -> dict[str, Any]:
    """Return the state of a lane after some steps, in which one layer rested at first."""
    net = make_net()
    net[3].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    watched = Watched(net, optimizer, recipes=["bf16", "bf16-true", "bf16-kahan", "e4m3fn"])
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    watched.monitor.watch_average(average)
    train(net, optimizer, 3, before_step=lambda _: average.update_parameters(net))
    net[3].bias.requires_grad_(True)
    train(net, optimizer, 2, first=3)
    (state,) = watched.monitor.state_dict()["twins"]["lanes"]
    return state


def want(lane: Mapping[str, Any], remainders: tuple[int, ...]) -> dict[str, SampledNow]:
    """Return the elements of each layer whose index divided by 3 leaves one of the remainders."""
    wanted = {}
    for group, counts, shape, _ in lane["buckets"]:
        for name in counts:
            indices = lane["samples"][name][0]
            own = indices[torch.isin(indices % 3, torch.tensor(remainders))]
            wanted[name] = SampledNow(own, group, shape)
    return {name: each for name, each in wanted.items() if len(each.indices)}


def cut(lane: dict[str, Any], *remainders: int) -> dict[str, Any]:
    piece = join_pieces([lane], want(lane, remainders))
    assert piece is not None
    return piece


def list_elements(lane: Mapping[str, Any]) -> dict[tuple[Any, ...], float]:
    """Return all that the twins of a lane keep, by twin, kind of number, layer and element."""
    layout = Layout(tuple(Bucket(*each) for each in lane["buckets"]))
    found: dict[tuple[Any, ...], float] = {}
    for name, place in layout.places.items():
        indices, weights, states = lane["samples"][name]
        number = layout.bucket_numbers[name]
        start = layout.slices[number].start
        within = slice(place.start - start, place.stop - start)
        each = {("saved", key): value for key, value in states.items() if len(value) > 1}
        each["saved", "weights"] = weights
        for twin, state in {"run": lane["reference"], **lane["twins"]}.items():
            flats = {key: value for key, value in state["tensors"].items() if len(value)}
            flats |= {f"average {key}": value for key, value in state["averages"].items()}
            each |= {(twin, key): value[place] for key, value in flats.items()}
            for key, value in state["states"][number].items():
                flat = value.expand(place.stop) if value.numel() == 1 else value.view(-1)
                each[twin, key] = flat[within]
        for (twin, key), values in each.items():
            for index, value in zip(indices.tolist(), values.tolist(), strict=True):
                found[twin, key, name, index] = value
    return found


def test_pieces_joined_again_have_every_number_of_every_element(lane) -> None:
    pieces = [cut(lane, 0), cut(lane, 2), cut(lane, 1)]
    whole = join_pieces(pieces, want(lane, (0, 1, 2)))
    assert whole is not None
    truth = list_elements(lane)
    assert list_elements(whole) == truth
    assert ("bf16", "average average") in {key[:2] for key in truth}
    assert len({key[:2] for key in truth}) > 30
    for state in (*pieces, whole):
        check_twin_state({"lanes": [state], "resynchronised": {}, "sum_rounding": {}})


def test_other_cuts_need_elements_of_several_pieces(lane) -> None:
    pieces = [cut(lane, 0), cut(lane, 1, 2)]
    joined = join_pieces(pieces, want(lane, (0, 1)))
    assert joined is not None
    found = list_elements(joined)
    assert found == {k: v for k, v in list_elements(lane).items() if k[-1] % 3 in (0, 1)}


def test_layers_that_stepped_alike_share_a_bucket_again(lane) -> None:
    joined = join_pieces([cut(lane, 0), cut(lane, 1, 2)], want(lane, (0, 1, 2)))
    assert joined is not None
    buckets = [{*counts} for _, counts, *_ in joined["buckets"]]
    assert sorted(map(sorted, buckets)) == sorted(sorted({*c}) for _, c, *_ in lane["buckets"])


def test_a_piece_with_just_the_wanted_elements_keeps_scales_and_random_numbers(lane) -> None:
    pieces = [cut(lane, 0), cut(lane, 1, 2)]
    pieces[1]["twins"]["bf16"]["generator"] = torch.arange(3)
    joined = join_pieces(pieces, want(lane, (1, 2)))
    assert joined is not None
    assert torch.equal(joined["twins"]["bf16"]["generator"], torch.arange(3))
    assert joined is not pieces[1]
    assert join_pieces([lane], want(lane, (0, 1, 2)))["twins"]["e4m3fn"]["amaxes"] is not None


def test_a_layer_of_which_an_element_is_nowhere_is_left_out(lane) -> None:
    piece = cut(lane, 0, 1)
    wanted = want(lane, (0, 1))
    first = next(iter(wanted))
    wanted[first] = wanted[first]._replace(indices=lane["samples"][first][0])
    joined = join_pieces([piece], wanted)
    assert joined is not None
    assert joined["samples"].keys() == wanted.keys() - {first}
    assert join_pieces([piece], {first: wanted[first]}) is None


@pytest.mark.parametrize("change", ["step", "follows"])
def test_pieces_that_do_not_fit_together_give_no_state(lane, change: str) -> None:
    pieces = [copy.deepcopy(cut(lane, 0)), cut(lane, 1, 2)]
    if change == "step":
        for state in pieces[0]["reference"]["states"]:
            state["step"] += 1
    else:
        pieces[0]["follows_updates"] = True
    assert join_pieces(pieces, want(lane, (0, 1, 2))) is None


def test_a_twin_that_has_ended_in_one_piece_stays_ended(lane) -> None:
    pieces = [cut(lane, 0), cut(lane, 1, 2)]
    del pieces[0]["twins"]["bf16"]
    joined = join_pieces(pieces, want(lane, (0, 1, 2)))
    assert joined is not None
    assert joined["twins"].keys() == lane["twins"].keys() - {"bf16"}


def test_watched_weights_and_counts_of_writes_are_joined(lane) -> None:
    pieces = [cut(lane, 0), cut(lane, 1, 2)]
    for number, piece in enumerate(pieces):
        run: dict[str, Tensor] = piece["run"]
        run["times_changed"] = torch.full_like(run["times_changed"], float(number))
        run["watched"] = piece["reference"]["tensors"]["weights"]
    joined = join_pieces(pieces, want(lane, (0, 1, 2)))
    assert joined is not None
    assert joined["run"]["times_changed"].max() == 1.0
    assert torch.equal(joined["run"]["watched"], joined["reference"]["tensors"]["weights"])
