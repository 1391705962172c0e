"""The end of a watched run: no observed step, a step in backward, and warnings as errors."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import altgrad
from altgrad.report import read
from tests.integrations.trainings import FORMAT, make_model, make_training, train


def make_training_in_backward() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """Return a model and its optimizers, of which each steps a parameter in the backward pass.

    One layer never gets a gradient, so that a step is complete only when the next one begins.
    """
    model = make_model()
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    optimizers = []
    for parameter in model.parameters():
        optimizers.append(optimizer := torch.optim.SGD([parameter], lr=0.1))

        def step(_: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    return model, optimizers


def train_in_backward(model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        (model(torch.randn(4, 8)) - 1).square().mean().backward()


def test_a_state_has_the_last_step_in_backward(tmp_path: Path) -> None:
    model, optimizers = make_training_in_backward()
    run = altgrad.watch(model, optimizers, tmp_path, formats=FORMAT, every_n_steps=1)
    train_in_backward(model, 4)
    state = run.state_dict()
    run.close()
    resumed = altgrad.watch(
        model, optimizers, tmp_path, formats=FORMAT, every_n_steps=1, state=state
    )
    train_in_backward(model, 3)
    resumed.close()
    assert read(tmp_path).steps == (0, 1, 2, 3, 4, 5, 6)


def test_a_single_step_in_backward_is_an_observed_step(tmp_path: Path) -> None:
    model, optimizers = make_training_in_backward()
    run = altgrad.watch(model, optimizers, tmp_path, formats=FORMAT, every_n_steps=3)
    train_in_backward(model, 3)
    run.close()  # without a warning: warnings are errors here
    assert read(tmp_path).steps == (2,)


def test_a_summary_without_an_observed_step_says_so(tmp_path: Path) -> None:
    model, optimizer = make_training()
    run = altgrad.watch(model, optimizer, tmp_path, every_n_steps=10, warn=[].append)
    train(model, optimizer, 3)
    first, last = run.close().splitlines()
    assert first == "[AltGrad] No step was observed, so there are no verdicts."
    assert last == f"altgrad report {run.path}"


def test_a_run_is_closed_where_its_warnings_are_errors(tmp_path: Path) -> None:
    model, optimizer = make_training()
    run = altgrad.watch(model, optimizer, tmp_path, every_n_steps=10)
    train(model, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="observed no step"):
            run.close()
    hooks = [value for name, value in vars(optimizer).items() if name.endswith("_hooks")]
    assert not any(hooks)
    again = altgrad.watch(model, optimizer, tmp_path, every_n_steps=1)
    train(model, optimizer, 1)
    again.close()
    state = again.state_dict()
    # The file is not locked any more: another writer goes on in it, without a warning.
    resumed = altgrad.watch(model, optimizer, tmp_path, every_n_steps=1, state=state)
    train(model, optimizer, 1)
    resumed.close()
    assert resumed.path == again.path
    altgrad.report.RunFile.resume(run.path, 0, again.monitor.run_header()).close()


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning")  # of one process, says torch
@pytest.mark.filterwarnings("ignore:.*NO_SHARD:FutureWarning")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("keeps_parameters", [True, False])
@pytest.mark.parametrize("every", [1, 10])
def test_a_module_that_is_wrapped_in_fsdp1_later_gives_one_true_warning(
    every: int, keeps_parameters: bool, tmp_path: Path
) -> None:
    (model, optimizer), told = make_training(), []
    run = altgrad.watch(model, optimizer, tmp_path, every_n_steps=every, warn=told.append)
    wrapped = FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=keeps_parameters
    )
    train(wrapped, optimizer, 3)
    run.close()
    (notice,) = told
    assert "they were wrapped in FSDP1 after attach()" in notice


def test_a_folder_stays_the_same_if_the_current_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make_training()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    run = altgrad.watch(model, optimizer, "run", formats=FORMAT, every_n_steps=1)
    os.chdir(elsewhere)
    train(model, optimizer, 2)
    state = run.state_dict()
    run.close()
    assert state["output"]["run_file"] == str(tmp_path / "run" / "altgrad.jsonl")
    assert read(tmp_path / "run").steps == (0, 1)
    assert [*elsewhere.iterdir()] == []


@pytest.mark.parametrize("steps", [None, -3, True, 1.5, "2"])
def test_a_state_with_a_wrong_number_of_steps_is_refused(steps: object, tmp_path: Path) -> None:
    model, optimizer = make_training()
    run = altgrad.watch(model, optimizer, tmp_path, formats=FORMAT)
    with pytest.raises(ValueError, match=r"state\['steps'\]=.*: expected an int of at least 0"):
        run.load_state_dict(run.state_dict() | {"steps": steps})
    run.close()
