"""`OptimizerTwin`: a twin whose own optimizer makes each step, with the gradients of the run.

A *twin* is a sample of each layer of the *run*, the training that is watched, stepped and stored as
a recipe says. No formula is modelled: the optimizer is a copy of the run's own, or one that a
factory makes, which is a function in the recipe. Layers that step alike are one parameter of it, a
*bucket*. Read `packed_state` first, and `twin` for the base class; `twin_source` comes next.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad.recipes.packed_states import PackedStates
from altgrad.recipes.recipe import Recipe
from altgrad.recipes.stored_states import COUNTERS
from altgrad.twins.element_scales import ElementScales
from altgrad.twins.factory import FactoryGroup
from altgrad.twins.flat_state import is_same_state, take_state
from altgrad.twins.generators import PrivateGenerators, may_draw
from altgrad.twins.hyperparameters import Changes, apply_changes, find_unmade
from altgrad.twins.isolation import step_quietly
from altgrad.twins.layout import Bucket, Layout
from altgrad.twins.optimizer_copy import (
    copy_hyperparameters,
    copy_optimizer,
    use_fused,
)
from altgrad.twins.packed_state import (
    list_state_tensors,
    load_state,
    save_state,
    split_packed_state,
)
from altgrad.twins.sample import Sampled
from altgrad.twins.twin import Arrangement, Twin


class Gradients(NamedTuple):
    """The sampled gradients of a step of the training.

    Attributes:
        values: The gradients, floating-point (elements); 0 at padding.
        present: For each bucket, a set of layers whose samples are stepped as one parameter: True
            if these have a gradient in this step.
        scale: The loss scale by which the gradients are still multiplied, a tensor of one element;
            None if they are not.
        found_inf: The flag of a GradScaler that a fused optimizer reads on the device, a tensor of
            one element: not 0 if the step is skipped. None without it.
        sums: By name of the recipe, other gradients for the twins of recipes with `accumulate`,
            which add them up over backward passes themselves, float32 or float64 (elements).
    """

    values: Tensor
    present: Sequence[bool]
    scale: Tensor | None = None
    found_inf: Tensor | None = None
    sums: Mapping[str, Tensor] = MappingProxyType({})


class OptimizerTwin(Twin):
    """A twin whose own optimizer makes each step, with the gradients of the training.

    A *twin* is a sample of each layer of the training that is stepped and stored as a recipe says.
    The optimizer is a copy of the training's, or one that a function in the recipe makes.

    Args:
        recipe: The recipe.
        dtype: The dtype of the weights of the training.
        scales: The scales of the sampled elements, for formats that have scales.
        seed: Seed of stochastic rounding, and of all that the optimizer draws.
    """

    def __init__(
        self, recipe: Recipe, dtype: torch.dtype, scales: ElementScales, seed: int
    ) -> None:
        super().__init__(recipe, dtype, scales, seed)
        # One copy, or one optimizer for each group of the run if a factory makes them. Beside each
        # stand the indices of the run's groups that its own groups stand for.
        self._optimizers: list[tuple[Optimizer, list[int]]] = []
        self._made: dict[int, FactoryGroup] = {}  # what a factory made, by group of the run
        self._parameters: list[nn.Parameter] = []  # one for each bucket
        self._homes: list[Tensor] = []  # views of `tensors.weights` for each parameter
        self._loaded: Sequence[Mapping[str, Any]] = []  # states of the buckets of a checkpoint
        self._loaded_groups: Mapping[int, Mapping[str, Any]] = {}
        self._gradients = torch.zeros(0, dtype=self.dtype, device="cpu")
        self._bucket_gradients: list[Tensor] = []
        self._generators = PrivateGenerators(self._seed)
        self._counts_on_host = False
        self._undone_for: Sequence[bool] = ()  # `present` in the last step that could be undone

    @property
    def _packed(self) -> PackedStates | None:
        """The description of states in blocks of a few bits; None if the optimizer keeps none."""
        return None if self.recipe.maker is None else self.recipe.maker.packed

    @property
    def states(self) -> Mapping[str, Tensor]:
        """The optimizer states with one number per sampled element, such as exp_avg, by name.

        Each is a flat tensor, (elements). Numbers are 0 in layers without the state, and at
        padding. An `OptimizerMaker` may read states of another form.
        """
        parts = self._find_elementwise(self._read_states())
        return {name: self._join(each) for name, each in parts.items()}

    def _read_states(self) -> Sequence[Mapping[str, Any]]:
        """Return the optimizer's state of each parameter, in the form that torch.optim has."""
        maker, states = self.recipe.maker, self._bucket_states()
        if maker is None or maker.read is None:
            return states
        each = zip(states, self._parameters, self.layout.buckets, strict=True)
        return [
            maker.read(state, _find_group(self._find_optimizer(bucket.group), p)) if state else {}
            for state, p, bucket in each
        ]

    def _find_elementwise(
        self, bucket_states: Sequence[Mapping[str, Any]]
    ) -> Mapping[str, list[tuple[slice, Tensor]]]:
        """Return the states with one number per element, in parts, by name.

        A part is a slice of the flat tensor of all elements, and the numbers there.

        Args:
            bucket_states: The state of each parameter.
        """
        states: dict[str, list[tuple[slice, Tensor]]] = {}
        for state, place in zip(bucket_states, self.layout.slices, strict=True):
            for name, value in state.items():
                if _is_elementwise(name, value, place):
                    states.setdefault(name, []).append((place, value))
        return states

    def _join(self, parts: Sequence[tuple[slice, Tensor]]) -> Tensor:
        """Return the parts of a state as one flat tensor with 0 elsewhere; a view if possible."""
        (_, first), *others = parts
        if not others and first.numel() == self.layout.length:
            return first.view(-1)
        flat = torch.zeros_like(self.tensors.weights, dtype=first.dtype)
        for place, value in parts:
            flat[place] = value.view(-1)
        return flat

    def has_state(self, name: str, state: Mapping[str, Any], layer: Sampled) -> bool:
        """Return True if a layer has the same optimizer state in the twin as in the training.

        Small differences of rounding are allowed.

        Args:
            name: Name of the layer.
            state: The state that the training's optimizer has of the layer, by name.
            layer: The layer.
        """
        number = self.layout.bucket_numbers.get(name)
        if number is None:
            return False
        own, start = self._bucket_states()[number], self.layout.slices[number].start
        place = self.layout.places[name]
        positions = torch.arange(place.start - start, place.stop - start, device="cpu")
        return own.keys() == state.keys() and all(
            is_same_state(own[key], positions, value, layer.places) for key, value in state.items()
        )

    def rearrange(self, new: Arrangement) -> None:
        """Move the numbers of the twin to other places in its flat tensors, and remake optimizers.

        A *twin* is a sample of the layers that an optimizer steps as a recipe says. Layers may be
        new or gone.

        The new optimizers go on with the states of the earlier ones. For renewed layers, they take
        those of the training, unless a function in the recipe makes the optimizers.

        Args:
            new: The places of the samples, and the state of the training.

        Raises:
            CannotCopyError: The training's optimizer cannot be copied.
            NotElementwiseError: A state does not hold one number per element of a layer.
        """
        old, states = self.layout, self._bucket_states()
        sources = old.find_sources(new.layout, new.begun)
        choices = self._describe_choices()
        super().rearrange(new)
        self._gradients = torch.zeros_like(self.tensors.weights, dtype=self._find_dtype(new))
        self._bucket_gradients = self._split(self._gradients)
        self._homes = self._split(self.tensors.weights)
        self._parameters = [*map(nn.Parameter, self._split(self.tensors.weights))]
        if self._gradients.dtype != self.dtype:
            for parameter in self._parameters:
                parameter.grad_dtype = self._gradients.dtype
        self._optimizers = self._make_optimizers(new, choices)
        self._undone_for = ()
        self._loaded = []
        places = zip(new.layout.buckets, new.layout.slices, self._parameters, strict=True)
        for bucket, place, parameter in places:
            number = self._find_source(old, new, bucket)
            if number is not None:
                positions = sources[place][: sum(bucket.counts.values())]
                positions = (positions - old.slices[number].start).to(parameter.device)
                state = split_packed_state(
                    self._packed, states[number], positions, bucket.length, bucket.shape
                )
            else:
                state = self._take_state(new, bucket)
            if state:
                self._find_optimizer(bucket.group).state[parameter] = state

    def _find_source(self, old: Layout, new: Arrangement, bucket: Bucket) -> int | None:
        """Return the index of the old bucket whose optimizer state a new bucket goes on with.

        A *bucket* is a parameter with the samples of layers that step alike. None if it takes the
        state of the training, or begins without one. The optimizer of a factory, a function in the
        recipe, keeps its own state, unless layers of several buckets come together.
        """
        names = bucket.counts.keys()
        fresh = new.renewed if self.recipe.optimizer is None else new.begun
        numbers = {old.bucket_numbers.get(name) for name in names}
        return numbers.pop() if len(numbers) == 1 and fresh.isdisjoint(names) else None

    def _find_dtype(self, new: Arrangement) -> torch.dtype:
        """Return the dtype in which this twin, a copy that steps a sample, holds its gradients.

        Weights in 16 bits may have gradients in float32, by the attribute `grad_dtype` of a
        parameter. A twin whose weights have the dtype of the training's therefore takes the dtype
        of the training's gradients. Any other twin takes the dtype of its own weights.

        Args:
            new: The layout of the sample, with the dtypes of the training.
        """
        if new.gradient_dtype is None or self.dtype != new.weights.dtype:
            return self.dtype
        return new.gradient_dtype

    def step(self, gradients: Gradients) -> None:
        """Step the twin's optimizer, and round weights and states to the formats of the recipe.

        A step that a GradScaler skips on the device has no effect on the twin: a fused optimizer
        skips it itself, and with another the step is undone.

        Args:
            gradients: The gradients of the training.
        """
        self.tensors.begin_step()
        found_inf = gradients.found_inf
        is_fused = all(_reads_found_inf(optimizer) for optimizer, _ in self._optimizers)
        undoes = found_inf is not None and not is_fused
        if undoes and self._must_look(gradients) and found_inf.item():  # type: ignore[union-attr]
            return
        scale = self._take_gradients(gradients, can_unscale=is_fused)
        before = self._copy_host_numbers() if undoes else None
        with self._undoing(found_inf) if undoes else self._scaling(scale, found_inf):
            for optimizer, _ in self._optimizers:
                self._step_optimizer(optimizer)
        if undoes:
            self._counts_on_host = before != self._copy_host_numbers()
            self._undone_for = gradients.present
        self._store_states()
        lost = self.tensors.lost if len(self.tensors.lost) else None
        stays = None if lost is None else self._find_unstepped(gradients)
        self._store(self.tensors.weights, self.recipe.rounding, lost, stays)
        self.tensors.end_step()

    def _find_unstepped(self, gradients: Gradients) -> Tensor | None:
        """Return a mask of weights that the step has left as they were stored; None if it has none.

        These are in layers without a gradient, or in a step that a GradScaler skips.
        """
        found_inf, now = gradients.found_inf, self.tensors.weights
        if found_inf is None and all(gradients.present):
            return None
        is_skipped: Any = False if found_inf is None else found_inf.to(now.device) != 0
        stays = now == self.tensors.before
        for place, is_present in zip(self.layout.slices, gradients.present, strict=True):
            if is_present:
                stays[place] &= is_skipped
        return stays

    def _take_gradients(self, gradients: Gradients, *, can_unscale: bool) -> Tensor | None:
        """Set copies of the gradients in the parameters, since many optimizers change theirs.

        Args:
            gradients: The gradients of the training.
            can_unscale: True if the optimizer divides by a loss scale itself.

        Returns:
            The loss scale by which the copies are still multiplied, one element; None if they are
            not.
        """
        values = gradients.sums.get(self.recipe.name, gradients.values)
        scale = gradients.scale
        # Scaled gradients may exceed the range of another dtype, so that they are divided before
        # the conversion. In the same dtype, they are stepped just as the run's are.
        if scale is not None and not (can_unscale and values.dtype == self.dtype):
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            values, scale = values / scale.to(values.device), None
        self._gradients.copy_(values)
        each = zip(self._parameters, self._bucket_gradients, gradients.present, strict=True)
        for parameter, gradient, is_present in each:
            parameter.grad = gradient if is_present else None
        return scale

    def _must_look(self, gradients: Gradients) -> bool:
        """Return True if the host must read `found_inf`, by which a GradScaler skips a step.

        Otherwise the step is made, and undone on the device if the flag is set, so that the host
        need not wait. That is impossible if the optimizer keeps its count of steps as a number of
        Python, and in the first step of a layer, which creates the optimizer states.

        Args:
            gradients: The gradients of the step, and which layers have some.
        """
        return self._counts_on_host or gradients.present != self._undone_for

    def _copy_host_numbers(self) -> list[object]:
        """Return the plain Python numbers in the optimizers, their groups and their states.

        A step changes some of them if the optimizer counts on the host.
        """
        optimizers = [optimizer for optimizer, _ in self._optimizers]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        return [
            {name: value for name, value in each.items() if isinstance(value, (int, float, tuple))}
            for each in (*map(vars, optimizers), *groups, *self._bucket_states())
        ]

    @contextmanager
    def _undoing(self, found_inf: Tensor | None) -> Iterator[None]:
        """Undo the step inside on the device if a GradScaler found inf; the host does not wait."""
        assert found_inf is not None
        earlier = [(each, each.clone()) for each in self._all_tensors()]
        yield
        for now, before in earlier:
            now.copy_(torch.where(found_inf.to(now.device) != 0, before, now))

    @contextmanager
    def _scaling(self, scale: Tensor | None, found_inf: Tensor | None) -> Iterator[None]:
        """Set `grad_scale` and `found_inf` of optimizers, as GradScaler does, for code inside."""
        if found_inf is None:
            yield
            return
        for optimizer, _ in self._optimizers:
            vars(optimizer).update(found_inf=found_inf, grad_scale=scale)
        try:
            yield
        finally:
            for optimizer, _ in self._optimizers:
                del vars(optimizer)["found_inf"], vars(optimizer)["grad_scale"]

    def _step_optimizer(self, optimizer: Optimizer) -> None:
        """Step one of the optimizers, and move its parameters back into the flat weights.

        Raises:
            ValueError: The step added parameters, or took some away.
        """
        held = _list_parameters(optimizer)
        with self._drawing(optimizer):
            step_quietly(optimizer)
        if [*map(id, held)] != [*map(id, _list_parameters(optimizer))]:
            raise ValueError(
                f"{type(optimizer).__name__} has other parameters after a step than before: "
                "expected those that it was made of; add parameters before the first step"
            )
        for parameter, home in zip(self._parameters, self._homes, strict=True):
            # Optimizers may write `p.data = …`, after which the parameter lies elsewhere.
            if parameter.data_ptr() != home.data_ptr():
                home.copy_(parameter.detach())
                parameter.data = home

    def follow(self, changes: Changes) -> None:
        """Set in the twin's optimizers the hyperparameters that were changed in the training's.

        A *twin* is a sample of the layers that an optimizer steps as a recipe says.

        Args:
            changes: The changes by index of the group in the training's optimizer.
        """
        if self._made:
            for number in self._made.keys() & changes.keys():
                self._made[number].follow(changes[number])
            return
        for optimizer, groups in self._optimizers:
            apply_changes(changes, optimizer, groups)
            if changes and self.recipe.fused:  # the recipe's own choice
                use_fused(optimizer)

    def find_unmade(self, changes: Changes) -> Changes:
        """Return the changes of hyperparameters that this twin's own step has not made.

        Args:
            changes: What changed in the groups of the training's optimizer while it stepped.

        Returns:
            The changes whose values the twin does not have: those of hooks, such as a schedule.
        """
        unmade: dict[int, Mapping[str, Any]] = {}
        for optimizer, groups in self._optimizers:
            unmade |= find_unmade(changes, optimizer, groups)
        return unmade

    def nbytes(self) -> int:
        """Return the memory of the twin in bytes."""
        states = self._all_tensors()[1:]
        return super().nbytes() + self._gradients.nbytes + sum(each.nbytes for each in states)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state that a resumed run needs to continue exactly.

        Returns:
            A dict of what `Twin.state_dict` has, the optimizer states, what a function of the
            recipe chose, and the generators from which optimizers draw.
        """
        states = self._bucket_states()
        return {
            **super().state_dict(),
            "states": [save_state(self._packed, each) for each in states],
            "groups": self._describe_choices(),
            "generators": self._generators.state_dict(),
        }

    def load_state_dict(
        self, layout: Layout, state: Mapping[str, Any], device: torch.device
    ) -> None:
        """Restore the twin's weights and optimizer states from a checkpoint.

        A *twin* is a sample of the layers that an optimizer steps as a recipe says. Its elements
        stay in the places that they had when the state was saved, until the next `rearrange`.

        Args:
            layout: The places of the samples in flat tensors when the state was saved.
            state: A result of `state_dict`.
            device: The device of the layers.
        """
        super().load_state_dict(layout, state, device)
        states, self._loaded_groups = state["states"], copy.deepcopy(state["groups"])
        self._loaded = [load_state(self._packed, each) for each in states]
        self._generators.load_state_dict(state["generators"])

    def _bucket_states(self) -> Sequence[Mapping[str, Any]]:
        """Return the optimizer's state of each parameter of the twin, a sample of the layers.

        Each parameter is a *bucket*: the samples of layers that step alike. Before the first step,
        the states are those of the checkpoint, or empty.
        """
        if not self._optimizers:
            return self._loaded or [{} for _ in self.layout.buckets]
        owners = [self._find_optimizer(bucket.group) for bucket in self.layout.buckets]
        each = zip(owners, self._parameters, strict=True)
        return [optimizer.state.get(parameter, {}) for optimizer, parameter in each]

    def _find_optimizer(self, group: int) -> Optimizer:
        """Return the optimizer that steps the layers of a parameter group of the training."""
        return next(optimizer for optimizer, groups in self._optimizers if group in groups)

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat tensor, one in the shape of each parameter of the twin."""
        pairs = zip(self.layout.buckets, self.layout.slices, strict=True)
        shapes = ((each.shape, place) for each, place in pairs)
        return [flat[p].view((-1,) if shape is None else shape) for shape, p in shapes]

    def _describe_choices(self) -> Mapping[int, Mapping[str, Any]]:
        """Return what the recipe's function that makes optimizers chose for each parameter group.

        The keys are indices of the training's groups; each value is a `FactoryGroup.state_dict`.
        The result is empty without such a function.
        """
        if not self._optimizers:
            return self._loaded_groups
        return {number: made.state_dict() for number, made in self._made.items()}

    def _make_optimizers(
        self, new: Arrangement, choices: Mapping[int, Mapping[str, Any]]
    ) -> list[tuple[Optimizer, list[int]]]:
        """Make the optimizers that step a twin, a sample of the layers, as its recipe says.

        One optimizer is a copy of the training's. If the recipe has a function that makes
        optimizers, there is one for each parameter group of the training instead.

        Args:
            new: The places of the sampled elements, and the state of the training.
            choices: What that function chose before, results of `FactoryGroup.state_dict`, by index
                of the training's group.

        Returns:
            The optimizers, each with the index of the training's group for each of its own groups.
        """
        numbers = sorted({bucket.group for bucket in new.layout.buckets})
        if not numbers:  # other ranks hold all sampled elements
            return []
        pairs = [*zip(new.layout.buckets, self._parameters, strict=True)]
        groups = [(n, [p for bucket, p in pairs if bucket.group == n]) for n in numbers]
        maker = self.recipe.maker
        if maker is None:
            copied = copy_optimizer(new.optimizer, groups, fused=self.recipe.fused)
            return [(copied, numbers)]
        self._made = {}
        for number, parameters in groups:
            options = copy_hyperparameters(new.optimizer, number)
            made = FactoryGroup(maker.make, parameters, options, self._seed)
            if number in choices:
                made.load_state_dict(choices[number])
            if maker.compiles:
                made.compile()
            self._made[number] = made
        return [(made.optimizer, [number]) for number, made in self._made.items()]

    def _take_state(self, new: Arrangement, bucket: Bucket) -> dict[str, Any]:
        """Return the optimizer state for a parameter of the twin, sampled from the training's.

        It is empty if the recipe makes its own optimizer.
        """
        layers = [new.layers[name] for name in bucket.counts]
        states = [each.read_state(new.optimizer) for each in layers]
        if not any(states) or self.recipe.optimizer is not None:
            return {}
        return take_state(
            states,
            [each.weights.shape for each in layers],
            [each.places for each in layers],
            bucket.length,
            dtype=self.dtype,
            real_dtype=layers[0].parameter.dtype,
            shape=bucket.shape,
        )

    def _store_states(self) -> None:
        """Round the optimizer states that the recipe names to their formats, in place."""
        formats = self.recipe.state_formats
        if not formats:
            return
        for name, parts in self._find_elementwise(self._bucket_states()).items():
            format = formats.get(name, formats.get("*"))
            if format is None:
                continue
            flat = self._join(parts)
            scale = self._scales.find_for_states(format, name, flat)
            self._round(flat, format, scale, self.recipe.rounding)
            for place, value in parts:
                if value.data_ptr() != flat.data_ptr():
                    value.copy_(flat[place].view(value.shape))

    def _all_tensors(self) -> list[Tensor]:
        """Return the weights, then all tensors of the optimizers' states."""
        states = (list_state_tensors(self._packed, state) for state in self._bucket_states())
        return [self.tensors.weights, *(each for some in states for each in some)]

    def _drawing(self, optimizer: Optimizer) -> AbstractContextManager[object]:
        """Return a context with the twin's own random numbers, if an optimizer may draw some."""
        if not may_draw(type(optimizer)):
            return nullcontext()
        return self._generators.using([self.tensors.weights.device])


def _is_elementwise(name: str, value: object, place: slice) -> bool:
    """Return True if an optimizer state has one floating-point number per element of a parameter.

    Args:
        name: Name of the state.
        value: The state.
        place: The slice of a flat tensor that the parameter has.
    """
    # A counter has one element, as the state of a bucket with one element has.
    is_plain = type(value) in {Tensor, nn.Parameter}
    is_float = is_plain and value.is_floating_point() and name not in COUNTERS  # type: ignore[attr-defined]
    return is_float and value.numel() == place.stop - place.start  # type: ignore[attr-defined]


def _find_group(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """Return the parameter group of an optimizer that has a parameter."""
    groups = optimizer.param_groups
    return next(group for group in groups if any(each is parameter for each in group["params"]))


def _list_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _reads_found_inf(optimizer: Optimizer) -> bool:
    """Return True if an optimizer itself skips a step for which a GradScaler found inf."""
    # GradScaler asks for the same attribute: torch/amp/grad_scaler.py, GradScaler.step.
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
