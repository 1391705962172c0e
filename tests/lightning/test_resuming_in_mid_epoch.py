"""`PrecisionMonitor`: a run that resumes in mid-epoch keeps every observed step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from altgrad.report import Run, judge_run, read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings(r"ignore:.*add the following callbacks. \["),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]
BATCHES, EPOCHS = 8, 2


class Validated(Net):
    """A net that is validated."""

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        self.log("val", self.layers(batch[0]).square().mean())


class Manual(Validated):
    """A net whose two optimizers step in each batch."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.layers(batch[0]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in self.layers[:2]]


class SaveFirst(pl.Callback):
    """A callback that saves a checkpoint before the monitor has written the figures of a batch."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.path, self.batch = folder / "early.ckpt", batch

    def on_train_batch_end(self, run: pl.Trainer, *others: Any) -> None:
        if run.fit_loop.total_batch_idx == self.batch:
            run.save_checkpoint(self.path)


class Fail(pl.Callback):
    """A callback that ends the training with an error before a batch is complete."""

    def on_train_batch_end(self, run: pl.Trainer, *others: Any) -> None:
        if run.fit_loop.total_batch_idx == 4:
            raise KeyError("on purpose")


class SaveAfterError(pl.Callback):
    """A callback that saves a checkpoint after an error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, run: pl.Trainer, *others: Any) -> None:
        run.save_checkpoint(self.path)


def equal_batches() -> DataLoader[Any]:
    """Return a loader of equal batches: Lightning begins anew with the data in mid-epoch."""
    one = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(one.repeat(BATCHES, 1)), batch_size=4)


def fit(
    folder: Path,
    module: type[Net],
    *callbacks: pl.Callback,
    every: int = 1,
    monitor: PrecisionMonitor | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> PrecisionMonitor:
    monitor = monitor or PrecisionMonitor(["bf16", "e5m2"], every_n_steps=every)
    saves = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    options |= {"max_epochs": EPOCHS, "enable_checkpointing": saves, "log_every_n_steps": 1}
    torch.manual_seed(0)
    data = [equal_batches()] * (2 if issubclass(module, Validated) else 1)
    run = trainer(
        folder,
        *callbacks[:1],
        monitor,
        *callbacks[1:],
        logger=False,
        **options,
    )
    run.fit(module(), *data, ckpt_path=ckpt_path)
    return monitor


def list_figures(run: Run) -> list[Any]:
    return [(row.step, row.layer, dict(row.figures)) for row in run.rows]


def assert_live_verdicts_are_those_of_the_file(monitor: PrecisionMonitor) -> None:
    live, stored = monitor.assessment, judge_run(read(monitor.path))
    assert live.summary == stored.summary
    for mine, other in zip(live.advice, stored.advice, strict=True):
        assert (mine.layer, mine.recipe, mine.verdict) == (other.layer, other.recipe, other.verdict)
        assert dict(mine.figures) == pytest.approx(dict(other.figures), rel=1e-6, nan_ok=True)


CASES: dict[str, tuple[type[Net], dict[str, Any], dict[str, Any], int]] = {
    "every n steps": (Validated, {"every_n_train_steps": 5}, {}, 1),
    "interval of 4": (Validated, {"every_n_train_steps": 4}, {}, 4),
    "validation": (Validated, {"monitor": "val"}, {"val_check_interval": 3}, 1),
    "accumulation": (
        *(Validated, {"every_n_train_steps": 2}),
        *({"accumulate_grad_batches": 3}, 1),
    ),
    "validation with accumulation": (
        *(Validated, {"monitor": "val"}),
        *({"val_check_interval": 2, "accumulate_grad_batches": 3}, 1),
    ),
    "manual": (Manual, {"every_n_train_steps": 10}, {}, 1),
    "manual, validation": (Manual, {"monitor": "val"}, {"val_check_interval": 3}, 1),
    "end of an epoch": (Validated, {"save_on_train_epoch_end": True}, {}, 1),
    "validation after an epoch": (Validated, {"monitor": "val"}, {}, 1),
}
QUICK = [("every n steps", False), ("validation", True), ("manual", True)]


@pytest.mark.parametrize(
    ("case", "elsewhere"),
    [
        pytest.param(case, elsewhere, marks=[] if (case, elsewhere) in QUICK else pytest.mark.slow)
        for case in CASES
        for elsewhere in (False, True)
    ],
)
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(
    tmp_path: Path, case: str, elsewhere: bool
) -> None:
    module, saving, options, every = CASES[case]
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=-1, **saving)
    whole = read(fit(tmp_path / "whole", module, every=every, **options).path)
    fit(tmp_path / "run", module, keep, every=every, **options)
    saved = sorted((tmp_path / "kept").iterdir(), key=lambda path: int(path.stem[5:]))
    checkpoint = saved[-2]  # from then on there are steps to make
    folder = tmp_path / ("other" if elsewhere else "run")
    resumed = fit(folder, module, every=every, ckpt_path=checkpoint, **options)
    found = read(resumed.path)
    assert found.steps == whole.steps
    assert [*map(len, list_figures(found))] == [*map(len, list_figures(whole))]
    for (*place, figures), (*expected, true) in zip(
        list_figures(found), list_figures(whole), strict=True
    ):
        assert place == expected
        assert figures == pytest.approx(true, rel=1e-6, nan_ok=True)
    assert_live_verdicts_are_those_of_the_file(resumed)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_checkpoint_saved_before_the_figures_are_written_holds_them(
    tmp_path: Path, elsewhere: bool
) -> None:
    early = SaveFirst(tmp_path, batch=4)
    fit(tmp_path / "run", Net, early)
    folder = tmp_path / ("other" if elsewhere else "run")
    resumed = fit(folder, Net, ckpt_path=early.path)
    assert read(resumed.path).steps == (*range(BATCHES * EPOCHS),)
    assert_live_verdicts_are_those_of_the_file(resumed)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_checkpoint_saved_after_an_error_holds_the_last_step(
    tmp_path: Path, is_first: bool
) -> None:
    saving = SaveAfterError(tmp_path / "failed.ckpt")
    callbacks = [saving, Fail()] if is_first else [Fail(), saving]
    with pytest.raises(KeyError, match="on purpose"):
        fit(tmp_path / "run", Net, *callbacks)
    resumed = fit(tmp_path / "run", Net, ckpt_path=saving.path)
    assert read(resumed.path).steps == (*range(BATCHES * EPOCHS),)
    assert_live_verdicts_are_those_of_the_file(resumed)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_checkpoint_saved_after_the_training_names_the_run_file(
    tmp_path: Path, elsewhere: bool
) -> None:
    first = PrecisionMonitor(["bf16", "e5m2"], every_n_steps=1)
    run = trainer(tmp_path / "run", first, logger=False)
    run.fit(Net(), equal_batches())
    run.save_checkpoint(tmp_path / "end.ckpt")
    folder = tmp_path / ("other" if elsewhere else "run")
    resumed = fit(folder, Net, ckpt_path=tmp_path / "end.ckpt")
    assert (resumed.path == first.path) is not elsewhere
    assert read(resumed.path).steps == (*range(BATCHES * EPOCHS),)
    assert_live_verdicts_are_those_of_the_file(resumed)


