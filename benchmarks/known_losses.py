"""Compare what dtypes and hyperparameters alone foretell with what optimizers in 16 bits do.

    python -m benchmarks.known_losses [--quick]   # half a minute, from the root of the repository

A monitor gives a notice where a run in 16 bits loses its weight decay, where a state cannot fall,
and where an average of weights cannot follow. The tables have a column that says whether there is a
notice, and one for what happens: in 16 bits against the same run in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adamax, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from altgrad import WeightStorage
from altgrad.monitor.known_losses import describe_lost_factors
from altgrad.monitor.lagging_average import describe_lagging_average
from benchmarks.paired import print_environment, print_table, script_arguments, write_json

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
Row = tuple[str, ...]


def has_notice(optimizer: Optimizer, word: str) -> bool:
    """Return True if a monitor gives a notice with a word for the layers of an optimizer."""
    names = {layer: "layer" for group in optimizer.param_groups for layer in group["params"]}
    notices = describe_lost_factors([optimizer], names, lambda _: False)
    return any(word in notice for notice in notices)


# --- weight decay


class Decay(NamedTuple):
    """A way to store and step weights, whose decay is measured.

    Attributes:
        name: The way, in words.
        dtype: The dtype of the weights.
        options: Arguments of AdamW.
        make_storage: A function that returns what stores the weights; None for their dtype alone.
    """

    name: str
    dtype: torch.dtype
    options: dict[str, bool] = {}  # noqa: RUF012 - never changed
    make_storage: Callable[[], WeightStorage] | None = None


DECAYS = (
    Decay("float32", torch.float32),
    Decay("bf16, for-loop", torch.bfloat16),
    Decay("bf16, foreach", torch.bfloat16, {"foreach": True}),
    Decay("bf16, fused", torch.bfloat16, {"fused": True}),
    Decay("fp16, for-loop", torch.float16),
    Decay("fp16, fused", torch.float16, {"fused": True}),
    Decay("float32, stored in bf16", torch.float32, {}, lambda: WeightStorage("bf16")),
    Decay(
        *("stochastically", torch.float32, {}),
        lambda: WeightStorage("bf16", rounding="stochastic"),
    ),
    Decay(
        *("with Kahan summation", torch.float32, {}),
        lambda: WeightStorage("bf16", compensation="kahan"),
    ),
)


def shrink(way: Decay, lr: float, decay: float, steps: int) -> tuple[float, bool]:
    """Return which share of itself a layer is after steps with noise as gradients, and its notice.

    Args:
        way: How weights are stored and stepped.
        lr: The learning rate.
        decay: lr · weight_decay.
        steps: Number of steps.

    Returns:
        The projection of the weights on those at the start, and True if there is a notice.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(128, 128, generator=generator, dtype=torch.float64) * 0.02
    weight = nn.Parameter(start.to(way.dtype))
    optimizer = AdamW([weight], lr, weight_decay=decay / lr, eps=1e-6, **way.options)
    if way.make_storage is not None:
        way.make_storage().attach(optimizer)
    told = has_notice(optimizer, "weight decay")
    for _ in range(steps):
        weight.grad = torch.randn(128, 128, generator=generator).to(way.dtype)
        optimizer.step()
    return float((weight.detach().double() * start).sum() / start.square().sum()), told


def measure_decays(decay: float, steps: int) -> Iterator[Row]:
    for way in DECAYS:
        shares, told = zip(
            *(shrink(way, lr, decay, steps) for lr in (1e-3, 1e-4, 1e-5)), strict=True
        )
        yield way.name, "yes" if told[0] else "no", *(f"{share:.3f}" for share in shares)


# --- states


class State(NamedTuple):
    """A state that is an average, and a function that makes its optimizer.

    Attributes:
        name: The name of the state.
        kind: What steps it, in words.
        make: Function of a parameter and a beta that returns the optimizer.
    """

    name: str
    kind: str
    make: Callable[[nn.Parameter, float], Optimizer]


STATES = (
    State("exp_avg_sq", "AdamW", lambda p, b: AdamW([p], 0.0, (0.9, b))),
    State("exp_avg_sq", "AdamW, fused", lambda p, b: AdamW([p], 0.0, (0.9, b), fused=True)),
    State("exp_inf", "Adamax", lambda p, b: Adamax([p], 0.0, (0.9, b))),
    State("exp_avg", "AdamW", lambda p, b: AdamW([p], 0.0, (b, 0.9))),
    State("momentum_buffer", "SGD", lambda p, b: SGD([p], 0.0, momentum=b)),
)


