"""The numbers of a step are one event, and TensorBoard reads what a call per number writes."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

from altgrad.output import WriterLogger
from altgrad.output.charts import Row
from altgrad.output.scalars import log_scalars, write_scalars
from altgrad.output.tensorboard import TensorBoardRuns

NUMBERS = {"a/b": 0.1, "a/c d": -1e300, "e": math.nan, "e/f.weight": math.inf, "g": 1e-45, "h": 3}


def read(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Return the steps and values of each tag in the files of a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(each.step, repr(each.value)) for each in events.Scalars(tag)] for tag in tags}


def write_one_by_one(folder: Path, prefix: str = "") -> dict[str, list[tuple[int, str]]]:
    with SummaryWriter(folder) as writer:
        for step in (3, 4):
            for tag, value in NUMBERS.items():
                writer.add_scalar(prefix + tag, value, step)
    return read(folder)


@contextmanager
def count(method: str, kind: type = FileWriter) -> Iterator[mock.Mock]:
    """Count the calls of a method, which go on to the method itself."""
    with mock.patch.object(kind, method, autospec=True, side_effect=getattr(kind, method)) as calls:
        yield calls


def test_all_numbers_of_a_step_are_one_event_with_the_tags_and_values_of_single_calls(
    tmp_path: Path,
) -> None:
    with SummaryWriter(tmp_path / "one") as writer, count("add_summary") as calls:
        for step in (3, 4):
            write_scalars(writer, NUMBERS, step)
    assert calls.call_count == 2
    assert read(tmp_path / "one") == write_one_by_one(tmp_path / "each")


def test_a_row_is_one_event_in_each_run(tmp_path: Path) -> None:
    model = {f"progress_kept/{name}": 1.0 for name in ("bf16", "e5m2", "now")} | {"ulp_mean": 2.0}
    layers = {f"layer{k}": {"ulp_mean": 1.0, "stall_frac/bf16": 0.5} for k in range(9)}
    with SummaryWriter(tmp_path) as writer, count("add_summary") as calls:
        runs = TensorBoardRuns(WriterLogger(writer))
        runs.log_row(Row(7, model, {"own_share": 0.0}, layers))
        runs.close()
    assert calls.call_count == 3  # the run itself, bf16 and e5m2
    assert len(read(tmp_path)) == 2 + 1 + 9


def test_a_writer_that_was_closed_is_opened_again(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path)
    for step in (3, 4):
        writer.close()
        write_scalars(writer, NUMBERS, step)
    writer.close()
    assert read(tmp_path) == write_one_by_one(tmp_path / "each")


def test_a_writer_with_a_method_of_its_own_gets_each_number() -> None:
    class Writer(SummaryWriter):
        def __init__(self) -> None:
            self.seen: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.seen.append((tag, value, step))

    writer = Writer()
    write_scalars(writer, {"a": 1.0, "b": 2.0}, 5)
    assert writer.seen == [("a", 1.0, 5), ("b", 2.0, 5)]


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_a_logger_of_lightning_writes_one_event_with_its_prefix(
    tmp_path: Path, prefix: str
) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="one", prefix=prefix)
    with count("add_summary") as calls:
        for step in (3, 4):
            log_scalars(logger, NUMBERS, step)
    logger.finalize("success")
    assert calls.call_count == 2
    before = f"{prefix}-" if prefix else ""
    assert read(tmp_path / "one") == write_one_by_one(tmp_path / "each", before)
    # What the method of Lightning itself writes.
    logger = TensorBoardLogger(tmp_path, name=None, version="itself", prefix=prefix)
    for step in (3, 4):
        logger.log_metrics(NUMBERS, step)
    logger.finalize("success")
    assert read(tmp_path / "one") == read(tmp_path / "itself")


def make_subclass(log: Callable[..., object]) -> type:
    return type("Mine", (TensorBoardLogger,), {"log_metrics": log})


def test_a_logger_with_a_method_of_its_own_gets_one_call(tmp_path: Path) -> None:
    calls: list[Any] = []
    logger = make_subclass(lambda _, metrics, step: calls.append((metrics, step)))(tmp_path)
    log_scalars(logger, NUMBERS, 5)
    assert calls == [(NUMBERS, 5)]
