"""Steps of twins: no global hook, no record of a profiler, no changed setting."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from altgrad.recipes.recipe import Recipe
from altgrad.twins.isolation import keeping_settings, step_quietly
from tests.twins.twinning import Watched, make_net, train


class Inheriting(AdamW):
    """An optimizer whose `step` calls that of its class's parent, which torch has wrapped, too."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)


def make(kind: type[Optimizer] = AdamW) -> Optimizer:
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    return kind([weight], lr=0.5)  # type: ignore[call-arg]


@contextmanager
def calls_to_hooks() -> Iterator[list[str]]:
    calls: list[str] = []
    before = register_optimizer_step_pre_hook(lambda *_: calls.append("before"))
    after = register_optimizer_step_post_hook(lambda *_: calls.append("after"))
    try:
        yield calls
    finally:
        before.remove()
        after.remove()


@pytest.mark.parametrize("kind", [SGD, AdamW, Inheriting])
def test_global_hooks_are_not_called(kind: type[Optimizer]) -> None:
    make(AdamW).step()  # from now on torch has wrapped the step of the class
    optimizer = make(kind)
    with calls_to_hooks() as calls:
        step_quietly(optimizer)
        assert calls == []
        assert (optimizer.param_groups[0]["params"][0] < 1).all()
        make(SGD).step()
    assert calls == ["before", "after"]


def test_global_hooks_are_called_in_another_thread_meanwhile() -> None:
    class Waiting(AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            other = threading.Thread(target=make(SGD).step)
            other.start()
            other.join()

    with calls_to_hooks() as calls:
        step_quietly(make(Waiting))
    assert calls == ["before", "after"]


def test_a_global_hook_that_is_removed_in_the_step_stays_removed() -> None:
    calls: list[int] = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(1))

    class Removing(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            handle.remove()

    step_quietly(make(Removing))
    make(SGD).step()
    assert calls == []


def test_hooks_of_the_optimizer_itself_are_called() -> None:
    optimizer, calls = make(), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    step_quietly(optimizer)
    assert calls == [1]


def test_a_step_that_the_user_has_decorated_runs_as_it_is() -> None:
    class Decorated(SGD):
        pass

    calls: list[int] = []
    inner = make(Decorated).step.__func__  # type: ignore[attr-defined]

    @functools.wraps(inner)
    def counting(self: Decorated, closure: Any = None) -> Any:
        calls.append(1)
        return inner(self, closure)

    Decorated.step = counting  # type: ignore[method-assign]
    step_quietly(make(Decorated))
    assert calls == [1]


def test_a_profiler_has_no_record_of_the_step() -> None:
    optimizer = make()
    with torch.profiler.profile() as profile:
        step_quietly(optimizer)
    names = {event.key for event in profile.key_averages()}
    assert not {name for name in names if name.startswith("Optimizer.step")}
    assert "aten::addcdiv_" in names or "aten::_foreach_addcdiv_" in names


@pytest.mark.default_twins
def test_a_global_hook_is_called_once_for_each_step_of_the_run() -> None:
    net = make_net()
    optimizer = AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=["bf16", "bf16-true"])
    with calls_to_hooks() as calls:
        train(net, optimizer, 10)
    assert calls == ["before", "after"] * 10
    assert len(watched.records) == 1


# --- settings


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "grad mode": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(mode=False)),
    "default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "determinism": (
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(mode=True),
    ),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("raises", [False, True])
def test_a_setting_that_is_left_changed_is_restored(name: str, raises: bool) -> None:
    read, change = SETTINGS[name]
    before = read()

    def act() -> None:
        with keeping_settings():
            change()
            assert read() != before
            if raises:
                raise RuntimeError("in the step")

    if raises:
        with pytest.raises(RuntimeError, match="in the step"):
            act()
    else:
        act()
    assert read() == before


@pytest.mark.default_twins
@pytest.mark.parametrize("where", ["in the step", "in the factory"])
def test_a_factory_that_changes_settings_changes_neither_run_nor_twins(where: str) -> None:
    def change() -> None:
        torch.set_grad_enabled(mode=True)
        torch.set_default_dtype(torch.float64)

    class Changing(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            if where == "in the step":
                change()

    def factory(parameters: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
        if where == "in the factory":
            change()
        return Changing(parameters, lr=group["lr"])

    net = make_net()
    optimizer = SGD(net.parameters(), 0.01)
    watched = Watched(net, optimizer, recipes=["bf16", Recipe("mine", optimizer=factory)])
    train(net, optimizer, 10)
    assert torch.get_default_dtype() == torch.float32
    assert watched.notices == []
    assert watched.records[-1].model.recipes == ("bf16", "mine")
