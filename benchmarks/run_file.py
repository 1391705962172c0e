"""Measure the run file: bytes and time of a step, and what `altgrad report` takes for a long run.

    python benchmarks/run_file.py [--quick] [--threads N]

A step has 100 layers, with the default formats and recipes or with *everything*: four formats and
the ten recipes that belong to them. Figures are computed when they are first read. Each call
therefore makes the record of the step anew from its sums, as an observed step does; the time to
make the record is subtracted. Long files repeat the lines of twenty steps.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

from altgrad import StepRecord, UpdateMonitor
from altgrad.measurement.step_record import step_record
from altgrad.report import RunFile
from altgrad.report.records.lines import format_step, tabulate
from benchmarks.gpt import Gpt, train
from benchmarks.paired import (
    Target,
    paired_batches,
    parse_with_threads,
    print_environment,
    print_table,
    print_targets,
    quartiles,
    script_arguments,
    write_json,
)

EVERYTHING = ("e4m3fn", "e5m2", "fp16", "bf16")
SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "everything": {"formats": EVERYTHING}}
MOST_BYTES = {"default": 50_000, "everything": 120_000}
RECORD, FIGURES, LINES, APPEND = "record", "all figures", "their line", "appended to the file"
ROUNDS, STEPS, WARM_STEPS, LAYERS = 40, 10_000, 20, (300, 3_000)

REPORT = """
import io, json, re, sys, time
from rich.console import Console
from altgrad.report import RunReport, print_report, read
began, cpu = time.perf_counter(), time.process_time()
run = read(sys.argv[1])
read_in = time.process_time() - cpu
print_report(RunReport.from_run(run), Console(file=io.StringIO()))
taken = time.process_time() - cpu
# Not getrusage, which also counts what the process had before it began to run this code.
memory = int(re.search("VmHWM: *\t? *(\\d+)", open("/proc/self/status").read())[1]) / 1024
print(json.dumps([time.perf_counter() - began, taken, read_in, memory]))
"""


class Recorded(NamedTuple):
    """A short run.

    Attributes:
        header: The header of its file.
        makers: For each step, a function that makes the record anew at each call.
    """

    header: Mapping[str, Any]
    makers: Sequence[Callable[[], StepRecord]]


class Row(NamedTuple):
    setting: str
    variant: str
    low: float
    median: float
    high: float


class LongRun(NamedTuple):
    """What a long run took.

    Attributes:
        name: What was run.
        steps: Number of observed steps.
        megabytes: Size of the file.
        seconds: Time from the start of reading to the end of the report.
        cpu_seconds: Its time on a CPU.
        read_seconds: That of `read` alone.
        memory: Largest memory of the process in MiB, libraries included.
    """

    name: str
    steps: int
    megabytes: float
    seconds: float
    cpu_seconds: float
    read_seconds: float
    memory: float


class Wide(nn.Module):
    """A net of many small layers, each with a gradient.

    Args:
        layers: Number of layers.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(8, 8) for _ in range(layers))

    def forward(self) -> torch.Tensor:
        return torch.stack([weight.square().sum() for weight in self.weights]).sum()


