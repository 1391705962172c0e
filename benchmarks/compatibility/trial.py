"""Run a way to train without and with a monitor, and judge what the monitor saw.

A row is *exact* if two things hold: each step that the monitor saw equals the clones of weights and
gradients around the real step, bit for bit; and training with the monitor equals training without.
"""

from __future__ import annotations

import io
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from altgrad import StepRecord, UpdateMonitor
from tests.step_truth.designs import AltGrad, Design, recording_observer
from tests.step_truth.modes import Run
from tests.step_truth.recording import Journal, Step, difference

EXACT = "exact"
REFUSED = "refused"
LEFT_OUT = "left out with a warning"
NOT_SEEN = "not seen"
NOT_RUN = "not run here"
WRONG = "WRONG"

OBSERVER = "altgrad.monitor.monitor.StepObserver"
RECIPES = "altgrad.monitor.monitor.find_default_recipes"
SETTINGS: dict[str, Any] = {"formats": "e4m3fn", "recipes": ()}
_OURS = re.compile("altgrad|UpdateMonitor|StepObserver|Precision")


class Finding(NamedTuple):
    """What came out of a row: one of the results, and a notice, error or reason."""

    result: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        group: Heading of its table.
        name: The way to train.
        attempt: Function that runs it and returns what came out.
    """

    group: str
    name: str
    attempt: Callable[[], Finding] = field(repr=False)


class RefusedError(Exception):
    """An error at `attach`, or where an adapter attaches."""


class Unwatched(Design):
    """No observer: training as it is without AltGrad."""

    def watch(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def adapt(self, _: Callable[[], Any]) -> AbstractContextManager[None]:
        return nullcontext()

    def callback(self) -> pl.Callback:
        return pl.Callback()


class Watched(AltGrad):
    """A monitor with the notices and records that users get; a copy of each step is kept, too."""

    def __init__(self) -> None:
        super().__init__()
        self.notices: list[str] = []
        self.records: list[StepRecord] = []

    @contextmanager
    def watch(self, module: nn.Module, *optimizers: Any, **options: Any) -> Iterator[None]:
        """Observe optimizers with an UpdateMonitor."""

        def attach() -> UpdateMonitor:
            settings = SETTINGS | {"scaling": None, "max_elements": None}
            told = self.notices.append
            monitor = UpdateMonitor(module, self.records.append, warn=told, **settings)
            return monitor.attach(*optimizers, **options)

        with self.adapt(attach):
            yield

    @contextmanager
    def adapt(self, attach: Callable[[], Any]) -> Iterator[None]:
        """Observe with what a function attaches: a monitor, or the watched run of an adapter."""
        with patch(OBSERVER, recording_observer(self)):
            try:
                watching = attach()
            except Exception as error:
                raise RefusedError(str(error)) from error
            with watching if hasattr(watching, "__exit__") else nullcontext():
                yield


Judge = Callable[["Watched", list[Step], list[str]], Finding]


def try_run(run: Run, judge: Judge | None = None) -> Finding:
    """Run a way to train twice, and judge what the monitor saw.

    Args:
        run: Function of a design and a folder that trains, and returns the journal of its steps.
        judge: Function of the monitor, the true steps and the notices; by default `judge_steps`.

    Returns:
        What came out.
    """
    with quiet() as caught, TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "without").mkdir()
        (folder / "with").mkdir()
        try:
            truth, state = train_from_seed(run, Unwatched(), folder / "without")
        except Exception as error:  # noqa: BLE001 - a library or a device is missing
            return Finding(NOT_RUN, f"fails without AltGrad: {shorten(error)}")
        if not any(has_moved(step) for step in truth.steps):
            return Finding(NOT_RUN, "moves no weight without AltGrad")
        caught.clear()
        design = Watched()
        try:
            journal, watched_state = train_from_seed(run, design, folder / "with")
        except RefusedError as error:
            return Finding(REFUSED, str(error))
        except Exception as error:  # noqa: BLE001 - the page says it
            return Finding(WRONG, f"fails with AltGrad alone: {shorten(error)}")
        told = [text for each in caught if _OURS.match(text := str(each.message))]
        if difference(journal.steps, truth.steps) or not torch.equal(state, watched_state):
            again, _ = train_from_seed(run, Unwatched(), folder / "without")
            if difference(again.steps, truth.steps):
                return Finding(NOT_RUN, "no two runs without AltGrad are equal")
            return Finding(WRONG, "training differs from that without AltGrad")
    return (judge or judge_steps)(design, journal.steps, [*design.notices, *told])


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Collect warnings, discard what trainers print, and step no twins by default.

    Yields:
        The warnings.
    """
    with ExitStack() as stack:
        stack.enter_context(patch(RECIPES, lambda _: ()))
        for redirect in (redirect_stdout, redirect_stderr):
            stack.enter_context(redirect(io.StringIO()))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        yield caught


