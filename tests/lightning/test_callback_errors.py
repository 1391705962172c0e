"""`PrecisionMonitor`: an error or an unsupported run gives one warning, and training goes on."""

import pickle
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from altgrad import UpdateMonitor
from altgrad.report import read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, are_gone, batches, count_hooks, fit, trainer

# --- errors in the callback, in loggers and in the user's module


def test_an_internal_error_warns_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def broken(*_: Any) -> dict[str, float]:
        raise RuntimeError("broken on purpose")

    monitor = PrecisionMonitor(every_n_steps=1)
    monkeypatch.setattr("altgrad.measurement.measurer.Measurer.measure_batch", broken)
    with pytest.warns(UserWarning, match="stops observing.*broken on purpose") as caught:
        run = fit(tmp_path, monitor)
    assert len([w for w in caught if "stops observing" in str(w.message)]) == 1
    assert run.global_step == 6
    assert count_hooks(run) == 0


@pytest.mark.parametrize(
    "place",
    [
        "altgrad.measurement.measurer.Measurer.measure_batch",
        "altgrad.monitor.engine.Engine.scales_changed",
        "altgrad.observation.snapshots.Snapshots.take",
        "altgrad.monitor.recorder.step_record",
        "altgrad.output.charts.Charts.add",
    ],
)
def test_training_goes_on_after_an_error_with_two_callbacks(
    tmp_path: Path, monkeypatch: Any, place: str
) -> None:
    """torch iterates over the hooks while they run, so that removing one there is an error."""

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory, on purpose")

    failing, other = PrecisionMonitor(every_n_steps=1), PrecisionMonitor("e5m2", every_n_steps=1)
    monkeypatch.setattr(place, out_of_memory)
    run = trainer(tmp_path, failing, other)
    with pytest.warns(UserWarning, match="stops observing after .*out of memory"):
        run.fit(Net(), batches(6))
    assert run.global_step == 6
    assert count_hooks(run) == 0


def test_the_notice_of_an_error_has_its_type_and_message(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*_: Any) -> Any:
        raise ArithmeticError("broken on purpose")

    monkeypatch.setattr("altgrad.output.charts.Charts.add", broken)
    expected = r"^PrecisionMonitor stops observing after an error: ArithmeticError\('broken"
    with pytest.warns(UserWarning, match=expected):
        fit(tmp_path, PrecisionMonitor(every_n_steps=1))


@pytest.mark.parametrize(
    "place",
    ["altgrad.measurement.measurer.Measurer.measure_batch", "altgrad.output.charts.Charts.add"],
)
def test_strict_re_raises_an_error_in_the_training(
    tmp_path: Path, monkeypatch: Any, place: str
) -> None:
    def broken(*_: Any) -> Any:
        raise ArithmeticError("broken on purpose")

    monkeypatch.setattr(place, broken)
    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1, strict=True))
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        run.fit(Net(), batches(3))
    assert count_hooks(run) == 0


def test_the_error_of_the_user_is_raised_if_the_state_cannot_be_read(
    tmp_path: Path, monkeypatch: Any, made: Any
) -> None:
    """After an error of an accelerator, tensors on it cannot be copied."""

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
    assert count_hooks(run) == 0
    assert are_gone(made)
    assert monitor.state_dict() == {}


