"""Do runs with twins of other libraries' optimizers, and runs with these optimizers themselves.

`compare` does three runs from one start on the same batches, as `twin_runs` does:

- **fp32**, with AdamW of torch: its twin predicts what the library's optimizer would do.
- **low**: the net in the dtype of the recipe, really stepped by the library's optimizer.
- **fed**: a run in fp32 with AdamW that takes the gradients of the low run.

What the low run does is computed here from all elements, without AltGrad.
"""

from __future__ import annotations

import copy
import importlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from altgrad import StepRecord, UpdateMonitor
from benchmarks.twin_runs import Run, backward
from benchmarks.twin_tasks import World

ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


class Library(NamedTuple):
    """The optimizer of a library as a user makes it.

    Attributes:
        module: The module to import.
        dtype: The dtype of the net that it trains.
        make: Function of the module, parameters and hyperparameters that returns the optimizer.
        read: Function of an optimizer and a parameter that returns its moments as torch's AdamW
            defines them, ``exp_avg`` and ``exp_avg_sq``.
    """

    module: str
    dtype: torch.dtype
    make: Callable[..., Optimizer]
    read: Callable[[Optimizer, Tensor], Mapping[str, Tensor]]


def _read_plain(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Tensor]:
    return optimizer.state[parameter]


def _read_optimi(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Tensor]:
    """Undo the correction for bias: optimi keeps m / (1 − β1^t) and v / (1 − β2^t)."""
    state, steps = optimizer.state[parameter], optimizer.param_groups[0]["step"].item()
    betas = zip(("exp_avg", "exp_avg_sq"), ADAM["betas"], strict=True)
    return {name: state[name].double() * (1 - beta**steps) for name, beta in betas}


def _read_torchao(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Tensor]:
    """Let torchao unpack its states, if they are packed."""
    state = optimizer.state[parameter]
    return {n: each.dequantize() if hasattr(each, "codes") else each for n, each in state.items()}


def _read_bnb(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, Tensor]:
    """Let bitsandbytes unpack its states, if they are packed."""
    state, functional = (
        optimizer.state[parameter],
        importlib.import_module("bitsandbytes.functional"),
    )

    def unpack(end: str) -> Tensor:
        codes = state[f"state{end}"]
        if codes.dtype != torch.uint8:
            return codes
        return functional.dequantize_blockwise(
            codes, absmax=state[f"absmax{end}"], code=state[f"qmap{end}"], blocksize=256
        )

    return {"exp_avg": unpack("1"), "exp_avg_sq": unpack("2")}


LIBRARIES = {
    "torchao-sr": Library(
        "torchao.optim",
        torch.bfloat16,
        lambda ao, held, **options: ao._AdamW(held, **options, bf16_stochastic_round=True),  # noqa: SLF001
        _read_plain,
    ),
    "optimi-kahan": Library(
        "optimi",
        torch.bfloat16,
        lambda optimi, held, **options: optimi.AdamW(held, **options, kahan_sum=True),
        _read_optimi,
    ),
    "torchao-8bit": Library(
        "torchao.optim",
        torch.float32,
        lambda ao, held, **options: ao.AdamW8bit(held, **options),
        _read_torchao,
    ),
    "torchao-fp8": Library(
        "torchao.optim",
        torch.float32,
        lambda ao, held, **options: ao.AdamWFp8(held, **options),
        _read_torchao,
    ),
    "bnb-8bit": Library(
        "bitsandbytes.optim",
        torch.float32,
        lambda bnb, held, **options: bnb.AdamW8bit(held, **options),
        _read_bnb,
    ),
}
"""The optimizers, by name of the recipe."""


class Fate(NamedTuple):
    """Figures of a layer under a library's optimizer, predicted or real; NaN without a value.

    Attributes:
        moved: Mean over steps of the share that moved, of the elements that fp32 moved in the step.
        kept: `progress_kept` at the end.
        drift: `drift` at the end: ‖low − fp32‖ / ‖movement of fp32‖.
        m_ratio: `exp_avg_ratio` at the end: median of low / fp32.
        v_ratio: `exp_avg_sq_ratio` at the end: median of low / fp32.
    """

    moved: float
    kept: float
    drift: float
    m_ratio: float
    v_ratio: float


class Layer(NamedTuple):
    """Predicted and real figures of a layer; *fed* with the gradients of the real run.

    Attributes:
        name: Name of the layer.
        numel: Number of its elements.
        predicted: Figures of the twin of the fp32 run.
        real: Figures of the low run against the fp32 run.
        fed: Figures of the twin of the fed run.
        real_fed: Figures of the low run against the fed run.
    """

    name: str
    numel: int
    predicted: Fate
    real: Fate
    fed: Fate
    real_fed: Fate


class Comparison(NamedTuple):
    """Figures of all layers, and the mean loss of the last 20 batches, in fp32 and low."""

    layers: list[Layer]
    loss: float
    low_loss: float


