"""Fixtures: a monitor in mid-training, and references to the monitors of callbacks."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from altgrad import UpdateMonitor
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Attached, Net, batches, count_hooks, trainer


@pytest.fixture(autouse=True)
def _no_pictures_by_default(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draw no pictures for loggers, which takes longer than a small run, unless a test is marked.

    The marker is ``pictures``; `tests/output` draws them.
    """
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("altgrad.output.output.Output._pictures", lambda *_: {})


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Attached]:
    """Return a function that makes a monitor in mid-training, its Trainer and its module."""
    started: list[tuple[PrecisionMonitor, pl.Trainer]] = []

    def start(module: Net | None = None) -> tuple[PrecisionMonitor, pl.Trainer, Net]:
        monitor, module = PrecisionMonitor(every_n_steps=1), module or Net()
        run = trainer(tmp_path, monitor)
        run.fit(module, batches(1))
        monitor.on_train_start(run, module)
        assert count_hooks(run) == 2
        started.append((monitor, run))
        return monitor, run, module

    yield start
    for monitor, run in started:
        monitor.teardown(run)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[UpdateMonitor]]:
    """Return references to each `UpdateMonitor` that a callback makes in training."""
    references: list[weakref.ref[UpdateMonitor]] = []

    class Referenced(UpdateMonitor):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            references.append(weakref.ref(self))

    monkeypatch.setattr("altgrad_lightning.session.UpdateMonitor", Referenced)
    return references
