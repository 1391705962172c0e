"""`TrainingSteps`: which steps are observed, and when a training step is shown."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from altgrad import SamplingRule, StepRecord
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.monitor.policy import StepPolicy
from altgrad.monitor.sharding import Sharding
from altgrad.monitor.training_steps import TrainingSteps
from altgrad.observation import StepOutcome
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization.format_set import FormatSet

FORMATS = FormatSet("bf16")


class Recorder:
    """A recorder whose records have layers and no figures, and that notes its calls."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters
        self.prepared: list[Optimizer] = []
        self.given: Any = None

    def prepare(self, optimizer: Optimizer) -> None:
        self.prepared.append(optimizer)

    def find_attached(self) -> dict[str, Tensor]:
        return self.parameters

    def make_record(self, outcome: StepOutcome, seconds: tuple[float, float]) -> Any:
        if outcome.error is not None:
            raise outcome.error
        if self.given is None or isinstance(self.given, str):
            return self.given
        return StepRecord(outcome.index, {name: {} for name in self.given}, {}, *seconds)


class Run:
    """The training steps of a small model, without a monitor."""

    def __init__(self, every_n_steps: Any = 1, rules: Sequence[SamplingRule] = ()) -> None:
        self.model = nn.Linear(2, 2)
        self.optimizer = SGD(self.model.parameters(), lr=0.1)
        registry = ParameterRegistry(self.model)
        names = [*registry.names.values()]
        policy = StepPolicy(every_n_steps, None)
        own = {"every_n_steps": policy.every_n_steps, "max_elements": 100, "seed": 0}
        settings = LayerSettings(names, rules, FORMATS, FORMATS.formats, **own)
        self.recorder = Recorder(dict(self.model.named_parameters()))
        self.records: list[tuple[Optimizer, StepRecord]] = []
        self.skipped: list[str] = []
        self.steps = TrainingSteps(
            policy,
            MeasuredLayers(registry, settings),
            self.recorder,
            Sharding(),
            threading.RLock(),
            lambda *shown: self.records.append(shown),
            self.skipped.append,
        )

    def finish(self, index: int, given: Any, error: Exception | None = None) -> None:
        self.recorder.given = given
        self.steps.finish(StepOutcome(self.optimizer, index, None, None, error))


def test_steps_that_are_due_are_prepared() -> None:
    run = Run(every_n_steps=3)
    assert [run.steps.begin(run.optimizer, index) for index in range(4)] == [
        *(False, False, True, False)
    ]
    assert run.recorder.prepared == [run.optimizer]


def test_an_error_of_the_schedule_is_raised_to_the_caller() -> None:
    run = Run(every_n_steps=lambda index: 1 // index)
    with pytest.raises(ZeroDivisionError):
        run.steps.begin(run.optimizer, 0)


def test_the_record_of_a_step_outside_of_backward_is_shown_at_once() -> None:
    run = Run()
    run.finish(4, ["weight", "bias"])
    ((optimizer, record),) = run.records
    assert (optimizer, record.index, [*record.layers]) == (run.optimizer, 4, ["weight", "bias"])
    assert run.steps.last_seen == {"weight": 4, "bias": 4}


def test_a_step_that_moved_no_weight_is_counted_and_not_shown() -> None:
    run = Run()
    run.finish(0, "no gradients")
    run.finish(1, None)  # none of the layers is measured
    assert (run.records, run.skipped, run.steps.last_seen) == ([], ["no gradients"], {})


def test_an_error_of_a_step_is_raised_and_nothing_is_shown() -> None:
    run = Run()
    with pytest.raises(ValueError, match="on purpose"):
        run.finish(0, ["weight"], ValueError("on purpose"))
    assert (run.records, run.skipped) == ([], [])


def test_a_layer_is_due_an_interval_after_the_step_that_measured_it() -> None:
    run = Run(rules=[SamplingRule("bias", every_n_steps=3)])
    run.finish(0, ["weight", "bias"])
    due = [[name for name in ("weight", "bias") if run.steps.is_layer_due(name, i)] for i in (1, 3)]
    assert due == [["weight"], ["weight", "bias"]]


def test_a_resumed_run_goes_on_with_the_intervals() -> None:
    rules = [SamplingRule("bias", every_n_steps=3)]
    run, resumed = Run(rules=rules), Run(rules=rules)
    run.finish(0, ["weight", "bias"])
    resumed.steps.load_state_dict(run.steps.state_dict())
    assert resumed.steps.state_dict() == {"last_seen": {"weight": 0, "bias": 0}, "budgets": None}
    assert not resumed.steps.is_layer_due("bias", 1)


@pytest.mark.parametrize("ends_by", ["end", "close", "the next pass"])
def test_steps_inside_a_backward_pass_are_one_record(ends_by: str) -> None:
    run = Run()
    optimizers = {each: SGD([each], lr=0.1) for each in run.model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizer = optimizers[parameter]
        assert run.steps.begin(optimizer, 0)
        run.recorder.given = [next(n for n, p in run.model.named_parameters() if p is parameter)]
        run.steps.finish(StepOutcome(optimizer, 0, None, None, None))

    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    run.recorder.parameters = {}  # nothing is expected: the training step is not known to be whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("altgrad.monitor.backward_steps.merge_records", merge)
        run.model(torch.ones(2)).sum().backward()
        assert run.records == []
        if ends_by == "the next pass":
            run.model(torch.ones(2)).sum().backward()
        else:
            getattr(run.steps, ends_by)()
    ((_, record),) = run.records
    assert (record.index, [*record.layers]) == (0, ["weight", "bias"])


def merge(records: Sequence[StepRecord]) -> StepRecord:
    """Join the layers of records that have no figures."""
    layers = {name: figures for each in records for name, figures in each.layers.items()}
    return StepRecord(0, layers, {}, 0.0, 0.0)