def make_library_run(net: nn.Module, recipe: str, lr: float) -> Run:
    """Return a run of a net, converted in place, that the library's optimizer really steps.

    Args:
        net: The net.
        recipe: Name of the recipe, in `LIBRARIES`.
        lr: Learning rate.
    """
    library = LIBRARIES[recipe]
    module = importlib.import_module(library.module)

    def make(held: Iterable[nn.Parameter]) -> Optimizer:
        return library.make(module, [*held], lr=lr, **ADAM)

    return Run(net.to(library.dtype), make)


class _Shares:
    """The share of elements that one run moved in a step, of those that another one moved."""

    def __init__(self, low: Run, high: Run) -> None:
        self._runs = low, high
        self._before = self._copy()
        self._shares: dict[str, list[float]] = {name: [] for name in high.parameters}

    def note_step(self) -> None:
        """Compare the weights of both runs with those at the last call."""
        before, self._before = self._before, self._copy()
        for name, shares in self._shares.items():
            low, high = (
                old[name] != new[name] for old, new in zip(before, self._before, strict=True)
            )
            if high.any():
                shares.append((low & high).sum().item() / high.sum().item())

    def average(self, name: str) -> float:
        return statistics.fmean(self._shares[name])

    def _copy(self) -> list[dict[str, Tensor]]:
        return [{n: p.detach().clone() for n, p in run.parameters.items()} for run in self._runs]


def _find_fate(low: Run, high: Run, recipe: str, name: str, moved: float) -> Fate:
    ours, theirs = low.movement(name), high.movement(name)
    apart = low.parameters[name].detach().double() - high.parameters[name].detach().double()
    read = LIBRARIES[recipe].read
    mine, base = (
        reader(run.optimizer, run.parameters[name])
        for reader, run in ((read, low), (_read_plain, high))
    )
    ratios = []
    for state in ("exp_avg", "exp_avg_sq"):
        known = base[state] != 0
        ratios.append((mine[state].double() / base[state].double())[known].median().item())
    return Fate(
        moved,
        ((ours * theirs).sum() / theirs.square().sum()).item(),
        (apart.norm() / theirs.norm()).item(),
        *ratios,
    )


def watch(run: Run, recipe: str, elements: int) -> tuple[UpdateMonitor, list[StepRecord]]:
    """Attach a monitor that observes each step, and return it with the list of its records.

    Args:
        run: The run.
        recipe: Name of the recipe whose twin steps a sample of each layer.
        elements: Number of elements that the twin has of each layer.
    """
    records: list[StepRecord] = []
    monitor = UpdateMonitor(
        [*run.parameters.items()],
        records.append,
        formats="bf16",
        every_n_steps=1,
        recipes=recipe,
        twin_elements=elements,
        strict=True,
    )
    return monitor.attach(run.optimizer), records


def _read_fate(records: list[StepRecord], recipe: str, name: str) -> Fate:
    still = [record.layers[name][f"still_frac/{recipe}"] for record in records]
    last = records[-1].layers[name]
    metrics = ("progress_kept", "drift", "exp_avg_ratio", "exp_avg_sq_ratio")
    return Fate(
        1 - statistics.fmean(each for each in still if not math.isnan(each)),
        *(last.get(f"{metric}/{recipe}", math.nan) for metric in metrics),
    )


def compare(
    start: nn.Module, world: World, recipe: str, lr: float, steps: int, elements: int = 256
) -> Comparison:
    """Do the three runs, and compare predicted with real figures layer by layer.

    Args:
        start: The net at the start of each run.
        world: The data.
        recipe: Name of the recipe, in `LIBRARIES`.
        lr: Learning rate.
        steps: Number of steps.
        elements: Number of elements that twins have of each layer.
    """

    def make(held: Iterable[nn.Parameter]) -> Optimizer:
        return AdamW(held, lr=lr, **ADAM)

    high_net, low_net = copy.deepcopy(start), copy.deepcopy(start)
    high, fed = Run(high_net, make), Run(copy.deepcopy(start), make)
    low = make_library_run(low_net, recipe, lr)
    monitor, records = watch(high, recipe, elements)
    fed_monitor, fed_records = watch(fed, recipe, elements)
    shares, fed_shares = _Shares(low, high), _Shares(low, fed)
    losses = []
    for number in range(steps):
        losses.append([backward(net, world, number) for net in (high_net, low_net)])
        for name, parameter in low.parameters.items():
            assert parameter.grad is not None
            fed.parameters[name].grad = parameter.grad.float().clone()
        for run in (high, low, fed):
            run.step()
        for each in (shares, fed_shares):
            each.note_step()
    monitor.detach()
    fed_monitor.detach()
    layers = [
        Layer(
            name,
            parameter.numel(),
            _read_fate(records, recipe, name),
            _find_fate(low, high, recipe, name, shares.average(name)),
            _read_fate(fed_records, recipe, name),
            _find_fate(low, fed, recipe, name, fed_shares.average(name)),
        )
        for name, parameter in high.parameters.items()
    ]
    loss, low_loss = (statistics.fmean(each) for each in zip(*losses[-20:], strict=True))
    return Comparison(layers, loss, low_loss)
