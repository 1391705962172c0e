"""`Output`: run file, verdicts, pictures, several loggers, and resumed runs."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from altgrad import Figures
from altgrad.report import Run, Verdict, find_confirmation, judge_run, read
from altgrad_lightning import PrecisionMonitor, StoreAs
from tests.lightning.runs import Net, batches, fit, logged, trainer

ALL = {"images": 0, "tensors": 0, "histograms": 0}


def assert_row_is(row: Any, figures: Figures) -> None:
    assert [*row.figures] == [*figures]
    for key, value in figures.items():
        assert row.figures[key] == pytest.approx(value, rel=1e-7, nan_ok=True), key


def test_the_run_file_has_every_layer_at_the_steps_of_the_loss(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(layer_charts=1)
    run = fit(tmp_path, monitor)
    assert monitor.path == Path(run.logger.log_dir) / "altgrad.jsonl"
    found = read(run.logger.log_dir)
    assert found.steps == (1, 3, 5)
    assert [*found.layers] == [name for name, _ in Net().named_parameters()]
    last = {row.layer: row for row in found.rows if row.step == 5}
    for name, figures in monitor.latest.items():
        assert_row_is(last[name], figures)
    assert_row_is(last[None], monitor.latest_model)
    with_weights = [row.step for row in found.rows if "weights" in row.histograms]
    assert with_weights == [1]  # the first observed step, and then the fourth


@pytest.mark.filterwarnings("ignore:PrecisionMonitor (expects|sees frozen)")
@pytest.mark.parametrize(
    ("recipe", "precision", "callbacks", "dtype"),
    [
        ("bf16-true", "bf16-true", [], "bfloat16"),
        ("bf16-sr", "32-true", [StoreAs("bf16-sr")], "float32"),
        (None, "bf16-mixed", [], "float32"),
    ],
)
def test_the_run_file_says_how_a_trainer_stores_its_weights(
    tmp_path: Path, recipe: str | None, precision: Any, callbacks: list[pl.Callback], dtype: str
) -> None:
    def train(recipes: Any, *others: pl.Callback, **options: Any) -> Run:
        torch.manual_seed(0)
        monitor = PrecisionMonitor(formats="e4m3fn", recipes=recipes)
        trainer(tmp_path / str(recipes), monitor, *others, **options).fit(Net(), batches(4))
        return read(monitor.path)

    first, run = train(["bf16-true", "bf16-sr"]), train("bf16", *callbacks, precision=precision)
    assert run.now is not None
    assert (run.now.dtype, run.now.optimizer) == (dtype, "torch.optim.adamw.AdamW")
    assert (run.now.weights, run.now.rounding) == (
        ("bf16", "stochastic") if callbacks else (None, "nearest_even")
    )
    confirmation = find_confirmation(first, run)
    assert (confirmation and confirmation.recipe) == recipe


def test_the_verdicts_equal_those_of_the_run_file(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(every_n_steps=1)
    assert monitor.assessment is None
    fit(tmp_path, monitor)
    expected = judge_run(read(monitor.path))
    assert monitor.assessment.summary == expected.summary
    assert monitor.assessment.suggestions == expected.suggestions
    assert len(monitor.assessment.advice) == 6 * 3
    assert monitor.assessment.by_layer["layers.2.weight"]["bf16"].verdict is Verdict.FROZEN


class InTurn(Net):
    """A net with two optimizers, of which each batch steps one."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_index: int) -> None:
        self.manual_backward(self.layers(batch[0]).square().mean())
        self.optimizers()[batch_index % 2].step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(each.parameters(), lr=1e-3) for each in self.layers[:2]]


def test_ranges_show_the_weights_of_all_layers_observed_so_far(tmp_path: Path) -> None:
    """The fourth observed batch steps one of two optimizers; its picture has the layers of both."""
    monitor = PrecisionMonitor(every_n_steps=1)
    trainer(tmp_path, monitor).fit(InTurn(), batches(4))
    rows = {row.step: row for row in read(monitor.path).rows if "weights" in row.histograms}
    of_one = 8 * 8 + 8
    counts = [(rows[step].elements, sum(rows[step].histograms["weights"].counts)) for step in rows]
    assert [*rows] == [0, 3]
    assert counts == [(of_one, of_one), (of_one, 2 * of_one)]


def test_pictures_are_drawn_at_powers_of_four_and_at_the_end(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(every_n_steps=1, histograms=True), steps=7)
    events = EventAccumulator(run.logger.log_dir, size_guidance=ALL).Reload()
    tags = events.Tags()
    pictures = {
        *(f"4-AltGrad-maps/stall_frac_map/{f}" for f in ("bf16", "e4m3fn", "e5m2")),
        "5-AltGrad-ranges/ranges",
    }
    assert {*tags["images"]} == pictures
    assert min(pictures) == "4-AltGrad-maps/stall_frac_map/bf16"  # the first on the page
    for tag in pictures:
        assert [event.step for event in events.Images(tag)] == [0, 3, 6]
    assert "altgrad/verdict/text_summary" in tags["tensors"]
    texts = events.Tensors("altgrad/verdict/text_summary")
    assert [event.step for event in texts] == [0, 3, 6]
    assert b"frozen" in texts[-1].tensor_proto.string_val[0]
    assert "6-AltGrad-steps/steps/bf16" in tags["histograms"]
    assert "6-AltGrad-steps/steps/bf16/layers.2.weight" in tags["histograms"]
    assert [e.step for e in events.Histograms("6-AltGrad-steps/steps/bf16")] == [*range(7)]
    assert "custom_scalars__config__" in tags["tensors"]


