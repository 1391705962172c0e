"""`Session`: notices, merged records, and the state after the end."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from altgrad import LostRankError, UpdateMonitor, model_figures
from altgrad.report import read
from altgrad_lightning import PrecisionMonitor
from altgrad_lightning.notices import Notices
from altgrad_lightning.result import Result
from altgrad_lightning.session import Session
from altgrad_lightning.settings import Settings
from tests.lightning.runs import Net, count_hooks

MONITOR = "altgrad_lightning.session.UpdateMonitor"


def settings(**others: Any) -> Settings:
    """Return the settings of `PrecisionMonitor("bf16", every_n_steps=1)`, with some replaced."""
    chosen = {"formats": PrecisionMonitor("bf16").formats, "every_n_steps": 1, "scaling": "tensor"}
    chosen |= {"layer_charts": 8, "histograms": False, "run_file": False, "max_elements": 4096}
    chosen |= {"recipes": (), "twin_elements": 256}
    chosen |= {"sampling": (), "overhead_budget": None, "seed": 0, "strict": False}
    return Settings(**chosen | others)


def make_session(
    *, is_first: bool = True, state: dict[str, Any] | None = None
) -> tuple[Session, SimpleNamespace, Net, Result]:
    """Make a session for a module with two optimizers, each for one linear layer."""
    module, callback = Net(), PrecisionMonitor()
    run = SimpleNamespace(
        strategy=None,
        lightning_module=module,
        is_global_zero=is_first,
        world_size=1,
        optimizers=[torch.optim.SGD(each.parameters(), lr=0.1) for each in module.layers[:2]],
        callbacks=[callback],
        loggers=[],
        precision_plugin=None,
        global_step=1,
        # Private in Lightning, like the attribute that `Session` reads for the logged step.
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0)),
    )
    result = Result(state=state or {})
    session = Session(run, module, callback, settings(), Notices(), result)
    return session, run, module, result


def step(run: SimpleNamespace, module: Net, *which: int) -> None:
    for index in which:
        module.zero_grad()
        module.layers(torch.randn(4, 8)).square().sum().backward()
        run.optimizers[index].step()


def warned(do: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        do()
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(("is_first", "own"), [(True, ["PrecisionMonitor warns"]), (False, [])])
def test_notices_of_the_session_are_given_on_the_first_rank_only(
    is_first: bool, own: list[str]
) -> None:
    session, *_ = make_session(is_first=is_first)
    assert warned(lambda: session.warn("warns")) == own


@pytest.mark.parametrize("is_first", [True, False])
def test_notices_of_the_monitor_are_given_once_on_every_rank(
    monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    class Talking(UpdateMonitor):
        def __init__(self, *arguments: Any, warn: Any = None, **options: Any) -> None:
            super().__init__(*arguments, warn=warn, **options)
            if warn is not None:
                warn("lost rank 1")

    monkeypatch.setattr(MONITOR, Talking)
    session, run, *_ = make_session(is_first=is_first)
    assert warned(session.attach) == ["PrecisionMonitor lost rank 1"]
    run.optimizers = run.optimizers[:1]
    assert warned(session.attach) == []
    session.end()


def test_a_lost_rank_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    class Lonely(UpdateMonitor):
        def attach(self, *_: Any, **__: Any) -> Any:
            attempts.append(1)
            raise LostRankError("rank 0 of 2 is alone")

    monkeypatch.setattr(MONITOR, Lonely)
    session, run, *_ = make_session()
    messages = warned(lambda: attempts.append(session.start(None)))
    assert messages == ["PrecisionMonitor does not observe this run: rank 0 of 2 is alone"]
    assert attempts == [1, False]
    assert count_hooks(run) == 0


def test_the_records_of_a_batch_are_merged(tmp_path: Path) -> None:
    session, run, module, result = make_session()
    assert session.start(tmp_path)
    session.finish_batch()
    assert result.latest_step is None  # no step yet
    step(run, module, 0, 1, 0)
    session.finish_batch()
    assert [*result.latest] == [f"layers.{k}.{name}" for k in (0, 1) for name in ("weight", "bias")]
    merged = model_figures([*result.latest.values()])
    assert result.latest_model == pytest.approx(merged, rel=0, abs=0, nan_ok=True)
    assert result.latest_step == 0
    first = result.latest
    step(run, module, 1)
    session.finish_batch()
    assert [*result.latest] == ["layers.1.weight", "layers.1.bias"]
    assert result.latest["layers.1.weight"] != first["layers.1.weight"]
    session.end()


def test_replaced_optimizers_are_observed_with_the_state_so_far(tmp_path: Path) -> None:
    session, run, module, _ = make_session()
    assert session.start(tmp_path)
    assert not session.has_other_optimizers
    step(run, module, 0)
    before = session.state_dict()["monitor"]
    old, run.optimizers = run.optimizers, [torch.optim.SGD(module.parameters(), lr=0.1)]
    assert session.has_other_optimizers
    assert session.attach()
    after = session.state_dict()["monitor"]
    assert after["last_seen"] == before["last_seen"] != {}
    assert after["ever_moved"].keys() == before["ever_moved"].keys() != set()
    assert count_hooks(SimpleNamespace(optimizers=old)) == 0
    assert count_hooks(run) == 2
    session.end()
    assert count_hooks(run) == 0


def test_the_result_has_the_state_and_the_verdicts_after_the_end(tmp_path: Path) -> None:
    session, run, module, result = make_session()
    session.start(tmp_path)
    step(run, module, 0)
    session.finish_batch()
    state, assessment = session.state_dict(), session.assessment
    assert result.state == {}
    assert result.assessment is None
    session.end()
    assert result.state["monitor"]["last_seen"] == state["monitor"]["last_seen"] != {}
    assert result.state["output"] == state["output"] != {}
    assert result.assessment.summary == assessment.summary
    twin = make_session(state=result.state)[0]
    assert twin.state_dict() == result.state


@pytest.mark.parametrize(("alone", "is_shared"), [(True, True), (False, True), (True, False)])
def test_the_state_is_dropped_if_other_ranks_would_be_needed(
    monkeypatch: pytest.MonkeyPatch, alone: bool, is_shared: bool
) -> None:
    monkeypatch.setattr(UpdateMonitor, "is_shared", property(lambda _: is_shared))
    session, run, module, result = make_session()
    session.start(None)
    step(run, module, 0)
    session.end(alone=alone)
    assert (result.state == {}) == (alone and is_shared)


def test_other_ranks_are_not_waited_for_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(_: UpdateMonitor) -> Any:
        raise AssertionError("it waits")

    session, run, module, result = make_session()
    session.start(tmp_path)
    step(run, module, 0)
    monkeypatch.setattr(UpdateMonitor, "is_shared", property(lambda _: True))
    monkeypatch.setattr(UpdateMonitor, "state_dict", wait)
    session.finish_after_error()
    assert result.latest_step == 0
    assert read(result.path).steps == (0,)
    session.end(alone=True)


def test_ranks_after_the_first_write_nothing(tmp_path: Path) -> None:
    session, run, module, result = make_session(is_first=False)
    assert session.start(tmp_path)
    step(run, module, 0)
    session.finish_batch()
    session.end()
    assert result.latest
    assert (result.path, result.assessment, result.state["output"]) == (None, None, None)
    assert [*tmp_path.iterdir()] == []
