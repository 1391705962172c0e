"""Time an observed step for models of growing size, with the same number of sampled elements.

    python benchmarks/model_size.py [--quick] [--threads N] [--sizes 1e6 1e8] [--elements 1024]

The model has 26 tensors; SGD steps them with gradients that are drawn once. Hooks outside of those
of `UpdateMonitor` separate the monitor's time from that of the step:

- before the step, the monitor copies the sampled weights and gradients;
- after it, the monitor copies the new weights, measures, and copies the results to the host.

Only the three gathers of elements can depend on the size, because elements lie ever farther apart
in memory. The same gathers by `torch.take` alone are timed, too. The step in between replaces the
contents of the caches, as in training.

The first observed step is timed separately: it reads whole parameters for their amax, and draws
samples. Each amax is computed again every 100 observed steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from paired import (
    Quartiles,
    paired_steps,
    parse_with_threads,
    print_environment,
    print_table,
    quartiles,
    script_arguments,
    size_name,
    time_calls,
    write_json,
)
from torch import Tensor, nn
from torch.optim import SGD

from altgrad import UpdateMonitor
from altgrad.monitor.monitor import DEFAULT_MAX_ELEMENTS
from altgrad.monitor.scale_state import STEPS_PER_SCALE

TENSORS = 26
SIZES = (1e6, 3e6, 1e7, 3e7, 1e8, 3e8)  # the largest takes 2.4 GB of weights and gradients
QUICK_LIMIT = 30_000_000
FORMATS = ("e4m3fn", "e5m2", "fp16", "bf16")
FLAT = 1.25  # largest ratio of the time at the largest size to the smallest that counts as flat
PLAIN, OBSERVED, GATHERED = "plain", "observed", "gathered"


class Row(NamedTuple):
    """The times at one size, in µs per tensor or in ms.

    Attributes:
        parameters: Number of parameters of the model.
        rounds: Number of rounds.
        before_us: Time of the monitor before the step.
        after_us: Time of the monitor after the step.
        observed_us: Sum of both.
        gathered_us: Time of the three gathers alone.
        step_ms: Time of a plain step.
        first_step_ms: Time of the first observed step.
    """

    parameters: int
    rounds: int
    before_us: Quartiles
    after_us: Quartiles
    observed_us: Quartiles
    gathered_us: Quartiles
    step_ms: float
    first_step_ms: float

    @property
    def own_us(self) -> float:
        """The median time of the monitor less that of the three gathers, in µs per tensor."""
        return self.observed_us.median - self.gathered_us.median


class Stamped:
    """An SGD optimizer that times the hooks before and after its step.

    Args:
        parameters: The parameters to step.
        add: Function that registers the hooks to time.
    """

    def __init__(self, parameters: list[nn.Parameter], add: Callable[[SGD], object]) -> None:
        self.before: list[float] = []  # seconds, of each step
        self.after: list[float] = []
        self.whole: list[float] = []
        self._optimizer = SGD(parameters, lr=1e-6)
        self._began = self._ended = 0.0
        # Hooks are called in the order of their registration. These two stand next to the step:
        # hooks of `add` come before the second, and after the first.
        self._optimizer.register_step_post_hook(self._note_end)
        add(self._optimizer)
        self._optimizer.register_step_pre_hook(self._note_begin)

    def step(self) -> None:
        start = time.perf_counter()
        self._optimizer.step()
        stop = time.perf_counter()
        self.before.append(self._began - start)
        self.after.append(stop - self._ended)
        self.whole.append(stop - start)

    def _note_begin(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _note_end(self, *_: object) -> None:
        self._ended = time.perf_counter()


def make_parameters(size: int) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.empty(size // TENSORS)) for _ in range(TENSORS)]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.empty_like(parameter).normal_(std=0.02)
    return parameters


def add_gathers(parameters: list[nn.Parameter], elements: int) -> Callable[[SGD], object]:
    """Return a function that adds hooks with the gathers of the monitor, and nothing else.

    Args:
        parameters: The parameters.
        elements: Number of elements to gather from each.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = [
        torch.randint(p.numel(), (min(elements, p.numel()),), generator=generator).sort().values
        for p in parameters
    ]
    out = [torch.empty(len(positions)) for positions in chosen]

    def gather(tensors: list[Tensor]) -> None:
        for number, tensor in enumerate(tensors):
            place = number % TENSORS
            torch.take(tensor, chosen[place], out=out[place])

    weights = [p.detach() for p in parameters]
    gradients = [p.grad for p in parameters if p.grad is not None]

    def add(optimizer: SGD) -> None:
        optimizer.register_step_pre_hook(lambda *_: gather([*weights, *gradients]))
        optimizer.register_step_post_hook(lambda *_: gather(weights))

    return add


