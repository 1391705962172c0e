"""`Checkpoint`: a run that goes on from a state goes on as if it had not stopped."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from altgrad import StepRecord, UpdateMonitor
from altgrad.distributed.host_group import LostRankError
from altgrad.distributed.peers import Alone
from tests.monitor.watching import FORMATS, assert_equal_figures, net, train, watched


def test_loading_a_state_into_an_attached_monitor_is_an_error() -> None:
    model = net()
    _, monitor, _ = watched(model)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) before attach\(\)"):
        monitor.load_state_dict(monitor.state_dict())


def test_a_state_without_an_entry_is_an_error_that_names_it() -> None:
    model = net()
    optimizer, monitor, _ = watched(model)
    train(model, optimizer)
    state = monitor.state_dict()
    for name in {*state} - {"samples", "twins", "starts"}:  # which version 0.1.0 did not write
        rest = {other: value for other, value in state.items() if other != name}
        with pytest.raises(ValueError, match=rf"'{name}'\] are missing; leave out load_state_dict"):
            UpdateMonitor(net(), formats=FORMATS).load_state_dict(rest)


def watch_six_steps(stop: int | None, **options: Any) -> list[StepRecord]:
    """Return the records of six steps, if wanted with another monitor from step `stop` on."""
    model = net()
    optimizer, monitor, records = watched(model, **options)
    for step in range(6):
        if step == stop:
            state = copy.deepcopy(monitor.state_dict())
            monitor.detach()
            settings = {"formats": FORMATS, "max_elements": None, "strict": True} | options
            monitor = UpdateMonitor(model, records.append, **settings)
            monitor.load_state_dict(state)
            assert_equal_states(monitor.state_dict(), state)
            monitor.attach(optimizer)
        train(model, optimizer, seed=step)
    return records


def assert_equal_states(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal_states(value, other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal_states(*pair)
    else:
        assert one == other


def test_a_resumed_run_has_the_figures_of_a_run_that_did_not_stop() -> None:
    whole, resumed = (watch_six_steps(stop) for stop in (None, 3))
    for record, expected in zip(resumed, whole, strict=True):
        for name, figures in expected.layers.items():
            assert_equal_figures(record.layers[name], dict(figures))


@pytest.mark.parametrize("lost", ["whole_history", "exchange"])
def test_without_an_answer_of_a_rank_flags_and_twins_begin_anew(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object) -> None:
        raise LostRankError("rank 1 did not answer")

    model, said = torch.nn.Linear(8, 8), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    for strict in (False, True):
        monitor = UpdateMonitor(model, recipes="bf16", warn=said.append, strict=strict)
        with monitor.attach(optimizer):
            model(torch.ones(8)).sum().backward()
            optimizer.step()
            with monkeypatch.context() as patch:
                patch.setattr(Alone, "size", 2)
                patch.setattr(Alone, lost, lose)
                if strict:
                    with pytest.raises(LostRankError):
                        monitor.state_dict()
                else:
                    states = [monitor.state_dict(), monitor.state_dict()]
    for state in states:
        assert (state["ever_moved"], state["twins"]["lanes"]) == ({}, [])
        assert [*state["last_seen"]] == ["weight", "bias"]
        UpdateMonitor(model, recipes="bf16", strict=True, warn=pytest.fail).load_state_dict(state)
    (notice,) = said
    assert notice == (
        "state_dict() was not called on every rank, so that never_moved_frac and twins will begin "
        "anew: rank 1 did not answer"
    )
