"""`OptimizerRun`: which check of a lane is the first, and the state of a generator."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

from altgrad.twins.lane_sorter import LaneSorter
from altgrad.twins.layer_plan import LaneKind
from altgrad.twins.optimizer_run import OptimizerRun, get_random_state

KIND = LaneKind(torch.float32, torch.float32, torch.device("cpu"), 1)


def make_run() -> OptimizerRun:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)
    return OptimizerRun(optimizer, LaneSorter(None, ()))  # type: ignore[arg-type]


def test_checks_are_first_ones_until_weights_have_moved() -> None:
    run = make_run()
    assert [run.is_first_check(KIND, has_moved=moved) for moved in (False, False, True)] == [
        *(True, True, True)
    ]
    assert not run.is_first_check(KIND, has_moved=True)
    assert run.is_first_check(KIND._replace(block=32), has_moved=True)


def test_a_run_in_which_nothing_moves_has_8_first_checks() -> None:
    run = make_run()
    firsts = [run.is_first_check(KIND, has_moved=False) for _ in range(20)]
    assert firsts == [True] * 8 + [False] * 12
    assert run.checked == {KIND}


def test_the_state_of_a_generator_changes_with_each_number() -> None:
    before = get_random_state(torch.device("cpu"))
    assert torch.equal(before, get_random_state(torch.device("cpu")))
    torch.rand(1)
    assert not torch.equal(before, get_random_state(torch.device("cpu")))


@pytest.mark.parametrize(("name", "arguments"), [("mps", ()), ("xpu:1", ("xpu:1",))])
def test_the_random_state_of_another_device_is_read_as_its_module_takes_it(
    name: str, arguments: tuple[str, ...]
) -> None:
    module = mock.Mock()
    with mock.patch.object(torch, "get_device_module", return_value=module):
        get_random_state(torch.device(name))
    module.get_rng_state.assert_called_once_with(*map(torch.device, arguments))