@pytest.mark.parametrize("strict", [False, True])
def test_a_logger_is_dropped_after_an_error_and_the_others_go_on(
    tmp_path: Path, strict: bool
) -> None:
    class Full(TensorBoardLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any("-AltGrad" in key for key in metrics):
                raise OSError("no space left")

    monitor = PrecisionMonitor(every_n_steps=1, strict=strict)
    other = CSVLogger(tmp_path / "other")
    run = trainer(tmp_path, monitor, logger=[Full(tmp_path), other])
    if strict:
        with pytest.raises(OSError, match="no space left"):
            run.fit(Net(), batches(3))
        return
    with pytest.warns(UserWarning, match="goes on without Full, which failed: OSError") as caught:
        run.fit(Net(), batches(3))
    assert run.global_step == 3
    assert len([each for each in caught if "without Full" in str(each.message)]) == 1
    assert len(Path(other.log_dir, "metrics.csv").read_text().splitlines()) > 3
    assert read(monitor.path).steps == (0, 1, 2)


def test_a_warning_is_given_once_in_each_training(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(every_n_steps=100)
    for callback in (monitor, monitor, pickle.loads(pickle.dumps(monitor))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            fit(tmp_path, callback)
        notices = [str(each.message) for each in caught if "PrecisionMon" in str(each.message)]
        assert len(notices) == 1
        assert "observed no step" in notices[0]


# --- runs that cannot be observed


def test_a_run_in_bf16_has_one_warning_of_each_kind(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match=r"cannot judge bf16 for weights.*torch\.bfloat16"),
        pytest.warns(UserWarning, match=r"expects weight decay to be lost in layers\.0\.weight"),
        pytest.warns(UserWarning, match=r"expects exp_avg_sq of layers\.0\.weight.* stay large"),
    ):
        fit(tmp_path, PrecisionMonitor(), precision="bf16-true")


def test_a_refused_strategy_gives_a_warning() -> None:
    monitor, module = PrecisionMonitor(run_file=False), Net()
    optimizer = module.configure_optimizers()
    run = SimpleNamespace(
        strategy=type("Other", (), {})(),
        lightning_module=module,
        is_global_zero=True,
        world_size=2,
        optimizers=[optimizer],
        callbacks=[monitor],
        log_every_n_steps=1,
    )
    with pytest.warns(UserWarning, match="does not observe this run.*: Other has 2 processes"):
        monitor.on_train_start(run, module)
    assert count_hooks(run) == 0
    monitor.on_train_batch_end(run, module)
    references = [weakref.ref(run.strategy), weakref.ref(module), weakref.ref(optimizer)]
    del run, module, optimizer
    assert are_gone(references)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.(script|interface). is deprecated"
)  # torch deprecates what it imports itself
def test_a_warning_names_the_layers_of_optimizers_in_backward(tmp_path: Path) -> None:
    # Private: torch has no public function to step optimizers inside the backward pass.
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
    assert count_hooks(run) == 0


def test_an_optimizer_with_copied_parameters_gives_a_warning(tmp_path: Path) -> None:
    """In DeepSpeed ZeRO, the optimizer steps flat copies of the parameters."""

    class Copies(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            flat = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters()]))
            return torch.optim.SGD([flat], lr=0.1)

    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1))
    with pytest.warns(UserWarning, match="SGD steps none of the observed parameters.*DeepSpeed"):
        run.fit(Copies(), batches(3))
    assert run.global_step == 3


def test_the_other_optimizers_are_observed_if_one_cannot_be(tmp_path: Path) -> None:
    """The temperature of soft actor-critic is a tensor outside the module."""

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


def test_a_module_without_parameters_gives_a_warning_and_trains(tmp_path: Path) -> None:
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


@pytest.mark.filterwarnings("ignore:.*returned .None., this fit will run with no optimizer")
def test_a_module_without_an_optimizer_gives_a_warning(tmp_path: Path) -> None:
    class Idle(Net):
        def configure_optimizers(self) -> None:
            return None

    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1))
    with pytest.warns(UserWarning, match=r"observe this run.*configure_optimizers\(\) of the mod"):
        run.fit(Idle(), batches(2))


# --- runs without an observed step


def test_a_run_without_an_observed_step_gives_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="observed no step"):
        fit(tmp_path, PrecisionMonitor(every_n_steps=100))


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_the_warning_counts_the_skipped_steps_by_reason(tmp_path: Path) -> None:
    class Nothing(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> None:
            return None

    with pytest.warns(UserWarning, match="observed no step: all were skipped, .'no gradients': 3"):
        trainer(tmp_path, PrecisionMonitor(every_n_steps=1)).fit(Nothing(), batches(3))


def test_the_warning_of_skipped_steps_says_that_layers_moved(tmp_path: Path) -> None:
    class InBackward(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            def step(parameter: Tensor) -> None:
                parameter.data.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None

            for parameter in self.parameters():
                parameter.register_post_accumulate_grad_hook(step)
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.warns(UserWarning, match="PrecisionMonitor") as caught:
        trainer(tmp_path, PrecisionMonitor(every_n_steps=1)).fit(InBackward(), batches(3))
    texts = [str(each.message) for each in caught]
    expected = "observed no step: all were skipped, {'no gradients': 3}, and yet layers moved"
    (number,) = (n for n, text in enumerate(texts) if text.endswith(expected))
    assert "hooks inside the backward pass" in texts[number + 1]


@pytest.mark.filterwarnings("ignore:You are trying to .self.log")
def test_the_warning_of_a_barebones_trainer_names_the_argument_to_pass(tmp_path: Path) -> None:
    run = pl.Trainer(
        barebones=True,
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=PrecisionMonitor(),
    )
    with pytest.warns(UserWarning, match="logs at no step: pass every_n_steps"):
        run.fit(Net(), batches(2))
