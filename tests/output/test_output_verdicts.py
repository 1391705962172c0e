"""Verdicts on the run: written to the run file when they are drawn, and warned about once."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger

from altgrad.report import Verdict, read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, batches, fit, trainer
from tests.report.records.by_hand import list_texts

RECIPES = ["bf16-kahan"]


def read_verdict_lines(path: Path) -> list[dict[str, Any]]:
    lines = list_texts(path)
    return [line for line in lines if "verdicts" in line]


def fit_recorded(folder: Path, monitor: PrecisionMonitor, **options: Any) -> list[str]:
    """Train, and return the notices on frozen layers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, monitor, **options)
    texts = [str(each.message) for each in caught]
    return [text for text in texts if "frozen layers" in text]


@pytest.mark.parametrize("logger", [True, False], ids=["tensorboard", "csv"])
def test_the_run_file_has_verdicts_at_powers_of_four_and_at_the_end(
    tmp_path: Path, logger: bool
) -> None:
    monitor = PrecisionMonitor("bf16", recipes=RECIPES, every_n_steps=1)
    fit(tmp_path, monitor, steps=7, **({} if logger else {"logger": CSVLogger(tmp_path)}))
    lines = read_verdict_lines(monitor.path)
    assert [line["step"] for line in lines] == [0, 3, 6]
    last = read(monitor.path).verdicts
    assert [*last] == ["bf16-kahan", "bf16"]
    for name, each in monitor.assessment.runs.items():
        assert last[name]["verdict"] == each.verdict.name
        assert last[name]["frozen_layers"] == tuple(each.frozen)
        assert last[name]["to_do"] == each.to_do


def test_a_killed_run_has_the_verdicts_of_its_last_look(tmp_path: Path) -> None:
    class Killed(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if _[-1] == 2:
                content = monitor.path.read_bytes()
                (tmp_path / "killed").mkdir()
                (tmp_path / "killed" / "altgrad.jsonl").write_bytes(content)

    monitor = PrecisionMonitor("bf16", recipes=RECIPES, every_n_steps=1)
    trainer(tmp_path, monitor, Killed()).fit(Net(), batches(3))
    killed = read(tmp_path / "killed")
    assert killed.steps[-1] >= 1
    assert [*killed.verdicts] == ["bf16-kahan", "bf16"]


def test_frozen_layers_of_a_run_in_bf16_are_warned_about_once(tmp_path: Path) -> None:
    monitor = PrecisionMonitor("e4m3fn", recipes=RECIPES, every_n_steps=1)
    notices = fit_recorded(tmp_path, monitor, steps=7, precision="bf16-true")
    (notice,) = notices
    assert notice.startswith("PrecisionMonitor sees frozen layers: layers.2.weight (5 % of the")
    now = monitor.assessment.runs["now"]
    assert notice.endswith(f"as they are stored they stand still. {find_remedy(monitor)}")
    assert now.frozen
    assert monitor.assessment.by_layer["layers.2.weight"]["now"].verdict is Verdict.FROZEN


def find_remedy(monitor: PrecisionMonitor) -> str:
    """Return what to do at the first look with a frozen layer, as the run file has it."""
    looks = [line["verdicts"]["now"] for line in read_verdict_lines(monitor.path)]
    to_do: str = next(each["to_do"] for each in looks if each["frozen_layers"])
    return to_do


def test_a_run_in_float32_is_not_warned_about(tmp_path: Path) -> None:
    assert not fit_recorded(tmp_path, PrecisionMonitor("bf16", recipes=["bf16"], every_n_steps=1))


class RoundingAtRandom(Net):
    """A net in bf16 whose optimizer rounds at random, so that its weights move."""

    def configure_optimizers(self) -> Any:
        torchao = pytest.importorskip("torchao.optim")
        # torchao has no public name for it
        return torchao._AdamW(self.parameters(), lr=1e-3, bf16_stochastic_round=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_in_bf16_that_rounds_at_random_is_not_warned_about(tmp_path: Path) -> None:
    torch.manual_seed(0)
    monitor = PrecisionMonitor("e4m3fn", recipes=RECIPES, every_n_steps=20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, monitor, precision="bf16-true").fit(RoundingAtRandom(), batches(200))
    assert "now" in monitor.assessment.runs
    assert not [each for each in caught if "frozen layers" in str(each.message)]
