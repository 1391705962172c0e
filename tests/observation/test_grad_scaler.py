"""`SkipTeller`: steps that a GradScaler skips are told, and the scaler works as it did."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from altgrad.observation.grad_scaler import SkipTeller

RATE = 0.5


def weights() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, 2.0]))


class Skips(list):
    def tell(self, optimizer: Optimizer) -> None:
        self.append(optimizer)


def scaled_step(scaler: torch.amp.GradScaler, optimizer: Optimizer, gradient: float) -> object:
    (p,) = optimizer.param_groups[0]["params"]
    scaler.scale(p.sum())  # the scale is made on first use
    p.grad = torch.full_like(p, gradient)
    result = scaler.step(optimizer)
    scaler.update()
    return result


def scaler_and_optimizer(**options) -> tuple[torch.amp.GradScaler, SGD, nn.Parameter]:
    p = weights()
    return torch.amp.GradScaler("cpu", init_scale=4.0, **options), SGD([p], lr=RATE), p


def test_steps_that_the_scaler_skips_are_told_and_others_are_not() -> None:
    scaler, optimizer, p = scaler_and_optimizer()
    skips = Skips()
    SkipTeller.of(scaler).listen(skips.tell)
    scaled_step(scaler, optimizer, 4.0)
    assert p.tolist() == [0.5, 1.5]
    assert skips == []
    scaled_step(scaler, optimizer, float("inf"))
    assert p.tolist() == [0.5, 1.5]
    assert skips == [optimizer]
    scaled_step(scaler, optimizer, 2.0)
    assert p.tolist() == [0, 1]
    assert skips == [optimizer]
    assert not optimizer._optimizer_step_pre_hooks


def test_the_result_and_the_errors_of_the_step_are_those_of_the_scaler() -> None:
    class Returning(SGD):
        def step(self, closure=None, extra=None):
            if extra is None:
                raise ValueError("no extra")
            return extra

    scaler, _, p = scaler_and_optimizer(enabled=False)
    optimizer, skips = Returning([p], lr=RATE), Skips()
    SkipTeller.of(scaler).listen(skips.tell)
    assert scaler.step(optimizer, extra=7) == 7
    assert scaler.step(optimizer, None, 8) == 8
    with pytest.raises(ValueError, match="no extra"):
        scaler.step(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert skips == []


def test_a_restored_scaler_is_as_it_was() -> None:
    scaler, optimizer, _ = scaler_and_optimizer()
    before, skips = dict(vars(scaler)), Skips()
    restore = SkipTeller.of(scaler).listen(skips.tell)
    assert "step" in vars(scaler)
    restore()
    assert vars(scaler) == before
    scaled_step(scaler, optimizer, float("inf"))
    assert skips == []
    restore()  # harmless
    assert vars(scaler).keys() == before.keys()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first_first", "last_first"])
def test_two_may_listen_to_one_scaler(order: tuple[int, int]) -> None:
    scaler, optimizer, _ = scaler_and_optimizer()
    both = [Skips(), Skips()]
    restores = [SkipTeller.of(scaler).listen(skips.tell) for skips in both]
    scaled_step(scaler, optimizer, float("inf"))
    assert [len(skips) for skips in both] == [1, 1]
    restores[order[1]]()
    both_before = [len(skips) for skips in both]
    restores[order[0]]()
    scaled_step(scaler, optimizer, 1.0)
    assert [len(skips) for skips in both] == both_before
    assert "step" not in vars(scaler)


def test_a_thousand_who_come_and_go_leave_nothing() -> None:
    """Each came while the one before was there: a chain of them would be too deep to call."""
    scaler, optimizer, _ = scaler_and_optimizer()
    skips = Skips()
    stop = SkipTeller.of(scaler).listen(skips.tell)
    for _ in range(1000):
        stop_next = SkipTeller.of(scaler).listen(skips.tell)
        stop()
        stop = stop_next
    scaled_step(scaler, optimizer, float("inf"))
    assert len(skips) == 1
    stop()
    assert "step" not in vars(scaler)


def test_the_last_to_listen_is_restored_to_the_one_before() -> None:
    scaler, optimizer, _ = scaler_and_optimizer()
    first, second = Skips(), Skips()
    restore_first = SkipTeller.of(scaler).listen(first.tell)
    SkipTeller.of(scaler).listen(second.tell)()
    scaled_step(scaler, optimizer, float("inf"))
    assert (len(first), len(second)) == (1, 0)
    restore_first()
    assert "step" not in vars(scaler)


def test_a_step_that_someone_replaced_later_stays_theirs() -> None:
    scaler, _, _ = scaler_and_optimizer()
    skips = Skips()
    restore = SkipTeller.of(scaler).listen(skips.tell)
    scaler.step = theirs = lambda optimizer: "theirs"
    restore()
    assert scaler.step is theirs


def test_a_scaler_whose_listener_is_gone_works() -> None:
    scaler, optimizer, p = scaler_and_optimizer()
    skips = Skips()
    SkipTeller.of(scaler).listen(skips.tell)
    gone = weakref.ref(skips)
    del skips
    assert gone() is None
    scaled_step(scaler, optimizer, float("inf"))
    scaled_step(scaler, optimizer, 2.0)
    assert p.tolist() == [0.5, 1.5]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_scaler_that_is_listened_to_can_be_copied_as_before(copied) -> None:
    scaler, optimizer, p = scaler_and_optimizer()
    skips = Skips()
    SkipTeller.of(scaler).listen(skips.tell)
    twin = copied(scaler)
    scaled_step(twin, optimizer, float("inf"))
    scaled_step(twin, optimizer, 1.0)
    assert twin.get_scale() == 2
    assert p.tolist() == [0.75, 1.75]
    assert skips == []


def test_a_scaler_that_is_listened_to_steps_what_it_stepped_before() -> None:
    """It asks for `param_groups` and `step` only, as accelerate's wrapper has them."""

    class Wrapper(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

        def step(self) -> None:
            self.optimizer.step()

    scaler, optimizer, p = scaler_and_optimizer()
    wrapped = Wrapper(optimizer)
    scaled_step(scaler, wrapped, 4.0)
    assert p.tolist() == [0.5, 1.5]
    skips = Skips()
    SkipTeller.of(scaler).listen(skips.tell)
    scaled_step(scaler, wrapped, 4.0)
    assert p.tolist() == [0, 1]
