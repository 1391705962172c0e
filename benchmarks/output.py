"""Time what an observed step costs beside its measuring: verdicts, run file, loggers, pictures.

    python benchmarks/output.py [--quick] [--threads N]

A step has 100 layers and four formats, without twins and with those of the default recipes. Figures
are computed when they are first read. Each call therefore makes the record of the step anew from
its sums, as an observed step does; the time to make the record is subtracted. Times are those of
the processor. Pictures are four heat maps of 60 layers and 200 steps, and the ranges of formats.
"""

from __future__ import annotations

import functools
import gc
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils.tensorboard import SummaryWriter

from altgrad import Histogram, StepRecord, UpdateMonitor
from altgrad.measurement.layer_columns import LayerRow, gather_columns
from altgrad.measurement.step_record import step_record
from altgrad.output import Output, OutputSettings, WriterLogger
from altgrad.output.history import History
from altgrad.quantization import get_formats
from altgrad.report import FormatInfo, ranges
from altgrad.report.canvas import draw_pixels
from benchmarks.gpt import Gpt, train
from benchmarks.paired import (
    Target,
    parse_with_threads,
    print_environment,
    print_table,
    print_targets,
    quartiles,
    script_arguments,
    write_json,
)

FORMATS = ("e4m3fn", "e5m2", "fp16", "bf16")
ROUNDS, WARM_UP = 40, 3
LOOK = 4  # the maps are those of so many formats


class Row(NamedTuple):
    variant: str
    low: float
    median: float
    high: float


class Step(NamedTuple):
    """An observed step of the GPT, and the header of its run.

    Attributes:
        make: A function that makes the record of the step anew at each call.
        header: The header.
    """

    make: Callable[[], StepRecord]
    header: Mapping[str, Any]


def observe_step(**settings: Any) -> Step:
    torch.manual_seed(0)
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    calls: list[Callable[[], StepRecord]] = []

    def keep(*arguments: object, **named: object) -> StepRecord:
        calls.append(functools.partial(step_record, *arguments, **named))
        return calls[-1]()

    watched = UpdateMonitor(model, formats=FORMATS, strict=True, **settings).attach(optimizer)
    with mock.patch("altgrad.monitor.recorder.step_record", keep), watched:
        train(model, optimizer, 3)
        return Step(calls[-1], watched.run_header())


def time_writing(step: Step, folder: Path | None, logger: WriterLogger | None, rounds: int) -> Row:
    """Return the time to write a step, without pictures and verdicts on the run, in ms.

    Args:
        step: The step.
        folder: Folder of the run file; None for none.
        logger: The logger; None for none.
        rounds: Number of steps that are timed.
    """
    loggers, settings = [logger] if logger else [], OutputSettings(strict=True)
    output = Output(loggers, folder, lambda: step.header, settings, None, 0, print)
    taken = []
    # Verdicts and pictures come with the 1st, 4th, 16th, … step.
    with mock.patch("altgrad.output.output._is_even_power", return_value=False):
        for number in range(WARM_UP + rounds):
            record = step.make()
            record.model["update_rms"]  # a monitor reads it, to see whether the step was skipped
            gc.collect()
            gc.disable()
            start = time.process_time()
            output.write(number, record, {})
            taken.append(1e3 * (time.process_time() - start))
            gc.enable()
    output.close()
    parts = [name for name, part in (("run file", folder), ("TensorBoard", logger)) if part]
    return Row(", ".join(["verdicts and charts", *parts]), *quartiles(taken[WARM_UP:]))


def make_rows(layers: Sequence[str], step: int) -> list[LayerRow]:
    """Return figures of layers that come and go with the steps."""
    return [
        LayerRow(
            name,
            {f"stall_frac/{each}": 0.5 + 0.5 * math.sin(step / 30 + place) for each in FORMATS},
            {},
        )
        for place, name in enumerate(layers)
    ]


def time_pictures(step: Step, rounds: int) -> Row:
    """Return the time to draw the pictures of a look, in ms.

    Args:
        step: A step whose layers the pictures show.
        rounds: Number of looks, after a first one.
    """
    history = History()
    for number in range(200):
        history.add(number, gather_columns(make_rows([*step.header["layers"]], number)))
    infos = [FormatInfo.from_format(each, "tensor") for each in get_formats(FORMATS)]
    weights = Histogram(-20, [1, 5, 9, 30, 50, 20, 3])
    taken = []
    for _ in range(1 + rounds):
        start = time.process_time()
        pictures = [*history.draw_heat_maps().values(), ranges(weights, infos)]
        for picture in pictures:
            draw_pixels(picture)
        taken.append(1e3 * (time.process_time() - start))
    assert len(pictures) == LOOK + 1
    return Row("pictures of a look", *quartiles(taken[1:]))


def main() -> None:
    parser = script_arguments("Time what an observed step costs beside its measuring.")
    arguments = parse_with_threads(parser)
    print_environment()
    rounds = ROUNDS // (5 if arguments.quick else 1)
    found: dict[str, list[Row]] = {}
    for twins, settings in (("no twins", {"recipes": ()}), ("default twins", {})):
        step = observe_step(**settings)
        found[twins] = rows = []
        for parts in ((), ("file",), ("board",), ("file", "board")):
            with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
                path = Path(folder) if "file" in parts else None
                logger = WriterLogger(writer) if "board" in parts else None
                rows.append(time_writing(step, path, logger, rounds))
    pictures = time_pictures(step, max(3, rounds // 5))
    print(f"\n{len(step.header['layers'])} layers, {len(FORMATS)} formats; ms of the processor\n")
    cells = [
        (twins, row.variant, *(f"{value:.1f}" for value in row[1:]))
        for twins, rows in found.items()
        for row in rows
    ]
    cells.append(("", pictures.variant, *(f"{value:.0f}" for value in pictures[1:])))
    print_table(("", "", "low", "median", "high"), cells)
    targets = [
        Target("all of an observed step, no twins, ms", found["no twins"][-1].median, 4.0),
        Target("the pictures of a look, ms", pictures.median, 300.0),
    ]
    print_targets(targets)
    figures = {twins: [row._asdict() for row in rows] for twins, rows in found.items()}
    named = [target._asdict() for target in targets]
    write_json(arguments.json, {**figures, "pictures": pictures._asdict(), "targets": named})


if __name__ == "__main__":
    main()
