"""`PrecisionMonitor` from run to run: how it starts, ends, is copied, and leaves nothing behind."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Attached, Net, batches, fit, hooks_of, logged, trainer


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


@pytest.mark.parametrize("hook", ["teardown", "on_exception", "on_train_end"])
def test_each_end_of_a_run_detaches(attached: Attached, hook: str) -> None:
    monitor, run, module = attached()
    monitor.latest_step = 1  # or it would say that it observed none
    getattr(monitor, hook)(run, module)
    assert hooks_of(run) == 0
    assert monitor._monitor is None


def test_starting_twice_does_not_double_the_hooks(attached: Attached) -> None:
    monitor, run, module = attached()
    monitor.on_train_start(run, module)
    assert hooks_of(run) == 2


def test_the_steps_of_a_tuner_are_not_due(attached: Attached) -> None:
    """Tuners put callbacks of their own in the place of all others."""
    monitor, run, _ = attached()
    assert monitor._is_due(0)
    run.callbacks = []
    assert not monitor._is_due(0)


def test_fast_dev_run(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(every_n_steps=1), fast_dev_run=2)
    assert run.global_step == 2


# --- several runs


def test_fitting_twice_observes_both_times_without_doubling(tmp_path: Path) -> None:
    monitor = PrecisionMonitor()
    for _ in range(2):
        run = fit(tmp_path, monitor)
        assert monitor.latest_step == 5
        assert hooks_of(run) == 0


def test_a_second_run_of_another_module_is_charted_afresh(tmp_path: Path) -> None:
    monitor = PrecisionMonitor("bf16", layer_charts=1)
    fit(tmp_path, monitor)
    run = trainer(tmp_path, monitor)
    run.fit(Net(depth=4), batches(6))
    assert "layers.4.weight" in monitor.latest
    stalls = logged(run.logger.log_dir)["altgrad/stall_frac/bf16/layers.4.weight"]
    assert all(value == 1.0 for _, value in stalls)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_skipped_steps_are_those_of_the_last_fit(tmp_path: Path) -> None:
    class Silent(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Any:
            return None if batch_index == 3 else super().training_step(batch, batch_index)

    monitor = PrecisionMonitor(every_n_steps=1)
    for _ in range(2):
        trainer(tmp_path, monitor).fit(Silent(), batches(6))
        assert monitor.skipped == {"no gradients": 1}


# --- copies


def test_it_can_be_pickled_before_and_after_a_run(tmp_path: Path) -> None:
    monitor = PrecisionMonitor()
    assert pickle.loads(pickle.dumps(monitor)).formats == monitor.formats
    fit(tmp_path, monitor)
    assert pickle.loads(pickle.dumps(monitor)).latest_step == 5


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


def test_a_pickle_with_an_argument_that_is_gone_trains(tmp_path: Path) -> None:
    """As 0.1.0 pickled a callback: it had `compile`."""
    monitor = PrecisionMonitor("bf16", every_n_steps=1)
    state = monitor.__getstate__()
    old = PrecisionMonitor.__new__(PrecisionMonitor)
    old.__setstate__(state | {"_settings": state["_settings"] | {"compile": False}})
    fit(tmp_path, old, steps=2)
    assert old.latest_step == 1
