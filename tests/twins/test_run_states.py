"""`RunStates`: layers whose optimizer states something other than a step has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from altgrad.twins.layer_plan import Stepped
from altgrad.twins.run_states import RunStates


class Run:
    """Two layers after a few steps of AdamW, remembered."""

    def __init__(self) -> None:
        self.net = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in "ab"})
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-3)
        self.states = RunStates()
        for _ in range(3):
            self.step()

    @property
    def stepped(self) -> list[Stepped]:
        return [Stepped(name, self.net[name].weight, 0) for name in "ab"]

    def step(self) -> None:
        self.net["a"](self.net["b"](torch.ones(4))).sum().backward()
        self.optimizer.step()
        self.states.remember(self.optimizer, self.stepped)

    def find_changed(self) -> set[str]:
        return self.states.find_changed(self.optimizer, self.stepped)


def test_steps_are_no_change() -> None:
    run = Run()
    assert run.find_changed() == set()
    run.step()
    assert run.find_changed() == set()


def load(run: Run) -> None:
    run.optimizer.load_state_dict(run.optimizer.state_dict())


def clear(run: Run) -> None:
    run.optimizer.state.clear()


def zero(run: Run) -> None:
    for state in run.optimizer.state.values():
        state["exp_avg"].zero_()


def replace(run: Run) -> None:
    for state in run.optimizer.state.values():
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])


def replace_parameters(run: Run) -> None:
    [group] = run.optimizer.param_groups
    for name in "ab":
        run.net[name].weight = nn.Parameter(torch.ones(4, 4))
    group["params"] = [*run.net.parameters()]


@pytest.mark.parametrize("change", [load, clear, zero, replace, replace_parameters])
def test_each_other_change_is_found(change: Callable[[Run], None]) -> None:
    run = Run()
    change(run)
    assert run.find_changed() == {"a", "b"}
    run.step()
    assert run.find_changed() == set()


def test_the_layers_of_a_change_are_told_apart() -> None:
    run = Run()
    state: dict[str, Any] = run.optimizer.state[run.net["b"].weight]
    state["exp_avg"].mul_(0.5)
    assert run.find_changed() == {"b"}


def test_a_changed_number_in_a_state_is_a_change() -> None:
    run = Run()
    state: dict[str, Any] = run.optimizer.state[run.net["a"].weight]
    state["times"] = 3
    run.states.remember(run.optimizer, run.stepped)
    state["times"] = 0
    assert run.find_changed() == {"a"}


def test_new_layers_have_not_changed() -> None:
    run = Run()
    assert RunStates().find_changed(run.optimizer, run.stepped) == set()
