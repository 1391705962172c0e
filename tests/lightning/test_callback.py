"""`PrecisionMonitor`: what it logs, that it is true, and that training does not notice it."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from altgrad import FloatFormat, UpdateMonitor
from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.observation.snapshots import Snapshots
from altgrad.report import read
from altgrad_lightning import PrecisionMonitor
from tests.counting import host_copies
from tests.lightning.runs import (
    Net,
    RecordingAdamW,
    assert_are_of_last_step,
    batches,
    fit,
    hooks_of,
    logged,
    trainer,
)

PER_FORMAT = (
    *("kept_update_ratio", "stall_frac", "stiffness_mean"),
    *("grad_stiff_correlation", "grad_below_stiffness_frac"),
)
PER_LAYER = ("update_rms", "update_weight_ratio", "unmoved_frac", "ulp_mean", "ulp_zero_frac")
OF_ITSELF = ("own_share", "elements", "skipped_steps")


Attached = Callable[..., tuple[PrecisionMonitor, pl.Trainer, Net]]


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Attached]:
    """Makes what there is in mid-training."""
    started: list[PrecisionMonitor] = []

    def start(module: Net | None = None) -> tuple[PrecisionMonitor, pl.Trainer, Net]:
        monitor, module = PrecisionMonitor(every_n_steps=1), module or Net()
        run = trainer(tmp_path, monitor)
        run.fit(module, batches(1))
        monitor.on_train_start(run, module)
        assert hooks_of(run) == 2
        started.append(monitor)
        return monitor, run, module

    yield start
    for monitor in started:
        monitor.teardown()


def test_the_event_file_holds_the_metrics_under_the_designed_keys(tmp_path: Path) -> None:
    monitor = PrecisionMonitor()
    run = fit(tmp_path, monitor)
    scalars = logged(run.logger.log_dir)
    layers = [name for name, _ in Net().named_parameters()]
    formats = ("bf16", "e4m3fn", "e5m2")
    expected = {f"altgrad/{metric}/{layer}" for metric in PER_LAYER for layer in layers}
    expected |= {
        f"altgrad/{metric}/{format}/{layer}"
        for metric in PER_FORMAT
        for format in formats
        for layer in layers
    }
    expected |= {f"altgrad/monitor/{key}" for key in OF_ITSELF}
    expected |= {f"altgrad/{metric}" for metric in LAYER_METRICS}
    expected |= {f"altgrad/{metric}/{format}" for metric in FORMAT_METRICS for format in formats}
    assert {tag for tag in scalars if tag.startswith("altgrad/")} == expected
    step, stalled = scalars["altgrad/stall_frac/bf16/layers.2.weight"][-1]
    assert stalled == 1.0  # a LayerNorm gain
    assert step == monitor.latest_step
    kept = scalars["altgrad/kept_update_ratio/e4m3fn/layers.0.weight"][-1][1]
    assert kept == pytest.approx(monitor.latest["layers.0.weight"]["kept_update_ratio/e4m3fn"])


def test_steps_are_those_at_which_lightning_logs_the_loss(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor())
    scalars = logged(run.logger.log_dir)
    steps = [step for step, _ in scalars["loss"]]
    assert steps == [1, 3, 5]
    assert [step for step, _ in scalars["altgrad/stall_frac/bf16/layers.0.weight"]] == steps


def test_steps_are_those_of_the_loss_with_accumulation_too(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(), accumulate_grad_batches=2, log_every_n_steps=1)
    scalars = logged(run.logger.log_dir)
    loss_steps = [step for step, _ in scalars["loss"]]
    own_steps = [step for step, _ in scalars["altgrad/stall_frac/bf16/layers.0.weight"]]
    assert own_steps == loss_steps == [0, 1, 2]


def test_every_n_steps_is_independent_of_the_trainer(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(every_n_steps=3))
    own = logged(run.logger.log_dir)["altgrad/stall_frac/bf16/layers.0.weight"]
    assert [step for step, _ in own] == [2, 5]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:PrecisionMonitor cannot judge")  # bf16-true judged for bf16
def test_figures_are_those_of_the_step_that_happened(tmp_path: Path, options: Any) -> None:
    """Weights and gradients, clipped and accumulated, as the optimizer itself recorded them."""
    torch.manual_seed(0)
    monitor = PrecisionMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor, **options)
    module = Net(optimizer=RecordingAdamW)
    run.fit(module, batches(6))
    names = [name for name, _ in module.named_parameters()]
    assert list(monitor.latest) == names
    for name, *steps in zip(names, *run.optimizers[0].steps, strict=True):
        assert_are_of_last_step(monitor.latest[name], steps)


def test_training_is_bit_identical_with_and_without(tmp_path: Path) -> None:
    final = []
    for callbacks in ([], [PrecisionMonitor(every_n_steps=1)]):
        torch.manual_seed(0)
        module = Net()
        trainer(tmp_path, *callbacks, gradient_clip_val=0.1).fit(module, batches(6))
        final.append([p.detach().clone() for p in module.parameters()])
        final[-1].append(torch.rand(3))  # the global generator is where it was
    assert all(torch.equal(a, b) for a, b in zip(*final, strict=True))


def test_at_most_layer_charts_layers_the_worst_and_fixed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    monitor = PrecisionMonitor(layer_charts=2, formats=["bf16"])
    run = trainer(tmp_path, monitor)
    run.fit(Net(depth=4), batches(6))
    tags = [tag for tag in logged(run.logger.log_dir) if tag.startswith("altgrad/stall_frac/bf16/")]
    assert len(tags) == 2
    assert "altgrad/stall_frac/bf16/layers.4.weight" in tags  # the frozen gain keeps nothing
    assert len(monitor.latest) == 10


def test_default_board_stays_small_for_a_deep_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, PrecisionMonitor())
    run.fit(Net(depth=60), batches(2))
    own = [tag for tag in logged(run.logger.log_dir) if tag.startswith("altgrad/")]
    of_model = len(OF_ITSELF) + len(LAYER_METRICS) + 3 * len(FORMAT_METRICS)
    assert len(own) == 8 * (len(PER_LAYER) + 3 * len(PER_FORMAT)) + of_model
    assert len(own) <= 300


def test_a_step_that_is_not_due_copies_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    taken = []
    original = Snapshots.take

    def counting(*arguments: Any) -> Any:
        taken.append(1)
        return original(*arguments)

    monkeypatch.setattr(Snapshots, "take", counting)
    fit(tmp_path, PrecisionMonitor(every_n_steps=3), steps=6)
    assert len(taken) == 2


def test_nothing_is_left_behind_after_a_run_or_an_exception(tmp_path: Path) -> None:
    class Failing(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
            if batch_index == 3:
                raise KeyError("the user's own error")
            return super().training_step(batch, batch_index)

    for module in (Net(), Failing()):
        monitor = PrecisionMonitor(every_n_steps=1)
        run = trainer(tmp_path, monitor)
        try:
            run.fit(module, batches(6))
        except KeyError:
            assert isinstance(module, Failing)
        assert hooks_of(run) == 0
        assert monitor._monitor is None
        assert monitor._optimizers == []
        assert monitor.latest_step == (2 if isinstance(module, Failing) else 5)


def test_fitting_twice_observes_both_times_without_doubling(tmp_path: Path) -> None:
    monitor = PrecisionMonitor()
    for _ in range(2):
        run = fit(tmp_path, monitor)
        assert monitor.latest_step == 5
        assert hooks_of(run) == 0


def test_a_fault_of_its_own_warns_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def broken(*_: Any) -> dict[str, float]:
        raise RuntimeError("broken on purpose")

    monitor = PrecisionMonitor(every_n_steps=1)
    monkeypatch.setattr("altgrad.measurement.measurer.Measurer.measure_batch", broken)
    with pytest.warns(
        UserWarning, match="stops observing after a fault.*broken on purpose"
    ) as warnings:
        run = fit(tmp_path, monitor)
    assert len([w for w in warnings if "fault" in str(w.message)]) == 1
    assert run.global_step == 6
    assert hooks_of(run) == 0


@pytest.mark.parametrize(
    "place",
    [
        "altgrad.measurement.measurer.Measurer.measure_batch",
        "altgrad.monitor.step_measuring.StepMeasuring.scales_changed",
        "altgrad.observation.snapshots._copy_all",
        "altgrad.measurement.step_record.StepVectors.record",
        "altgrad_lightning.charts.Charts.add",
    ],
)
def test_a_fault_does_not_end_the_training_whoever_else_has_hooks(
    tmp_path: Path, monkeypatch: Any, place: str
) -> None:
    """torch iterates over the hooks while they run, so that none may be removed there."""

    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("out of memory, on purpose")

    faulty, other = PrecisionMonitor(every_n_steps=1), PrecisionMonitor("e5m2", every_n_steps=1)
    monkeypatch.setattr(place, out_of_memory)
    run = trainer(tmp_path, faulty, other)
    with pytest.warns(UserWarning, match="stops observing after a fault"):
        run.fit(Net(), batches(6))
    assert run.global_step == 6
    assert hooks_of(run) == 0


@pytest.mark.parametrize(
    "place",
    ["altgrad.measurement.measurer.Measurer.measure_batch", "altgrad_lightning.charts.Charts.add"],
)
def test_strict_raises_a_fault_into_the_training(
    tmp_path: Path, monkeypatch: Any, place: str
) -> None:
    def broken(*_: Any) -> Any:
        raise ArithmeticError("broken on purpose")

    monkeypatch.setattr(place, broken)
    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1, strict=True))
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        run.fit(Net(), batches(3))
    assert hooks_of(run) == 0


def test_an_error_of_the_user_is_raised_although_the_state_cannot_be_had(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """As after a fault of an accelerator, from which nothing can be copied any more."""

    class Failing(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
            raise KeyError("the user's own error")

    def out_of_order(_: UpdateMonitor) -> Any:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(UpdateMonitor, "state_dict", out_of_order)
    monitor = PrecisionMonitor()
    run = trainer(tmp_path, monitor)
    with (
        pytest.warns(UserWarning, match="PrecisionMonitor could not save its state.*CUDA error"),
        pytest.raises(KeyError, match="the user's own error"),
    ):
        run.fit(Failing(), batches(3))
    assert hooks_of(run) == 0
    assert monitor._monitor is None


def test_it_can_be_pickled_before_and_after_a_run(tmp_path: Path) -> None:
    monitor = PrecisionMonitor()
    assert pickle.loads(pickle.dumps(monitor)).formats == monitor.formats
    fit(tmp_path, monitor)
    assert pickle.loads(pickle.dumps(monitor)).latest_step == 5


def test_a_second_run_of_another_module_is_charted_afresh(tmp_path: Path) -> None:
    monitor = PrecisionMonitor("bf16", layer_charts=1)
    fit(tmp_path, monitor)
    run = trainer(tmp_path, monitor)
    run.fit(Net(depth=4), batches(6))
    assert "layers.4.weight" in monitor.latest
    stalls = logged(run.logger.log_dir)["altgrad/stall_frac/bf16/layers.4.weight"]
    assert all(value == 1.0 for _, value in stalls)


def test_parameters_that_are_unfrozen_later_are_observed(tmp_path: Path) -> None:
    class Unfreezing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers[0].requires_grad_(False)

        def on_train_batch_start(self, _batch: Any, batch_index: int) -> None:
            if batch_index == 3:
                self.layers[0].requires_grad_(True)

    monitor = PrecisionMonitor()
    run = trainer(tmp_path, monitor, log_every_n_steps=1)
    run.fit(Unfreezing(), batches(6))
    assert not math.isnan(monitor.latest["layers.0.weight"]["stall_frac/bf16"])


def test_a_run_without_an_observed_step_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="observed no step"):
        fit(tmp_path, PrecisionMonitor(every_n_steps=100))


def test_weights_no_finer_than_the_format_are_told_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"cannot judge bf16 for weights.*torch\.bfloat16"):
        fit(tmp_path, PrecisionMonitor(), precision="bf16-true")


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_step_without_gradients_is_not_a_stall(tmp_path: Path) -> None:
    class Silent(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Any:
            return None if batch_index == 3 else super().training_step(batch, batch_index)

    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1))
    run.fit(Silent(), batches(6))
    stalls = logged(run.logger.log_dir)["altgrad/stall_frac/e5m2/layers.0.weight"]
    assert [step for step, _ in stalls] == [0, 1, 2, 4, 5]


def test_frozen_unused_and_integer_parameters(tmp_path: Path) -> None:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers[0].weight.requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(3))
            self.counts = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
            self.wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    monitor = PrecisionMonitor()
    run = trainer(tmp_path, monitor)
    with pytest.warns(UserWarning, match=r"other dtypes: \['wave'\]"):
        run.fit(Odd(), batches(6))
    assert list(monitor.latest) == [
        *("layers.0.bias", "layers.1.weight", "layers.1.bias", "layers.2.weight", "layers.2.bias")
    ]


def test_manual_optimization_without_and_with_closure(tmp_path: Path) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__(optimizer=RecordingAdamW)
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_index: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.layers(batch[0]).sum()
                self.manual_backward(loss)
                return loss

            if batch_index % 2:
                optimizer.step(closure=closure)
            else:
                closure()
                optimizer.step()

    for steps in (5, 6):  # the last step is one without, then one with a closure
        monitor = PrecisionMonitor(every_n_steps=1)
        run = trainer(tmp_path, monitor)
        run.fit(Manual(), batches(steps))
        of_first = [step[0] for step in run.optimizers[0].steps]
        assert len(of_first) == steps
        assert_are_of_last_step(monitor.latest["layers.0.weight"], of_first)


def test_a_strategy_that_cannot_be_observed_is_told() -> None:
    monitor = PrecisionMonitor(run_file=False)
    run = SimpleNamespace(
        strategy=type("Other", (), {})(),
        lightning_module=Net(),
        is_global_zero=True,
        world_size=2,
        optimizers=[],
        callbacks=[monitor],
        log_every_n_steps=1,
    )
    with pytest.warns(UserWarning, match="does not observe this run.*: Other has 2 processes"):
        monitor.on_train_start(run, Net())
    assert monitor._monitor is None
    assert monitor._trainer is None


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.(script|interface). is deprecated"
)  # torch's own, at import
def test_optimizers_in_backward_are_told_by_name_and_training_goes_on(tmp_path: Path) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    class InBackward(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            first, last = self.layers[0].parameters(), self.layers[1].parameters()
            _apply_optimizer_in_backward(torch.optim.SGD, first, {"lr": 0.1})
            return torch.optim.SGD(last, lr=0.1)

    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1))
    with pytest.warns(UserWarning, match=r"optimizer in backward: layers\.0\.weight, layers\.0\.b"):
        run.fit(InBackward(), batches(3))
    assert run.global_step == 3
    assert hooks_of(run) == 0


def test_an_optimizer_of_copies_is_told_and_training_goes_on(tmp_path: Path) -> None:
    """As DeepSpeed ZeRO does it: the optimizer steps flat copies, the parameters follow."""

    class Copies(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            flat = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters()]))
            return torch.optim.SGD([flat], lr=0.1)

    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1))
    with pytest.warns(UserWarning, match="SGD steps none of the observed parameters.*DeepSpeed"):
        run.fit(Copies(), batches(3))
    assert run.global_step == 3


class Unaware(torch.optim.SGD):
    """Moves weights whatever a GradScaler found."""

    def step(self, closure: Any = None) -> Any:
        found_inf = self.__dict__.pop("found_inf", None)
        result = super().step(closure)
        self.found_inf = found_inf
        return result


@pytest.mark.parametrize(
    ("optimizer", "lr", "found", "moves", "is_skipped"),
    [
        (partial(torch.optim.SGD, fused=True), 0.1, 0.0, True, False),
        (partial(torch.optim.SGD, fused=True), 1e-30, 0.0, False, False),
        (partial(torch.optim.SGD, fused=True), 0.1, 1.0, False, True),
        (Unaware, 0.1, 1.0, True, False),
    ],
)
def test_found_inf_comes_with_the_figures_and_counts_where_nothing_moved(
    attached: Attached, optimizer: Any, lr: float, found: float, moves: bool, is_skipped: bool
) -> None:
    """A fused optimizer is told in a tensor whether to skip the step: nobody else reads it."""

    class Told(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.parameters(), lr=lr)

    module = Told()
    nn.init.ones_(module.layers[2].bias)  # 0 would move by as little as 1e-30
    monitor, run, _ = attached(module)
    for told in (0.0, found):  # scales and elements are chosen at the first step
        module.zero_grad()
        module.layers(torch.randn(4, 8)).square().sum().backward()
        run.optimizers[0].found_inf = torch.tensor(told)
        before = [p.detach().clone() for p in module.parameters()]
        with host_copies() as copies:
            run.optimizers[0].step()
        monitor.latest = {}
        monitor.on_train_batch_end(run)
    assert copies == ["cpu"]
    assert all(map(torch.equal, before, module.parameters())) != moves
    assert monitor.skipped == ({"inf": 1} if is_skipped else {})
    assert bool(monitor.latest) != is_skipped


def test_starting_twice_does_not_double_the_hooks(attached: Attached) -> None:
    monitor, run, module = attached()
    monitor.on_train_start(run, module)
    assert hooks_of(run) == 2


@pytest.mark.parametrize("hook", ["teardown", "on_exception", "on_train_end"])
def test_each_end_of_a_run_detaches(attached: Attached, hook: str) -> None:
    monitor, run, module = attached()
    monitor.latest_step = 1  # or it would say that it observed none
    getattr(monitor, hook)(run, module)
    assert hooks_of(run) == 0
    assert monitor._monitor is None


def test_the_steps_of_a_tuner_are_not_due(attached: Attached) -> None:
    """Tuners put callbacks of their own in the place of all others."""
    monitor, run, _ = attached()
    assert monitor._is_due(0)
    run.callbacks = []
    assert not monitor._is_due(0)


def test_what_is_told_is_told_once() -> None:
    monitor = PrecisionMonitor()
    with pytest.warns(UserWarning, match="PrecisionMonitor says this"):
        monitor._tell("says this")
    monitor._tell("says this")  # a warning would be an error here


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_skipped_steps_are_those_of_the_last_fit(tmp_path: Path) -> None:
    class Silent(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Any:
            return None if batch_index == 3 else super().training_step(batch, batch_index)

    monitor = PrecisionMonitor(every_n_steps=1)
    for _ in range(2):
        trainer(tmp_path, monitor).fit(Silent(), batches(6))
        assert monitor.skipped == {"no gradients": 1}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_a_copy_made_in_mid_run_is_detached(attached: Attached, copied: Any) -> None:
    """A module that has it as a hyperparameter is saved with it."""
    monitor, run, _ = attached()
    twin = copied(monitor)
    assert twin._monitor is None
    assert twin._trainer is None
    assert twin.latest.keys() == monitor.latest.keys()
    assert hooks_of(run) == 2
    assert monitor._monitor.is_observing


@pytest.mark.parametrize("strict", [False, True])
def test_a_logger_that_fails_gets_no_more_and_the_others_go_on(
    tmp_path: Path, strict: bool
) -> None:
    class Full(TensorBoardLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(key.startswith("altgrad") for key in metrics):
                raise OSError("no space left")

    monitor = PrecisionMonitor(every_n_steps=1, strict=strict)
    other = CSVLogger(tmp_path / "other")
    run = trainer(tmp_path, monitor, logger=[Full(tmp_path), other])
    if strict:
        with pytest.raises(OSError, match="no space left"):
            run.fit(Net(), batches(3))
        return
    with pytest.warns(UserWarning, match="goes on without Full, which failed: OSError") as told:
        run.fit(Net(), batches(3))
    assert run.global_step == 3
    assert len([each for each in told if "without Full" in str(each.message)]) == 1
    assert len(Path(other.log_dir, "metrics.csv").read_text().splitlines()) > 3
    assert read(monitor.path).steps == (0, 1, 2)


def test_one_optimizer_of_other_parameters_does_not_hide_the_rest(tmp_path: Path) -> None:
    """As the temperature of soft actor-critic, a tensor that is no parameter of the module."""

    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            temperature = nn.Parameter(torch.zeros(1))
            return (
                torch.optim.SGD([temperature], lr=0.1),
                torch.optim.SGD(self.parameters(), lr=0.1),
            )

        def training_step(self, batch: list[Tensor], batch_index: int) -> None:
            _, second = self.optimizers()
            self.manual_backward(self.layers(batch[0]).sum())
            second.step()

    monitor = PrecisionMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="or a part of it: SGD steps none of the observed"):
        trainer(tmp_path, monitor).fit(Two(), batches(3))
    assert "layers.0.weight" in monitor.latest


def test_a_module_without_parameters_is_told_and_trains_on(tmp_path: Path) -> None:
    class Outside(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.outside = [nn.Parameter(torch.ones(1))]

        def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
            return self.outside[0].sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.outside, lr=0.1)

    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1))
    with pytest.warns(UserWarning, match="does not observe this run.*no parameter to observe"):
        run.fit(Outside(), batches(2))
    assert run.global_step == 2


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
def test_barebones_says_what_to_pass(tmp_path: Path) -> None:
    run = pl.Trainer(
        barebones=True,
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=PrecisionMonitor(),
    )
    with pytest.warns(UserWarning, match="logs at no step: pass every_n_steps"):
        run.fit(Net(), batches(2))


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_why_no_step_was_observed(tmp_path: Path) -> None:
    class Nothing(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> None:
            return None

    with pytest.warns(UserWarning, match="observed no step: all were skipped, .'no gradients': 3"):
        trainer(tmp_path, PrecisionMonitor(every_n_steps=1)).fit(Nothing(), batches(3))


@pytest.mark.parametrize("logger", [False, "csv"])
def test_other_loggers_and_none(tmp_path: Path, logger: Any) -> None:
    if logger == "csv":
        logger = CSVLogger(tmp_path)
    monitor = PrecisionMonitor()
    run = fit(tmp_path, monitor, logger=logger)
    assert monitor.latest_step == 5
    if logger:
        text = Path(run.logger.log_dir, "metrics.csv").read_text()
        assert "altgrad/stall_frac/bf16/layers.0.weight" in text.splitlines()[0]


def test_fast_dev_run(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(every_n_steps=1), fast_dev_run=2)
    assert run.global_step == 2


def test_a_format_of_ones_own_and_unscaled(tmp_path: Path) -> None:
    monitor = PrecisionMonitor([FloatFormat("mine", 3, 2, 3)], scaling=None)
    fit(tmp_path, monitor)
    assert not math.isnan(monitor.latest["layers.0.weight"]["stall_frac/mine"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"formats": []}, r"formats=\[\]: expected one or more"),
        ({"formats": ["bf17"]}, "nearest: bf16"),
        ({"formats": [FloatFormat("bf16", 2, 1, 1), "bf16"]}, "two different formats are named"),
        ({"every_n_steps": 0}, "every_n_steps=0: expected 1 or more"),
        ({"layer_charts": -1}, "layer_charts=-1: expected 0 or more"),
        ({"scaling": "row"}, "scaling='row': expected"),
    ],
    ids=str,
)
def test_wrong_configuration_fails_at_construction(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionMonitor(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 2.5}, "every_n_steps=2.5: expected int"),
        ({"layer_charts": True}, "layer_charts=True: expected how many layers"),
    ],
    ids=str,
)
def test_a_count_that_is_no_int(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        PrecisionMonitor(**arguments)
