"""Time the measurement of one tensor in one step, in nanoseconds per element.

    python benchmarks/measuring.py [--quick] [--threads 1 2] [--sizes 1e4 1e6]

For each size and number of formats, these variants are paired:

- **altgrad engine**: the sums that a monitor needs, on the device, with memory that is reused; by
  the eager kernel, which calls torch, and by the native one, if numba is installed.
- **altgrad.measure**: also new memory at each call, the copy to the host, and the metrics.
- **naive**: the same figures as one would write them first; see naive.py.
- **torch clone of one**: a clone of one of the three tensors (weights before, after, gradient).
- **memory limit**: the sums of the three tensors, which read each of them once.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from naive import naive_figures, ordinary_data
from paired import (
    Quartiles,
    Seconds,
    Target,
    paired_batches,
    prepare_kernel,
    print_environment,
    print_table,
    print_targets,
    quartiles,
    ratios,
    script_arguments,
    size_name,
    write_json,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from altgrad import get_format, measure
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.native_code import CHOICE, native_code
from altgrad.quantization.format_set import FormatSet

SIZES = (1e3, 1e4, 1e5, 1e6, 3e7, 1e8)
QUICK_LIMIT = 1_000_000
NAIVE_LIMIT = 1_000_000  # beyond, it takes seconds and gigabytes
FORMATS = {1: ("e4m3fn",), 4: ("e4m3fn", "e5m2", "fp16", "bf16")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEMORY_SIZE = 4_000_000

LIMIT = "memory limit: three sums"
NAIVE = "naive"
EAGER, NATIVE = "altgrad engine, eager", "altgrad engine, native"
MEASURE, NATIVE_MEASURE = "altgrad.measure, eager", "altgrad.measure, native"
VARIANTS = ("torch clone of one", LIMIT, NAIVE, EAGER, NATIVE, MEASURE, NATIVE_MEASURE)
AT_MOST = {  # nanoseconds per element, one thread, float32, at 1e6 and at 3e7
    (EAGER, 1): 45,
    (EAGER, 4): 130,
    (NATIVE, 1): 12,
    (NATIVE, 4): 28,
}
TARGET_SIZES = (1_000_000, 30_000_000)
MEMORY_TARGET_MIB = 16

Step = tuple[Tensor, Tensor, Tensor]


class Cell(NamedTuple):
    """The times of one variant, in nanoseconds per element."""

    dtype: str
    threads: int
    formats: int
    elements: int
    variant: str
    rounds: int
    minimum: float
    median: float
    ratio_to_limit: Quartiles


def make_variants(step: Step, formats: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    before, after, gradient = step
    measurer = Measurer(FormatSet(formats))
    resolved = [get_format(name) for name in formats]
    variants: dict[str, Callable[[], object]] = {
        "torch clone of one": before.clone,
        LIMIT: lambda: (before.sum(), after.sum(), gradient.sum()),
        EAGER: by_kernel("eager", lambda: measurer.measure_tensor(*step)),
        MEASURE: by_kernel("eager", lambda: measure(*step, formats=formats)),
    }
    if native_code.is_loaded:
        variants[NATIVE] = by_kernel("native", lambda: measurer.measure_tensor(*step))
        variants[NATIVE_MEASURE] = by_kernel("native", lambda: measure(*step, formats=formats))
    if before.numel() <= NAIVE_LIMIT:
        variants[NAIVE] = lambda: [naive_figures(*step, format) for format in resolved]
    return variants


def by_kernel(kernel: str, run: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        os.environ[CHOICE] = kernel
        return run()

    return call


def choose_rounds(elements: int, *, quick: bool) -> int:
    rounds = 30 if elements <= 1_000_000 else 7 if elements <= 30_000_000 else 3
    return max(3, rounds // 6) if quick else rounds


def make_cells(
    seconds: Seconds, dtype: str, threads: int, formats: int, elements: int
) -> list[Cell]:
    scale = 1e9 / elements
    return [
        Cell(
            dtype=dtype,
            threads=threads,
            formats=formats,
            elements=elements,
            variant=name,
            rounds=len(taken),
            minimum=min(taken) * scale,
            median=quartiles(taken).median * scale,
            ratio_to_limit=ratios(seconds, name, LIMIT),
        )
        for name, taken in seconds.items()
    ]


def print_cells(cells: list[Cell]) -> None:
    """Print one table, with a row for each variant and a column for each size."""
    first = cells[0]
    sizes = sorted({cell.elements for cell in cells})
    print(
        f"\n{first.dtype}, {first.threads} thread(s), {first.formats} format(s): ns per element, "
        "minimum · median (· median ratio to the memory limit)\n"
    )
    at = {(cell.variant, cell.elements): cell for cell in cells}
    rows = [
        (name, *(format_cell(at.get((name, size))) for size in sizes))
        for name in VARIANTS
        if any((name, size) in at for size in sizes)
    ]
    print_table(("", *map(size_name, sizes)), rows)


def format_cell(cell: Cell | None) -> str:
    if cell is None:
        return "skipped"
    return f"{cell.minimum:.3g} · {cell.median:.3g} · {cell.ratio_to_limit.median:.3g}"


def find_targets(cells: list[Cell]) -> list[Target]:
    """Compare medians with the bounds in `AT_MOST`; sizes that did not run are not measured."""
    at = {
        (cell.variant, cell.formats, cell.elements): cell.median
        for cell in cells
        if cell.dtype == "float32" and cell.threads == 1
    }
    return [
        Target(
            f"{name}, {formats} format(s), {size_name(size)}",
            at.get((name, formats, size)),
            at_most,
        )
        for (name, formats), at_most in AT_MOST.items()
        for size in TARGET_SIZES
    ]


def peak_memory(run: Callable[[], object]) -> int:
    """Return the peak of the memory that a call allocates in torch, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    held = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def memory_targets() -> list[Target]:
    """Compare the peak memory of measuring with its bound.

    Each call has a new Measurer, so that memory that is allocated once is counted, too.
    """
    os.environ[CHOICE] = "eager"
    step = ordinary_data(MEMORY_SIZE)
    ordinary = Measurer(FormatSet(FORMATS[1]))
    ordinary.measure_tensor(*ordinary_data(1_000))  # torch allocates constants at first
    targets = []
    for formats in FORMATS.values():
        judged = FormatSet(formats)
        peak = peak_memory(lambda judged=judged: Measurer(judged).measure_tensor(*step)) / 2**20
        demand = f"MiB beside {size_name(MEMORY_SIZE)} elements, {len(formats)} format(s)"
        targets.append(Target(demand, peak, MEMORY_TARGET_MIB))
    return targets


