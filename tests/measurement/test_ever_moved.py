"""`EverMovedStore`: bits that are kept, put together, packed, and begun anew."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from altgrad.measurement.ever_moved import EverMovedStore, PackedBits, scatter_packed_bits
from tests.strategies import thorough

CPU = torch.device("cpu")


def silent(said: str) -> None:
    raise AssertionError(f"nothing is to be told: {said}")


def bits(kinds: int, elements: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(kinds, elements, generator=generator) < 0.4


def packed_by_numpy(ever: Tensor) -> list[int]:
    return np.packbits(ever.flatten().numpy(), bitorder="little").tolist()


def holding(**layers: Tensor) -> EverMovedStore:
    kept = EverMovedStore(silent)
    for name, ever in layers.items():
        kept.keep(name, ever)
    return kept


# Kept and put together


def test_what_was_left_is_taken_once() -> None:
    kept = holding(w=bits(3, 5))
    assert torch.equal(kept.take("w", 3, 5), bits(3, 5))
    assert kept.take("w", 3, 5) is None
    assert kept.take("other", 3, 5) is None


def test_what_two_optimizers_have_moved_is_put_together() -> None:
    one, other = bits(2, 9, seed=1), bits(2, 9, seed=2)
    kept = holding(w=one.clone())
    kept.keep("w", other.clone())
    expected = np.logical_or(one.numpy(), other.numpy())
    assert np.array_equal(kept.take("w", 2, 9).numpy(), expected)
    assert not np.array_equal(expected, one)


def test_of_another_number_of_elements_only_the_later_is_kept() -> None:
    kept = holding(w=torch.ones(2, 9, dtype=torch.bool))
    kept.keep("w", bits(2, 4))
    assert torch.equal(kept.take("w", 2, 4), bits(2, 4))


@pytest.mark.parametrize("how", ["take", "get_row"])
def test_a_layer_of_another_number_of_elements_begins_anew_and_says_so(how: str) -> None:
    told: list[str] = []
    kept = EverMovedStore(told.append)
    kept.keep("w", torch.ones(2, 9, dtype=torch.bool))
    if how == "take":
        assert kept.take("w", 2, 4) is None
    else:
        row = kept.get_row("w", 2, 4, CPU)
        assert not row.moved.any()
        assert not row.effective.any()
    assert told == ["has never_moved_frac of w begin anew: it has 4 measured elements, and had 9"]
    assert (kept.take("w", 2, 4) is None) is (how == "take")
    assert len(told) == 1


# A layer that stays


def test_the_row_of_a_layer_is_what_is_kept_of_it() -> None:
    kept = EverMovedStore(silent)
    row = kept.get_row("w", 3, 5, CPU)
    assert (row.moved.shape, row.effective.shape) == ((1, 1, 5), (1, 2, 5))
    assert row.moved.dtype is row.effective.dtype is torch.bool
    assert not row.moved.any()
    assert not row.effective.any()
    row.moved[0, 0, 1] = row.effective[0, 1, 4] = True
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[0, 1] = expected[2, 4] = True
    again = kept.get_row("w", 3, 5, CPU)
    assert torch.equal(torch.cat((again.moved, again.effective), dim=1)[0], expected)
    assert torch.equal(kept.take("w", 3, 5), expected)


def test_a_row_goes_on_with_what_was_left() -> None:
    row = holding(w=bits(2, 6)).get_row("w", 2, 6, CPU)
    assert torch.equal(row.moved[0, 0], bits(2, 6)[0])
    assert torch.equal(row.effective[0, 0], bits(2, 6)[1])


def test_a_row_made_in_inference_mode_can_be_updated_outside_of_it() -> None:
    kept = EverMovedStore(silent)
    with torch.inference_mode():
        row = kept.get_row("w", 2, 3, CPU)
    row.moved.logical_or_(torch.tensor([True, False, True]))
    assert kept.take("w", 2, 3).tolist() == [[True, False, True], [False] * 3]


# Packed


@thorough
@given(st.integers(1, 4), st.integers(0, 40), st.integers(0, 99))
def test_packed_bits_are_those_of_numpy_and_come_back(kinds: int, elements: int, seed: int) -> None:
    ever = bits(kinds, elements, seed)
    state = holding(w=ever.clone(), v=bits(1, 3)).state_dict(())
    if not ever.any():
        assert [*state] == ["v"]
        return
    shape, packed = state["w"]
    assert shape == (kinds, elements)
    assert packed.dtype is torch.uint8
    assert packed.tolist() == packed_by_numpy(ever)
    other = EverMovedStore(silent)
    other.load_state_dict(state, {})
    assert torch.equal(other.take("w", kinds, elements), ever)
    assert torch.equal(other.take("v", 1, 3), bits(1, 3))


def test_what_lies_elsewhere_is_packed_too_and_does_not_move_in() -> None:
    kept = holding(both=bits(2, 5, seed=1))
    elsewhere = [("both", bits(2, 5, seed=2)), ("there", bits(2, 3))]
    state = kept.state_dict(iter(elsewhere))
    assert [*state] == ["both", "there"]
    assert state["both"][1].tolist() == packed_by_numpy(bits(2, 5, seed=1) | bits(2, 5, seed=2))
    assert state["there"][1].tolist() == packed_by_numpy(bits(2, 3))
    assert kept.take("there", 2, 3) is None
    assert torch.equal(kept.take("both", 2, 5), bits(2, 5, seed=1))


def test_loading_forgets_what_was_there() -> None:
    kept = holding(old=bits(2, 5))
    kept.load_state_dict(holding(new=bits(2, 6)).state_dict(()), {})
    assert kept.take("old", 2, 5) is None
    assert torch.equal(kept.take("new", 2, 6), bits(2, 6))


# Parts of layers


def test_of_what_was_loaded_the_part_that_lies_here_is_kept() -> None:
    kept, state = holding(), holding(w=bits(2, 7), whole=bits(2, 3)).state_dict(())
    positions = torch.tensor([1, 2, 6])
    kept.load_state_dict(state, {"w": (7, positions), "unknown": (4, torch.tensor([0]))})
    assert torch.equal(kept.take("w", 2, 3), bits(2, 7)[:, positions])
    assert torch.equal(kept.take("whole", 2, 3), bits(2, 3))
    assert kept.take("unknown", 2, 1) is None


def test_a_part_of_another_number_of_elements_begins_anew() -> None:
    told: list[str] = []
    kept = EverMovedStore(told.append)
    state = holding(w=bits(2, 7)).state_dict(())
    kept.load_state_dict(state, {"w": (8, torch.tensor([1]))})
    assert kept.take("w", 2, 1) is None
    assert told == ["has never_moved_frac of w begin anew: it has 8 measured elements, and had 7"]


def test_bits_of_a_part_are_put_where_they_belong_in_the_whole() -> None:
    part, positions = bits(2, 3), torch.tensor([6, 0, 4])
    packed: PackedBits = holding(w=part).state_dict(())["w"]
    expected = np.zeros((2, 9), dtype=bool)
    expected[:, [6, 0, 4]] = part.numpy()
    whole = scatter_packed_bits(packed, (2, 9), positions)
    assert whole.tolist() == packed_by_numpy(torch.from_numpy(expected))
    assert part.any()


@pytest.mark.parametrize("known", [None, bits(2, 4), bits(3, 3)], ids=["nothing", "more", "kinds"])
def test_where_nothing_is_known_of_a_part_the_whole_is_0(known: Tensor | None) -> None:
    packed = None if known is None else holding(w=known).state_dict(())["w"]
    assert scatter_packed_bits(packed, (2, 9), torch.tensor([6, 0, 4])).tolist() == [0, 0, 0]
