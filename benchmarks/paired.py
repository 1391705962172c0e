"""Helpers of the benchmarks: paired timing, counts of operations, tables and targets.

To pair variants is to time them in rounds: a round calls every variant once, in a new order. A
machine that slows down, or is shared, then slows all variants alike. Compare the median of the
ratios within rounds; times alone belong to one machine on one day.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from altgrad.measurement.native_code import CHOICE, native_code

MINIMUM_BATCH_SECONDS = 1e-3  # shorter calls are timed in batches of about this length
SLOW_CALL_SECONDS = 0.1  # longer calls have no untimed call before them

Variants = Mapping[str, Callable[[], object]]
"""Functions to time, by name."""
Seconds = dict[str, list[float]]
"""For each variant its time in each round, in seconds per call."""


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


class Target(NamedTuple):
    """A bound for a measured number.

    Attributes:
        demand: What the number is, in words.
        measured: The number; None if it was not measured.
        at_most: The bound.
    """

    demand: str
    measured: float | None
    at_most: float

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.at_most else "NOT MET"


def time_calls(run: Callable[[], object], calls: int = 1) -> float:
    """Return the time of calls in a row, in seconds per call.

    Each result is freed before the next call.

    Args:
        run: The function to call.
        calls: Number of calls.
    """
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def paired_batches(variants: Variants, rounds: int) -> Seconds:
    """Time functions without side effects, short ones in batches of calls.

    An untimed call comes before each batch. The memory allocator and the cache are then in the
    state in which this variant leaves them, and not another one. Long calls do not need it.

    Args:
        variants: The functions.
        rounds: Number of rounds.
    """
    first = {name: min(time_calls(run), time_calls(run)) for name, run in variants.items()}
    calls = {name: max(1, round(MINIMUM_BATCH_SECONDS / first[name])) for name in variants}

    def timed(name: str) -> float:
        if first[name] < SLOW_CALL_SECONDS:
            variants[name]()
        return time_calls(variants[name], calls[name])

    return _rounds(list(variants), timed, rounds)


def paired_steps(variants: Variants, rounds: int, *, untimed: int) -> Seconds:
    """Time functions that change something, such as training steps: all are called equally often.

    Args:
        variants: The functions.
        rounds: Number of rounds, with one timed call of each variant.
        untimed: Number of calls of the same variant before each timed call.
    """

    def timed(name: str) -> float:
        for _ in range(untimed):
            variants[name]()
        return time_calls(variants[name])

    return _rounds(list(variants), timed, rounds)


def _rounds(names: list[str], timed: Callable[[str], float], rounds: int) -> Seconds:
    seconds: Seconds = {name: [] for name in names}
    shuffler = random.Random(0)
    for _ in range(rounds):
        for name in shuffler.sample(names, len(names)):
            seconds[name].append(timed(name))
    return seconds


def quartiles(values: Sequence[float]) -> Quartiles:
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def ratios(seconds: Seconds, name: str, base: str) -> Quartiles:
    """Return quartiles of the ratios of two variants' times.

    Ratios are taken within rounds, so that a drift of the machine cancels.

    Args:
        seconds: Times of all variants.
        name: The variant in the numerator.
        base: The variant in the denominator.
    """
    return quartiles([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])


class Counts(TorchDispatchMode):
    """A count of operations that torch dispatches, and of copies to the host, as if on a GPU.

    All tensors are on the CPU, so that each is told to be on the host or on the device by its
    origin. A tensor that an operation makes without inputs, or from tensors on the host alone, is
    on the host, such as random tokens. All others are on the device. A tensor on the host that
    meets one on the device counts as moved to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.host_copies = 0
        self._copying = False  # True inside of a copy, which counts once
        self._on_host: dict[int, Tensor] = {}  # by address; kept alive so that no address recurs

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_host = all(map(self._is_on_host, inputs))
        if str(function) == "aten._local_scalar_dense.default" and not self._copying:
            self.host_copies += not on_host
        result = function(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for tensor in outputs if on_host else (*inputs, *outputs):
            self._on_host.pop(_address(tensor), None)
            if on_host:
                self._on_host[_address(tensor)] = tensor
        return result

    def _is_on_host(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._on_host

    def counted(self, method: str) -> Callable[..., object]:
        """Return a method of Tensor that copies to the host, with a count of copies from a device.

        Args:
            method: Name of the method, such as ``"cpu"``.
        """
        original = getattr(Tensor, method)

        def call(tensor: Tensor, *args: object, **kwargs: object) -> object:
            if self._copying or self._is_on_host(tensor):
                return original(tensor, *args, **kwargs)
            self.host_copies += 1
            self._copying = True
            try:
                if method != "cpu":
                    return original(tensor, *args, **kwargs)
                copied = tensor.clone()  # cpu() would return the tensor itself, not a new one
                self._on_host[_address(copied)] = copied
                return copied
            finally:
                self._copying = False

        return call


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def counting() -> Iterator[Counts]:
    counts = Counts()
    methods = {name: counts.counted(name) for name in ("tolist", "cpu", "numpy")}
    with mock.patch.multiple(Tensor, **methods), counts:
        yield counts


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as aligned Markdown, with the first column to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *padded[1:]]) + " |"

    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    print("\n".join(map(line, [header, rules, *rows])), flush=True)


def print_targets(targets: Sequence[Target], number: str = ".2f") -> None:
    print("\nTargets")
    print_table(
        ("target", "at most", "measured", ""),
        [
            (
                target.demand,
                f"{target.at_most:g}",
                "–" if target.measured is None else format(target.measured, number),
                target.verdict,
            )
            for target in targets
        ],
    )


def size_name(number: float) -> str:
    """Return a number of elements as text, such as 1e6 or 3e7."""
    return f"{number:.0e}".replace("e+0", "e") if number >= 1_000 else f"{number:g}"


def script_arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no large sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser


def parse_with_threads(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with an option for torch's threads, which are set."""
    parser.add_argument("--threads", type=int, metavar="N", help="cores for torch; default: all")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def environment() -> dict[str, str]:
    """Return what the figures depend on: versions, threads and the machine."""
    return {
        "torch": torch.__version__,
        "torch_threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def prepare_kernel() -> None:
    """Load or compile the native kernel, unless ``ALTGRAD_KERNEL=eager`` or numba is missing."""
    if importlib.util.find_spec("numba"):
        os.environ.setdefault(CHOICE, "native")
    native_code.prepare(compiles=True)
    print(f"kernel: {native_code.describe()}", flush=True)


def print_environment() -> None:
    print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)


def write_json(file: Path | None, figures: Mapping[str, object]) -> None:
    if file is not None:
        text = json.dumps({"environment": environment(), **figures}, indent=2)
        file.write_text(text + "\n", encoding="utf-8")
