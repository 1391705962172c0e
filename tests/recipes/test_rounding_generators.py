"""`RoundingGenerators`: equal draws on every rank, and the same draws after a resume."""

from __future__ import annotations

import pytest
import torch

from altgrad.recipes.rounding_generators import RoundingGenerators

CPU = torch.device("cpu")


def draw(generators: RoundingGenerators, device: torch.device = CPU) -> list[float]:
    return torch.rand(3, generator=generators.get(device)).tolist()


def test_ranks_with_one_seed_draw_alike_and_other_seeds_differ() -> None:
    assert draw(RoundingGenerators(3)) == draw(RoundingGenerators(3))
    assert draw(RoundingGenerators(3)) != draw(RoundingGenerators(4))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draw(RoundingGenerators(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_restored_state_goes_on_and_is_saved_also_before_the_next_draw() -> None:
    generators = RoundingGenerators(0)
    draw(generators)
    state = generators.state_dict()
    expected = draw(generators)
    once = RoundingGenerators(5)
    draw(once)
    once.load_state_dict(state)
    twice = RoundingGenerators(7)
    twice.load_state_dict(once.state_dict())
    assert draw(twice) == draw(once) == expected
    assert draw(twice) == draw(once) == draw(generators)


@pytest.mark.parametrize("saved", [["cpu:1"], ["cuda:0", "cpu:1"], ["cpu:1", "cpu"]])
def test_one_other_device_of_the_type_takes_a_loaded_state(saved: list[str]) -> None:
    """The first rank saves its own device alone, and a resumed run may get other devices."""
    states = {}
    for seed, name in enumerate(saved):
        generators = RoundingGenerators(seed)
        draw(generators)
        states[name] = generators.state_dict()["cpu"]
    expected = RoundingGenerators(len(saved) - 1)
    draw(expected)
    resumed = RoundingGenerators(9)
    resumed.load_state_dict(states)
    assert draw(resumed) == draw(expected)
    state = resumed.state_dict()
    assert {*state} == {"cpu", *saved[:-1]}
    assert torch.equal(state["cpu"], expected.state_dict()["cpu"])


def test_a_device_of_another_type_begins_with_the_seed() -> None:
    resumed = RoundingGenerators(2)
    resumed.load_state_dict({"cuda:0": torch.zeros(16, dtype=torch.uint8)})  # no GPU is needed
    assert draw(resumed) == draw(RoundingGenerators(2))
