"""Time writing and reading the run file, per observed step of 100 layers and four formats.

    python benchmarks/run_file.py [--quick] [--threads N]

Figures are computed when they are first read. Each call therefore makes the record of the step anew
from its sums, as an observed step does; the time to make the record is subtracted.
"""

# ruff: noqa: SLF001 - `dumped` writes to the same kind of file, by a private method

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from altgrad import StepRecord, UpdateMonitor
from altgrad.measurement.step_record import step_record
from altgrad.quantization import get_formats
from altgrad.report import FormatInfo, Header, LayerInfo, RunFile, read
from altgrad.report.records.lines import format_lines
from benchmarks.gpt import Gpt, train
from benchmarks.paired import (
    Target,
    paired_batches,
    print_environment,
    print_table,
    print_targets,
    quartiles,
    script_arguments,
    time_calls,
    write_json,
)

FORMATS = ("e4m3fn", "e5m2", "fp16", "bf16")
RECORD, FIGURES, LINES, APPEND = "record", "all figures", "their lines", "appended to the file"
DUMPS = "json.dumps of all figures, appended"
ROUNDS = 60


class Row(NamedTuple):
    variant: str
    low: float
    median: float
    high: float


def a_step() -> Callable[[], StepRecord]:
    """Return a function that makes the record of one step of the GPT anew at each call."""
    torch.manual_seed(0)
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    calls: list[Callable[[], StepRecord]] = []

    def keep(*arguments: object, **named: object) -> StepRecord:
        calls.append(lambda: step_record(*arguments, **named))
        return calls[-1]()

    watched = UpdateMonitor(model, formats=FORMATS, recipes=(), strict=True).attach(optimizer)
    with mock.patch("altgrad.monitor.recorder.step_record", keep), watched:
        train(model, optimizer, 2)
    return calls[-1]


def header_from(record: StepRecord) -> Header:
    return Header(
        {each.name: FormatInfo.from_format(each, "tensor") for each in get_formats(FORMATS)},
        {
            name: LayerInfo((figures.population,), "float32", figures.elements, figures.formats)
            for name, figures in record.layers.items()
        },
    )


def read_figures(record: StepRecord) -> None:
    for figures in (*record.layers.values(), record.model):
        figures.in_order()


def dumped(file: RunFile, record: StepRecord) -> None:
    """Append figures by `json.dumps`, as one would write it first.

    Standard errors and histograms are left out.

    Args:
        file: The run file.
        record: The record of the step.
    """

    def valid(value: float) -> float | str | None:
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)

    def line(name: str | None, figures: Mapping[str, float]) -> str:
        values = {key: valid(value) for key, value in figures.items()}
        return json.dumps({"step": 0, "layer": name, "figures": values}) + "\n"

    lines = [line(name, figures) for name, figures in record.layers.items()]
    file._write("".join([*lines, line(None, record.model)]))


def make_rows(seconds: Mapping[str, list[float]]) -> list[Row]:
    """Return the time of the record, and the time that each other variant adds to it, in ms."""
    plain = seconds[RECORD]
    rows = [Row(RECORD, *(1e3 * value for value in quartiles(plain)))]
    for name, taken in seconds.items():
        if name != RECORD:
            added = [1e3 * (a - b) for a, b in zip(taken, plain, strict=True)]
            rows.append(Row(name, *quartiles(added)))
    return rows


def main() -> None:
    parser = script_arguments("Time writing and reading the run file, paired.")
    parser.add_argument("--threads", type=int, metavar="N", help="cores for torch; default: all")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print_environment()
    record = a_step()
    with tempfile.TemporaryDirectory() as folder:
        file = RunFile.create(folder, header_from(record()))
        other = RunFile.create(folder, header_from(record()))
        size = file.path.stat().st_size
        file.append(0, record(), skipped={})
        size = file.path.stat().st_size - size
        layers = len(record().layers)
        print(f"{layers} layers, {len(FORMATS)} formats: {size / 1e3:,.0f} kB a step")
        variants = {
            RECORD: record,
            FIGURES: lambda: read_figures(record()),
            LINES: lambda: format_lines(0, record(), {}, None),
            APPEND: lambda: file.append(0, record(), skipped={}),
            DUMPS: lambda: dumped(other, record()),
        }
        rows = make_rows(paired_batches(variants, ROUNDS // (5 if arguments.quick else 1)))
        file.close()
        other.close()
        reading = time_reading(Path(folder), record)
    print(f"\nAdded to the record, ms a step; reading takes {1e3 * reading:.2f} ms a step\n")
    cells = [(row.variant, *(f"{value:.2f}" for value in row[1:])) for row in rows]
    print_table(("", "low", "median", "high"), cells)
    measured = next(row.median for row in rows if row.variant == APPEND)
    targets = [Target("appended to the file, ms a step", measured, 5.0)]
    print_targets(targets)
    figures = {"rows": [row._asdict() for row in rows], "reading_ms": 1e3 * reading, "bytes": size}
    write_json(arguments.json, {**figures, "targets": [target._asdict() for target in targets]})


def time_reading(folder: Path, record: Callable[[], StepRecord], steps: int = 20) -> float:
    with RunFile.create(folder, header_from(record())) as file:
        for step in range(steps):
            file.append(step, record(), skipped={})
    return min(time_calls(lambda: read(file.path)) for _ in range(3)) / steps


if __name__ == "__main__":
    main()
