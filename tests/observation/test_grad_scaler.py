"""`SkipNotifier` reports the steps that a GradScaler skips, and leaves the scaler as it was."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from altgrad.observation.grad_scaler import SkipNotifier
from tests.observation.watching import hook_count

RATE = 0.5


def weights() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, 2.0]))


class Skips(list):
    def tell(self, optimizer: Optimizer) -> None:
        self.append(optimizer)


def scaled_step(scaler: torch.amp.GradScaler, optimizer: Optimizer, gradient: float) -> object:
    (p,) = optimizer.param_groups[0]["params"]
    scaler.scale(p.sum())  # GradScaler makes its scale on first use
    p.grad = torch.full_like(p, gradient)
    result = scaler.step(optimizer)
    scaler.update()
    return result


def scaler_and_optimizer(**options) -> tuple[torch.amp.GradScaler, SGD, nn.Parameter]:
    p = weights()
    return torch.amp.GradScaler("cpu", init_scale=4.0, **options), SGD([p], lr=RATE), p


def test_listeners_are_called_for_skipped_steps_only() -> None:
    scaler, optimizer, p = scaler_and_optimizer()
    skips = Skips()
    SkipNotifier.get_or_create(scaler).listen(skips.tell)
    scaled_step(scaler, optimizer, 4.0)
    assert p.tolist() == [0.5, 1.5]
    assert skips == []
    scaled_step(scaler, optimizer, float("inf"))
    assert p.tolist() == [0.5, 1.5]
    assert skips == [optimizer]
    scaled_step(scaler, optimizer, 2.0)
    assert p.tolist() == [0, 1]
    assert skips == [optimizer]
    assert hook_count(optimizer) == 0


def test_results_and_errors_of_the_step_pass_through() -> None:
    class Returning(SGD):
        def step(self, closure=None, extra=None):
            if extra is None:
                raise ValueError("no extra")
            return extra

    scaler, _, p = scaler_and_optimizer(enabled=False)
    optimizer, skips = Returning([p], lr=RATE), Skips()
    SkipNotifier.get_or_create(scaler).listen(skips.tell)
    assert scaler.step(optimizer, extra=7) == 7
    assert scaler.step(optimizer, None, 8) == 8
    with pytest.raises(ValueError, match="no extra"):
        scaler.step(optimizer)
    assert hook_count(optimizer) == 0
    assert skips == []


def test_a_restored_scaler_has_its_own_step_again() -> None:
    scaler, optimizer, _ = scaler_and_optimizer()
    before, skips = dict(vars(scaler)), Skips()
    restore = SkipNotifier.get_or_create(scaler).listen(skips.tell)
    assert "step" in vars(scaler)
    restore()
    assert vars(scaler) == before
    scaled_step(scaler, optimizer, float("inf"))
    assert skips == []
    restore()  # harmless
    assert vars(scaler).keys() == before.keys()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first_first", "last_first"])
def test_one_scaler_serves_two_listeners(order: tuple[int, int]) -> None:
    scaler, optimizer, _ = scaler_and_optimizer()
    both = [Skips(), Skips()]
    restores = [SkipNotifier.get_or_create(scaler).listen(skips.tell) for skips in both]
    scaled_step(scaler, optimizer, float("inf"))
    assert [len(skips) for skips in both] == [1, 1]
    restores[order[1]]()
    both_before = [len(skips) for skips in both]
    restores[order[0]]()
    scaled_step(scaler, optimizer, 1.0)
    assert [len(skips) for skips in both] == both_before
    assert "step" not in vars(scaler)


def test_a_thousand_listeners_that_come_and_go_leave_nothing() -> None:
    """A chain of a thousand replaced `step` methods would exceed the recursion limit."""
    scaler, optimizer, _ = scaler_and_optimizer()
    skips = Skips()
    stop = SkipNotifier.get_or_create(scaler).listen(skips.tell)
    for _ in range(1000):
        stop_next = SkipNotifier.get_or_create(scaler).listen(skips.tell)
        stop()
        stop = stop_next
    scaled_step(scaler, optimizer, float("inf"))
    assert len(skips) == 1
    stop()
    assert "step" not in vars(scaler)


def test_a_listener_stays_when_a_later_one_stops() -> None:
    scaler, optimizer, _ = scaler_and_optimizer()
    first, second = Skips(), Skips()
    restore_first = SkipNotifier.get_or_create(scaler).listen(first.tell)
    SkipNotifier.get_or_create(scaler).listen(second.tell)()
    scaled_step(scaler, optimizer, float("inf"))
    assert (len(first), len(second)) == (1, 0)
    restore_first()
    assert "step" not in vars(scaler)


def test_a_step_that_other_code_replaces_later_is_kept() -> None:
    scaler, _, _ = scaler_and_optimizer()
    skips = Skips()
    restore = SkipNotifier.get_or_create(scaler).listen(skips.tell)
    scaler.step = theirs = lambda optimizer: "theirs"
    restore()
    assert scaler.step is theirs


def test_a_scaler_works_after_its_listener_is_collected() -> None:
    scaler, optimizer, p = scaler_and_optimizer()
    skips = Skips()
    SkipNotifier.get_or_create(scaler).listen(skips.tell)
    gone = weakref.ref(skips)
    del skips
    assert gone() is None
    scaled_step(scaler, optimizer, float("inf"))
    scaled_step(scaler, optimizer, 2.0)
    assert p.tolist() == [0.5, 1.5]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_scaler_with_a_listener_can_be_copied(copied) -> None:
    scaler, optimizer, p = scaler_and_optimizer()
    skips = Skips()
    SkipNotifier.get_or_create(scaler).listen(skips.tell)
    twin = copied(scaler)
    scaled_step(twin, optimizer, float("inf"))
    scaled_step(twin, optimizer, 1.0)
    assert twin.get_scale() == 2
    assert p.tolist() == [0.75, 1.75]
    assert skips == []


def test_a_scaler_with_a_listener_still_steps_unknown_wrappers() -> None:
    """GradScaler needs only `param_groups` and `step`, which accelerate's wrapper has."""

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
    SkipNotifier.get_or_create(scaler).listen(skips.tell)
    scaled_step(scaler, wrapped, 4.0)
    assert p.tolist() == [0, 1]