def run_state(state: State, beta: float, dtype: torch.dtype, steps: int) -> tuple[Tensor, Tensor]:
    """Return a state after steps with large gradients, and after as many with small ones."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.ones(512, dtype=dtype))
    optimizer = state.make(weight, beta)
    ends = []
    for size in (1.0, 0.01):
        for _ in range(steps):
            gradient = torch.randn(512, generator=generator) + 0.3
            weight.grad = (gradient * size).to(dtype)
            optimizer.step()
        ends.append(optimizer.state[weight][state.name].double().clone())
    return ends[0], ends[1]


def measure_states(steps: int) -> Iterator[Row]:
    """Yield a row for each state: in 16 bits as a multiple of that in float64."""
    for state in STATES:
        for beta in (0.9, 0.9843, 0.99, 0.996, 0.997, 0.999):
            exact = run_state(state, beta, torch.float64, steps)
            low = run_state(state, beta, torch.bfloat16, steps)
            ratios = [float(a.norm() / b.norm()) for a, b in zip(low, exact, strict=True)]
            weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
            told = has_notice(state.make(weight, beta), state.name)
            yield (
                *(state.kind, state.name, f"{beta:g}", "yes" if told else "no"),
                *(f"{ratio:.2f}" for ratio in ratios),
            )


# --- averages of weights


def follow(dtype: torch.dtype, decay: float, option: str, steps: int) -> tuple[float, float, bool]:
    """Average weights that move by 20 % and wander by 1 %, in 16 bits and in float64.

    Args:
        dtype: The dtype of the averages.
        decay: The decay of the averages.
        option: The argument of `AveragedModel`, ``"avg_fn"`` or ``"multi_avg_fn"``.
        steps: Number of steps.

    Returns:
        The error relative to the averages and to their movement, and True if there is a notice.
    """
    make = {"avg_fn": get_ema_avg_fn, "multi_avg_fn": get_ema_multi_avg_fn}[option]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 64, generator=generator) * 0.05
    models = [nn.Linear(64, 64, bias=False).to(each) for each in (dtype, torch.float64)]
    averages = [AveragedModel(model, **{option: make(decay)}) for model in models]
    for number in range(steps):
        mean = start * (1 + 0.2 * (1 - math.exp(-4 * number / steps)))
        noise = torch.randn(64, 64, generator=generator)
        for model, averaged in zip(models, averages, strict=True):
            with torch.no_grad():
                model.weight.copy_(mean * (1 + 0.01 * noise))
            averaged.update_parameters(model)
    low, exact = (averaged.module.weight.detach().double() for averaged in averages)
    error = (low - exact).norm()
    told = bool([*describe_lagging_average(averages[0])])
    return float(error / exact.norm()), float(error / (exact - start).norm()), told


def measure_averages(steps: int) -> Iterator[Row]:
    for name, dtype in HALF.items():
        for decay in (0.9, 0.99, 0.999, 0.9999):
            lag = torch.finfo(dtype).eps / 2 / (1 - decay)
            both = [follow(dtype, decay, way, steps) for way in ("multi_avg_fn", "avg_fn")]
            yield (
                *(name, f"{decay:g}", f"{lag / 2:.2g} to {lag:.2g}"),
                "yes" if both[0][2] else "no",
                *(f"{number:.2g}" for each in both for number in each[:2]),
            )


def main() -> None:
    arguments = script_arguments((__doc__ or "").splitlines()[0]).parse_args()
    print_environment()
    steps = 200 if arguments.quick else 1_000
    tables = {
        f"Weights after {steps:,} steps that exactly leave {math.exp(-1e-3 * steps):.3f}": (
            ("weights", "notice", "lr 1e-3", "1e-4", "1e-5"),
            [*measure_decays(1e-3, steps)],
        ),
        "States in bf16 / in float64: after noise, and after gradients 100 times smaller": (
            ("optimizer", "state", "beta", "notice", "noise", "smaller"),
            [*measure_states(steps)],
        ),
        "Averages of weights: errors relative to the averages, and to their movement": (
            ("format", "decay", "lag", "notice", "multi_avg_fn", "of movement", "avg_fn", "of it"),
            [*measure_averages(2 * steps)],
        ),
    }
    for title, (header, rows) in tables.items():
        print(f"\n{title}")
        print_table(header, rows)
    write_json(arguments.json, {title: rows for title, (_, rows) in tables.items()})


if __name__ == "__main__":
    main()
