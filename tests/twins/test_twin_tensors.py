"""`TwinTensors`: which weights have moved, and what a change between steps does to them."""

import pytest
import torch

from altgrad.twins.twin_tensors import TwinTensors


def start(
    *weights: float, dtype: torch.dtype = torch.float32, keeps_lost: bool = False
) -> TwinTensors:
    return TwinTensors.start_at(torch.tensor(weights, dtype=dtype), keeps_lost=keeps_lost)


def move(tensors: TwinTensors, *updates: float) -> None:
    tensors.begin_step()
    tensors.weights.add_(torch.tensor(updates))
    tensors.end_step()


def test_a_twin_starts_with_nothing_moved() -> None:
    tensors = start(1.0, 2.0)
    assert not tensors.moved.any()
    assert not tensors.moved_in_window.any()
    assert tensors.start.tolist() == tensors.window.tolist() == [1.0, 2.0]


def test_a_weight_that_moved_and_came_back_has_moved() -> None:
    tensors = start(1.0, 2.0)
    move(tensors, 0.5, 0.0)
    move(tensors, -0.5, 0.0)
    assert tensors.moved_in_window.tolist() == [True, False]


def test_a_window_begins_anew_and_the_total_remembers() -> None:
    tensors = start(1.0, 2.0)
    move(tensors, 0.5, 0.0)
    tensors.begin_window(torch.tensor([True, True]))
    move(tensors, 0.0, 0.25)
    stack = tensors.stack(torch.tensor([[0, 1]]), {})
    assert stack.moved_in_window.tolist() == [[False, True]]
    assert stack.moved.tolist() == [[True, True]]
    assert stack.window.tolist() == [[1.5, 2.0]]
    assert stack.before.tolist() == [[1.5, 2.0]]


def test_the_window_of_a_layer_that_is_not_shown_goes_on() -> None:
    tensors = start(1.0, 2.0)
    move(tensors, 0.5, 0.5)
    tensors.begin_window(torch.tensor([True, False]))
    move(tensors, 0.0, 0.25)
    stack = tensors.stack(torch.tensor([[0, 1]]), {})
    assert stack.moved_in_window.tolist() == [[False, True]]
    assert stack.window.tolist() == [[1.5, 2.0]]
    assert stack.moved.tolist() == [[True, True]]


def test_a_change_between_steps_is_no_movement() -> None:
    tensors = start(1.0, 2.0)
    move(tensors, 0.5, 0.0)
    tensors.replace_weights(torch.tensor([9.5, 2.0]))
    assert (tensors.weights - tensors.start).tolist() == [0.5, 0.0]
    assert tensors.moved_in_window.tolist() == [True, False]


def test_nan_and_inf_that_stay_do_not_spread_to_earlier_weights() -> None:
    tensors = start(float("inf"), 2.0)
    tensors.replace_weights(torch.tensor([float("inf"), 3.0]))
    assert tensors.start.tolist() == [float("inf"), 3.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_element_that_is_repaired_begins_anew(bad: float) -> None:
    tensors = start(1.0, 2.0)
    move(tensors, bad, 0.5)
    tensors.begin_window(torch.tensor([True, True]))
    move(tensors, 0.0, 0.5)
    tensors.replace_weights(torch.tensor([4.0, 5.0]))
    assert tensors.start.tolist() == [4.0, 4.0]
    assert tensors.window.tolist() == [4.0, 4.5]
    assert tensors.before.tolist() == [4.0, 4.5]
    stack = tensors.stack(torch.tensor([[0, 1]]), {})
    assert stack.moved.tolist() == [[False, True]]
    assert stack.moved_in_window.tolist() == [[False, True]]


def test_an_element_that_something_else_makes_nan_and_repairs_begins_anew() -> None:
    tensors = start(1.0, 2.0)
    move(tensors, 0.5, 0.5)
    tensors.replace_weights(torch.tensor([float("nan"), 2.5]))
    tensors.replace_weights(torch.tensor([7.0, 2.5]))
    assert tensors.start.tolist() == [7.0, 2.0]
    assert tensors.moved_in_window.tolist() == [False, True]


def test_nan_that_stays_leaves_earlier_weights() -> None:
    tensors = start(1.0, 2.0)
    move(tensors, float("nan"), 0.5)
    tensors.replace_weights(torch.tensor([float("nan"), 3.0]))
    assert tensors.start.tolist() == [1.0, 2.5]
    assert tensors.moved_in_window.tolist() == [True, True]


def test_a_state_is_a_copy() -> None:
    tensors = start(1.0, 2.0, keeps_lost=True)
    state = tensors.state_dict()
    move(tensors, 0.5, 0.5)
    assert state["weights"].tolist() == state["start"].tolist() == [1.0, 2.0]
    assert not state["moved_in_window"].any()


def test_rearranging_keeps_old_elements_and_takes_new_ones() -> None:
    tensors = start(1.0, 2.0, keeps_lost=True)
    move(tensors, 0.5, 0.0)
    tensors.lost.fill_(0.25)
    later = tensors.rearrange(torch.tensor([-1, 0]), start(7.0, 8.0, keeps_lost=True))
    assert later.weights.tolist() == [7.0, 1.5]
    assert later.start.tolist() == [7.0, 1.0]
    assert later.moved_in_window.tolist() == [False, True]
    assert later.lost.tolist() == [0.0, 0.25]


def test_an_empty_twin_takes_all_elements_from_the_run() -> None:
    later = start().rearrange(torch.tensor([-1, -1]), start(7.0, 8.0))
    assert later.weights.tolist() == [7.0, 8.0]
    assert len(later.lost) == 0


def test_memory_counts_every_tensor() -> None:
    assert start(*[0.0] * 64).nbytes() == 64 * (4 * 4 + 2)
    assert start(*[0.0] * 64, keeps_lost=True).nbytes() == 64 * (4 * 4 + 2 + 2)


def test_a_change_of_weights_in_16_bits_is_exactly_no_movement() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1000, generator=generator).bfloat16()
    tensors = TwinTensors.start_at(weights.clone())
    tensors.replace_weights(weights * 0.3)
    for earlier in (tensors.start, tensors.window, tensors.before):
        assert torch.equal(earlier, tensors.weights)