def record_run(
    model: nn.Module,
    run_step: Callable[[torch.optim.Optimizer], object],
    steps: int,
    **options: Any,
) -> Recorded:
    """Train a model for some steps, and keep the sums of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    makers: list[Callable[[], StepRecord]] = []

    def keep(*arguments: object, **named: object) -> StepRecord:
        makers.append(lambda: step_record(*arguments, **named))
        return makers[-1]()

    monitor = UpdateMonitor(model, strict=True, **options)
    with mock.patch("altgrad.monitor.recorder.step_record", keep), monitor.attach(optimizer):
        for _ in range(steps):
            run_step(optimizer)
    return Recorded(monitor.run_header(), makers)


def record_gpt(setting: str, steps: int) -> Recorded:
    torch.manual_seed(0)
    model = Gpt()
    return record_run(model, lambda optimizer: train(model, optimizer), steps, **SETTINGS[setting])


def record_wide(layers: int) -> Recorded:
    torch.manual_seed(0)
    model = Wide(layers)

    def run_step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model().backward()
        optimizer.step()

    return record_run(model, run_step, 3)


def write_long(folder: Path, recorded: Recorded, steps: int) -> Path:
    """Write a file of many steps, which repeats the lines of a few with other numbers."""
    with RunFile.create(folder, recorded.header) as file:
        records = [make() for make in recorded.makers]
        for step, record in enumerate(records):
            file.append(step, record, skipped={})
    begins = b'{"step": '
    # Packed bytes hold line ends of other kinds, so that `splitlines` would not do.
    lines = [
        line.partition(b",")[2]
        for line in file.path.read_bytes().split(b"\n")
        if line.startswith(begins)
    ]
    with file.path.open("ab") as end:
        for step, line in zip(range(len(lines), steps), itertools.cycle(lines)):
            end.write(begins + str(step).encode() + b"," + line + b"\n")
    return file.path


def report(name: str, path: Path, steps: int) -> LongRun:
    """Report a run in a process of its own, as `altgrad report RUN --all` does."""
    command = [sys.executable, "-c", REPORT, str(path)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return LongRun(name, steps, path.stat().st_size / 1e6, *json.loads(shown))


def measure_step(setting: str, recorded: Recorded, rounds: int) -> list[Row]:
    """Return the time of the record, and the time that each other variant adds to it, in ms."""
    make = recorded.makers[-1]

    def read_figures() -> None:
        record = make()
        for figures in (*record.layers.values(), record.model):
            figures.in_order()

    def format_line() -> None:
        record = make()
        format_step(0, record, {}, 0, tabulate(record, None))

    with tempfile.TemporaryDirectory() as folder, RunFile.create(folder, recorded.header) as file:
        variants = {
            RECORD: make,
            FIGURES: read_figures,
            LINES: format_line,
            APPEND: lambda: file.append(0, make(), skipped={}),
        }
        seconds = paired_batches(variants, rounds)
    plain = seconds[RECORD]
    rows = [Row(setting, RECORD, *(1e3 * value for value in quartiles(plain)))]
    for name, taken in seconds.items():
        if name != RECORD:
            added = [1e3 * (a - b) for a, b in zip(taken, plain, strict=True)]
            rows.append(Row(setting, name, *quartiles(added)))
    return rows


def count_bytes(recorded: Recorded) -> int:
    """Return the bytes of the last step, of which the first ones take fewer."""
    record = recorded.makers[-1]()
    return len(format_step(STEPS, record, {}, 0, tabulate(record, None)))


def print_long(runs: Sequence[LongRun]) -> None:
    print_table(
        ("", "steps", "MB", "report, s", "of it on a CPU", "of this, read", "MiB"),
        [
            (
                *(each.name, f"{each.steps:,}", f"{each.megabytes:,.0f}"),
                *(f"{value:.1f}" for value in each[3:6]),
                f"{each.memory:,.0f}",
            )
            for each in runs
        ],
    )


def main() -> None:
    parser = script_arguments("Measure the run file, and reports of long runs.")
    arguments = parse_with_threads(parser)
    print_environment()
    parts = 10 if arguments.quick else 1
    rows: list[Row] = []
    runs: list[LongRun] = []
    targets: list[Target] = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS:
            recorded = record_gpt(setting, WARM_STEPS)
            size = count_bytes(recorded)
            targets.append(Target(f"bytes of a step, {setting}", size, MOST_BYTES[setting]))
            rows += measure_step(setting, recorded, ROUNDS // parts)
            path = write_long(Path(folder, setting), recorded, STEPS // parts)
            runs.append(report(f"{setting}, 100 layers", path, STEPS // parts))
            path.unlink()
        for layers in LAYERS:
            recorded, steps = record_wide(layers), 300_000 // layers // parts
            rows += measure_step(f"{layers:,} layers", recorded, ROUNDS // parts // 2)
            path = write_long(Path(folder, str(layers)), recorded, steps)
            runs.append(report(f"default, {layers:,} layers", path, steps))
    print("\nAdded to the record, ms a step\n")
    cells = [(*row[:2], *(f"{value:.2f}" for value in row[2:])) for row in rows]
    print_table(("", "", "low", "median", "high"), cells)
    print("\nA report of a long run\n")
    print_long(runs)
    for each in runs[:2]:
        targets.append(Target(f"report, s on a CPU, {each.name}", each.cpu_seconds, 10.0 / parts))
        targets.append(Target(f"memory, MiB, {each.name}", each.memory, 600.0))
    print_targets(targets)
    figures = {"rows": [row._asdict() for row in rows], "runs": [run._asdict() for run in runs]}
    write_json(arguments.json, {**figures, "targets": [target._asdict() for target in targets]})


if __name__ == "__main__":
    main()
