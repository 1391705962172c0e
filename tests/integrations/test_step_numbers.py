"""`StepNumbers`: one count for the steps of several optimizers."""

import torch

from altgrad.integrations.step_numbers import StepNumbers


def make_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def count(steps: list[tuple[torch.optim.Optimizer | None, int]], first: int = 0) -> list[int]:
    """Return the numbers of steps, each an optimizer and its own count."""
    numbers, found = StepNumbers(first), []
    for optimizer, index in steps:
        if (number := numbers.find_next(optimizer, index)) > numbers.last:
            numbers.begin(number)
        numbers.join(optimizer, index)
        found.append(number)
    return found


def test_one_optimizer_counts_its_own_steps() -> None:
    one = make_optimizer()
    assert count([(one, 0), (one, 1), (one, 2)]) == [0, 1, 2]
    assert count([(one, 0), (one, 1)], first=7) == [7, 8]


def test_optimizers_share_a_number_until_one_steps_again() -> None:
    critic, generator = make_optimizer(), make_optimizer()
    steps = [(critic, 0), (critic, 1), (critic, 2), (generator, 0), (critic, 3)]
    assert count(steps) == [0, 1, 2, 2, 3]


def test_a_step_that_was_skipped_keeps_its_number() -> None:
    one = make_optimizer()
    assert count([(one, 0), (one, 0), (one, 1)]) == [0, 0, 1]


def test_steps_in_backward_count_as_those_of_one_optimizer() -> None:
    one = make_optimizer()
    assert count([(None, 0), (None, 0), (one, 0), (None, 1)]) == [0, 0, 0, 1]


def test_a_step_that_has_ended_is_not_shared() -> None:
    one, other = make_optimizer(), make_optimizer()
    numbers = StepNumbers()
    assert not numbers.has_begun
    numbers.begin(numbers.find_next(one, 0))
    numbers.join(one, 0)
    assert numbers.has_begun
    assert numbers.find_next(other, 0) == 0
    numbers.end()
    assert numbers.find_next(other, 0) == 1
