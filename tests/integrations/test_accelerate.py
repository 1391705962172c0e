"""`altgrad.integrations.accelerate.watch`: before or after `prepare`, with trackers and DDP."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker, on_main_process
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from altgrad import RunWatch
from altgrad.integrations.accelerate import watch
from altgrad.report import read
from tests.integrations.trainings import (
    FORMAT,
    RecordingAdamW,
    assert_equal,
    assert_true,
    clone_weights,
    make_model,
    make_training,
    train,
)
from tests.processes import run

NAMES = [name for name, _ in make_model().named_parameters()]


@pytest.fixture(autouse=True)
def _no_state() -> Iterator[None]:
    """Forget the states that all Accelerators of a process share."""
    yield
    forget()


def forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # no public name resets it
    GradientState._reset_state()  # likewise


def train_watched(
    folder: Path, accelerator: Accelerator, is_first: bool, steps: int = 4, **options: Any
) -> tuple[RunWatch, nn.Module, RecordingAdamW]:
    """Watch before `prepare` if `is_first`, and after it otherwise; then train."""
    model, optimizer = make_training()
    options = {"formats": FORMAT, "every_n_steps": 2, "recipes": (), **options}
    if is_first:
        watched = watch(accelerator, model, optimizer, folder, **options)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    if not is_first:
        watched = watch(accelerator, prepared, wrapped, folder, **options)
    torch.manual_seed(1)
    train(prepared, wrapped, steps, accelerator.backward)
    return watched, model, optimizer


@pytest.mark.parametrize("is_first", [True, False])
def test_figures_are_those_of_the_recorded_step(tmp_path: Path, is_first: bool) -> None:
    watched, _, optimizer = train_watched(tmp_path, Accelerator(cpu=True), is_first)
    watched.close()
    assert read(tmp_path).steps == (1, 3)
    assert_true(watched.latest.layers, NAMES, optimizer.steps[3])


@pytest.mark.parametrize("is_first", [True, False])
def test_training_is_bit_identical(tmp_path: Path, is_first: bool) -> None:
    model, optimizer = make_training()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer)
    torch.manual_seed(1)
    train(*prepared, 4, accelerator.backward)
    state = torch.get_rng_state()
    _, other, _ = train_watched(tmp_path, accelerator, is_first, recipes=["bf16-sr"])
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(clone_weights(other), clone_weights(model))


def test_accumulated_steps_are_seen_as_the_optimizer_makes_them(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = make_training()
    prepared, wrapped = accelerator.prepare(model, optimizer)
    watched = watch(accelerator, prepared, wrapped, tmp_path, formats=FORMAT, every_n_steps=1)
    for _ in range(4):
        with accelerator.accumulate(prepared):
            train(prepared, wrapped, 1, accelerator.backward)
    watched.close()
    assert len(optimizer.steps) == 2
    assert read(tmp_path).steps == (0, 1)
    assert_true(watched.latest.layers, NAMES, optimizer.steps[1])


class Plain(GeneralTracker):
    """A tracker as users write them."""

    name = "plain"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    @property
    def tracker(self) -> dict[int, dict[str, float]]:
        return self.logged

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    @on_main_process
    def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
        self.logged[step] = values


def test_trackers_get_the_figures(tmp_path: Path) -> None:
    tracker = Plain()
    accelerator = Accelerator(cpu=True, log_with=["tensorboard", tracker], project_dir=tmp_path)
    model, optimizer = accelerator.prepare(*make_training())
    watched = watch(accelerator, model, optimizer, tmp_path / "run", every_n_steps=1, charts="all")
    accelerator.init_trackers("project")  # also after `watch`
    train(model, optimizer, 2, accelerator.backward)
    rms = watched.latest.model["update_rms"]
    watched.close()
    accelerator.end_training()
    assert [*tracker.logged] == [0, 1]
    assert tracker.logged[1]["altgrad/update_rms"] == rms
    events = EventAccumulator(str(tmp_path / "project")).Reload()
    assert events.Scalars("2-AltGrad-model/update_rms")[1].value == pytest.approx(rms, rel=1e-6)
    assert "5-AltGrad-ranges/ranges" in events.Tags()["images"]


def test_a_saved_state_goes_on_with_the_run(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    watched, _, _ = train_watched(tmp_path, accelerator, is_first=False, steps=3)
    accelerator.save_state(tmp_path / "saved")
    watched.close()
    forget()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*make_training())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*altgrad")
        resumed = watch(accelerator, model, optimizer, tmp_path, formats=FORMAT, every_n_steps=2)
        accelerator.load_state(tmp_path / "saved")
        train(model, optimizer, 3, accelerator.backward)
        resumed.close()
    assert resumed.path == watched.path
    assert read(tmp_path).steps == (1, 3, 5)


def train_from(folder: Path, saved: Path, *, is_watched: bool) -> RunWatch | None:
    """Load a checkpoint of an Accelerator, and train two steps."""
    forget()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*make_training())
    run = None
    if is_watched:
        run = watch(accelerator, model, optimizer, folder, formats=FORMAT, every_n_steps=1)
    accelerator.load_state(saved)
    train(model, optimizer, 2, accelerator.backward)
    if run is not None:
        run.close()
    return run


def test_a_checkpoint_without_the_run_begins_anew_with_a_notice(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(*make_training())
    accelerator.save_state(tmp_path / "saved")
    with pytest.warns(UserWarning, match="begins anew: .*saved has no altgrad.pt") as caught:
        train_from(tmp_path, tmp_path / "saved", is_watched=True)
    assert len(caught) == 1
    assert read(tmp_path).steps == (0, 1)


def test_a_checkpoint_with_the_run_is_loaded_without_it(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    watched, _, _ = train_watched(tmp_path, accelerator, is_first=False)
    accelerator.save_state(tmp_path / "saved")
    watched.close()
    train_from(tmp_path, tmp_path / "saved", is_watched=False)


def test_a_damaged_state_begins_anew_with_a_notice(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    watched, _, _ = train_watched(tmp_path / "first", accelerator, is_first=False)
    accelerator.save_state(tmp_path / "saved")
    watched.close()
    (tmp_path / "saved" / "altgrad.pt").write_bytes(b"no state")
    with pytest.warns(UserWarning, match="begins anew, because .*altgrad.pt cannot be") as caught:
        train_from(tmp_path / "second", tmp_path / "saved", is_watched=True)
    assert len(caught) == 1
    assert read(tmp_path / "second").steps == (0, 1)


def test_a_run_goes_back_to_its_checkpoint_until_it_is_closed(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*make_training())
    runs = [  # each has a file of its own in the checkpoint
        watch(accelerator, model, optimizer, tmp_path / name, formats=FORMAT, every_n_steps=1)
        for name in "ab"
    ]
    train(model, optimizer, 2, accelerator.backward)
    accelerator.save_state(tmp_path / "saved")
    train(model, optimizer, 3, accelerator.backward)
    accelerator.load_state(tmp_path / "saved")
    train(model, optimizer, 1, accelerator.backward)
    for each, name in zip(runs, "ab", strict=True):
        each.close()
        assert [path.name for path in (tmp_path / name).glob("*.jsonl")] == ["altgrad.jsonl"]
        assert read(tmp_path / name).steps == (0, 1, 2)
    accelerator.load_state(tmp_path / "saved")  # such as the best checkpoint at the end


def test_a_model_that_fsdp2_has_yet_to_shard_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """Whole trainings under FSDP2 are rows of the compatibility page."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    with pytest.raises(ValueError, match=r"FSDP2 replaces .* call watch after prepare\(\)"):
        watch(accelerator, *make_training(), tmp_path)


# --- several processes


def train_on_a_rank(rank: int, folder: str, is_first: bool) -> dict[str, Any]:
    warnings.filterwarnings("error", message=".*altgrad")
    forget()
    accelerator = Accelerator(cpu=True)
    watched, _, optimizer = train_watched(Path(folder), accelerator, is_first)
    watched.close()
    latest = watched.latest
    return {
        "layers": None if latest is None else {n: dict(f) for n, f in latest.layers.items()},
        "steps": optimizer.steps,
        "path": watched.path,
    }


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [True, False])
def test_under_ddp_the_first_rank_alone_observes_and_writes(tmp_path: Path, is_first: bool) -> None:
    first, second = run(train_on_a_rank, 2, str(tmp_path), is_first)
    assert_true(first["layers"], NAMES, first["steps"][3])
    assert_equal([a for _, a in first["steps"][3]], [a for _, a in second["steps"][3]])
    assert (first["path"], second["path"]) == (tmp_path / "altgrad.jsonl", None)
    assert second["layers"] is None
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["altgrad.jsonl"]