def main() -> None:
    parser = script_arguments("Time the measuring of one tensor's step, paired.")
    parser.add_argument("--sizes", nargs="+", type=float, default=SIZES, metavar="N")
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2), metavar="N")
    parser.add_argument("--dtypes", nargs="+", default=tuple(DTYPES), choices=DTYPES)
    parser.add_argument("--formats", nargs="+", type=int, default=tuple(FORMATS), choices=FORMATS)
    arguments = parser.parse_args()
    print_environment()
    prepare_kernel()
    sizes = [int(s) for s in arguments.sizes if not arguments.quick or s <= QUICK_LIMIT]
    all_cells: list[Cell] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in arguments.dtypes:
            for count in arguments.formats:
                formats = FORMATS[count]
                cells: list[Cell] = []
                for size in sizes:
                    variants = make_variants(ordinary_data(size, DTYPES[dtype]), formats)
                    rounds = choose_rounds(size, quick=arguments.quick)
                    seconds = paired_batches(variants, rounds)
                    cells += make_cells(seconds, dtype, threads, count, size)
                print_cells(cells)
                all_cells += cells
    targets = find_targets(all_cells) + memory_targets()
    print_targets(targets, ".3g")
    figures = {
        "cells": [cell._asdict() for cell in all_cells],
        "targets": [target._asdict() for target in targets],
    }
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
