"""What a training notices of twins that add up gradients themselves: nothing but operations."""

from __future__ import annotations

import collections
import gc
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad import StepRecord, UpdateMonitor
from altgrad.twins.gradient_sums import GradientSums
from tests.twins.accumulating import (
    LOW,
    RANDOM,
    accumulate,
    find_loss,
    make_adam,
    make_batches,
    watch,
)
from tests.twins.twinning import assert_equal, copy_weights, make_net, one_thread

on_one_thread = one_thread()


class Counter(TorchDispatchMode):
    """A count of all operations of torch by name, also in backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


def count_backward(net: nn.Module) -> int:
    net.zero_grad()
    losses = [find_loss(net, each, 2) for each in make_batches(0, 2)]
    with Counter() as counter:
        for each in losses:
            each.backward()
    return counter.names.total()


def test_backward_passes_have_more_operations_only_while_a_recipe_needs_them() -> None:
    net = make_net()
    optimizer = make_adam([*net.parameters()])
    plain = count_backward(net)
    watched = watch(net, optimizer, recipes=["bf16", "bf16-true"])
    optimizer.step()
    assert count_backward(net) == plain
    watched.monitor.detach()
    watched = watch(net, optimizer)
    # A gather of each micro-gradient and, of the second, one of the gradient before; and one sum.
    assert plain + 6 * 3 <= count_backward(net) <= plain + 6 * 8 + 60
    optimizer.step()
    assert count_backward(net) > plain
    watched.monitor.detach()
    assert count_backward(net) == plain


def test_a_monitor_that_is_gone_leaves_no_hook() -> None:
    net = make_net()
    optimizer = make_adam([*net.parameters()])
    plain = count_backward(net)
    watched = watch(net, optimizer)
    optimizer.step()
    assert count_backward(net) > plain
    del watched
    gc.collect()
    assert count_backward(net) == plain


def test_an_error_that_ends_the_observation_removes_the_hooks() -> None:
    def fail(record: StepRecord) -> None:
        raise RuntimeError("no place to write to")

    net = make_net()
    optimizer = make_adam([*net.parameters()])
    plain = count_backward(net)
    notices: list[str] = []
    monitor = UpdateMonitor(net, fail, recipes=LOW, warn=notices.append).attach(optimizer)
    assert count_backward(net) > plain
    optimizer.step()
    assert len(notices) == 1
    assert not monitor.is_observing
    assert count_backward(net) == plain


def test_a_step_that_is_not_observed_copies_no_more_to_the_host() -> None:
    def count(*recipes: Any) -> collections.Counter[str]:
        net = make_net()
        optimizer = make_adam([*net.parameters()])
        watched = watch(net, optimizer, recipes=recipes, every_n_steps=100)
        for index in range(2):
            with Counter() as counter:
                optimizer.zero_grad()
                accumulate(net, index, 3)
                optimizer.step()
        watched.monitor.detach()
        return counter.names

    plain, summing = count("bf16", "bf16-sr"), count(LOW, RANDOM)
    assert summing["aten.take.out"] > plain["aten.take.out"]
    # AdamW reads its counts of steps, which are on the host.
    assert summing["aten._local_scalar_dense.default"] == plain["aten._local_scalar_dense.default"]
    assert summing.keys().isdisjoint({"aten.nonzero.default", "aten.masked_select.default"})


def test_an_optimizer_that_is_not_elementwise_ends_the_hooks() -> None:
    net = make_net()
    optimizer = torch.optim.Adafactor(net.parameters(), 1e-3)
    plain = count_backward(net)
    watched = watch(net, optimizer, recipes=[LOW, "bf16"])
    count_backward(net)
    optimizer.step()
    assert any("ends the twins of low" in notice for notice in watched.notices)
    assert count_backward(net) == plain


def test_training_is_bit_for_bit_as_without_twins() -> None:
    def run(*recipes: Any) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(65, 70), nn.Dropout(0.5), nn.Linear(70, 3))
        optimizer = make_adam([*net.parameters()])
        watched = watch(net, optimizer, recipes=recipes)
        for index in range(4):
            optimizer.zero_grad()
            accumulate(net, index, 4)
            optimizer.step()
        watched.monitor.detach()
        return copy_weights(net), torch.get_rng_state()

    (plain, state), (watched, other) = run(), run(LOW, RANDOM)
    assert all(map(torch.equal, plain, watched))
    assert torch.equal(state, other)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_with_a_graph_can_be_added_up() -> None:
    net = make_net()
    optimizer = make_adam([*net.parameters()])
    watched = watch(net, optimizer)
    for inputs in make_batches(0, 3):
        gradients = torch.autograd.grad(
            find_loss(net, inputs, 1), [*net.parameters()], create_graph=True
        )
        penalty = sum(each.square().sum() for each in gradients)
        (find_loss(net, inputs, 1) + penalty).backward(create_graph=True)
    optimizer.step()
    assert_equal(watched)
    net.zero_grad()


@pytest.mark.parametrize("first", [True, False])
def test_an_error_of_a_hook_ends_these_twins_with_one_notice(first: bool) -> None:
    net = make_net()
    optimizer = make_adam([*net.parameters()])
    plain = count_backward(net)
    watched = watch(net, optimizer, recipes=[LOW, "bf16"], strict=False)

    def step() -> None:
        optimizer.zero_grad()
        accumulate(net, 0, 4)
        optimizer.step()

    if not first:
        step()
    with mock.patch.object(GradientSums, "add", side_effect=RuntimeError("broken")):
        step()
    assert [each for each in watched.notices if "broken" in each] == watched.notices
    assert len(watched.notices) == 1
    assert watched.notices[0].startswith("ends the twin of low: RuntimeError('broken')")
    step()
    assert count_backward(net) == plain
    (lane,) = watched.monitor.state_dict()["twins"]["lanes"]
    assert lane["twins"].keys() == {"bf16"}
