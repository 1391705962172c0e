"""`Alone` is the identity: a rank without others takes the same road and waits for nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from altgrad import StepRecord, UpdateMonitor
from altgrad.distributed.peers import Alone, StepSums
from altgrad.quantization.scale_groups import compute_layer_amaxes
from tests.distributed.comparing import plain
from tests.distributed.listening import Listening
from tests.distributed.sharded import Net, fsdp
from tests.distributed.training import sgd, train
from tests.processes import run

NAMES = ("a", "b", "c")


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return sgd(nn.Linear(1, 1))


def sums(present: tuple[str, ...], **others: Any) -> StepSums:
    vectors = np.arange(6.0).reshape(3, 2)
    return StepSums(seconds=(1.0, 2.0), names=NAMES, vectors=vectors, present=present, **others)


def test_a_rank_alone_is_rank_0_of_1() -> None:
    assert (Alone().rank, Alone().size) == (0, 1)


# A step


def test_combining_returns_the_local_step(optimizer) -> None:
    local = sums(NAMES, found_inf=True, skipped="inf")
    step = Alone().combine(optimizer, 3, local)
    assert step == local
    assert np.array_equal(step.vectors, sums(NAMES).vectors)


@pytest.mark.parametrize("present", [("a", "c"), ("c", "a"), ("b",), ()])
def test_layers_that_were_not_stepped_are_dropped(optimizer, present) -> None:
    step = Alone().combine(optimizer, 3, sums(present))
    rows = [row for row, name in enumerate(NAMES) if name in present]
    assert [*step.names] == [NAMES[row] for row in rows]
    assert np.array_equal(step.vectors, sums(NAMES).vectors[rows])
    assert step.seconds == (1.0, 2.0)


def test_an_error_in_the_step_is_raised_unchanged(optimizer) -> None:
    error = ArithmeticError("it")
    with pytest.raises(ArithmeticError) as raised:
        Alone().combine(optimizer, 3, sums((), error=error))
    assert raised.value is error


def test_other_errors_are_raised_at_once_and_not_held() -> None:
    alone = Alone()
    with pytest.raises(ArithmeticError), alone.hold_errors():
        raise ArithmeticError
    assert alone.take_error() is None


# Beside steps


def test_attaching_raises_the_error_of_the_check() -> None:
    def check() -> list[torch.optim.Optimizer]:
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        Alone().attach(check)


def test_all_elements_of_all_layers_are_local() -> None:
    alone, parameters = Alone(), {"a": torch.tensor([1.0, -3.0]), "b": torch.zeros(2, 2)}
    some = torch.tensor([1])
    assert alone.part("a", None) == (None, None, None)
    part = alone.part("a", some)
    assert part.indices is some
    assert part.local is some
    assert part.positions is None
    assert alone.known(parameters) == parameters
    assert alone.parts(["a", "b"]) == {}
    history = {"a": ((1, 2), torch.zeros(1, dtype=torch.uint8))}
    assert alone.whole_history(history, ["a", "b"], 1) is history


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
def test_the_local_amax_is_returned_unchanged(scaling) -> None:
    parameters = {"a": torch.tensor([[1.0, -3.0], [0.0, 0.0]]), "b": torch.zeros(2, 2)}
    amax, has_zero = Alone().amax(parameters, scaling)
    expected, expected_zero = compute_layer_amaxes([*parameters.values()], scaling)
    assert [each.tolist() for each in amax] == [each.tolist() for each in expected]
    assert [*has_zero] == [*expected_zero]


# Compared with a process group of one rank


def observe(net: nn.Module) -> dict[str, Any]:
    records: list[StepRecord] = []
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    monitor = UpdateMonitor(net, records.append, max_elements=300, strict=True)
    with Listening() as heard, monitor.attach(optimizer):
        train(net, optimizer, 4)
        state = monitor.state_dict()
    moved = {name: (shape, each.tolist()) for name, (shape, each) in state["ever_moved"].items()}
    return {
        "records": [plain(record) for record in records],
        "moved": {name: each for name, each in moved.items() if any(each[1])},
        "amax": {name: each.tolist() for name, (_, each) in state["scales"]["amax"].items()},
        "speaks": "allreduce" in {name for name, _ in heard.said},
    }


def observe_both(rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return observe(Net()), observe(fsdp(1))


def test_a_rank_alone_gives_the_results_of_a_process_group_of_one() -> None:
    ((alone, together),) = run(observe_both, 1)
    assert (alone.pop("speaks"), together.pop("speaks")) == (False, True)
    assert len(alone["records"]) == 4
    assert len(alone["moved"]) > 5
    assert alone == together
