"""`bring_to_host`: what is measured where; tests/devices runs it on a device without float64."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from altgrad.monitor.host_step import bring_to_host
from altgrad.observation import OptimizerStep
from altgrad.observation.snapshots import Copies
from altgrad.quantization import devices


def make_step(*, found_inf: Tensor | None = None) -> OptimizerStep:
    before = torch.arange(6.0).view(2, 3), torch.zeros(4)
    return OptimizerStep(
        names=("a", "b"),
        before=before,
        gradients=tuple(each + 10 for each in before),
        after=tuple(each + 20 for each in before),
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))]),
        index=3,
        found_inf=found_inf,
    )


def test_a_step_that_is_measured_where_it_is_stays_as_it_is() -> None:
    step = make_step()
    assert bring_to_host(step, {}) is step


@pytest.mark.parametrize("found_inf", [None, torch.ones(())], ids=str)
def test_a_step_of_another_device_goes_into_the_given_memory(found_inf: Tensor | None) -> None:
    step = make_step(found_inf=found_inf)
    memory = {"a": Copies(*(torch.zeros(2, 3) for _ in range(3)))}
    with (
        mock.patch.object(devices, "EXACT", frozenset({"cuda"})),
        mock.patch.object(devices, "_HOST", torch.device("cpu", 0)),  # as if that were another one
    ):
        moved = bring_to_host(step, memory)
    assert (moved.names, moved.index, moved.optimizer) == (step.names, 3, step.optimizer)
    assert (moved.found_inf is None) is (found_inf is None)
    for field, place in (("before", 0), ("gradients", 1), ("after", 2)):
        now, then = getattr(moved, field), getattr(step, field)
        assert now[0] is memory["a"][place]
        assert now[1] is not then[1]
        assert all(map(torch.equal, now, then))


def test_a_step_without_layers_has_none_on_the_host() -> None:
    step = make_step(found_inf=torch.ones(()))
    empty = OptimizerStep((), (), (), (), step.optimizer, 0, step.found_inf)
    with (
        mock.patch.object(devices, "EXACT", frozenset({"cuda"})),
        mock.patch.object(devices, "_HOST", torch.device("cpu", 0)),
    ):
        moved = bring_to_host(empty, {})
    assert (moved.before, moved.gradients, moved.after) == ((), (), ())
    assert moved.found_inf is not None
    assert moved.found_inf.item() == 1
