"""`MicroGradients`: see each gradient that a backward pass adds to the gradients of a layer.

In gradient accumulation, several backward passes come before a step. Each adds its gradient, a
*micro-gradient*, to `parameter.grad`. Recipes with `accumulate` add them up in another format: for
these, a hook on each layer shows them at the sampled elements. Other recipes need no hook.

The hook is one of torch's node `AccumulateGrad`, which does the addition. It runs just before, sees
what the hooks of the user have made of the gradient, and does not run for `torch.autograd.grad`,
which adds nothing. A hook after the addition would show the sum alone, and the difference of two
sums is rounded.

Read `gradient_sums` first, which adds up; `run_average` comes next.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from altgrad.observation.dtensor import is_sharded
from altgrad.observation.optimizers import check_not_captured
from altgrad.quantization.devices import Gathered
from altgrad.recipes.recipe import Recipe
from altgrad.recipes.rounding_generators import RoundingGenerators
from altgrad.twins.gradient_sums import GradientSums, follow_changes
from altgrad.twins.layer_plan import LaneKind, Stepped, draw_layer
from altgrad.twins.layout import Layout
from altgrad.twins.run_weights import RunWeights
from altgrad.twins.sample import Sampled
from altgrad.twins.twin_source import TwinSource


class MicroGradients:
    """The sums of the gradients of single backward passes, at the sampled elements of some layers.

    It has hooks on the layers from the beginning until `remove`, or until it is garbage-collected.
    An error in a hook is raised by the next `take_sums`, and never in a backward pass.

    Args:
        kind: The properties that the layers share: dtypes, device and block size.
        stepped: The layers.
        source: The layers of the training, from which samples are drawn.
        recipes: The recipes with `accumulate`, the format in which gradients are added up.
        generators: The random numbers of stochastic rounding, by name of the recipe.
    """

    def __init__(
        self,
        kind: LaneKind,
        stepped: Sequence[Stepped],
        source: TwinSource,
        recipes: Sequence[Recipe],
        generators: Mapping[str, RoundingGenerators],
    ) -> None:
        self.recipes = tuple(recipes)
        self._kind = kind
        self._layers: dict[str, Sampled] = {}
        for each in stepped:
            indices = draw_layer(source, kind, each).to(each.parameter.device)
            self._layers[each.name] = Sampled(each.parameter, each.parameter.shape, indices)
        sizes = [len(each.indices) for each in self._layers.values()]
        self._sums = GradientSums(recipes, generators, sizes, kind.gradient_dtype, kind.device)
        self._places = dict(zip(self._layers, self._sums.places, strict=True))
        # Views for each layer: of micro-gradients, and of the gradients before they are added.
        self._micro = {name: self._sums.micro[place] for name, place in self._places.items()}
        self._before = {name: self._sums.before[place] for name, place in self._places.items()}
        self._positions: tuple[Layout | None, Tensor] = None, self._sums.total
        self._gathered = Gathered()
        self._waiting: set[str] = set()  # layers whose micro-gradient is still to be added
        self._seen: set[str] = set()  # layers with a micro-gradient since the last `take_sums`
        self._missed: set[str] = set()  # those with one, too, that could not be sampled
        self._error: Exception | None = None
        # Node and handle. A node lives as long as someone holds it, and goes with this object.
        self._hooks: dict[str, tuple[Any, Any]] = {}
        self.add_hooks(self._layers)

    def covers(self, stepped: Sequence[Stepped]) -> bool:
        """Return True if these are the layers, with the shapes that they had.

        Args:
            stepped: Layers that an optimizer is about to step.
        """
        mine = [(name, id(each.parameter), each.shape) for name, each in self._layers.items()]
        return mine == [(name, id(each), each.shape) for name, each, _ in stepped]

    def add_hooks(self, names: Collection[str]) -> None:
        """Register the hooks of some layers, in place of those that they have.

        Args:
            names: Names of the layers.
        """
        for name in names:
            parameter = self._layers[name].parameter
            self._remove_hook(name)
            if parameter.requires_grad:
                with torch.inference_mode(mode=False), torch.enable_grad():
                    node = get_gradient_edge(parameter).node
                handle = node.register_prehook(_make_hook(self._receive, name))
                self._hooks[name] = node, handle

    def remove(self) -> None:
        """Remove all hooks: the sums of sampled gradients that this object keeps stay as they are.

        `parameter.grad` and the training go on as before.
        """
        for name in [*self._hooks]:
            self._remove_hook(name)

    def _remove_hook(self, name: str) -> None:
        if name in self._hooks:
            _, handle = self._hooks.pop(name)
            handle.remove()

    # --- during backward passes

    def _receive(self, name: str, gradients: Sequence[Tensor | None]) -> None:
        """Take the sampled elements of a gradient that a backward pass is about to add up."""
        (gradient,) = gradients
        if self._error is None and gradient is not None:
            try:
                with torch.no_grad():
                    self._note(name, gradient)
            except Exception as error:  # noqa: BLE001 - raised by `take_sums`, not in a backward
                self._error = error

    def _note(self, name: str, gradient: Tensor) -> None:
        layer = self._layers[name]
        before = layer.parameter.grad
        check_not_captured()
        if not (self._can_sample(gradient, layer) and self._can_sample(before, layer)):
            self._missed.add(name)
            return
        if name in self._waiting:
            self._add_waiting()
        self._gathered.take(gradient, layer.indices, self._micro[name])
        if before is not None:
            self._gathered.take(before, layer.indices, self._before[name])
        self._waiting.add(name)
        self._seen.add(name)

    def _can_sample(self, gradient: Tensor | None, layer: Sampled) -> bool:
        """Return True for a dense gradient of a layer in the expected dtype, and for None."""
        if gradient is None:
            return True
        return (
            gradient.layout == torch.strided
            and gradient.dtype == self._kind.gradient_dtype
            and gradient.device == layer.indices.device
            and gradient.shape == layer.shape
            and not is_sharded(gradient)
        )

    def _add_waiting(self) -> None:
        """Add the sampled gradients of one backward pass to the sums.

        All layers are added at once, when the first of them has its gradient of the next pass.
        """
        self._gathered.bring()
        for name in self._layers.keys() - self._waiting:
            self._micro[name].zero_()
            self._before[name].copy_(self._sums.total[self._places[name]])
        self._sums.add()
        self._waiting.clear()

    # --- before a step

    def take_sums(
        self,
        layout: Layout,
        applied: Tensor,
        present: Collection[str],
        places: RunWeights,
    ) -> dict[str, Tensor]:
        """Return the gradients with which the sample of each recipe steps, just before a step.

        A recipe with `accumulate` says in which format gradients of several passes are added up.
        The result is the sum in that format, changed as the training has changed its own sum: by
        unscaling, clipping and so on. A gradient that no backward pass has added up, such as one
        that was set by hand, is rounded once instead.

        Args:
            layout: The places of the samples in flat tensors.
            applied: The gradients that the training is about to apply, floating-point (elements).
            present: Names of the layers with a gradient.
            places: An object that says by `rows`, `mask` and `layer_rows` where the elements of
                each layer are in flat tensors.

        Returns:
            The gradients by name of the recipe, float32 or float64 (elements).

        Raises:
            Exception: An error of a hook since the last call.
        """
        if self._error is not None:
            raise self._error
        if self._waiting:
            self._add_waiting()
        positions = self._find_positions(layout)
        own = {name: each[positions] for name, each in self._sums.sums.items()}
        taken = follow_changes(own, self._sums.total[positions], applied, places)
        unseen = set(present) - (self._seen - self._missed)
        once = [place for name, place in layout.places.items() if name in unseen]
        for recipe in self.recipes:
            for place in once:
                part = taken[recipe.name][place]
                part.copy_(applied[place])
                self._sums.round_as(recipe, part)
        # Its hook may be on a node that torch has replaced, as after `module.to`.
        self.add_hooks(unseen & self._layers.keys())
        self._seen.clear()
        self._missed.clear()
        return taken

    def _find_positions(self, layout: Layout) -> Tensor:
        """Return where this object's tensors have the sum of gradients of each sampled element.

        Args:
            layout: The places of the sampled elements of the layers in the flat tensors of a step,
                which may have other layers, or another order, than the sums here.

        Returns:
            Positions in the sums, int64 (elements); the last position, at which all sums are 0, for
            padding and for layers without sums.
        """
        known, positions = self._positions
        if known is not layout:
            # The last element is 0: it stands for padding, and for layers that are not known.
            last = len(self._sums.total) - 1
            positions = torch.full((layout.length,), last, dtype=torch.int64, device="cpu")
            for name, place in layout.places.items():
                mine = self._places.get(name)
                if mine is not None and mine.stop - mine.start == place.stop - place.start:
                    positions[place] = torch.arange(mine.start, mine.stop, device="cpu")
            positions = positions.to(self._kind.device)
            self._positions = layout, positions
        return positions

    def nbytes(self) -> int:
        """Return the memory of samples and sums in bytes."""
        return self._sums.nbytes() + sum(each.indices.nbytes for each in self._layers.values())


def _make_hook(method: Callable[..., None], name: str) -> Callable[[Sequence[Tensor | None]], None]:
    """Return a hook that calls a bound method with a layer's name, and holds its object weakly."""
    reference = weakref.WeakMethod(method)

    def receive(gradients: Sequence[Tensor | None]) -> None:
        alive = reference()
        if alive is not None:
            alive(name, gradients)

    return receive