def train_from_seed(run: Run, design: Design, folder: Path) -> tuple[Journal, torch.Tensor]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that libraries draw from
    journal = run(design, folder)
    return journal, torch.get_rng_state()


def judge_steps(design: Watched, truth: list[Step], notices: list[str]) -> Finding:
    """Compare what a monitor saw with the truth."""
    note = " ".join(dict.fromkeys(notices))
    problem = difference(design.seen, truth)
    if problem is None:
        problem = compare_figures(design.records, truth)
        if problem:
            return Finding(WRONG, problem)
        names = {name for step in truth for name in step}
        measured = {name for record in design.records for name in record.layers}
        if measured and measured != names:
            return Finding(LEFT_OUT if notices else NOT_SEEN, note)
        return Finding(EXACT, note)
    if is_part(design.seen, truth):
        return Finding(LEFT_OUT if notices else NOT_SEEN, note)
    return Finding(WRONG, problem)


def is_part(seen: list[Step], truth: list[Step]) -> bool:
    """Return True if all that was seen is true, though steps or layers are missing."""
    names = {name for step in seen for name in step}
    left = iter([{n: each for n, each in step.items() if n in names} for step in truth])
    return all(any(difference([step], [other]) is None for other in left) for step in seen)


def compare_figures(records: list[StepRecord], truth: list[Step]) -> str | None:
    """Describe the first wrong figure; None if each is right, or a record has several steps."""
    if len(records) != len(truth):
        return None
    for record, step in zip(records, truth, strict=True):
        for name in step.keys() & record.layers.keys():
            before, gradient, after = step[name]
            update = after.double() - before.double()
            if record.layers[name].population < update.numel():  # rows of a sparse gradient
                update = update[gradient.flatten(1).any(1)]
            expected = update.square().mean().sqrt().item()
            figure = record.layers[name]["update_rms"]
            if not is_equal(figure, expected):
                return f"update_rms of {name} is {figure} instead of {expected}"
            still = (after == before)[gradient != 0].double().mean().item()
            figure = record.layers[name]["unmoved_frac"]
            if not is_equal(figure, still):
                return f"unmoved_frac of {name} is {figure} instead of {still}"
    return None


def is_equal(figure: float, expected: float) -> bool:
    """Compare figures that float64 sums in any order."""
    both_nan = math.isnan(figure) and math.isnan(expected)
    return both_nan or math.isclose(figure, expected, rel_tol=1e-12)


def has_moved(step: Step) -> bool:
    return any(not torch.equal(before, after) for before, _, after in step.values())


def shorten(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:100]}"


def make_rows(group: str, runs: dict[str, Run]) -> list[Row]:
    """Return a row for each way to train in one process.

    Args:
        group: Heading of their table.
        runs: The ways to train, by name.

    Returns:
        The rows.
    """
    return [Row(group, name, partial(try_run, run)) for name, run in runs.items()]
