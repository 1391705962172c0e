"""What a deep copy shares: functions, and what they change."""

from __future__ import annotations

import dataclasses
import decimal
import functools
import logging
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from altgrad.twins.shared_objects import find_shared
from tests.twins.twinning import Watched, make_net, train


def hold(value: Any) -> Any:
    return lambda: value


def hold_and_assign() -> Any:
    count = 0

    def outer() -> Any:
        def inner() -> int:
            nonlocal count
            count += 1
            return count

        return inner

    return outer


REPORTS: list[int] = []


def assign_globally() -> None:
    global COUNT  # noqa: PLW0603
    COUNT = 1


COUNT = 0


def hold_own_variable() -> int:
    count = 0

    def add() -> None:
        nonlocal count
        count += 1

    add()
    return count


@dataclasses.dataclass(frozen=True)
class Frozen:
    inner: Any = 1


@dataclasses.dataclass
class Open:
    inner: Any = 1


class Plain:
    def meet(self) -> None:
        pass


SHARED: dict[str, tuple[Any, str]] = {
    "a list": (hold([]), "a list through the function hold"),
    "an object": (hold(Plain()), "a Plain"),
    "a method of an object": (hold(Plain().meet), "a Plain"),
    "a dataclass": (hold(Open()), "a Open"),
    "a list in a frozen dataclass": (hold(Frozen([])), "a list"),
    "a list in a tuple": (hold((1, [])), "a list"),
    "a list two functions away": (hold(hold([])), "a list"),
    "a dict in a partial": (hold(functools.partial(print, {})), "a dict"),
    "a tensor": (hold(torch.ones(1)), "a Tensor"),
    "a generator": (hold(torch.Generator()), "a Generator"),
    "a module": (hold(nn.Identity()), "a Identity"),
    "an array": (hold(np.ones(1)), "a ndarray"),
    "a loss scaler": (hold(torch.amp.GradScaler("cpu")), "a GradScaler"),
    "a method of a list": ([].append, "a list through the function list.append"),
    "a method of a dict": ({}.update, "a dict"),
    "a default": (lambda things=[]: things, "a list"),
    "a default by name": (lambda *, things={}: things, "a dict"),
    "a variable": (hold_and_assign(), "a variable of the function"),
    "a global list": (lambda x: REPORTS.append(x), "a list"),  # noqa: PLW0108
    "a global list in a function inside": (lambda: lambda x: REPORTS.append(x), "a list"),  # noqa: PLW0108
    "a global variable": (assign_globally, "a variable of the function"),
    "in an attribute": ({"x": [Open(hold([]))]}, "a list"),
    "in a partial": (functools.partial(hold([])), "a list"),
    "behind a cache": (functools.cache(hold([])), "a list"),
}


@pytest.mark.parametrize(("value", "words"), SHARED.values(), ids=SHARED)
def test_an_object_that_a_copy_would_share_is_found(value: Any, words: str) -> None:
    assert find_shared(value).startswith(words)


UNSHARED: dict[str, Any] = {
    "a list": [[], {}, set()],
    "a tensor": torch.ones(1),
    "a method": Plain().meet,
    "numbers": hold((1, 2.0, True, None, "a", b"b", decimal.Decimal(1), np.float32(1), range(3))),
    "types": hold((int, torch.float32, torch.device("cpu"), np.dtype("f4"), re.compile("a"))),
    "a frozen dataclass": hold(Frozen()),
    "a logger": hold(logging.getLogger("a")),
    "functions of C": hold((math.sqrt, torch.add, len, np.add, str.join)),
    "functions of torch": hold((torch.nn.functional.relu, torch.linalg.norm, torch.ops.aten.add)),
    "a function without gradients": torch.no_grad()(hold(1)),
    "a compiled function": torch.compile(hold(1)),
    "a function in a function": hold(torch.no_grad()(torch.compile(hold(1)))),
    "a partial": functools.partial(print, end=""),
    "global functions, modules and types": lambda x: torch.add(math.sqrt(Frozen(x).inner), hold(1)),
    "a variable of its own": hold_own_variable,
    "a cache": functools.cache(hold(1)),
}


@pytest.mark.parametrize("value", UNSHARED.values(), ids=UNSHARED)
def test_objects_that_are_copied_or_immutable_are_not_found(value: Any) -> None:
    assert find_shared(value) == ""


def test_a_variable_that_is_not_assigned_yet_is_left_out() -> None:
    def outer() -> Any:
        def inner() -> Any:
            return later

        found = find_shared(inner)
        later = []  # type: ignore[var-annotated]
        return found, later

    assert outer()[0] == ""


def test_an_object_that_is_known_is_left_out() -> None:
    inner = Open(hold([]))
    assert find_shared([inner], known=inner) == ""


@pytest.mark.default_twins
def test_an_optimizer_that_reports_to_the_training_gives_it_no_report_of_a_twin() -> None:
    reports: list[int] = []

    class Reporting(AdamW):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, 1e-3)
            self.report = lambda: reports.append(1)

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.report()
            super().step(closure)

    net = make_net()
    optimizer = Reporting(net.parameters())
    watched = Watched(net, optimizer, recipes=["bf16", "bf16-true"])
    train(net, optimizer, 6)
    assert len(reports) == 6
    ended, fed = watched.notices
    assert "ends the twins of bf16-true: Reporting cannot run on a sample" in ended
    assert "Reporting.report leads to a list through the function" in ended
    assert "feeds the twins of bf16" in fed
