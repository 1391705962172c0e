"""`Attachments` removes hooks and listeners together, also when their owner is collected."""

import gc
import weakref
from types import SimpleNamespace

import pytest
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer

from altgrad.observation.attachments import Attachments, find_scalers
from altgrad.observation.step_hooks import StepHooks
from tests.observation.recorder import RATE, weights
from tests.observation.watching import INF, hook_count, training


class Owner:
    """A stand-in for an observer, whose methods the attachments call."""

    def __init__(self) -> None:
        self.steps: list[Optimizer] = []
        self.skips: list[Optimizer] = []
        self.attached = Attachments(self)

    def attach(self, *optimizers: Optimizer) -> None:
        for each in optimizers:
            hooks = StepHooks(each, self.is_due, self.capture, self.finish)
            self.attached.hooks.append(hooks)

    def is_due(self, hooks: StepHooks) -> bool:
        return True

    def capture(self, hooks: StepHooks, optimizer: Optimizer) -> None:
        pass

    def finish(self, hooks: StepHooks, optimizer: Optimizer, captured: None) -> None:
        self.steps.append(optimizer)

    def skip(self, optimizer: Optimizer) -> None:
        self.skips.append(optimizer)


def sgd() -> SGD:
    return SGD([weights()], lr=RATE)


def skip_a_step(scaler: GradScaler, optimizer: Optimizer) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    scaler.scale(p.sum())  # GradScaler makes its scale on first use
    p.grad.fill_(INF)
    scaler.step(optimizer)
    scaler.update()


def test_hooks_and_listeners_are_called_until_they_are_removed() -> None:
    one, two = sgd(), sgd()
    owner, scaler = Owner(), GradScaler("cpu")
    owner.attach(one, two)
    owner.attached.listen(scaler, owner.skip)
    assert owner.attached.optimizers == [one, two]
    two.step()
    one.step()
    skip_a_step(scaler, one)
    assert (owner.steps, owner.skips) == ([two, one], [one])
    owner.attached.remove_all()
    assert (owner.attached.optimizers, owner.attached.hooks) == ([], [])
    assert [hook_count(each) for each in (one, two)] == [0, 0]
    assert "step" not in vars(scaler)
    owner.attached.remove_all()  # harmless
    one.step()
    assert owner.steps == [two, one]


def test_a_scaler_calls_its_listener_once_and_again_after_it_is_removed_and_added() -> None:
    optimizer, owner, scaler = sgd(), Owner(), GradScaler("cpu")
    for count in (1, 2):
        owner.attached.listen(scaler, owner.skip)
        owner.attached.listen(scaler, owner.skip)
        skip_a_step(scaler, optimizer)
        assert owner.skips == [optimizer] * count
        owner.attached.remove_all()
    skip_a_step(scaler, optimizer)
    assert len(owner.skips) == 2


def test_hooks_of_a_running_step_stay_and_the_next_call_removes_them() -> None:
    one, two = sgd(), sgd()
    owner, scaler = Owner(), GradScaler("cpu")
    owner.attach(one, two)
    owner.attached.listen(scaler, owner.skip)
    one.register_step_post_hook(lambda *_: owner.attached.remove_all())
    one.step()
    assert owner.attached.optimizers == [one]
    assert (hook_count(one), hook_count(two)) == (3, 0)
    assert "step" not in vars(scaler)
    owner.attached.remove_all()
    assert owner.attached.optimizers == []
    assert hook_count(one) == 1


def test_collected_optimizers_are_forgotten_and_the_others_stay() -> None:
    one, two = sgd(), sgd()
    owner = Owner()
    owner.attach(one, two)
    kept = owner.attached.hooks[1]
    del one
    gc.collect()
    assert owner.attached.optimizers == [two]
    assert len(owner.attached.hooks) == 2
    owner.attached.forget_collected()
    assert owner.attached.hooks == [kept]
    two.step()
    assert owner.steps == [two]
    owner.attached.remove_all()


def test_hooks_and_listeners_are_removed_when_their_owner_is_collected() -> None:
    optimizer, owner, scaler = sgd(), Owner(), GradScaler("cpu")
    owner.attach(optimizer)
    owner.attached.listen(scaler, owner.skip)
    optimizer.step()
    gone, attached = weakref.ref(owner), owner.attached
    del owner
    gc.collect()
    assert gone() is None
    assert attached.hooks == []
    assert hook_count(optimizer) == 0
    assert "step" not in vars(scaler)


@pytest.mark.parametrize("stepped", [0, 1, 2])
def test_an_owner_collected_before_the_first_step_causes_a_warning(stepped: int) -> None:
    optimizers, owner = [sgd(), sgd()], Owner()
    owner.attach(*optimizers)
    for optimizer in optimizers[:stepped]:
        optimizer.step()

    def collect() -> None:
        nonlocal owner
        del owner
        gc.collect()

    if stepped:
        collect()
    else:
        with pytest.warns(UserWarning, match="StepObserver was collected before its first step"):
            collect()
    assert [hook_count(each) for each in optimizers] == [0, 0]


def test_an_owner_collected_after_its_optimizers_causes_no_warning() -> None:
    optimizer, owner = sgd(), Owner()
    owner.attach(optimizer)
    del optimizer
    gc.collect()
    del owner


# Scalers


def test_the_given_scaler_comes_before_the_scalers_of_wrappers() -> None:
    given, own = GradScaler("cpu"), GradScaler("cpu")
    _, optimizer = training()
    wrappers = [SimpleNamespace(scaler=own), optimizer, SimpleNamespace(scaler=None)]
    assert find_scalers(wrappers, given) == [given, own]
    assert find_scalers(wrappers, None) == [own]
    assert find_scalers([optimizer, SimpleNamespace(scaler="amp")], None) == []
