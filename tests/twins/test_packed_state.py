"""States in blocks of a few bits: they are split by whole blocks, and saved as plain tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from altgrad.recipes import PackedStates, StateParts
from altgrad.twins.packed_state import (
    list_state_tensors,
    load_state,
    save_state,
    split_packed_state,
)


class Box:
    """A state as a library may have it, which is no tensor: a block has four codes and a scale."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales


def take_apart(state: Any) -> StateParts:
    box = state.get("box")
    if box is None:
        return StateParts({"v": state["v"]}, {}, {"step": state["step"]})
    return StateParts({"codes": box.codes}, {"scales": box.scales}, {"step": state["step"]})


def put_together(parts: StateParts) -> dict[str, Any]:
    if not parts.blocks:
        return {"v": parts.elements["v"], **parts.shared}
    return {"box": Box(parts.elements["codes"], parts.blocks["scales"]), **parts.shared}


PACKED = PackedStates(take_apart, put_together, block=4, least=128)


def make_state() -> dict[str, Any]:
    return {"box": Box(torch.arange(16), torch.tensor([0.0, 1.0, 2.0, 3.0])), "step": 7}


def test_whole_blocks_are_taken_over_with_their_scales_and_padded_with_zeros() -> None:
    positions = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    split = split_packed_state(PACKED, make_state(), positions, 12)
    assert split["box"].codes.tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 0, 0, 0, 0]
    assert split["box"].scales.tolist() == [1.0, 3.0, 0.0]
    assert split["step"] == 7


@pytest.mark.parametrize("packed", [PACKED, None])
def test_a_state_that_is_not_packed_is_split_by_elements(packed: Any) -> None:
    state = {"v": torch.arange(4.0), "step": 7}
    split = split_packed_state(packed, state, torch.tensor([1, 3]), 3)
    assert split["v"].tolist() == [1.0, 3.0, 0.0]
    assert split["step"] == 7


def test_a_state_is_saved_as_plain_tensors_and_loaded_as_it_was() -> None:
    state = make_state()
    saved = save_state(PACKED, state)
    assert {*saved} == {*StateParts._fields}
    state["box"].codes.zero_()  # the copy shares nothing
    loaded = load_state(PACKED, saved)
    assert loaded["box"].codes.tolist() == [*range(16)]
    assert loaded["box"].scales.tolist() == [0.0, 1.0, 2.0, 3.0]
    loaded["box"].codes.zero_()
    assert saved["elements"]["codes"].tolist() == [*range(16)]


@pytest.mark.parametrize("state", [{}, {"v": torch.ones(3), "step": torch.ones(())}])
def test_a_plain_state_is_saved_by_name(state: dict[str, Any]) -> None:
    saved = save_state(None, state)
    assert saved.keys() == state.keys()
    assert load_state(None, saved).keys() == state.keys()
    assert len(list_state_tensors(None, state)) == len(state)
    assert save_state(PACKED, {}) == load_state(PACKED, {}) == {}


def test_writes_to_the_listed_tensors_change_the_state() -> None:
    state = make_state()
    for each in list_state_tensors(PACKED, state):
        each.zero_()
    assert not state["box"].codes.any()
    assert not state["box"].scales.any()
