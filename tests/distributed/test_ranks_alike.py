"""Ranks whose monitors differ are named, at attach() or in the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from altgrad import UpdateMonitor
from tests.distributed.sharded import fsdp
from tests.distributed.training import LIMIT, all_warnings, refused, sgd, train
from tests.processes import run

SIZE = 2

DIFFERS = "DisagreementError: rank 1 differs from rank 0: expected "
STOPS = "UpdateMonitor stops observing after an error: "

# Different settings, optimizers, states


def with_settings(**settings: Any) -> str:
    net = fsdp(SIZE)
    return refused(lambda: UpdateMonitor(net, **settings).attach(sgd(net)))


def different_optimizers(rank: int) -> str:
    """Attach an optimizer that steps only parameters with local elements, as in some codebases."""
    net = fsdp(SIZE)
    filled = [p for p in net.parameters() if p.to_local().numel()]
    return refused(lambda: UpdateMonitor(net).attach(torch.optim.SGD(filled, lr=0.1)))


def different_states(rank: int) -> str:
    """Restore a checkpoint on rank 0 alone."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    with UpdateMonitor(net).attach(optimizer) as monitor:
        train(net, optimizer, 1)
        state = monitor.state_dict()
    again = UpdateMonitor(net)
    if rank == 0:
        again.load_state_dict(state)
    return refused(lambda: again.attach(optimizer))


DIFFERENT = {
    "scaling": lambda rank: with_settings(scaling="tensor" if rank else "channel"),
    "seed": lambda rank: with_settings(seed=rank),
    "recipes": lambda rank: with_settings(recipes=[["bf16", "bf16-sr"][rank]]),
    "budget": lambda rank: with_settings(overhead_budget=0.1 * (rank + 1)),
    "formats": lambda rank: with_settings(formats=["bf16", "e5m2"][: rank + 1]),
    "max_elements": lambda rank: with_settings(max_elements=100 + rank),
    "optimizers": different_optimizers,
    "state": different_states,
}


def different(rank: int, what: str) -> str:
    return DIFFERENT[what](rank)


@pytest.mark.parametrize(
    ("what", "expected", "got"),
    [
        ("scaling", "setting scaling='channel'", "setting scaling='tensor'"),
        ("seed", "setting seed=0", "setting seed=1"),
        ("recipes", "setting recipes={'bf16'", "setting recipes={'bf16-sr'"),
        ("budget", "setting overhead_budget=0.1", "setting overhead_budget=0.2"),
        ("formats", "setting formats=", "setting formats="),
        ("max_elements", "sampling rows.weight=LayerSampling(", "max_elements=101"),
        ("optimizers", "optimizer 0 steps head.weight; optimizer 0 steps head.bias", "nothing"),
        ("state", "state scales=", "state scales="),
    ],
)
def test_differences_between_ranks_are_refused_by_name(
    two, what: str, expected: str, got: str
) -> None:
    for told in two(different, what):
        assert told.startswith(f"{DIFFERS}{expected}")
        assert got in told.partition(", got ")[2]
        assert "; give every rank the same arguments, layers, optimizers and state_dict()" in told


def different_layers(rank: int) -> str:
    """Attach different layers on each rank, like the stages of a pipeline."""
    net = fsdp(SIZE)
    stage = [(n, p) for n, p in net.named_parameters() if n.startswith(("up", "down")[rank])]
    optimizer = torch.optim.SGD([p for _, p in stage], lr=0.1)
    return refused(lambda: UpdateMonitor(stage).attach(optimizer))


def test_ranks_with_different_layers_are_refused_by_name(two) -> None:
    for told in two(different_layers):
        expected = "layer up.weight (48, 64) torch.float32 (Shard(dim=0),)"
        assert told.startswith(f"{DIFFERS}{expected}")
        assert ", got layer down.weight (64, 48) torch.float32 (Shard(dim=0),); " in told
        assert "stages of a pipeline" in told


def fail_on_one_rank(rank: int) -> str:
    """Attach an optimizer that rank 1 cannot observe; rank 0 must not wait for it."""
    net = fsdp(SIZE)
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    return refused(lambda: UpdateMonitor(net).attach(other if rank else sgd(net)))


def test_no_rank_observes_if_one_rank_cannot(two) -> None:
    first, second = two(fail_on_one_rank)
    assert second.startswith("ValueError: SGD steps none of the observed parameters")
    told = "DisagreementError: rank 1 cannot observe this run: ValueError('SGD steps none"
    assert first.startswith(told)


