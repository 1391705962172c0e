"""Private random numbers: a stream of their own inside, nothing changed outside."""

# ruff: noqa: NPY002 - the global generator is what is tested

import io
import random

import numpy as np
import pytest
import torch

from altgrad.twins.generators import PrivateGenerators, may_draw
from tests.recipes.storing import Given

CPU = [torch.device("cpu")]


def draw() -> list[float]:
    # A Gaussian more or less changes what NumPy and Python keep for the next.
    return [
        torch.rand(()).item(),
        torch.randn(()).item(),
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
    ]


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.fixture(autouse=True)
def _restored():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_streams_outside_go_on_as_if_nothing_was_drawn(before: int) -> None:
    seed_all(7)
    expected = [draw() for _ in range(before + 3)]
    seed_all(7)
    found = [draw() for _ in range(before)]
    private = PrivateGenerators(1)
    for _ in range(3):
        with private.using(CPU):
            draw()
            np.random.randn()
            random.gauss(0, 1)
            torch.randn(3)
        found.append(draw())
    assert found == expected


def test_an_exception_leaves_the_streams_outside_as_they_were() -> None:
    seed_all(7)
    expected = draw()
    seed_all(7)
    private = PrivateGenerators(1)

    def fail() -> None:
        with private.using(CPU):
            draw()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draw() == expected


def test_seeds_set_inside_stay_inside() -> None:
    seed_all(7)
    expected = draw()
    seed_all(7)
    with PrivateGenerators(1).using(CPU):
        seed_all(0)
    assert draw() == expected


def test_the_stream_inside_goes_on_and_depends_on_the_seed_alone() -> None:
    def draw_twice(seed: int, outside: int) -> list[list[float]]:
        seed_all(outside)
        private, drawn = PrivateGenerators(seed), []
        for _ in range(2):
            with private.using(CPU):
                drawn.append(draw())
            draw()
        return drawn

    first, second = draw_twice(1, 7)
    assert not {*first} & {*second}
    assert draw_twice(1, 8) == [first, second]
    assert not {*draw_twice(2, 7)[0]} & {*first}


def test_a_large_seed_is_accepted() -> None:
    with PrivateGenerators(2**40 + 5).using(CPU):
        draw()


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_restored_state_draws_on_exactly(before: int) -> None:
    private = PrivateGenerators(1)
    for _ in range(before):
        with private.using(CPU):
            draw()
    file = io.BytesIO()
    torch.save(private.state_dict(), file)
    with private.using(CPU):
        expected = draw()
    file.seek(0)
    other = PrivateGenerators(1)
    other.load_state_dict(torch.load(file, weights_only=True))
    with other.using(CPU):
        assert draw() == expected


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_another_kind_of_global_numpy_generator_is_left_alone(kind) -> None:
    replaced = np.random.get_bit_generator()
    np.random.set_bit_generator(kind(3))
    try:
        expected = np.random.rand(3).tolist()
        np.random.set_bit_generator(kind(3))
        private = PrivateGenerators(1)
        with private.using(CPU):
            draw()
        other = PrivateGenerators(1)
        other.load_state_dict(private.state_dict())
        with private.using(CPU):
            inside = draw()
        with other.using(CPU):
            assert draw() == inside
        assert np.random.rand(3).tolist() == expected
    finally:
        np.random.set_bit_generator(replaced)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="draws on a GPU")
def test_the_generator_of_a_device_is_private_too() -> None:
    device = torch.device("cuda", 0)
    state = torch.cuda.get_rng_state(device)
    private = PrivateGenerators(1)
    with private.using([device]):
        first = torch.rand(3, device=device)
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    other = PrivateGenerators(1)
    other.load_state_dict(private.state_dict())
    with private.using([device]):
        second = torch.rand(3, device=device)
    with other.using([device]):
        assert torch.equal(torch.rand(3, device=device), second)
    assert not torch.equal(first, second)


class Mine(torch.optim.AdamW):
    """An optimizer of a user, on top of torch's."""


def test_only_the_optimizers_of_torch_draw_nothing() -> None:
    assert not may_draw(torch.optim.AdamW)
    assert not may_draw(torch.optim.SGD)
    assert may_draw(Mine)
    assert may_draw(Given)


def test_the_optimizers_of_torch_are_known_by_their_module() -> None:
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    optimizers = [kind for kind in kinds if issubclass(kind, torch.optim.Optimizer)]
    assert len(optimizers) > 10
    assert not any(map(may_draw, optimizers))
