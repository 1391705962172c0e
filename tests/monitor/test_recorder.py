"""`Recorder`: every observed step has one road, whether measured, skipped or failed."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from altgrad import StepRecord, UpdateMonitor
from altgrad.distributed.peers import Alone, StepSums
from altgrad.measurement.measurer import Measurer
from altgrad.monitor.arena import Arena
from altgrad.monitor.engine import Engine
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.observation import StepOutcome
from tests.monitor.watching import FORMATS

STOPS = r"stops observing after an error: BrokenError\(\)"


class BrokenError(Exception):
    """The error of a test."""


@dataclass
class Road:
    """Record the arguments and results of each call, in order."""

    outcomes: list[StepOutcome] = field(default_factory=list)
    sums: list[StepSums] = field(default_factory=list)


@contextlib.contextmanager
def watching_the_road() -> Iterator[Road]:
    road, measure, combine = Road(), Engine.measure, Alone.combine

    def measuring(engine: Engine, outcome: StepOutcome, *others: Any) -> StepSums:
        road.outcomes.append(outcome)
        return measure(engine, outcome, *others)

    def combining(peers: Alone, optimizer: Any, index: int, local: StepSums) -> StepSums:
        assert (optimizer, index) == (road.outcomes[-1].optimizer, road.outcomes[-1].index)
        road.sums.append(local)
        return combine(peers, optimizer, index, local)

    with (
        mock.patch.object(Engine, "measure", measuring),
        mock.patch.object(Alone, "combine", combining),
    ):
        yield road


def broken(*_: object, **__: object) -> Any:
    raise BrokenError


@dataclass
class Case:
    """A step: how it is disturbed, and the expected result."""

    gradient: float | None = 0.5
    lr: float = 0.1
    found_inf: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    breaking: Callable[[], Any] = contextlib.nullcontext
    skipped: str | None = None
    fails: bool = False
    records: int = 0


def breaking(owner: type, name: str) -> Callable[[], Any]:
    return lambda: mock.patch.object(owner, name, broken)


CASES = {
    "ordinary": Case(records=1),
    "no gradients": Case(gradient=None, skipped="no gradients"),
    "learning rate 0": Case(lr=0.0, skipped="learning rate 0"),
    "inf": Case(found_inf=1.0, skipped="inf"),
    "not inf": Case(found_inf=0.0, records=1),
    "schedule": Case(options={"every_n_steps": broken}, fails=True),
    "choice of elements": Case(breaking=breaking(LayerSettings, "measured_indices"), fails=True),
    "memory": Case(breaking=breaking(Arena, "lay_out"), fails=True),
    "together": Case(breaking=breaking(Measurer, "measure_batch"), fails=True),
    "alone": Case(breaking=breaking(Measurer, "measure_tensor"), fails=True),
    "callback": Case(options={"on_record": broken}, fails=True, records=1),
}


def make_model(seed: int = 0) -> nn.Module:
    """Make a model with a layer that is measured in an arena and one that is measured alone."""
    torch.manual_seed(seed)
    return nn.ParameterDict({"small": torch.randn(30), "large": torch.randn(500, 500)})


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case) -> None:
    for parameter in model.parameters():
        gradient = case.gradient
        parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)
    if case.found_inf is not None:
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(case.found_inf), None
    optimizer.step()


def make_optimizer(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    is_fused = case.found_inf is not None
    return torch.optim.SGD(model.parameters(), lr=case.lr, fused=is_fused)


def make_monitor(model: nn.Module, case: Case, records: list[StepRecord], **more: Any):
    def on_record(record: StepRecord) -> None:
        records.append(record)
        case.options.get("on_record", lambda _: None)(record)

    options = {"formats": FORMATS, "max_elements": None, "on_record": on_record}
    others = {key: value for key, value in case.options.items() if key != "on_record"}
    return UpdateMonitor(model, **options, **others, **more)


@pytest.mark.parametrize("case", CASES.values(), ids=[*CASES])
def test_every_observed_step_is_measured_and_combined_once(case: Case) -> None:
    model, records, said = make_model(), [], []
    optimizer = make_optimizer(model, case)
    weights: list[list[Tensor]] = []

    def warn(message: str) -> None:
        said.append(message)
        weights.append([p.detach().clone() for p in model.parameters()])

    monitor = make_monitor(model, case, records, warn=warn)
    with monitor.attach(optimizer), watching_the_road() as road, case.breaking():
        make_step(model, optimizer, case)
        assert (len(road.outcomes), len(road.sums)) == (1, 1)
        is_observing = monitor.is_observing
    ((outcome,), (sums,)) = road.outcomes, road.sums
    assert (outcome.optimizer, outcome.index) == (optimizer, 0)
    # Public results: a record, a count of skipped steps, or one notice and the end of observing.
    assert len(records) == case.records
    assert monitor.latest is (records[0] if records else None)
    assert dict(monitor.skipped) == ({case.skipped: 1} if case.skipped else {})
    assert is_observing is not case.fails
    if not case.fails:
        assert (said, outcome.error, sums.error) == ([], None, None)
        return
    (message,) = said
    assert re.match(STOPS, message)
    assert message.endswith("Training goes on; strict=True would raise it")
    assert case.records == (sums.error is None)  # an error of the callback comes after the record
    # The error is reported at the end of the step, and training goes on.
    twin, plain = make_model(), Case(gradient=case.gradient, lr=case.lr)
    make_step(twin, make_optimizer(twin, plain), plain)
    assert all(map(torch.equal, weights[0], [p.detach() for p in twin.parameters()]))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fails])
def test_a_strict_monitor_raises_the_error_at_the_end_of_the_step(name: str) -> None:
    case, model = CASES[name], make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(model, case)
    monitor = make_monitor(model, case, [], strict=True).attach(optimizer)
    with case.breaking(), pytest.raises(BrokenError):
        make_step(model, optimizer, case)
    assert not monitor.is_observing
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fails])
def test_by_default_an_error_is_one_warning_that_names_the_monitor(name: str) -> None:
    case, model = CASES[name], make_model()
    optimizer = make_optimizer(model, case)
    monitor = make_monitor(model, case, [])
    with monitor.attach(optimizer), case.breaking():
        with pytest.warns(UserWarning, match=f"^UpdateMonitor {STOPS} in ") as warned:
            make_step(model, optimizer, case)
        make_step(model, optimizer, case)  # without a second warning
    assert len(warned) == 1


def test_steps_that_are_not_due_are_not_measured() -> None:
    model = make_model()
    case = Case(options={"every_n_steps": 2})
    optimizer, records = make_optimizer(model, case), []
    monitor = make_monitor(model, case, records, strict=True)
    with monitor.attach(optimizer), watching_the_road() as road:
        for _ in range(4):
            make_step(model, optimizer, case)
    assert [outcome.index for outcome in road.outcomes] == [1, 3]
    assert [record.index for record in records] == [1, 3]


def test_the_step_after_a_step_skipped_by_a_grad_scaler_is_observed() -> None:
    """A skipped step calls no `step` of the optimizer, so that nothing is measured."""
    model = make_model()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler("cpu")
    records: list[StepRecord] = []
    monitor = UpdateMonitor(model, records.append, formats=FORMATS, strict=True)
    with monitor.attach(optimizer, scaler=scaler), watching_the_road() as road:
        for factor in (float("inf"), 1.0):
            optimizer.zero_grad()
            scaler.scale(factor * sum(p.square().sum() for p in model.parameters())).backward()
            scaler.step(optimizer)
            scaler.update()
    assert dict(monitor.skipped) == {"inf": 1}
    assert len(records) == len(road.outcomes) == 1