def get_row(size: int, elements: int, rounds: int) -> Row:
    parameters = make_parameters(size)
    monitor = UpdateMonitor(
        nn.ParameterList(parameters),
        formats=FORMATS,
        max_elements=elements,
        recipes=(),
        strict=True,
    )
    stamped = {
        PLAIN: Stamped(parameters, lambda _: None),
        OBSERVED: Stamped(parameters, monitor.attach),
        GATHERED: Stamped(parameters, add_gathers(parameters, elements)),
    }
    first_step = time_calls(stamped[OBSERVED].step)
    steps = {name: each.step for name, each in stamped.items()}
    paired_steps(steps, 2, untimed=0)
    taken = paired_steps(steps, rounds, untimed=0)
    monitor.detach()
    observed, gathered = stamped[OBSERVED], stamped[GATHERED]
    return Row(
        parameters=size,
        rounds=rounds,
        before_us=per_tensor(observed.before[-rounds:]),
        after_us=per_tensor(observed.after[-rounds:]),
        observed_us=per_tensor(add_hook_times(observed)[-rounds:]),
        gathered_us=per_tensor(add_hook_times(gathered)[-rounds:]),
        step_ms=1e3 * quartiles(taken[PLAIN]).median,
        first_step_ms=1e3 * first_step,
    )


def add_hook_times(stamped: Stamped) -> list[float]:
    return [before + after for before, after in zip(stamped.before, stamped.after, strict=True)]


def per_tensor(seconds: list[float]) -> Quartiles:
    return Quartiles(*(1e6 / TENSORS * value for value in quartiles(seconds)))


def print_rows(rows: list[Row], elements: int) -> None:
    print(
        f"\n{TENSORS} tensors, {elements:,} elements of each, {len(FORMATS)} formats, "
        f"{rows[0].rounds} rounds; µs per tensor, medians (quartiles)\n"
    )
    header = (
        *("parameters", "observed step adds", "before the step", "after it"),
        *("three gathers alone", "the rest", "plain step, ms", "first observed step, ms"),
    )
    cells = [
        (
            size_name(row.parameters),
            f"{row.observed_us.median:.1f} ({row.observed_us.low:.1f}–{row.observed_us.high:.1f})",
            f"{row.before_us.median:.1f}",
            f"{row.after_us.median:.1f}",
            f"{row.gathered_us.median:.1f}",
            f"{row.own_us:.1f}",
            f"{row.step_ms:.2f}",
            f"{row.first_step_ms:.0f}",
        )
        for row in rows
    ]
    print_table(header, cells)


def print_verdict(rows: list[Row]) -> None:
    small, large = rows[0], rows[-1]
    growth = large.observed_us.median - small.observed_us.median
    factor = large.observed_us.median / small.observed_us.median
    gathers = large.gathered_us.median - small.gathered_us.median
    verdict = "flat" if factor <= FLAT else "not flat"
    print(
        f"\nFrom {size_name(small.parameters)} to {size_name(large.parameters)} parameters an "
        f"observed step adds {factor:.2f} times as much: {verdict} (up to {FLAT:g}).\n"
        f"It grows by {growth:.1f} µs per tensor, the gathers alone by {gathers:.1f} µs (elements "
        f"that are in no cache), the rest by {growth - gathers:.1f} µs.\n"
        f"Scales, taken of whole parameters every {STEPS_PER_SCALE} observed steps, come to at "
        f"most {10 * large.first_step_ms / TENSORS:.0f} µs per tensor and step at the largest size."
    )


def main() -> None:
    parser = script_arguments("Time an observed step against the size of the model.")
    parser.add_argument("--sizes", nargs="+", type=float, default=SIZES, metavar="N")
    parser.add_argument("--elements", type=int, default=DEFAULT_MAX_ELEMENTS, metavar="N")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parse_with_threads(parser)
    print_environment()
    torch.manual_seed(0)
    sizes = sorted(int(s) for s in arguments.sizes if not arguments.quick or s <= QUICK_LIMIT)
    rounds = 10 if arguments.quick else arguments.rounds
    get_row(sizes[0], arguments.elements, 3)  # torch and the monitor set up at first
    rows = [get_row(size, arguments.elements, rounds) for size in sizes]
    print_rows(rows, arguments.elements)
    print_verdict(rows)
    write_json(arguments.json, {"rows": [row._asdict() for row in rows]})


if __name__ == "__main__":
    main()
