"""`BatchStatistic`: the running mean or variance that BatchNorm keeps for evaluation.

BatchNorm moves each by a share, its momentum, of the way to the mean or variance of the batch. They
are averages with a decay of their own, of which 16 bits lose a part as of an average of weights. A
*twin* is a sample of the layers of the *run*, the training that is watched, stored and stepped as a
recipe says. It keeps the statistics of the channels whose weights it has.

Read `run_average` first; `average_sample` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from altgrad.recipes.recipe import Recipe
from altgrad.twins.writes import count_writes_to_each

Arithmetic: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of a running statistic, that of a batch, and the momentum; it returns the next one."""

_MOMENTUM = 0.1  # of the known step: 0.1 and 0.9 are rounded in bf16, and so are products


class BatchStatistic:
    """The running mean, or the running variance, of all BatchNorm modules of a training.

    A statistic belongs to the layer of the module's weight, which has as many elements. Modules
    without a weight, a momentum or a count of batches are left out. So are statistics in 16 bits,
    from which the mean of a batch cannot be found.

    Args:
        name: ``"running_mean"`` or ``"running_var"``.
        module: The module that is trained.
        names: The name of each parameter of the training.

    Attributes:
        name: The `name` argument.
        noted: The number of batches that each module had got when `note_batches` was last called,
            int64 of no dimension, by name of its weight's layer.
        noted_writes: How often torch had written to each of these numbers then, by the same name.
    """

    def __init__(self, name: str, module: nn.Module, names: Mapping[Tensor, str]) -> None:
        self.name = name
        self.noted: Mapping[str, Tensor] = {}
        self.noted_writes: Mapping[str, int] = {}
        self._modules = {
            names[each.weight]: each
            for each in module.modules()
            if isinstance(each, _BatchNorm) and each.weight in names
        }

    @property
    def has_modules(self) -> bool:
        """True if the training has a BatchNorm module with a weight."""
        return bool(self._modules)

    def find_modules(self) -> Mapping[str, _BatchNorm]:
        """Return the BatchNorm modules that keep the statistic, by name of their weight's layer."""
        return {
            layer: each
            for layer, each in self._modules.items()
            if each.running_mean is not None
            and each.running_mean.dtype.itemsize >= torch.float32.itemsize
            and each.momentum is not None
            and each.num_batches_tracked is not None
        }

    @property
    def is_low(self) -> bool:
        """True if a module keeps the statistic in 16 bits, from which twins cannot follow it."""
        kept = [getattr(each, self.name) for each in self._modules.values()]
        return any(e is not None and e.dtype.itemsize < torch.float32.itemsize for e in kept)

    def find_tensors(self) -> Mapping[str, Tensor]:
        """Return the statistic of each module, by name of its weight's layer."""
        return {layer: getattr(each, self.name) for layer, each in self.find_modules().items()}

    def find_momenta(self) -> Mapping[str, float]:
        """Return the momentum of each module, by name of its weight's layer."""
        return {n: float(each.momentum or 0.0) for n, each in self.find_modules().items()}

    def find_counters(self) -> Mapping[str, Tensor]:
        """Return the tensor in which each module counts batches, by name of its weight's layer."""
        return {n: each.num_batches_tracked for n, each in self.find_modules().items()}  # type: ignore[misc]

    def note_batches(self) -> None:
        """Note how many batches each BatchNorm module has got so far.

        It is called before the first step, also of a resumed training. Twins, samples of the layers
        with running statistics of their own, move these by the batches that come after it.
        """
        counters = self.find_counters()
        self.noted = {name: each.clone() for name, each in counters.items()}
        writes = count_writes_to_each([*counters.values()])
        self.noted_writes = dict(zip(counters, writes, strict=True))

    def concerns(self, recipe: Recipe) -> bool:
        """Return True if a recipe stores the statistic otherwise than a training in float32."""
        dtype = recipe.tensor_dtype
        is_low = dtype is not None and dtype.itemsize < torch.float32.itemsize
        return is_low or not recipe.state_formats.keys().isdisjoint((self.name, "*"))


