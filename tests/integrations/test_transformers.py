"""`PrecisionCallback` in the Trainer of Hugging Face."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.training_args import OptimizerNames

from altgrad import SamplingRule
from altgrad.integrations.transformers import PrecisionCallback
from altgrad.report import read
from tests.integrations.hugging import NAMES, Recorder, make_trainer
from tests.integrations.trainings import FORMAT, assert_equal, assert_true, clone_weights
from tests.processes import run
from tests.report.records.by_hand import list_texts


@pytest.fixture(autouse=True)
def _keep_generator() -> Any:
    with torch.random.fork_rng():
        yield


def test_figures_are_those_of_the_recorded_step(tmp_path: Path) -> None:
    callback, recorder = PrecisionCallback(formats=FORMAT), Recorder()
    trainer = make_trainer(tmp_path, callback, recorder, gradient_accumulation_steps=2)
    trainer.train()
    assert callback.run.path == tmp_path / "altgrad.jsonl"
    assert read(tmp_path).steps == (2, 4, 6)  # as the Trainer counts them in its logs
    assert len(recorder.steps) == 6
    assert_true(callback.run.latest.layers, NAMES, recorder.steps[5])


@pytest.mark.default_twins
def test_training_is_bit_identical(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path)
    plain.train()
    state = torch.get_rng_state()
    watched = make_trainer(tmp_path, PrecisionCallback(every_n_steps=1))
    watched.train()
    assert_equal(clone_weights(watched.model), clone_weights(plain.model))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.default_twins
def test_figures_are_in_the_logs_of_the_trainer(tmp_path: Path) -> None:
    callback = PrecisionCallback(formats=FORMAT)
    trainer = make_trainer(tmp_path, callback, max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer.train()
    logs = {log["step"]: log for log in trainer.state.log_history if "loss" in log}
    assert [*logs] == [2, 4]
    figure = callback.run.latest.model["kept_update_ratio/bf16"]
    assert logs[4]["altgrad/kept_update_ratio/bf16"] == figure
    assert "altgrad/progress_kept/bf16-sr" in logs[2]
    others = [log for log in trainer.state.log_history if "loss" not in log]
    assert others
    assert not any(key.startswith("altgrad") for log in others for key in log)
    assert all(math.isfinite(value) for value in logs[4].values())


@pytest.mark.parametrize("is_first", [True, False])
def test_tensorboard_gets_the_figures_if_the_callback_is_added_first(
    tmp_path: Path, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    callback = PrecisionCallback(formats=FORMAT)
    added = () if is_first else (callback,)
    trainer = make_trainer(tmp_path, *added, max_steps=2, report_to=["tensorboard"])
    if is_first:
        assert callback.add_to(trainer) is callback
    trainer.train()
    (file,) = tmp_path.rglob("events.*")  # transformers below 5 does not know the variable
    events = EventAccumulator(str(file.parent)).Reload()
    tag = "train/altgrad/kept_update_ratio/bf16"
    assert (tag in events.Tags()["scalars"]) is is_first
    if is_first:
        (event,) = events.Scalars(tag)
        figure = callback.run.latest.model["kept_update_ratio/bf16"]
        assert (event.step, event.value) == (2, pytest.approx(figure, rel=1e-5))


@pytest.mark.default_twins
def test_the_summary_is_printed_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = PrecisionCallback(tmp_path / "watched")
    make_trainer(tmp_path, callback).train()
    assert capsys.readouterr().out.endswith(f"{callback.run.summarize()}\n")
    assert callback.run.path == tmp_path / "watched" / "altgrad.jsonl"


def test_a_second_training_is_a_run_of_its_own(tmp_path: Path) -> None:
    callback, recorder = PrecisionCallback(formats=FORMAT, every_n_steps=3), Recorder()
    trainer = make_trainer(tmp_path, callback, recorder)
    trainer.train()
    first = callback.run
    trainer.train()
    assert first.path == tmp_path / "altgrad.jsonl"
    assert callback.run.path == tmp_path / "altgrad-2.jsonl"
    assert read(first.path).steps == read(callback.run.path).steps == (3, 6)
    assert_true(callback.run.latest.layers, NAMES, recorder.steps[11])


class RaiseOnce(TrainerCallback):
    has_raised = False

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == 3 and not self.has_raised:
            self.has_raised = True
            raise ZeroDivisionError


def test_a_training_after_one_that_raised_is_a_run_of_its_own(tmp_path: Path) -> None:
    callback = PrecisionCallback(formats=FORMAT)
    trainer = make_trainer(tmp_path, callback, RaiseOnce())
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert read(tmp_path / "altgrad.jsonl").steps == (2,)
    trainer.train()
    assert read(tmp_path / "altgrad-2.jsonl").steps == (2, 4, 6)


# --- checkpoints


def test_a_resumed_training_goes_on_in_the_run_file(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    first = PrecisionCallback(formats=FORMAT)
    make_trainer(tmp_path, first, **saving).train()
    whole = make_trainer(tmp_path / "whole", **saving)
    whole.train()
    resumed, recorder = PrecisionCallback(formats=FORMAT), Recorder()
    trainer = make_trainer(tmp_path, resumed, recorder, **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.run.path == first.run.path
    assert read(tmp_path).steps == (1, 2, 3, 4, 5, 6)
    lines = list_texts(first.run.path)
    assert [line["resumed"] for line in lines if "resumed" in line] == [{"before_step": 4}]
    assert_true(resumed.run.latest.layers, NAMES, recorder.steps[2])
    assert_equal(clone_weights(trainer.model), clone_weights(whole.model))


def test_a_resumed_training_in_another_folder_names_the_file_before(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, PrecisionCallback(formats=FORMAT), max_steps=4, **saving).train()
    resumed = PrecisionCallback(tmp_path / "second", formats=FORMAT)
    checkpoint = str(tmp_path / "checkpoint-4")
    # The checkpoint is found by the argument, and not by the folder of checkpoints.
    options = {"resume_from_checkpoint": checkpoint, **saving}
    trainer = make_trainer(tmp_path / "elsewhere", resumed, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert resumed.run.path == tmp_path / "second" / "altgrad.jsonl"
    assert read(resumed.run.path).steps == (2, 4, 6)


def test_a_checkpoint_of_another_training_is_not_taken(tmp_path: Path) -> None:
    """Both trainings have a checkpoint after step 3; only ``train`` is told which one is meant."""
    saving = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    for name, rate in (("a", 1e-3), ("b", 0.1)):
        callback = PrecisionCallback(formats=FORMAT, recipes=())
        make_trainer(tmp_path / name, callback, learning_rate=rate, **saving).train()
    resumed = PrecisionCallback(formats=FORMAT, recipes=())
    trainer = make_trainer(tmp_path / "b", resumed, **saving)
    with pytest.warns(UserWarning, match="begins anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert read(resumed.run.path).steps == (4, 5, 6)


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_a_trainer_that_does_not_log_every_few_steps_is_observed(
    tmp_path: Path, strategy: str
) -> None:
    callback = PrecisionCallback(formats=FORMAT, recipes=())
    options = {"logging_strategy": strategy, "logging_steps": 500, "max_steps": 20}
    trainer = make_trainer(tmp_path, callback, **options)
    trainer.train()
    assert read(callback.run.path).steps == (10, 20)
    logs = [each for each in trainer.state.log_history if "loss" in each]
    assert all("altgrad/kept_update_ratio/bf16" in each for each in logs)


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_a_training_whose_state_is_lost_begins_a_new_file(
    tmp_path: Path, content: bytes | None
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, PrecisionCallback(formats=FORMAT), max_steps=4, **saving).train()
    file = tmp_path / "checkpoint-4" / "altgrad.pt"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    callback = PrecisionCallback(formats=FORMAT)
    trainer = make_trainer(tmp_path, callback, **saving)
    with pytest.warns(UserWarning, match="PrecisionCallback begins anew"):
        trainer.train(resume_from_checkpoint=True)
    assert read(callback.run.path).steps == (6,)


def test_a_best_model_that_is_loaded_at_the_end_gives_no_warning(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        PrecisionCallback(formats=FORMAT),
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the first one is loaded
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*PrecisionCallback")
        trainer.train()


# --- errors


def test_an_error_of_the_observer_ends_observing_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    plain = make_trainer(tmp_path)
    plain.train()
    monkeypatch.setattr("altgrad.output.charts.Charts.add", broken)
    trainer = make_trainer(tmp_path, PrecisionCallback(formats=FORMAT))
    with pytest.warns(UserWarning, match="RuntimeError.*broken") as caught:
        trainer.train()
    assert len([each for each in caught if "broken" in str(each.message)]) == 1
    assert_equal(clone_weights(trainer.model), clone_weights(plain.model))
    strict = make_trainer(tmp_path, PrecisionCallback(formats=FORMAT, strict=True))
    with pytest.raises(RuntimeError, match="broken"):
        strict.train()


def test_a_model_that_a_rule_does_not_fit_is_trained_without_observer(tmp_path: Path) -> None:
    rules = [SamplingRule("no.such.layer")]
    callback = PrecisionCallback(sampling=rules)
    trainer = make_trainer(tmp_path, callback)
    with pytest.warns(UserWarning, match="PrecisionCallback does not observe this training"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert callback.run is None
    with pytest.raises(ValueError, match=r"no\.such\.layer"):
        make_trainer(tmp_path, PrecisionCallback(sampling=rules, strict=True)).train()


def test_a_state_that_cannot_be_saved_ends_observing_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr("altgrad.integrations.run_watch.RunWatch.state_dict", broken)
    callback = PrecisionCallback(formats=FORMAT)
    trainer = make_trainer(tmp_path, callback, save_strategy="steps", save_steps=3)
    with pytest.warns(UserWarning, match="could not save its state.*no space"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert read(tmp_path).steps == (2,)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps=0: expected 1 or more"),
        ({"formats": "fp7"}, ValueError, "fp7"),
        ({"max_element": 3}, TypeError, "max_element"),
        ({"recipes": "bf17"}, ValueError, "bf17"),
    ],
)
def test_wrong_arguments_are_refused_at_once(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        PrecisionCallback(**arguments)


# --- optimizers


def make_layerwise(model: nn.Module) -> tuple[Any, Any]:
    """Return an optimizer for each parameter, which steps in the backward pass.

    transformers does so for ``galore_adamw_layerwise``: optimization.py and trainer_optimizer.py.
    """
    each = {p: torch.optim.AdamW([p], lr=1e-3) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in each:
        parameter.register_post_accumulate_grad_hook(step)
    dummy = LayerWiseDummyOptimizer(optimizer_dict=each, lr=1e-3)
    return dummy, torch.optim.lr_scheduler.ConstantLR(dummy)


def test_optimizers_of_single_layers_share_a_record(tmp_path: Path) -> None:
    callback, recorder = PrecisionCallback(formats=FORMAT), Recorder("on_step_begin")
    trainer = make_trainer(
        tmp_path, callback, recorder, optimizers=make_layerwise, max_grad_norm=0.0
    )
    trainer.train()
    assert read(tmp_path).steps == (2, 4, 6)
    assert_true(callback.run.latest.layers, NAMES, recorder.steps[5])
    updates = torch.cat([(b - a).double().flatten() for a, b in recorder.steps[5]])
    rms = updates.square().mean().sqrt().item()
    assert callback.run.latest.model["update_rms"] == pytest.approx(rms, rel=1e-6)


RUN_HERE = {
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_torch_4bit", "adamw_torch_8bit", "stable_adamw"),
}
"""Values of the Trainer's argument `optim` that run on a CPU with the libraries of the tests."""


