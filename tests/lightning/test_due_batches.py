"""`DueBatches`: which steps of which optimizer are observed."""

import pytest
import torch
from torch.optim import SGD, Optimizer

from altgrad_lightning.due_batches import DueBatches


def make_optimizer() -> Optimizer:
    return SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def find_observed(
    due: DueBatches, optimizer: Optimizer, batches: range, steps_in: int = 1
) -> list[int]:
    """Return the batches in which an optimizer is observed that steps every `steps_in` batches."""
    return [batch for batch in batches if batch % steps_in == 0 and due.take_step(optimizer, batch)]


@pytest.mark.parametrize(("every", "expected"), [(1, [*range(9)]), (4, [3, 7]), (0, []), (20, [])])
def test_an_optimizer_that_steps_in_each_batch_is_observed_in_due_batches(
    every: int, expected: list[int]
) -> None:
    due = DueBatches(every)
    assert find_observed(due, make_optimizer(), range(9)) == expected


def test_an_optimizer_that_misses_the_due_batches_is_observed_at_its_next_step() -> None:
    due, every_batch, rare = DueBatches(50), make_optimizer(), make_optimizer()
    assert find_observed(due, rare, range(160), steps_in=5) == [50, 100, 150]
    assert find_observed(due, every_batch, range(160)) == [49, 99, 149]


def test_an_optimizer_that_steps_less_often_than_batches_are_due_is_observed_each_time() -> None:
    assert find_observed(DueBatches(10), make_optimizer(), range(100), 33) == [33, 66, 99]


def test_all_steps_in_one_batch_are_observed_alike() -> None:
    due, optimizer = DueBatches(4), make_optimizer()
    asked = [batch for batch in (0, 0, 2, 2, 5, 5, 6, 7, 7) if due.take_step(optimizer, batch)]
    assert asked == [5, 5, 7, 7]


def test_a_training_that_begins_later_has_the_same_due_batches() -> None:
    due = DueBatches(50)
    assert find_observed(due, make_optimizer(), range(73, 200)) == [99, 149, 199]


@pytest.mark.parametrize("stop", [1, 49, 50, 51, 77, 100, 101])
@pytest.mark.parametrize("steps_in", [1, 5, 60])
def test_a_resumed_training_observes_the_same_steps(stop: int, steps_in: int) -> None:
    expected = find_observed(DueBatches(50), make_optimizer(), range(200), steps_in)
    due, optimizer = DueBatches(50), make_optimizer()
    observed = find_observed(due, optimizer, range(stop), steps_in)
    resumed, other = DueBatches(50), make_optimizer()
    resumed.restore_last([other], due.get_last([optimizer]))
    observed += find_observed(resumed, other, range(stop, 200), steps_in)
    assert observed == expected


@pytest.mark.parametrize("damaged", [None, 7, "12", [None], {"a": 1}])
def test_what_a_damaged_checkpoint_holds_is_ignored(damaged: object) -> None:
    due, optimizer = DueBatches(2), make_optimizer()
    due.restore_last([optimizer], damaged)
    assert find_observed(due, optimizer, range(4)) == [1, 3]


def test_before_the_first_step_there_is_nothing_to_restore() -> None:
    due, optimizer = DueBatches(2), make_optimizer()
    assert due.get_last([optimizer]) == []
    due.restore_last([optimizer], [])
    assert find_observed(due, optimizer, range(4)) == [1, 3]


@pytest.mark.parametrize(
    ("steps", "missed"),
    [
        ({*range(12)}, []),  # each batch steps
        (set(), [3, 7, 11]),  # none does
        ({0, 1, 2, 3, 4}, [7, 11]),
        ({6, 10}, [3]),  # the batch before counts
    ],
)
def test_a_due_batch_misses_steps_if_neither_it_nor_the_one_before_steps(
    steps: set[int], missed: list[int]
) -> None:
    due, optimizer, found = DueBatches(4), make_optimizer(), []
    for batch in range(12):
        if batch in steps:
            due.take_step(optimizer, batch)
        if due.misses_steps(batch):
            found.append(batch)
    assert found == missed


def test_batches_that_accumulate_gradients_miss_no_steps() -> None:
    due, optimizer = DueBatches(1), make_optimizer()
    for step in range(3, 6):
        assert not any(due.misses_steps(step) for _ in range(7))
        due.take_step(optimizer, step)
        assert not due.misses_steps(step)
    assert not DueBatches(0).misses_steps(7)
