"""`Twin`: a sample of the layers that is stepped and stored as a recipe says, beside the run.

The *run* is the training that is watched; the *sample* has up to 256 elements of each layer. What
all twins have in common is here: weights in a flat tensor, rounded to the format of the recipe. An
`UpdateTwin` gets the updates of the run, whose optimizer cannot run on a sample; an `OptimizerTwin`
steps an optimizer of its own.

Read `element_scales` first; `self_check` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.measurement.twin_sums import TwinStack
from altgrad.quantization.number_format import NumberFormat
from altgrad.recipes.recipe import Recipe
from altgrad.recipes.rounding import StorageRounding, store_
from altgrad.twins.element_scales import ElementScales
from altgrad.twins.layout import Layout
from altgrad.twins.sample import Sampled
from altgrad.twins.twin_tensors import TwinTensors


class Arrangement(NamedTuple):
    """New places of the sampled elements in flat tensors, with the training just before a step.

    *Twins*, samples that are stepped as recipes say, take these places over.

    Attributes:
        optimizer: The training's optimizer.
        layout: The places of all layers, old and new.
        weights: The sampled weights of the training, in its dtype, (elements); 0 at padding.
        layers: All layers by name.
        renewed: Names of the layers whose optimizer states twins take from the training, instead of
            going on with their own.
        begun: Names of the renewed layers that are new or have another sample than before. Their
            weights are taken from the training, too.
        gradient_dtype: The dtype of the training's gradients; None for that of the weights.
    """

    optimizer: Optimizer
    layout: Layout
    weights: Tensor
    layers: Mapping[str, Sampled]
    renewed: frozenset[str] = frozenset()
    begun: frozenset[str] = frozenset()
    gradient_dtype: torch.dtype | None = None


class Twin:
    """A sample of some layers that is stepped as a recipe says; subclasses say what a step does.

    The weights are kept in a flat tensor, rounded to the format of the recipe.

    Args:
        recipe: The recipe.
        dtype: The dtype of the weights of the training.
        scales: The scales of the sampled elements, for formats that have scales.
        seed: Seed of stochastic rounding.

    Attributes:
        recipe: The `recipe` argument.
        dtype: The dtype of the twin's weights: that of the recipe, or else float32, or float64 in a
            training in float64.
        layout: The places of the layers in the twin's flat tensors.
        tensors: The weights, now and at earlier times.
        averages: Averages of the twin's weights by name, floating-point (elements), as the training
            keeps averages of its own; NaN where it has none.
    """

    def __init__(
        self, recipe: Recipe, dtype: torch.dtype, scales: ElementScales, seed: int
    ) -> None:
        self.recipe = recipe
        self.dtype = recipe.tensor_dtype or torch.promote_types(dtype, torch.float32)
        self.layout = Layout()
        self.tensors = TwinTensors.start_at(torch.zeros(0, dtype=self.dtype, device="cpu"))
        self.averages: dict[str, Tensor] = {}
        self._format = recipe.weights_format
        self._scales = scales
        self._weight_scaling = None if self._format is None else scales.applied(self._format)
        # A hash, since each recipe rounds by random numbers of its own.
        digest = sha256(f"{seed} {recipe.name}".encode()).digest()
        self._seed = int.from_bytes(digest[:4], "big")
        self._generator: torch.Generator | None = None
        self._amaxes: Tensor | None = None  # of the groups that share a scale: they never shrink

    @property
    def states(self) -> Mapping[str, Tensor]:
        """The states of the twin's optimizer, such as exp_avg, by name, (elements); else empty.

        A *twin* is a sample of the layers that is stored and stepped as a recipe says.

        A twin without an optimizer has none.
        """
        return {}

    def rearrange(self, new: Arrangement) -> None:
        """Move the numbers of the twin to other places in its flat tensors.

        A *twin* is a sample of the layers; their elements lie one layer after another. New layers
        begin with the training's weights; layers that are gone are dropped.

        Args:
            new: The places, and the state of the training.
        """
        weights = new.weights.to(self.dtype, copy=True)
        sources = self.layout.find_sources(new.layout, new.begun).to(weights.device)
        kept, self._amaxes = self._amaxes, None
        self._store(weights, "nearest_even")
        if kept is not None and self._amaxes is not None:
            self._amaxes = torch.where(sources < 0, self._amaxes, kept[sources])
        fresh = TwinTensors.start_at(weights, keeps_lost=self.recipe.compensation is not None)
        if len(fresh.lost):
            fresh.lost.copy_((new.weights.to(self.dtype) - weights).nan_to_num_(0.0))
        self.tensors = self.tensors.rearrange(sources, fresh)
        self.averages = {
            name: torch.where(sources < 0, torch.nan, each[sources])
            for name, each in self.averages.items()
            if len(each)
        }
        self.layout = new.layout

    def replace_weights(self, outside: Tensor, weights: Tensor) -> None:
        """Take over weights of the training that something other than a step has changed.

        The weights are rounded to the format of the recipe.

        Args:
            outside: bool (elements), True for the changed weights. The others stay.
            weights: The weights of the training, in its dtype, (elements).
        """
        now = self.tensors.weights
        changed = torch.where(outside, weights.to(self.dtype), now)
        self._store(changed, "nearest_even")
        self.tensors.replace_weights(torch.where(outside, changed, now))
        if len(self.tensors.lost):
            lost = (weights.to(self.dtype) - changed).nan_to_num_(0.0, 0.0, 0.0)
            self.tensors.lost.copy_(torch.where(outside, lost, self.tensors.lost))

    def step_average(self, name: str, act: Callable[[Tensor, Tensor], object]) -> None:
        """Update an average of the twin's weights, and round it to the format of the recipe.

        A *twin* is a sample of the layers that is stored and stepped as a recipe says.

        Args:
            name: Name of the average.
            act: Function that updates the average in place. It gets the average and the weights.
        """
        act(self.averages[name], self.tensors.weights)
        self._store_state(name, self.averages[name], self.recipe.rounding)

    def replace_average(self, name: str, outside: Tensor, values: Tensor) -> None:
        """Take over numbers of an average that something other than an update has changed.

        Args:
            name: Name of the average.
            outside: bool (elements), True for the changed numbers. The others stay.
            values: The average of the training's weights, floating-point (elements).
        """
        now = self.averages[name]
        changed = torch.where(outside, values.to(now.dtype), now)
        self._store_state(name, changed, "nearest_even")
        now.copy_(torch.where(outside, changed, now))

    def forget_amaxes(self) -> None:
        """Drop the amaxes (largest magnitudes) from which scales are computed.

        They are taken from the training's layers again when next needed. Amaxes of blocks stay,
        because they are the twin's own.
        """
        if not isinstance(self._weight_scaling, tuple):
            self._amaxes = None

    def stack(self, rows: Tensor) -> TwinStack:
        """Return the twin's weights, states and averages as matrices with a row for each layer.

        A *twin* is a sample of the layers that is stored and stepped as a recipe says.

        States are those of the optimizer; averages are those of the weights.

        Args:
            rows: Positions of the elements in the flat tensors, int64 (layers, width).
        """
        return self.tensors.stack(rows, {**self.averages, **self.states})

    def nbytes(self) -> int:
        """Return the memory of the twin in bytes."""
        averages = sum(each.nbytes for each in self.averages.values())
        amaxes = 0 if self._amaxes is None else self._amaxes.nbytes
        return self.tensors.nbytes() + averages + amaxes

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state that a resumed run needs to continue exactly.

        Returns:
            A dict of the weights at several times, their averages, the largest magnitudes from
            which scales are computed, and the generator of stochastic rounding.
        """
        generator = self._generator
        return {
            "tensors": self.tensors.state_dict(),
            "averages": {name: each.clone() for name, each in self.averages.items()},
            "amaxes": None if self._amaxes is None else self._amaxes.clone(),
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(
        self, layout: Layout, state: Mapping[str, Any], device: torch.device
    ) -> None:
        """Restore the twin's weights, averages and random numbers from a checkpoint.

        A *twin* is a sample of the layers that is stepped as a recipe says. Its elements stay in
        the places that they had when the state was saved, until the next `rearrange`.

        Args:
            layout: The places of the samples in flat tensors when the state was saved.
            state: A result of `state_dict`.
            device: The device of the layers.
        """
        tensors = {name: each.to(device, copy=True) for name, each in state["tensors"].items()}
        self.tensors, self.layout = TwinTensors(**tensors), layout
        averages = state["averages"].items()
        self.averages = {name: each.to(device, copy=True) for name, each in averages}
        amaxes = state["amaxes"]
        self._amaxes = None if amaxes is None else amaxes.to(device, copy=True)
        if state["generator"] is not None:
            self._get_generator(device).set_state(state["generator"])

    def _store(
        self,
        weights: Tensor,
        rounding: StorageRounding,
        lost: Tensor | None = None,
        stays: Tensor | None = None,
    ) -> None:
        """Round weights in place as the recipe stores them.

        Args:
            weights: The weights, in the dtype of the twin, (elements).
            rounding: How to round.
            lost: The rounding errors that Kahan summation keeps, bfloat16 (elements); None without
                it.
            stays: A mask of the weights that the step has not changed, as in `store_`; or None.
        """
        format = self._format
        if format is None:
            return
        scale = None
        if self._weight_scaling is not None:
            wanted = weights if lost is None else weights + lost.to(weights.dtype)
            if self._amaxes is None:
                self._amaxes = self._scales.start_amaxes(format, weights)
            scale = self._scales.find_for_weights(format, wanted, self._amaxes)
        self._round(weights, format, scale, rounding, lost, stays)

    def _store_state(self, name: str, numbers: Tensor, rounding: StorageRounding) -> None:
        """Round an optimizer state or an average in place, if the recipe has a format for it.

        Args:
            name: Name of the state.
            numbers: Its numbers, floating-point (elements).
            rounding: How to round.
        """
        formats = self.recipe.state_formats
        format = formats.get(name, formats.get("*"))
        if format is None or not format.is_coarser_than(numbers.dtype):
            return
        scale = self._scales.find_for_states(format, name, numbers)
        self._round(numbers, format, scale, rounding)

    def _round(
        self,
        numbers: Tensor,
        format: NumberFormat,
        scale: Tensor | None,
        rounding: StorageRounding,
        lost: Tensor | None = None,
        stays: Tensor | None = None,
    ) -> None:
        """Round weights or optimizer states in place, with the twin's own random numbers."""
        generator = None
        if rounding == "stochastic":
            generator = self._get_generator(numbers.device)
        store_(
            numbers,
            format.element,
            scale,
            rounding=rounding,
            generator=generator,
            lost=lost,
            stays=stays,
        )

    def _get_generator(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return self._generator


class UpdateTwin(Twin):
    """A twin that adds the updates of the training to its weights, and rounds them after each.

    A *twin* is a sample of some layers. The recipe says only in which format weights are stored;
    without a format, the twin's weights equal those of the training but for rounding.
    """

    def take_update(self, update: Tensor) -> None:
        """Add an update of the training to the weights, and round them to the recipe's format.

        A *recipe* says how weights and optimizer states are stored.

        Args:
            update: The change of the training's weights in its last step, floating-point
                (elements).
        """
        self.tensors.begin_step()
        self.tensors.weights.add_(update)
        lost = self.tensors.lost
        self._store(self.tensors.weights, self.recipe.rounding, lost if len(lost) else None)
        self.tensors.end_step()
