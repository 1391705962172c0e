"""States of twins travel between ranks as bytes, and are joined."""

from __future__ import annotations

from typing import Any

import torch

from altgrad.twins.rank_states import join_states, pack_state


def make_lane(*indices: int, kind: str = "float32") -> dict[str, Any]:
    own = torch.tensor(indices)
    return {"kind": [kind, 1], "samples": {"w": (own, own.float(), {})}}


def test_the_joined_state_has_the_lanes_of_all_ranks() -> None:
    first = {"lanes": [make_lane(1, 3)], "resynchronised": {"w": 1}}
    second = {
        "lanes": [make_lane(2), make_lane(2, kind="bf16")],
        "resynchronised": {"w": 3, "v": 1},
    }
    joined = join_states([pack_state(first), pack_state(second)])
    assert [each["samples"]["w"][0].tolist() for each in joined["lanes"]] == [[1, 3], [2], [2]]
    assert joined["resynchronised"] == {"w": 3, "v": 1}


def test_lanes_that_all_ranks_have_loaded_are_there_once() -> None:
    state = {"lanes": [make_lane(1, 3), make_lane(2)], "resynchronised": {}}
    assert len(join_states([pack_state(state)] * 2)["lanes"]) == 2


def test_values_of_any_class_come_back_as_they_were() -> None:
    lane = make_lane(0) | {"late": {0: {"betas": (0.9, 0.99), "shape": torch.Size([2])}}}
    (found,) = join_states([pack_state({"lanes": [lane], "resynchronised": {}})])["lanes"]
    assert found["late"] == lane["late"]
    assert isinstance(found["late"][0]["shape"], torch.Size)
