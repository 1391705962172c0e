"""`count_writes`: facts about torch on which the search for writes relies."""

from __future__ import annotations

import torch

from altgrad.twins.writes import UNCOUNTED, count_writes


def test_a_write_in_place_is_counted_also_through_a_view() -> None:
    tensor = torch.zeros(4)
    before = count_writes(tensor)
    tensor.add_(1)
    assert count_writes(tensor) == before + 1
    tensor[1:].zero_()
    assert count_writes(tensor) == before + 2


def test_a_write_through_data_is_not_counted() -> None:
    tensor = torch.zeros(4)
    before = count_writes(tensor)
    tensor.data.add_(1)
    assert count_writes(tensor) == before


def test_writes_to_inference_tensors_are_not_counted() -> None:
    with torch.inference_mode():
        assert count_writes(torch.zeros(4)) == UNCOUNTED