@pytest.mark.default_twins
@pytest.mark.filterwarnings("ignore:PrecisionMonitor (expects|sees frozen)")
@pytest.mark.filterwarnings("ignore:PrecisionMonitor sees frozen layers")
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_run_in_16_bits_is_charted_as_now(tmp_path: Path, precision: Any) -> None:
    monitor = PrecisionMonitor(["e4m3fn"], every_n_steps=1, charts="all")
    run = fit(tmp_path, monitor, precision=precision)
    scalars = logged(run.logger.log_dir)
    kept = [value for _, value in scalars["altgrad/progress_kept/now"]]
    broken = [value for _, value in scalars["altgrad/twin_nonfinite_frac/now"]]
    assert len(kept) == len(broken) == 6
    # In fp16, the eps of AdamW is 0, and weights become NaN.
    assert math.isfinite(kept[-1]) == (precision == "bf16-true")
    assert (broken[-1] > 0) == (precision == "16-true")
    assert "altgrad/frozen_frac/now/layers.2.weight" in scalars
    events = EventAccumulator(run.logger.log_dir, size_guidance=ALL).Reload()
    (*_, layout) = events.Tensors("custom_scalars__config__")  # the last one counts
    assert b"progress_kept" in layout.tensor_proto.string_val[0]
    lost = [value for _, value in scalars["altgrad/lost_now"]]
    assert lost == pytest.approx([1 - each for each in kept], nan_ok=True, abs=1e-6)
    row = next(row for row in read(monitor.path).rows if row.layer == "layers.2.weight")
    assert "frozen_frac" in row.twins["now"]


def test_own_share_elements_and_skipped_steps_are_charted(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(every_n_steps=1, charts="all"))
    scalars = logged(run.logger.log_dir)
    assert {value for _, value in scalars["altgrad/monitor/elements"]} == {2 * 72 + 16}
    assert {value for _, value in scalars["altgrad/monitor/skipped_steps"]} == {0.0}
    shares = [value for _, value in scalars["altgrad/monitor/own_share"]]
    assert all(0 < share < 1 for share in shares[2:])