def test_a_checkpoint_saved_after_a_fit_without_a_batch_keeps_the_state(tmp_path: Path) -> None:
    """A fit that resumes from the end of its training, or a validation, runs no batch."""
    early = SaveFirst(tmp_path, batch=BATCHES * EPOCHS - 1)
    first = fit(tmp_path / "run", Net, early)
    run = trainer(tmp_path / "run", monitor := PrecisionMonitor(["bf16", "e5m2"]), max_epochs=1)
    run.fit(Net(), equal_batches(), ckpt_path=early.path)
    assert monitor.latest_step is None
    state = monitor.state_dict()
    assert state["output"]["run_file"] == str(first.path)
    assert state["monitor"]["last_seen"]


def test_a_resumed_run_begins_a_new_file_if_the_earlier_one_is_damaged(tmp_path: Path) -> None:
    early = SaveFirst(tmp_path, batch=4)
    first = fit(tmp_path, Net, early)
    first.path.write_text("nonsense")
    with pytest.warns(UserWarning, match="begins a new run file in .*altgrad.jsonl"):
        resumed = fit(tmp_path, Net, ckpt_path=early.path)
    assert resumed.path.name == "altgrad-2.jsonl"
    assert read(resumed.path).steps == (*range(5, BATCHES * EPOCHS),)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_missing_earlier_file_is_named(tmp_path: Path, elsewhere: bool) -> None:
    early = SaveFirst(tmp_path, batch=4)
    fit(tmp_path / "run", Net, early).path.unlink()
    folder = tmp_path / ("other" if elsewhere else "run")
    if elsewhere:
        resumed = fit(folder, Net, ckpt_path=early.path)
        assert "steps before 5 are missing" in read(resumed.path).notes[0]
    else:
        with pytest.warns(UserWarning, match="begins a new run file in .* is missing"):
            resumed = fit(folder, Net, ckpt_path=early.path)
    assert read(resumed.path).steps == (*range(5, BATCHES * EPOCHS),)


def test_lightning_restores_its_step_between_the_start_and_the_first_batch(tmp_path: Path) -> None:
    """This is why the run file is continued after the last step of the state, not at this step."""
    steps: list[int] = []

    class See(pl.Callback):
        def on_train_start(self, run: pl.Trainer, *_: Any) -> None:
            # Lightning has no public name for the step at which it logs.
            steps.append(run.fit_loop.epoch_loop._batches_that_stepped)

        on_train_batch_start: Callable[..., None] = on_train_start

    keep = ModelCheckpoint(
        tmp_path / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=5
    )
    fit(tmp_path / "run", Net, keep)
    steps.clear()
    fit(tmp_path / "run", Net, See(), ckpt_path=tmp_path / "kept" / "step=5.ckpt")
    assert steps[:3] == [4, 5, 6]