def check_optimizer(folder: Path, name: str) -> bool:
    """Return False if transformers cannot train with an optimizer; check its figures otherwise."""
    try:
        make_trainer(folder / "plain", optim=name, max_steps=2).train()
    except Exception:  # noqa: BLE001 - a library or a device is missing
        return False
    callback, recorder = PrecisionCallback(formats=FORMAT, strict=True), Recorder()
    trainer = make_trainer(folder, callback, recorder, optim=name)
    trainer.train()
    assert read(folder).steps == (2, 4, 6)
    assert_true(callback.run.latest.layers, NAMES, recorder.steps[5])
    return True


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adafactor"])
def test_the_steps_of_an_optimizer_are_observed(tmp_path: Path, name: str) -> None:
    assert check_optimizer(tmp_path, name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_steps_of_every_optimizer_of_the_trainer_are_observed(tmp_path: Path) -> None:
    names = [each.value for each in OptimizerNames]
    found = {name for name in names if check_optimizer(tmp_path / name, name)}
    assert found >= RUN_HERE


# --- several processes


def train_on_a_rank(rank: int, folder: str) -> dict[str, Any]:
    warnings.filterwarnings("error", message=".*(PrecisionCallback|UpdateMonitor|StepObserver)")
    callback, recorder = PrecisionCallback(formats=FORMAT, recipes=()), Recorder()
    trainer = make_trainer(Path(folder), callback, recorder, save_strategy="steps", save_steps=3)
    trainer.train()
    resumed = PrecisionCallback(formats=FORMAT, recipes=())
    again = make_trainer(Path(folder), resumed, save_strategy="steps", save_steps=3, max_steps=8)
    again.train(resume_from_checkpoint=True)
    latest = callback.run.latest
    return {
        "layers": None if latest is None else {n: dict(f) for n, f in latest.layers.items()},
        "steps": recorder.steps,
        "paths": [str(each.run.path) for each in (callback, resumed)],
    }


@pytest.mark.slow
def test_under_ddp_the_first_rank_alone_observes_and_writes(tmp_path: Path) -> None:
    first, second = run(train_on_a_rank, 2, str(tmp_path))
    assert_true(first["layers"], NAMES, first["steps"][5])
    for mine, other in zip(first["steps"], second["steps"], strict=True):
        assert_equal([after for _, after in mine], [after for _, after in other])
    assert second["layers"] is None
    assert second["paths"] == ["None", "None"]
    assert first["paths"] == [str(tmp_path / "altgrad.jsonl")] * 2
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["altgrad.jsonl"]
    assert read(tmp_path).steps == (2, 4, 6, 8)