# Different steps


def other_steps(rank: int) -> list[str]:
    """Observe by schedules that make the ranks meet at different steps; training does not wait."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    net(torch.arange(6)).backward()
    monitor = UpdateMonitor(net, every_n_steps=lambda index: index == rank).attach(optimizer)
    with monitor, all_warnings() as told:
        for _ in range(2):
            optimizer.step()
    return told


def test_ranks_that_meet_at_different_steps_report_their_own_step() -> None:
    for rank, told in enumerate(run(other_steps, SIZE)):
        assert len(told) == 1
        assert told[0].startswith(
            "UpdateMonitor stops observing after an error: ranks observe different steps or "
            f"layers, rank {rank} step {rank} of SGD with "
        )


def in_turn(rank: int) -> dict[str, Any]:
    """Step two optimizers in turn; the schedule lets each rank observe a different one."""
    net = fsdp(SIZE)
    large = torch.optim.SGD(net.up.parameters(), lr=1e-2)
    small = torch.optim.SGD([*net.five.parameters(), *net.norm.parameters()], lr=1e-2)
    asked: list[int] = []

    def every(_: int) -> bool:
        asked.append(1)
        return (len(asked) + rank) % 2 == 0

    monitor = UpdateMonitor(net, every_n_steps=every).attach(large, small)
    net(torch.arange(6)).backward()
    with all_warnings() as told:
        for _ in range(2):
            large.step()
            small.step()
    return {"told": told, "observing": monitor.is_observing}


def test_ranks_in_steps_by_different_optimizers_report_how_many_layers_they_have() -> None:
    layers = [4, 2]  # rank 1 observes the second optimizer
    for each, count in zip(run(in_turn, SIZE, collective=LIMIT), layers, strict=True):
        assert len(each["told"]) == 1
        assert "observe different steps or layers" in each["told"][0]
        assert f" step 0 of SGD with {count} layers" in each["told"][0]
        assert not each["observing"]


def other_calls(rank: int, strict: bool) -> dict[str, Any]:
    """Take a checkpoint on rank 1 while rank 0 begins the first step of another layer."""
    net = fsdp(SIZE)
    late = [*net.five.parameters()]
    first = [p for name, p in net.named_parameters() if not name.startswith("five")]
    optimizer = torch.optim.SGD(first, lr=1e-2)
    monitor = UpdateMonitor(net, strict=strict).attach(optimizer)
    train(net, optimizer, 1)
    optimizer.add_param_group({"params": late})  # ranks compare their layers in the next step
    net(torch.arange(6)).backward()
    with all_warnings() as told:
        call = refused(monitor.state_dict) if rank else ""
        step = refused(optimizer.step)
        after = refused(lambda: train(net, optimizer, 1))
    told = [each for each in told if "UpdateMonitor" in each]
    raised = {"call": call, "step": step, "after": after}
    return raised | {"told": told, "observing": monitor.is_observing}


MET_OTHERS = [
    "rank 1 called state_dict() while rank 0 called optimizer.step()",
    "rank 0 called optimizer.step() while rank 1 called state_dict()",
]


def test_ranks_in_different_calls_name_both_calls_and_training_goes_on() -> None:
    first, second = run(other_calls, SIZE, False, collective=LIMIT)
    for own, each in zip(MET_OTHERS, (first, second), strict=True):
        assert f"{STOPS}{own}: call both on all ranks, in the same order" in each["told"][-1]
        assert each["call"] == each["step"] == each["after"] == ""
        assert not each["observing"]
    assert [len(each["told"]) for each in (first, second)] == [1, 2]
    assert second["told"][0].startswith("UpdateMonitor state_dict() was not called on every rank")
    assert MET_OTHERS[1] in second["told"][0]


def test_ranks_in_different_calls_raise_an_error_that_names_both_if_strict() -> None:
    first, second = run(other_calls, SIZE, True, collective=LIMIT)
    met_others = [f"LostRankError: {own}: call both on all ranks" for own in MET_OTHERS]
    assert first["call"] == ""
    assert second["call"].startswith(met_others[1])
    for own, each in zip(met_others, (first, second), strict=True):
        assert each["step"].startswith(own)
        assert each["after"] == ""
        assert each["told"] == []
        assert not each["observing"]
