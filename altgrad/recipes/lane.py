"""`Lane`: the twins of all layers that have one dtype and one device.

At each step, a lane gathers the sampled gradients once and steps each twin with them. At an
observed step it compares the reference twin with the run, and measures the others. Read
`optimizer_twin` and `self_check` first. `twins` comes next: it holds the lanes of each optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.measurement.twin_sums import measure_twins
from altgrad.recipes.element_scales import ElementScales
from altgrad.recipes.hyperparameters import Changes
from altgrad.recipes.layout import CHUNK, Bucket, Layout
from altgrad.recipes.optimizer_twin import Gradients, OptimizerTwin
from altgrad.recipes.recipe import Recipe
from altgrad.recipes.self_check import compare
from altgrad.recipes.twin import Arrangement, Sampled, Twin, UpdateTwin

MOST_BUCKETS = 32
"""Largest number of groups of layers that step alike. Layers beyond are left out.

Each costs about 12 operations per recipe and step. Experts that are routed to at random step each
on its own."""


class Stepped(NamedTuple):
    """A layer that the run's optimizer steps.

    Attributes:
        name: Name of the layer.
        parameter: The parameter.
        group: Index of its parameter group.
    """

    name: str
    parameter: Tensor
    group: int


class LaneSums(NamedTuple):
    """The measurements of a lane at an observed step, on the device.

    Attributes:
        layers: Names of the layers.
        recipes: Names of the recipes.
        states: Names of the states.
        values: float64 (layers, recipes, columns) of `altgrad.measurement.twin_sums`.
        counts: float64 (layers, counts) of the self-check.
        sizes: Number of sampled elements of each layer.
        populations: Number of elements of each layer.
        block: Number of neighbours that were drawn together.
    """

    layers: tuple[str, ...]
    recipes: tuple[str, ...]
    states: tuple[str, ...]
    values: Tensor
    counts: Tensor
    sizes: tuple[int, ...]
    populations: tuple[int, ...]
    block: int


class Lane:
    """The twins of layers with one dtype and one device, on one sample.

    Args:
        recipes: The recipes whose twins are to run.
        dtype: The dtype of the weights.
        gradient_dtype: The dtype of the gradients.
        device: The device of the weights.
        block: Number of neighbours that are drawn together.
        scales: The scales of formats that have some.
        draw: Function that takes the name and the shape of a layer, and returns its sample.
        seed: Seed of stochastic rounding.
        warn: Function that is called with each notice for the user.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
        device: torch.device,
        block: int,
        scales: ElementScales,
        draw: Callable[[str, torch.Size], Tensor],
        seed: int,
        warn: Callable[[str], object],
    ) -> None:
        self.block = block
        self.layout = Layout()
        self.layers: dict[str, Sampled] = {}
        self._dtype = dtype
        self._gradient_dtype = gradient_dtype
        self._device = device
        self._scales = scales
        self._draw = draw
        self._seed = seed
        self._warn = warn
        self.twins: dict[str, Twin] = {
            r.name: OptimizerTwin(r, dtype, scales, seed) for r in recipes
        }
        self.reference: Twin = OptimizerTwin(Recipe("run", dtype=dtype), dtype, scales, seed)
        self._baseline: Twin | None = None  # the reference itself in a run in float32 or float64
        if torch.promote_types(dtype, torch.float32) != dtype:
            self._baseline = OptimizerTwin(Recipe("fp32"), dtype, scales, seed)
        self._follows_updates = False
        self._has_new_layers = False  # since the last step
        self._is_arranged = False  # False for a layout of a checkpoint
        self._left_out: set[str] = set()
        self._signature: tuple[int, ...] = ()  # the parameters with a gradient in the last step
        self._present: list[bool] = []
        self._gradients = torch.zeros(0, dtype=gradient_dtype, device=device)
        self._gradients_now = Gradients(self._gradients, ())
        self._takes: list[tuple[Stepped, Tensor, Tensor]] = []  # of layers with a gradient
        self._run = torch.zeros(0, dtype=dtype, device=device)  # the weights of the run, gathered
        self._run_places: list[Tensor] = []  # parts of it, one for each layer
        self._rows = self._layer_rows = torch.zeros(0, dtype=torch.int64, device=device)
        self._mask = torch.zeros(0, dtype=torch.bool, device=device)
        self._outside = torch.zeros(0, dtype=torch.float64, device=device)  # changes by layer
        self._unexplained = torch.zeros(0, dtype=torch.bool, device=device)  # of the last capture
        self._versions: dict[str, tuple[int, int]] = {}
        self._loaded_samples: dict[str, Tensor] = {}  # of a checkpoint, until the first step

    @property
    def baseline(self) -> Twin:
        """The twin that stores nothing low: fp32, or float64 in a run in float64."""
        return self.reference if self._baseline is None else self._baseline

    @property
    def is_empty(self) -> bool:
        """True if the twins of all recipes have ended."""
        return not self.twins

    @property
    def all_twins(self) -> list[Twin]:
        """The reference, the baseline and the twins of all recipes that still run."""
        others = [] if self._baseline is None else [self._baseline]
        return [self.reference, *others, *self.twins.values()]

    # --- before a step of the run

    def capture(
        self,
        optimizer: Optimizer,
        stepped: Sequence[Stepped],
        *,
        is_checked: bool,
        is_checkable: bool,
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Gather the gradients of a step that is about to happen.

        Args:
            optimizer: The run's optimizer.
            stepped: The layers of this lane that it steps, with a gradient or without.
            is_checked: True if the self-check is made after the step.
            is_checkable: False if the reference twin cannot equal the run.
            scale: Loss scale by which the gradients are multiplied; None without.
            found_inf: Flag of a GradScaler; None without.
        """
        present = [each for each in stepped if each.parameter.grad is not None]
        signature = tuple(id(each.parameter) for each in present)
        if signature != self._signature:
            with self._following_updates_after_an_error(optimizer):
                self._arrange(optimizer, stepped, {each.name for each in present})
            self._present = self._find_present({each.name for each in present})
            self._signature = signature
            self._takes = self._find_takes(present)
        for each, indices, place in self._takes:
            torch.take(each.parameter.grad, indices, out=place)  # type: ignore[arg-type]
        self._gradients_now = Gradients(self._gradients, self._present, scale, found_inf)
        changed = self._find_changed()
        if changed or is_checked:
            self._resynchronise(changed, is_checkable=is_checkable)

    def _find_takes(self, present: Sequence[Stepped]) -> list[tuple[Stepped, Tensor, Tensor]]:
        places = self.layout.places
        return [
            (each, self.layers[each.name].indices, self._gradients[places[each.name]])
            for each in present
            if each.name in places
        ]

    def _arrange(self, optimizer: Optimizer, stepped: Sequence[Stepped], present: set[str]) -> None:
        """Lay out the layers anew if some are new, gone, or begin to differ in their steps."""
        buckets = self._split_buckets(stepped, present) + self._make_buckets(
            optimizer, stepped, present
        )
        if sum(bucket.shape is None for bucket in buckets) > MOST_BUCKETS:
            buckets = self._leave_out_small(buckets)
        layout = Layout(tuple(buckets))
        if layout != self.layout or not self._is_arranged:
            self._take_over(optimizer, layout, {each.name: each for each in stepped})

    def _find_present(self, present: set[str]) -> list[bool]:
        """Return for each bucket whether its layers have a gradient; all have, or none."""
        return [next(iter(bucket.counts)) in present for bucket in self.layout.buckets]

    def _split_buckets(self, stepped: Sequence[Stepped], present: set[str]) -> list[Bucket]:
        """Return the buckets of known layers, split where layers differ from now on."""
        groups = {each.name: each.group for each in stepped if self._is_known(each)}
        buckets = []
        for bucket in self.layout.buckets:
            parts: dict[tuple[int, bool], list[str]] = {}
            for name in bucket.counts:
                if name in groups:
                    parts.setdefault((groups[name], name in present), []).append(name)
            for (group, _), names in parts.items():
                buckets.append(bucket.split(names, group))
        return buckets

    def _is_known(self, layer: Stepped) -> bool:
        """Return True if the twins have a layer, perhaps from a checkpoint, with this sample."""
        if layer.name in self._loaded_samples:
            indices = self._draw(layer.name, layer.parameter.shape)
            if torch.equal(indices, self._loaded_samples.pop(layer.name)):
                self._add_layer(layer, indices)
        known = self.layers.get(layer.name)
        return known is not None and known.shape == layer.parameter.shape

    def _add_layer(self, layer: Stepped, indices: Tensor) -> None:
        shape = layer.parameter.shape
        self.layers[layer.name] = Sampled(layer.parameter, shape, indices.to(self._device))

    def _make_buckets(
        self, optimizer: Optimizer, stepped: Sequence[Stepped], present: set[str]
    ) -> list[Bucket]:
        """Return buckets for layers that have a gradient for the first time."""
        buckets: dict[object, dict[str, int]] = {}
        shapes: dict[object, torch.Size | None] = {}
        kept = {name for bucket in self._split_buckets(stepped, present) for name in bucket.counts}
        for each in stepped:
            if each.name in kept or each.name not in present or each.name in self._left_out:
                continue
            indices = self._draw(each.name, each.parameter.shape)
            if not len(indices):
                continue
            self._add_layer(each, indices)
            is_small = each.parameter.numel() < CHUNK and self._rounds_by_shape(optimizer, each)
            key = (each.name if is_small else _describe_state(optimizer, each), each.group)
            buckets.setdefault(key, {})[each.name] = len(indices)
            shapes[key] = each.parameter.shape if is_small else None
        return [Bucket(key[1], counts, shapes[key]) for key, counts in buckets.items()]  # type: ignore[index]

    def _rounds_by_shape(self, optimizer: Optimizer, layer: Stepped) -> bool:
        """Return True if the elements beyond the last full chunk may be rounded in another way."""
        is_fused = bool(optimizer.param_groups[layer.group].get("fused"))
        return self._dtype.itemsize < 4 or is_fused

    def _leave_out_small(self, buckets: Sequence[Bucket]) -> list[Bucket]:
        """Keep the buckets with the most elements, and warn once of the layers of the others."""
        flat = [bucket for bucket in buckets if bucket.shape is None]
        flat.sort(key=lambda bucket: -bucket.length)  # stable: equal runs leave out the same
        gone = [name for bucket in flat[MOST_BUCKETS:] for name in bucket.counts]
        if not self._left_out:
            self._warn(
                f"has no twins of {few(gone)} and of others that are stepped at other times than "
                f"the rest, as experts are: twins step {MOST_BUCKETS} groups of layers apart"
            )
        self._left_out.update(gone)
        for name in gone:
            self.layers.pop(name, None)
        return [bucket for bucket in buckets if self._left_out.isdisjoint(bucket.counts)]

    def _take_over(
        self, optimizer: Optimizer, layout: Layout, stepped: Mapping[str, Stepped]
    ) -> None:
        """Rearrange all twins for another layout."""
        for name in layout.places:
            parameter = stepped[name].parameter
            self.layers[name] = self.layers[name]._replace(parameter=parameter)
        self.layers = {name: self.layers[name] for name in layout.places}
        self.layout, self._is_arranged, self._has_new_layers = layout, True, True
        self._gradients = torch.zeros(
            layout.length, dtype=self._gradient_dtype, device=self._device
        )
        self._run = torch.zeros(layout.length, dtype=self._dtype, device=self._device)
        self._run_places = [self._run[place] for place in layout.places.values()]
        self._gather_run()
        self._scales.read(layout, {n: each.indices for n, each in self.layers.items()}, self._run)
        names = [*layout.places]
        self._outside = torch.zeros(len(names), dtype=torch.float64, device=self._device)
        self._unexplained = torch.zeros(len(names), dtype=torch.bool, device=self._device)
        rows, mask = layout.find_rows(names, self.block)
        self._rows, self._mask = rows.to(self._device), mask.to(self._device)
        self._layer_rows = torch.zeros(layout.length, dtype=torch.int64, device=self._device)
        for row, name in enumerate(names):
            self._layer_rows[layout.places[name]] = row
        new = Arrangement(optimizer, layout, self._run, self.layers)
        for twin in self.all_twins:
            self._try(twin, partial(twin.rearrange, new))
        self._versions = self._read_versions()

    def _gather_run(self) -> None:
        """Gather the weights of the run."""
        for layer, place in zip(self.layers.values(), self._run_places, strict=True):
            torch.take(layer.parameter, layer.indices, out=place)

    # --- weights that something other than a step has changed

    def _read_versions(self) -> dict[str, tuple[int, int]]:
        # Autograd counts in-place writes in `_version`, which has no public name:
        # https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks
        return {
            name: (each.parameter._version, each.parameter.data_ptr())  # noqa: SLF001
            for name, each in self.layers.items()
        }

    def _find_changed(self) -> list[str]:
        """Return the layers that were written to since the last step."""
        now = self._read_versions()
        return [name for name, version in now.items() if version != self._versions.get(name)]

    def _resynchronise(self, changed: Collection[str], *, is_checkable: bool) -> None:
        """Take over weights that were changed between steps.

        Writes through `.data` are not counted by torch. Layers most of whose weights differ from
        the reference are therefore taken over, too: if the reference twin is wrong, it is still
        wrong after the next step.

        Args:
            changed: Names of the layers that were written to.
            is_checkable: False if the reference twin cannot equal the run.
        """
        self._gather_run()
        tensors = self.reference.tensors
        each = (self._run, tensors.weights, tensors.start)
        run, twin, start = (numbers[self._rows] for numbers in each)
        counts = compare(run, twin, start, self._mask)
        layers = (counts[:, 1] > 0.5 * counts[:, 2]) & (counts[:, 0] > 0)
        if not is_checkable:
            layers = torch.zeros_like(layers)
        if changed:
            written = [name in changed for name in self.layout.places]
            is_written = torch.tensor(written, device=self._device)
            self._unexplained = layers & ~is_written
            layers = layers | (is_written & (counts[:, 0] > 0))
        else:
            self._unexplained = layers
        outside = layers[self._layer_rows] & (self._run != tensors.weights)
        outside &= ~(self._run.isnan() & tensors.weights.isnan())
        for member in self.all_twins:
            member.replace_weights(outside, self._run)
        self._outside += layers

    # --- after a step of the run

    def step(self, optimizer: Optimizer, changes: Changes) -> None:
        """Step all twins, now that the run has stepped.

        Args:
            optimizer: The run's optimizer.
            changes: Hyperparameters that were changed from outside since the last step.
        """
        if self._follows_updates:
            self._follow_run()
        else:
            with self._following_updates_after_an_error(optimizer):
                if self._has_new_layers:
                    self.read_states(optimizer)
                    self._has_new_layers = False
                for twin in self.all_twins:
                    self._try(twin, partial(_step, twin, self._gradients_now, changes))
        self._versions = self._read_versions()

    def _follow_run(self) -> None:
        """Give the updates of the run to the twins."""
        self._gather_run()
        update = self._run - self.reference.tensors.weights
        for twin in self.all_twins:
            assert isinstance(twin, UpdateTwin)
            twin.take_update(update)
        self.reference.tensors.weights.copy_(self._run)  # w + (v − w) may differ from v

    def check(self) -> Tensor:
        """Compare the reference twin with the run.

        Returns:
            float64 (layers, counts): the `COUNTS` of each layer, on the device.
        """
        self._gather_run()
        tensors = self.reference.tensors
        each = (self._run, tensors.weights, tensors.start)
        run, twin, start = (numbers[self._rows] for numbers in each)
        counts = compare(run, twin, start, self._mask)
        outside, self._outside = self._outside, torch.zeros_like(self._outside)
        further = torch.stack([outside, self._unexplained.double()], dim=1)
        return torch.cat([counts, further], dim=1)

    def read_states(self, optimizer: Optimizer) -> None:
        """Read the largest magnitude of each state that a recipe stores under a scale.

        Args:
            optimizer: The run's optimizer.
        """
        wanted = {name for twin in self.twins.values() for name in twin.recipe.state_formats}
        if not wanted:
            return
        states: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.layers.items():
            for key, state in optimizer.state.get(layer.parameter, {}).items():
                is_whole = isinstance(state, Tensor) and state.shape == layer.shape
                if is_whole and state.is_floating_point() and not wanted.isdisjoint((key, "*")):
                    states.setdefault(key, {})[name] = state
        amaxes = {
            key: dict(zip(each, _find_largest([*each.values()]), strict=True))
            for key, each in states.items()
        }
        self._scales.set_state_amaxes(amaxes)

    def measure(self, optimizer: Optimizer) -> LaneSums:
        """Measure the twins of all layers at an observed step, and begin another window.

        Args:
            optimizer: The run's optimizer.

        Returns:
            The sums of all twins and the counts of the self-check, on the device.
        """
        self.read_states(optimizer)
        names = tuple(self.layout.places)
        counts = self.check()
        stacks = {name: twin.stack(self._rows) for name, twin in self.twins.items()}
        baseline = self.baseline.stack(self._rows)
        states = tuple(baseline.states)
        values = measure_twins(self._mask, baseline, [*stacks.values()], states, block=self.block)
        for twin in self.all_twins:
            twin.tensors.begin_window()
        places = self.layout.places
        return LaneSums(
            names,
            tuple(stacks),
            states,
            values,
            counts,
            tuple(places[name].stop - places[name].start for name in names),
            tuple(self.layers[name].parameter.numel() for name in names),
            self.block,
        )

    # --- endings

    def follow_updates(self, optimizer: Optimizer, reason: str) -> None:
        """Feed twins with the updates of the run, since its optimizer cannot run on a sample.

        Args:
            optimizer: The run's optimizer.
            reason: What the self-check found.
        """
        if self._follows_updates:
            return
        recipes = [twin.recipe for twin in self.twins.values() if twin.recipe.only_weights]
        if self._baseline is not None:
            recipes = []
        if gone := self.twins.keys() - {each.name for each in recipes}:
            self._warn(f"ends the twins of {few(sorted(gone))}: {reason}")
        if recipes:
            names = [each.name for each in recipes]
            self._warn(f"feeds the twins of {few(names)} with the updates of the run: {reason}")
        self._make_followers()
        self._gather_run()
        for twin in self.all_twins:
            twin.rearrange(Arrangement(optimizer, self.layout, self._run, self.layers))

    def _make_followers(self) -> None:
        """Replace all twins by twins that take over the updates of the run."""
        make = (self._dtype, self._scales, self._seed)
        is_wide = self._baseline is None  # else, the run has no weights in float32 to compare with
        recipes = [twin.recipe for twin in self.twins.values() if twin.recipe.only_weights]
        self.twins = {r.name: UpdateTwin(r, *make) for r in recipes if is_wide}
        self.reference, self._baseline = UpdateTwin(Recipe("run", dtype=self._dtype), *make), None
        self._follows_updates = True

    @contextmanager
    def _following_updates_after_an_error(self, optimizer: Optimizer) -> Iterator[None]:
        """Go on with the updates of the run, if its optimizer cannot run on a sample."""
        try:
            yield
        except Exception as error:
            if self._follows_updates:
                raise
            kind = type(optimizer).__name__
            self.follow_updates(optimizer, f"{kind} cannot run on a sample: {error}")

    def _try(self, twin: Twin, act: Callable[[], object]) -> None:
        """Call a function of a twin; after an error, end the twin with one sentence."""
        try:
            act()
        except Exception as error:
            if twin is self.reference or twin is self._baseline:
                raise
            self.twins.pop(twin.recipe.name, None)
            self._warn(f"ends the twin of {twin.recipe.name}: {error!r}")

    # --- scales, memory, state

    def scales_changed(self) -> None:
        """Find scales anew, since the amax of a layer has changed."""
        self._scales.forget_amaxes()

    def nbytes(self) -> int:
        """Return the memory of the lane in bytes: samples, gradients and twins."""
        indices = sum(each.indices.nbytes for each in self.layers.values())
        own = self._gradients.nbytes + self._run.nbytes
        return indices + own + sum(twin.nbytes() for twin in self.all_twins)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to continue exactly."""
        return {
            "buckets": [(b.group, dict(b.counts), b.shape) for b in self.layout.buckets],
            "samples": {name: each.indices.cpu() for name, each in self.layers.items()},
            "follows_updates": self._follows_updates,
            "left_out": sorted(self._left_out),
            "reference": self.reference.state_dict(),
            "baseline": None if self._baseline is None else self._baseline.state_dict(),
            "twins": {name: twin.state_dict() for name, twin in self.twins.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`, before the first step. Recipes without a state begin anew.

        Args:
            state: A result of `state_dict`.
        """
        layout = Layout(tuple(Bucket(*bucket) for bucket in state["buckets"]))
        self._left_out = set(state["left_out"])
        self._loaded_samples = dict(state["samples"])
        if state["follows_updates"]:
            self._make_followers()
        for name, twin in self.twins.items():
            if name in state["twins"]:
                twin.load_state_dict(layout, state["twins"][name], self._device)
        self.reference.load_state_dict(layout, state["reference"], self._device)
        if self._baseline is not None:
            self._baseline.load_state_dict(layout, state["baseline"], self._device)
        self.layout = layout


def _step(twin: Twin, gradients: Gradients, changes: Changes) -> None:
    assert isinstance(twin, OptimizerTwin)
    twin.follow(changes)
    twin.step(gradients)


def _find_largest(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Return the largest magnitude of each tensor, on its device."""
    # The norm of order inf. torch has no public name for norms of many tensors in one call; its
    # gradient clipping makes it: torch/nn/utils/clip_grad.py.
    return torch._foreach_norm(tensors, torch.inf)  # noqa: SLF001


def _describe_state(optimizer: Optimizer, layer: Stepped) -> object:
    """Return what layers have alike that may share a bucket: their steps, and kinds of state."""
    state = optimizer.state.get(layer.parameter, {})
    steps = state.get("step")
    # Reading a counter waits for the device, once when a layer is new.
    return (float(steps) if steps is not None else None, tuple(state))
