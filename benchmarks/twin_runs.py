"""Do runs with twins, and runs that really store weights in low precision, from one start.

`compare` does three runs on the same batches:

- **fp32**: its twin predicts what would become of it under a recipe.
- **low**: the run as the recipe says, with gradients of its own.
- **fed**: a run in fp32 that takes the gradients of the low run, so that its twin has exactly
  these.

What becomes of the low run is computed here from all elements, without AltGrad.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from altgrad import Figures, UpdateMonitor
from benchmarks.twin_tasks import World

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class Fate(NamedTuple):
    """The figures of a layer in a low run, predicted or real; NaN for a figure without a value.

    Attributes:
        kept: `progress_kept`: ⟨low, fp32⟩ / ‖fp32‖² of the movements since the start.
        frozen: `frozen_frac`: among the elements that fp32 moved, the share that the low run never
            moved.
        v_ratio: `exp_avg_sq_ratio`: the median of low / fp32.
        nonfinite: `twin_nonfinite_frac`: the share of the elements that are NaN or inf.
    """

    kept: float
    frozen: float
    v_ratio: float
    nonfinite: float


class Layer(NamedTuple):
    """The predicted and real figures of a layer.

    Attributes:
        name: Name of the layer.
        moved: Number of sampled elements that the fp32 run has moved.
        predicted: Figures of the twin of the fp32 run.
        real: Figures of the low run, compared with the fp32 run.
        fed: Figures of the twin of the fed run.
        real_fed: Figures of the low run, compared with the fed run.
        now: Figures that a monitor of the low run has of the run itself, named ``now``; None where
            the low run has float32 tensors, of which a monitor cannot know that they are rounded.
    """

    name: str
    moved: int
    predicted: Fate
    real: Fate
    fed: Fate
    real_fed: Fate
    now: Fate | None


class Comparison(NamedTuple):
    """The figures of all layers, and the mean loss of the last 20 batches, in fp32 and low."""

    layers: list[Layer]
    loss: float
    low_loss: float


# --- ways to store, by name of the recipe


class Way(NamedTuple):
    """The dtype of all tensors, and a function that rounds the weights in place after each step."""

    dtype: torch.dtype
    store: Callable[[Tensor], object]


def _leave(_: Tensor) -> None:
    pass


def _round_to_bf16(weights: Tensor) -> None:
    weights.copy_(weights.bfloat16())


def _round_to_bf16_at_random(weights: Tensor) -> None:
    #   seeeeeee emmmmmmm | mmmmmmmm mmmmmmmm    float32; bf16 is the upper half
    # + 00000000 00000000 | rrrrrrrr rrrrrrrr    random bits carry into the upper half with the
    #                                            chance that the lower half stands for
    bits = weights.view(torch.int32)
    bits.add_(torch.randint_like(bits, 1 << 16)).bitwise_and_(-1 << 16)


WAYS = {
    "bf16-true": Way(torch.bfloat16, _leave),
    "fp16-true": Way(torch.float16, _leave),
    "bf16": Way(torch.float32, _round_to_bf16),
    "bf16-sr": Way(torch.float32, _round_to_bf16_at_random),
}


# --- real runs


class Run:
    """The parameters of a net, its optimizer, and which elements have moved.

    Args:
        net: The net.
        make: Function that makes the optimizer of the parameters.
        store: Function that rounds a weight in place, at the start and after each step.

    Attributes:
        parameters: Parameters by name.
        optimizer: The optimizer.
        moved: For each parameter, by name, a bool tensor: True if a step has moved the element.
    """

    def __init__(
        self,
        net: nn.Module,
        make: MakeOptimizer,
        store: Callable[[Tensor], object] = _leave,
    ) -> None:
        self.parameters = dict(net.named_parameters())
        self.optimizer = make(self.parameters.values())
        self._store = store
        for _, weights in self._weights():
            store(weights)
        self._start = self._copy()
        self.moved = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in self._weights()}

    def step(self) -> None:
        before = self._copy()
        self.optimizer.step()
        for name, weights in self._weights():
            self._store(weights)
            self.moved[name] |= weights != before[name]

    def movement(self, name: str) -> Tensor:
        """Return the movement of a layer since the start, float64 in the shape of the layer."""
        return self.parameters[name].detach().double() - self._start[name].double()

    def state(self, name: str, key: str) -> Tensor:
        """Return a state of the optimizer, float64 in the shape of the layer; NaN if missing.

        Args:
            name: Name of the layer.
            key: Name of the state, such as ``"exp_avg_sq"``.
        """
        parameter = self.parameters[name]
        state = self.optimizer.state[parameter].get(key)
        return torch.full_like(parameter, math.nan) if state is None else state.double()

    def _weights(self) -> list[tuple[str, Tensor]]:
        return [(name, parameter.detach()) for name, parameter in self.parameters.items()]

    def _copy(self) -> dict[str, Tensor]:
        return {name: weights.clone() for name, weights in self._weights()}


def find_fate(low: Run, high: Run, name: str) -> Fate:
    """Compute the real figures of a layer from all its elements.

    Args:
        low: The low run.
        high: The run in fp32 to compare it with.
        name: Name of the layer.
    """
    ours, theirs = low.movement(name), high.movement(name)
    finite = ours.isfinite() & theirs.isfinite()
    moved = high.moved[name] & finite
    v, v32 = low.state(name, "exp_avg_sq"), high.state(name, "exp_avg_sq")
    known = finite & v.isfinite() & v32.isfinite() & (v32 != 0)
    return Fate(
        _divide((ours * theirs)[finite].sum(), theirs[finite].square().sum()),
        _divide((moved & ~low.moved[name]).sum(), moved.sum()),
        (v / v32)[known].nanmedian().item() if known.any() else math.nan,
        (~finite).double().mean().item(),
    )


def _divide(a: Tensor, b: Tensor) -> float:
    return (a.double() / b.double()).item()  # NaN for 0 / 0


def train(net: nn.Module, world: World, steps: int, step: Callable[[], object]) -> float:
    """Train on the batches 0, 1, …; return the mean loss of the last 20.

    Args:
        net: The net.
        world: The data.
        steps: Number of batches.
        step: Function that steps the optimizer, and may use gradients of `net`.
    """
    losses = []
    for number in range(steps):
        losses.append(backward(net, world, number))
        step()
    return sum(losses[-20:]) / len(losses[-20:])


def backward(net: nn.Module, world: World, number: int) -> float:
    """Compute the gradients of the batch with a number; return its loss.

    Args:
        net: The net.
        world: The data.
        number: Number of the batch.
    """
    dtype = next(net.parameters()).dtype
    inputs, classes = world(number)
    outputs = net(inputs.to(dtype) if inputs.is_floating_point() else inputs)
    loss = functional.cross_entropy(outputs.flatten(0, -2).float(), classes.flatten())
    net.zero_grad()
    loss.backward()
    return loss.item()


# --- twins


def watch(run: Run, steps: int, recipe: str, elements: int) -> UpdateMonitor:
    """Attach a monitor whose twin makes every step, and is measured at the last step alone.

    Args:
        run: The run to observe.
        steps: Number of steps of the run.
        recipe: Name of the recipe of the twin.
        elements: Number of elements that the twin has of each layer.
    """
    return UpdateMonitor(
        [*run.parameters.items()],
        formats="bf16",
        every_n_steps=lambda index: index == steps - 1,
        recipes=recipe,
        twin_elements=elements,
        strict=True,
        warn=lambda _: None,  # that weights in bf16 are not judged for bf16
    ).attach(run.optimizer)


def read_fate(figures: Figures, recipe: str) -> Fate:
    """Read the figures that a twin predicts for a layer.

    Args:
        figures: Figures of the layer.
        recipe: Name of the twin's recipe.
    """
    metrics = ("progress_kept", "frozen_frac", "exp_avg_sq_ratio", "twin_nonfinite_frac")
    return Fate(*(figures.get(f"{metric}/{recipe}", math.nan) for metric in metrics))


def compare(
    start: nn.Module,
    world: World,
    make: MakeOptimizer,
    recipe: str,
    steps: int,
    elements: int = 256,
) -> Comparison:
    """Do the three runs, and compare predicted with real figures layer by layer.

    Args:
        start: The net at the start of each run.
        world: The data.
        make: Function that makes the optimizer of parameters.
        recipe: Name of the recipe, in `WAYS`.
        steps: Number of steps of each run.
        elements: Number of elements that twins have of each layer.
    """
    way, net = WAYS[recipe], copy.deepcopy(start)
    high = Run(net, make)
    with watch(high, steps, recipe, elements) as monitor:
        loss = train(net, world, steps, high.step)

    low_net = copy.deepcopy(start).to(way.dtype)
    low, fed = Run(low_net, make, way.store), Run(copy.deepcopy(start), make)

    def step_both() -> None:
        for name, parameter in low.parameters.items():
            assert parameter.grad is not None
            fed.parameters[name].grad = parameter.grad.float().clone()
        low.step()
        fed.step()

    watched_low = watch(low, steps, recipe, elements)
    with watched_low, watch(fed, steps, recipe, elements) as fed_monitor:
        low_loss = train(low_net, world, steps, step_both)

    assert monitor.latest is not None
    assert fed_monitor.latest is not None
    watched, watched_fed = monitor.latest.layers, fed_monitor.latest.layers
    assert watched_low.latest is not None
    watched_now = {
        name: figures
        for name, figures in watched_low.latest.layers.items()
        if "now" in figures.recipes
    }
    layers = [
        Layer(
            name,
            int(watched[name].moved_elements),
            read_fate(watched[name], recipe),
            find_fate(low, high, name),
            read_fate(watched_fed[name], recipe),
            find_fate(low, fed, name),
            read_fate(watched_now[name], "now") if name in watched_now else None,
        )
        for name in high.parameters
    ]
    return Comparison(layers, loss, low_loss)