def move_statistic(
    name: str, values: Tensor, batch: Tensor, momentum: Tensor, when: Tensor
) -> None:
    """Move a running statistic to that of a batch in place, as BatchNorm does in its dtype.

    Args:
        name: ``"running_mean"`` or ``"running_var"``.
        values: The running statistic, floating-point (elements).
        batch: The mean or the unbiased variance of the batch, float64 (elements).
        momentum: The share of the way, float64 (elements).
        when: bool (elements), True for the elements to move.
    """
    move = find_arithmetic(name, values.dtype, values.device)
    values.copy_(torch.where(when, move(values, batch, momentum), values))


@lru_cache(maxsize=16)
def find_arithmetic(name: str, dtype: torch.dtype, device: torch.device) -> Arithmetic:
    """Return the way in which BatchNorm rounds when it moves a running statistic.

    On a CPU, oneDNN rounds the factors 1 − momentum and momentum to bfloat16 before it multiplies.
    With a momentum of 0.01 they add up to 0.998, so that a statistic shrinks. Other devices and
    dtypes round the result alone. torch itself is asked, by a step of known numbers.

    Args:
        name: ``"running_mean"`` or ``"running_var"``.
        dtype: The dtype of the running statistics.
        device: Their device. The host waits for it at the first call.
    """
    if dtype.itemsize >= torch.float32.itemsize:
        return _round_once
    before = torch.linspace(0.5, 8, 256, dtype=torch.float64, device="cpu").to(dtype)
    batch, after = _step_known(name, before, device)
    momentum = torch.tensor(_MOMENTUM, dtype=torch.float64, device="cpu")
    return min(
        (_round_once, _round_factors, _round_factors_and_products),
        key=lambda move: int((move(before, batch, momentum) != after).sum()),
    )


def _step_known(name: str, before: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Have torch move a running statistic by a batch whose mean and variance are known.

    Args:
        name: ``"running_mean"`` or ``"running_var"``.
        before: The statistic, (channels) on the CPU.
        device: The device to use.

    Returns:
        The mean or unbiased variance of the batch, float64 (channels), and the statistic after the
        step, both on the CPU.
    """
    steps = torch.linspace(11, 1, len(before), dtype=torch.float64, device="cpu")
    count, numbers = 1024, steps.to(before.dtype)
    inputs = numbers.repeat(count, 1)
    if name == "running_var":
        inputs[::2].neg_()
    unit = torch.ones_like(before, device=device)
    own, other = before.to(device, copy=True), unit.clone()
    statistics = (own, other) if name == "running_mean" else (other, own)
    torch.batch_norm(
        *(inputs.to(device), unit, unit, *statistics),
        *(True, _MOMENTUM, 1e-5, torch.backends.cudnn.enabled),
    )
    wide = numbers.double()
    batch = wide if name == "running_mean" else wide.square() * count / (count - 1)
    return batch, own.cpu()


def _round_once(values: Tensor, batch: Tensor, momentum: Tensor) -> Tensor:
    return ((1 - momentum) * values.double() + momentum * batch).to(values.dtype)


def _round_factors(values: Tensor, batch: Tensor, momentum: Tensor) -> Tensor:
    """Return (1 − momentum) · values + momentum · batch, as BatchNorm may round it in 16 bits.

    The factors 1 − momentum and momentum, the batch, the first product and the result are rounded;
    the second product is not.

    Args:
        values: The running statistic before the batch, (elements).
        batch: The mean or variance of the batch, float64 (elements).
        momentum: The share of the way to `batch`, float64.

    Returns:
        The next running statistic, in the dtype of `values`, (elements).
    """
    kept, added = (each.to(values.dtype) for each in (1 - momentum, momentum))
    product = added.double() * batch.to(values.dtype).double()
    return ((values * kept).double() + product).to(values.dtype)


def _round_factors_and_products(values: Tensor, batch: Tensor, momentum: Tensor) -> Tensor:
    kept, added = (each.to(values.dtype) for each in (1 - momentum, momentum))
    return values * kept + batch.to(values.dtype) * added
