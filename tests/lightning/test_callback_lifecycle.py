"""`PrecisionMonitor` from run to run: start, end, copies, and no hooks or references left."""

import copy
import html
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from altgrad.report import read, write_answer
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import (
    Attached,
    Net,
    are_gone,
    batches,
    count_hooks,
    fit,
    logged,
    step_once,
    trainer,
)


def test_no_hook_or_reference_is_left_after_a_run_or_an_exception(
    tmp_path: Path, made: Any
) -> None:
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
        assert count_hooks(run) == 0
        assert are_gone(made)
        optimizer = weakref.ref(run.optimizers[0])
        del run
        module.trainer = None  # a module keeps its Trainer alive
        assert are_gone([optimizer])
        assert monitor.latest_step == (2 if isinstance(module, Failing) else 5)


@pytest.mark.parametrize("hook", ["teardown", "on_exception", "on_train_end"])
def test_each_end_of_a_run_detaches(made: Any, attached: Attached, hook: str) -> None:
    monitor, run, module = attached()
    step_once(monitor, run, module)  # or it would warn that no step was observed
    assert not are_gone(made)
    getattr(monitor, hook)(run, module)
    assert count_hooks(run) == 0
    assert are_gone(made)


def test_a_second_start_keeps_one_pair_of_hooks(attached: Attached) -> None:
    monitor, run, module = attached()
    monitor.on_train_start(run, module)
    assert count_hooks(run) == 2


def test_the_steps_of_a_tuner_are_ignored(attached: Attached) -> None:
    """Lightning's tuners replace all callbacks of the Trainer while they run."""
    monitor, run, module = attached()
    for callbacks, is_due in (([monitor], True), ([], False), ([monitor], True)):
        latest, run.callbacks = monitor.latest, callbacks
        step_once(monitor, run, module)
        assert (monitor.latest is not latest) == is_due


def test_fast_dev_run_trains_with_the_callback(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(every_n_steps=1), fast_dev_run=2)
    assert run.global_step == 2


@pytest.mark.pictures
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_ends_early_logs_the_last_pictures_and_verdicts(
    tmp_path: Path,
    error: type[BaseException],
    monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Ending(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 6:
                raise error

    # Lightning turns SIGINT off for the shutdown.
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monitor = PrecisionMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor)
    with pytest.raises((SystemExit, error)):
        run.fit(Ending(), batches(8))
    tags = EventAccumulator(run.logger.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()
    assert [event.step for event in tags.Images("5-AltGrad-ranges/ranges")] == [0, 3, 5]
    texts = tags.Tensors("altgrad/verdict/text_summary")
    assert [event.step for event in texts] == [0, 3, 5]
    text = html.unescape(texts[-1].tensor_proto.string_val[0].decode())
    assert write_answer(monitor.assessment.runs) in text
    assert "Not fine: e4m3fn, e5m2." in text
    printed = f"altgrad report {monitor.path}" in capsys.readouterr().out
    assert printed == (error is KeyboardInterrupt)


def test_the_step_of_a_batch_that_ctrl_c_ended_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    class Ending(pl.Callback):
        def on_train_batch_end(self, run: pl.Trainer, *_: Any) -> None:
            if run.global_step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monitor = PrecisionMonitor(every_n_steps=1)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer(tmp_path, Ending(), monitor, logger=False).fit(Net(), batches(4))
    assert read(monitor.path).steps == (0, 1, 2)
    assert monitor.latest_step == 2


# --- several runs


def test_a_second_fit_is_observed_and_leaves_no_hooks(tmp_path: Path) -> None:
    monitor = PrecisionMonitor()
    for _ in range(2):
        run = fit(tmp_path, monitor)
        assert monitor.latest_step == 5
        assert count_hooks(run) == 0


def test_a_second_run_chooses_its_charted_layers_anew(tmp_path: Path) -> None:
    monitor = PrecisionMonitor("bf16", layer_charts=1, charts="all")
    fit(tmp_path, monitor)
    run = trainer(tmp_path, monitor)
    run.fit(Net(depth=4), batches(6))
    assert "layers.4.weight" in monitor.latest
    stalls = logged(run.logger.log_dir)["altgrad/stall_frac/bf16/layers.4.weight"]
    assert all(value == 1.0 for _, value in stalls)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_skipped_steps_are_counted_anew_in_each_fit(tmp_path: Path) -> None:
    class Silent(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Any:
            return None if batch_index == 3 else super().training_step(batch, batch_index)

    monitor = PrecisionMonitor(every_n_steps=1)
    for _ in range(2):
        trainer(tmp_path, monitor).fit(Silent(), batches(6))
        assert monitor.skipped == {"no gradients": 1}


# --- copies


def test_a_callback_can_be_pickled_before_and_after_a_run(tmp_path: Path) -> None:
    monitor = PrecisionMonitor()
    assert pickle.loads(pickle.dumps(monitor)).formats == monitor.formats
    fit(tmp_path, monitor)
    assert pickle.loads(pickle.dumps(monitor)).latest_step == 5


def test_a_copy_of_a_trained_callback_holds_no_module(tmp_path: Path) -> None:
    class Large(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1000, 100)

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise AssertionError("the module is copied with the callback")

    monitor = PrecisionMonitor()
    trainer(tmp_path, monitor, logger=False).fit(module := Large(), batches(2))
    assert monitor.log.__self__ is module  # Lightning sets it as an attribute of each callback
    monitor.own = 7
    for twin in (copy.copy(monitor), copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert twin.latest_step == monitor.latest_step == 1
        assert twin.own == 7
        assert "log" not in vars(twin)
        assert "log_dict" not in vars(twin)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_a_copy_made_in_mid_run_is_detached(
    attached: Attached, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module with the callback as a hyperparameter is saved with a copy of the callback."""

    def is_copied(_: pl.Trainer, __: Any) -> Any:
        raise AssertionError("the Trainer is copied with the callback")

    monitor, run, module = attached()
    step_once(monitor, run, module)
    monkeypatch.setattr(pl.Trainer, "__reduce_ex__", is_copied)
    twin = copied(monitor)
    assert twin.latest.keys() == monitor.latest.keys() != set()
    assert monitor.state_dict()["monitor"]["last_seen"]
    assert twin.state_dict() == {}  # the state is the monitor's, and the copy has no monitor
    latest = twin.latest
    twin.teardown(run)
    assert count_hooks(run) == 2
    step_once(monitor, run, module)
    assert monitor.latest_model != twin.latest_model
    assert twin.latest is latest