class TwoOptimizers(Net):
    """A net with two optimizers, which step in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.layers[:2]]

    def training_step(self, batch: list[Tensor], batch_index: int) -> None:
        for k, optimizer in enumerate(self.optimizers()):
            if batch_index % 2 == k:
                continue
            optimizer.zero_grad()
            loss = self.layers(batch[0]).square().mean()
            self.manual_backward(loss)
            optimizer.step()
            self.log("loss", loss)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Net, {}),
        (Net, {"accumulate_grad_batches": 3}),
        (Net, {"accumulate_grad_batches": 2, "max_epochs": 2}),
        (TwoOptimizers, {}),
    ],
)
def test_figures_and_loss_have_the_same_steps(
    tmp_path: Path, module: type[Net], options: dict[str, Any], every: int
) -> None:
    monitor = PrecisionMonitor(charts="all")
    run = trainer(tmp_path, monitor, log_every_n_steps=every, **options)
    run.fit(module(), batches(8))
    scalars = logged(run.logger.log_dir)
    steps = [step for step, _ in scalars["loss"]]
    assert steps
    observed = [step for step, _ in scalars["altgrad/stall_frac/bf16"]]
    assert read(monitor.path).steps == tuple(observed)
    if module is Net:
        assert observed == steps
    else:  # the optimizer that does not step in a due batch is observed in the next one
        assert {*steps} <= {*observed} <= {*steps} | {step + 1 for step in steps}


# --- loggers


def test_several_loggers_get_equal_figures_in_stable_columns(tmp_path: Path) -> None:
    first, second = CSVLogger(tmp_path, "a"), CSVLogger(tmp_path, "b")
    board = TensorBoardLogger(tmp_path)
    monitor = PrecisionMonitor(every_n_steps=1, charts="all")
    fit(tmp_path, monitor, logger=[first, board, second])
    texts = [Path(each.log_dir, "metrics.csv").read_text() for each in (first, second)]
    assert texts[0] == texts[1]
    rows = [row for row in csv.DictReader(texts[0].splitlines()) if row["altgrad/stall_frac/bf16"]]
    assert [int(row["step"]) for row in rows] == [*range(6)]
    own = [key for key in rows[0] if key.startswith("altgrad/")]
    assert {f"altgrad/{key}" for key in ("monitor/own_share", "stall_frac/e5m2/layers.0.bias")} <= {
        *own
    }
    assert all(
        row[key] for row in rows for key in own
    )  # a missing figure is nan, not an empty cell
    scalars = logged(board.log_dir)
    assert {tag for tag in scalars if tag.startswith("altgrad/")} == {*own}


def test_mlflow_stores_the_figures_in_a_local_folder(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path / 'store'}")
    monitor = PrecisionMonitor(charts="all")
    fit(tmp_path, monitor, logger=logger)
    (found,) = (tmp_path / "store").glob("*/*/metrics/altgrad/stall_frac/bf16/model")
    lines = [line.split() for line in found.read_text().splitlines()]
    assert [int(step) for _, _, step in lines] == [1, 3, 5]
    assert float(lines[-1][1]) == pytest.approx(monitor.latest_model["stall_frac/bf16"])
    assert (found.parent / "layers.0.weight").is_file()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # wandb leaves files open
def test_wandb_offline_logs_beside_tensorboard(tmp_path: Path, monkeypatch: Any) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    board = TensorBoardLogger(tmp_path)
    monitor = PrecisionMonitor(recipes="bf16-sr", charts="all")
    fit(tmp_path, monitor, logger=[logger, board])
    summary = dict(logger.experiment.summary)
    wandb.finish()
    assert summary["altgrad/stall_frac/bf16"] == pytest.approx(
        monitor.latest_model["stall_frac/bf16"]
    )
    assert "altgrad/ranges" in summary
    assert {"1-AltGrad/progress_kept_table", "1-AltGrad/frozen_layers_table"} <= {*summary}
    assert "altgrad/stall_frac/bf16" in logged(board.log_dir)


def test_without_a_logger_the_run_file_is_in_the_root_directory(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(every_n_steps=2)
    fit(tmp_path, monitor, logger=False)
    assert monitor.path == tmp_path / "altgrad.jsonl"
    assert read(tmp_path).steps == (1, 3, 5)


def test_no_run_file_is_written_with_fast_dev_run_or_run_file_false(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(every_n_steps=1)
    fit(tmp_path, monitor, fast_dev_run=2)
    assert monitor.latest
    fit(tmp_path, PrecisionMonitor(run_file=False))
    assert not [*tmp_path.rglob("altgrad*.jsonl")]


def test_two_runs_in_one_directory_have_two_run_files(tmp_path: Path) -> None:
    for name in ("altgrad.jsonl", "altgrad-2.jsonl"):
        monitor = PrecisionMonitor()
        fit(tmp_path, monitor, logger=TensorBoardLogger(tmp_path, "", version=""))
        assert monitor.path.name == name
        assert read(monitor.path).steps == (1, 3, 5)


# --- resuming


@pytest.mark.filterwarnings(r"ignore:.*add the following callbacks. \[.ModelCheckpoint[^\]]*\]\.$")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_run_goes_on_without_gaps_or_duplicates(tmp_path: Path, elsewhere: bool) -> None:
    def run(
        folder: Path, epochs: int, *callbacks: pl.Callback, max_steps: int = -1, **options: Any
    ) -> PrecisionMonitor:
        monitor = PrecisionMonitor(every_n_steps=1, layer_charts=1)
        torch.manual_seed(0)
        logger = TensorBoardLogger(folder, "", version="")
        made = trainer(
            folder,
            monitor,
            *callbacks,
            max_epochs=epochs,
            max_steps=max_steps,
            logger=logger,
            enable_checkpointing=bool(callbacks),
            log_every_n_steps=1,
        )
        made.fit(Net(), batches(4), **options)
        return monitor

    # The run ends after step 5, and the checkpoint is from step 4.
    checkpoint = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=-1)
    first = run(tmp_path / "run", 2, checkpoint, max_steps=6)
    assert read(first.path).steps == (*range(6),)
    folder = tmp_path / ("other" if elsewhere else "run")
    resumed = run(folder, 2, ckpt_path=tmp_path / "kept" / "step=4.ckpt")
    assert (resumed.path == first.path) is not elsewhere
    found, whole = read(resumed.path), read(run(tmp_path / "whole", 2).path)
    assert found.steps == whole.steps == (*range(8),)
    found_rows = [(row.step, row.layer) for row in found.rows]
    assert found_rows == [(row.step, row.layer) for row in whole.rows]
    assert [path.name for path in found.predecessors] == (["altgrad.jsonl"] if elsewhere else [])
    for row, expected in zip(
        found.rows, whole.rows, strict=True
    ):  # never_moved_frac, too, which counts all steps
        assert [*row.figures.values()] == pytest.approx([*expected.figures.values()], nan_ok=True)
    assert resumed.assessment.summary == judge_run(whole).summary


def test_the_state_of_the_output_is_json(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(every_n_steps=1)
    fit(tmp_path, monitor)
    assert math.isnan(json.loads(json.dumps(monitor.state_dict()["output"])).get("none", math.nan))
