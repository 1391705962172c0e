"""What the scripts beside it share: rounds that pair variants, counts, tables and targets.

A round calls every variant once, in a new order, so that a machine that slows down or is shared
slows all of them alike. Ratios are taken within a round, and their median is what carries over;
times belong to one machine on one day.
"""

from __future__ import annotations

import argparse
import json
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

MINIMUM_BATCH_SECONDS = 1e-3  # shorter calls are timed in batches of about this length
SLOW_CALL_SECONDS = 0.1  # from here on the untimed call is left away

Variants = Mapping[str, Callable[[], object]]
Seconds = dict[str, list[float]]  # of each variant, one for each round


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


class Target(NamedTuple):
    """What is demanded, what was measured (None where it was not), and the bound it keeps to."""

    demand: str
    measured: float | None
    at_most: float

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.at_most else "NOT MET"


def seconds_of(run: Callable[[], object], calls: int = 1) -> float:
    """Seconds per call of a batch; each result is freed before the next call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def paired_batches(variants: Variants, rounds: int) -> Seconds:
    """Seconds per call of functions that can be called any number of times.

    An untimed call precedes each timed one: the memory allocator and the cache are then in the
    state that this variant leaves behind, not its neighbour. Long calls do not need it.
    """
    first = {name: min(seconds_of(run), seconds_of(run)) for name, run in variants.items()}
    calls = {name: max(1, round(MINIMUM_BATCH_SECONDS / first[name])) for name in variants}

    def timed(name: str) -> float:
        if first[name] < SLOW_CALL_SECONDS:
            variants[name]()
        return seconds_of(variants[name], calls[name])

    return _rounds(list(variants), timed, rounds)


def paired_steps(variants: Variants, rounds: int, *, untimed: int) -> Seconds:
    """Seconds of calls that change something, all variants being called equally often.

    `untimed` calls of the same variant precede each timed one.
    """

    def timed(name: str) -> float:
        for _ in range(untimed):
            variants[name]()
        return seconds_of(variants[name])

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
    """Of the ratios within a round, from which a drift of the machine cancels."""
    return quartiles([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])


class Counts(TorchDispatchMode):
    """Operations that torch dispatches, and copies to the host as they would be on a GPU.

    What an operation makes from nothing, or from such tensors alone, is taken to be on the host
    (random tokens, the edges of a histogram); all else is on the device, and so is what meets it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.host_copies = 0
        self._copying = False  # so that what a copy makes inside is not one more
        self._on_host: dict[int, Tensor] = {}  # by address, kept so that none recurs

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
        """A method of Tensor that copies, counted where it is given a tensor of the device."""
        original = getattr(Tensor, method)

        def call(tensor: Tensor, *args: object, **kwargs: object) -> object:
            if self._copying or self._is_on_host(tensor):
                return original(tensor, *args, **kwargs)
            self.host_copies += 1
            self._copying = True
            try:
                if method != "cpu":
                    return original(tensor, *args, **kwargs)
                copied = tensor.clone()  # as it would be, and then told apart
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
    """As aligned Markdown, the first column to the left."""
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
    """As 1e6 or 3e7."""
    return f"{number:.0e}".replace("e+0", "e") if number >= 1_000 else f"{number:g}"


def script_arguments(description: str) -> argparse.ArgumentParser:
    """The options of every script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no large sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return parser


def environment() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "torch_threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def print_environment() -> None:
    print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)


def write_json(file: Path | None, figures: Mapping[str, object]) -> None:
    if file is not None:
        text = json.dumps({"environment": environment(), **figures}, indent=2)
        file.write_text(text + "\n", encoding="utf-8")
