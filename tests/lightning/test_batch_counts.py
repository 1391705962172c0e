"""Cost of a batch under `PrecisionMonitor` with its defaults, for a GPT of 10.1 M parameters."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from altgrad_lightning import PrecisionMonitor
from benchmarks.gpt import VOCABULARY, Gpt, train
from tests.counting import Operations, host_copies
from tests.lightning.runs import around, trainer

SLOW = pytest.mark.slow
BATCHES = 4


class Language(pl.LightningModule):
    """A GPT without layers of 0, whose weights hardly move, so that scales stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Gpt()
        train(self.model, torch.optim.AdamW(self.model.parameters(), lr=1e-3))

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        text = batch[0]
        return functional.cross_entropy(self.model(text[None, :-1])[0], text[1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-9)


class Cost(NamedTuple):
    """The cost of a batch."""

    operations: Counter[str]
    after_copy: Counter[str]
    copies: list[str]


def costs(folder: Path, *monitors: PrecisionMonitor, **options: object) -> list[Cost]:
    """Return the cost of each batch of a run."""
    found: list[Cost] = []

    def count(batch: contextlib.ExitStack) -> None:
        copies, counted = batch.enter_context(host_copies()), Operations()
        batch.enter_context(counted.counting())
        found.append(Cost(counted.counts, counted.after_copy, copies))

    run = trainer(folder, *around(monitors, count), log_every_n_steps=1, **options)
    run.fit(Language(), DataLoader(torch.randint(VOCABULARY, (BATCHES, 33)), batch_size=1))
    return found


@pytest.mark.pictures
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"logger": False}, id="run file"),
        pytest.param({}, id="TensorBoard", marks=SLOW),
    ],
)
def test_an_observed_batch_makes_at_most_300_operations_and_one_host_copy(
    tmp_path: Path, options: dict[str, object]
) -> None:
    """Pictures are drawn at the fourth batch."""
    alone = costs(tmp_path / "alone", **options)
    monitor = PrecisionMonitor()
    watched = costs(tmp_path / "watched", monitor, **options)
    assert monitor.latest_step == BATCHES - 1
    for cost, without in list(zip(watched, alone, strict=True))[1:]:  # the first has to lay out
        added = cost.operations - without.operations
        assert 100 < added.total() <= 300
        assert not cost.after_copy
        assert Counter(cost.copies) - Counter(without.copies) == Counter(["cpu"])
