"""`WeightStorage`: training with weights stored in a number format.

`UpdateMonitor` predicts how such a training would go; `WeightStorage` runs it, without an fp32 copy
of the weights. It simulates the storage: the tensors keep their dtype and hold only values of the
format, and torch computes in that dtype.

`WeightStorage` selects layers, reacts to steps, and saves state; each `_Layer` scales and rounds
the weights of one layer.

Read `stored_states` first; `packed_states` comes next, the first file about recipes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from altgrad._messages import few, format_count
from altgrad.observation.dtensor import is_sharded
from altgrad.observation.optimizers import unwrap
from altgrad.observation.parameter_names import parameter_names
from altgrad.observation.rules import SamplingRule, resolve_layers
from altgrad.observation.step_hooks import count_step_calls, is_hooked
from altgrad.observation.stored import Stored, forget_stored, register_stored
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.devices import (
    editing_on_exact_device,
    find_exact_device,
    move_to_exact_device,
)
from altgrad.quantization.formats import Scaling, check_scaling
from altgrad.quantization.number_format import NumberFormat, get_applied_scaling
from altgrad.quantization.scaling import compute_amax, compute_format_scales
from altgrad.recipes.rounding import Compensation, StorageRounding, check_rounding, store_
from altgrad.recipes.rounding_generators import RoundingGenerators
from altgrad.recipes.stored_states import StoredStates, UnmatchedNames, expand_scales


class WeightStorage:
    """A storage that keeps the weights of optimizers in a number format.

    `attach` rounds the weights to the format, and so does each following step of an optimizer.
    Every weight is then a value of the format times its scale. A weight beyond the largest value is
    stored as the largest value. NaN and ±inf stay, so that a diverging run remains recognisable.

    Scales are powers of two. They grow when a weight would exceed the largest value, and they never
    shrink. A layer, channel or block of zeros gets its scale when its weights first move.
    The scales of `UpdateMonitor` may shrink: it recomputes them after 100 observed steps, and those
    of blocks in every observed step.

    Examples:
        >>> import torch
        >>> from altgrad import WeightStorage
        >>> gain = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = torch.optim.Adam([gain], lr=1e-3)
        >>> with WeightStorage("bf16").attach(optimizer):
        ...     for _ in range(100):
        ...         gain.grad = torch.ones(4)
        ...         optimizer.step()
        >>> gain.tolist()  # each update is less than half the spacing of bf16 below 1
        [1.0, 1.0, 1.0, 1.0]

    Args:
        format: A `FloatFormat`, a `BlockFormat`, or a name or dtype that
            `altgrad.quantization.get_formats` accepts. None for weights as they are.
            ``nvfp4`` is not supported, because its scales are not powers of two.
        scaling: The weights that share a scale in formats of fewer than 16 bits: ``"tensor"``,
            ``"channel"`` (along dimension 0) or ``("block", size)`` along the last dimension. None
            for no scale. Block formats ignore it.
        rounding: ``"nearest_even"`` or ``"stochastic"``. Stochastic rounding has the exact value as
            its mean, so that small updates take effect in the long run. `attach` always rounds to
            nearest.
        compensation: ``"kahan"`` keeps the rounding error of each weight in bf16 and adds it before
            the next rounding. This takes 16 bits per weight. Only with ``"nearest_even"``. Updates
            below about ``2**-(M + 10)`` of the weight, for M mantissa bits, are still lost: 8e-6 of
            the weight in bf16, 1e-4 in e4m3fn. For these only stochastic rounding helps.
        states: The format of each state of the optimizer by its name, ``"*"`` for all others. A
            state is stored after each step, without compensation, if it is a floating-point tensor
            of the shape of the layer. Scales of states are computed anew at each step. A warning
            lists names that no optimizer has after its first step.
        layers: Rules for single layers. The first rule that matches the name of a layer applies.
            Its `formats`, exactly one, replaces `format`; ``enabled=False`` leaves layers as they
            are. Rules about sampling are ignored.
        seed: The seed of stochastic rounding, which does not use the global generators of torch.

    Attributes:
        scaling: The `scaling` argument.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is invalid, or two arguments contradict each other.

    References:
        Zamirai et al., "Revisiting BFloat16 Training", arXiv 2010.06192, for stochastic rounding
        and Kahan summation of weights.
    """

    def __init__(
        self,
        format: str | torch.dtype | NumberFormat | None,
        scaling: Scaling | None = "tensor",
        *,
        rounding: StorageRounding = "nearest_even",
        compensation: Compensation | None = None,
        states: Mapping[str, str | torch.dtype | NumberFormat] = MappingProxyType({}),
        layers: Sequence[SamplingRule] = (),
        seed: int = 0,
    ) -> None:
        if scaling is not None:
            check_scaling(scaling)
        check_rounding(rounding, compensation)
        self._format = None if format is None else _one_format((format,))
        self._state_formats = {name: _one_format((each,)) for name, each in states.items()}
        self._states: dict[Tensor, StoredStates] = {}
        self._unmatched = UnmatchedNames((), ())
        for rule in layers:
            if rule.formats:
                _one_format(rule.formats)
        self.scaling = scaling
        self._rounding: StorageRounding = rounding
        self._compensation = compensation
        self._rules = tuple(layers)
        self._generators = RoundingGenerators(seed)
        self._layers: dict[Tensor, _Layer] = {}
        self._seen: set[Tensor] = set()  # known at attach, or warned about
        self._handles: list[RemovableHandle] = []
        self._loaded: dict[str, Mapping[str, Any]] = {}

    @property
    def formats(self) -> dict[str, str]:
        """The name of the format of each stored layer, by the name of the layer."""
        return {layer.name: layer.format.name for layer in self._layers.values()}

    def attach(self, *optimizers: Any, module: nn.Module | None = None) -> WeightStorage:
        """Round the weights of optimizers to the format, now and after each step.

        Attach the storage before a monitor or observer, so that these see the stored weights.

        Args:
            optimizers: One or several optimizers, or wrappers of optimizers that
                `StepObserver.attach` accepts.
            module: The module with the names of the layers. Without a module, names are those in
                the optimizers, which know names if created from ``named_parameters()``.

        Returns:
            The storage itself, as a context manager that detaches on exit.

        Raises:
            TypeError: An argument is not an optimizer.
            ValueError: A weight cannot be stored in its format, a rule matches no layer, or there
                are rules but layers have no names.
            RuntimeError: The storage is attached, or an optimizer is observed already.
        """
        if self._handles:
            raise RuntimeError(
                "the storage is attached already: give all optimizers to one attach(), or call "
                "detach() first"
            )
        unwrapped = [unwrap(optimizer) for optimizer in optimizers]
        for optimizer in unwrapped:
            if is_hooked(optimizer):
                raise RuntimeError(
                    f"this {type(optimizer).__name__} is observed already, so that its observer "
                    "would see weights before they are rounded: attach the storage first"
                )
        names = self._names(unwrapped, module)
        found = resolve_layers(
            [*names.values()],
            self._rules,
            every_n_steps=1,
            max_elements=None,
            formats=() if self._format is None else (self._format.name,),
        )
        layers: dict[Tensor, _Layer] = {}
        states: dict[Tensor, StoredStates] = {}
        for parameter, name in names.items():
            layer = found[name]
            if layer.enabled and layer.formats:
                has_rule_format = layer.rule is not None and layer.rule.formats is not None
                format = _one_format(layer.formats) if has_rule_format else self._format
                assert format is not None
                layers[parameter] = self._layer(name, parameter, format)
            if layer.enabled and self._state_formats:
                _check_is_whole(name, parameter)
                states[parameter] = StoredStates(name, self._state_formats, self.scaling)
        self._warn_about_unknown({layer.name for layer in layers.values()})
        self._layers, self._states, self._loaded = layers, states, {}
        self._unmatched = UnmatchedNames(self._state_formats, unwrapped)
        self._seen = {*names}
        # All checks have passed, so that an error leaves every weight unchanged.
        for each in layers.values():
            each.store_first()
        for optimizer in unwrapped:
            for parameter, kept in states.items():
                kept.store(parameter, optimizer.state.get(parameter, {}), "nearest_even", None)
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
            register_stored(optimizer, self, {p: self._describe(p) for p in {**layers, **states}})
        return self

    def detach(self) -> None:
        """Stop rounding. Weights, scales and rounding errors stay for another `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._unmatched = UnmatchedNames((), ())
        forget_stored(self)

    def __enter__(self) -> WeightStorage:  # noqa: PYI034 - typing has Self only from 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to continue exactly.

        Returns:
            A dict with two keys.

            - ``"layers"``: A dict with the state of each stored layer, by name of the layer.
            - ``"generators"``: A dict with the state of each generator for stochastic rounding, a
                uint8 tensor on the CPU, by name of the device.

            The state of a layer is a dict with four keys.

            - ``"format"``: The name of the format.
            - ``"scaling"``: The `Scaling` of the layer; None without scales.
            - ``"scales"``: The scales, float64; 0 where all weights have been 0; None without
                scales. The shape is ``()`` for ``"tensor"`` and ``(channels, 1, …)`` for
                ``"channel"``. For blocks it is that of the layer with the number of blocks as last
                dimension.
            - ``"lost"``: The rounding errors, bfloat16, the shape of the layer; None without
                compensation.
        """
        layers = {layer.name: layer.state_dict() for layer in self._layers.values()}
        return {"layers": {**self._loaded, **layers}, "generators": self._generators.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`: at once if the storage is attached, otherwise in `attach`.

        The caller restores weights and states of the optimizers, before `attach` or while the
        storage is attached. Layers whose format has changed start without scales and rounding
        errors. Layers whose scaling has changed start without scales.

        Args:
            state: A dict from `state_dict`.

        Raises:
            ValueError: `state` lacks a key of `state_dict`, or a tensor has another shape than its
                layer needs.
        """
        if not {"layers", "generators"} <= {*state}:
            raise ValueError(
                f"state has the keys {[*state]}: expected the result of WeightStorage.state_dict()"
            )
        self._generators.load_state_dict(state["generators"])
        self._loaded = dict(state["layers"])
        if not self._handles:
            self._layers = {}
            return
        for layer in self._layers.values():
            if layer.name in self._loaded:
                layer.load_state_dict(self._loaded[layer.name])
        self._warn_about_unknown({layer.name for layer in self._layers.values()})
        self._loaded = {}

    # --- layers

    def _names(
        self, optimizers: Sequence[Optimizer], module: nn.Module | None
    ) -> dict[Tensor, str]:
        """Return the parameters of the optimizers and their names, as keys and values.

        Raises:
            ValueError: There are rules, but a parameter has no name.
        """
        stepped = [_named_parameters(optimizer) for optimizer in optimizers]
        known = {} if module is None else parameter_names(module)
        pairs = [(known.get(p, name), p) for each in stepped for name, p in each]
        if self._rules and any(name is None for name, _ in pairs):
            raise ValueError(
                "layers= has rules for names, but not all parameters have a name: call "
                "attach(optimizer, module=model), or create the optimizer from "
                "model.named_parameters()"
            )
        return parameter_names(
            (name or f"parameter {index}", p) for index, (name, p) in enumerate(pairs)
        )

    def _layer(self, name: str, parameter: Tensor, format: NumberFormat) -> _Layer:
        """Return the `_Layer` of a parameter, restored from an earlier `attach` or checkpoint.

        It has the scales and rounding errors of the weights, which are not rounded yet.
        """
        _check_can_be_stored(name, parameter, format)
        layer = _Layer(name, parameter, format, self.scaling, self._compensation)
        known = self._layers.get(parameter)
        state = self._loaded.get(name) if known is None else known.state_dict()
        if state is not None:
            layer.load_state_dict(state)
        return layer

    def _describe(self, parameter: Tensor) -> Stored:
        """Return formats, scales and rounding by which a parameter and its states are stored."""
        layer, states = self._layers.get(parameter), self._states.get(parameter)
        return Stored(
            None if layer is None else layer.element,
            self._rounding,
            None if layer is None else self._compensation,
            lambda: None if layer is None else layer.expand_scales(),
            lambda: None if layer is None else layer.lost,
            {} if states is None else states.stored,
            {} if states is None else states.formats,
            None if layer is None else layer.format,
        )

    def _warn_about_unknown(self, names: set[str]) -> None:
        """Warn about layers of a loaded state that are not among the stored layers."""
        if unknown := [name for name in self._loaded if name not in names]:
            warnings.warn(
                f"the loaded state has {format_count(len(unknown), 'layer')} not stored now, "
                f"{few(unknown)}: their scales and rounding errors are dropped. "
                "Names differ with and without module=; call attach() as in the saved run",
                stacklevel=3,
            )

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Round weights and states after a step of an optimizer, as its hook."""
        if count_step_calls(optimizer) > 1:
            return  # a super().step() within a step, which may still change the weights
        # GradScaler sets it on fused optimizers, which skip the step on the device.
        found_inf = getattr(optimizer, "found_inf", None)
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        for parameter in parameters:
            generator = None
            if self._rounding == "stochastic":
                generator = self._generators.get(find_exact_device(parameter.device))
            if parameter in self._layers:
                self._layers[parameter].store(self._rounding, generator, found_inf)
            if parameter in self._states:
                states = optimizer.state.get(parameter, {})
                self._states[parameter].store(parameter, states, self._rounding, generator)
            if parameter not in self._seen:
                self._warn_about_late(parameter)
        self._unmatched.note_step(optimizer, (each for each in parameters if each in self._states))

    def _warn_about_late(self, parameter: Tensor) -> None:
        """Warn once about a parameter that was added after `attach`."""
        self._seen.add(parameter)
        warnings.warn(
            f"a parameter of shape {tuple(parameter.shape)} was added to the optimizer after "
            "attach(), and is not stored in a format: call attach() when all parameters exist",
            stacklevel=2,
        )


class _Layer:
    """The weights of one layer, their scales, and their rounding errors.

    If the device of the weights lacks float64, as MPS does, scales and errors are on the host. The
    host then rounds a copy of the weights, which is copied back.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        format: NumberFormat,
        scaling: Scaling | None,
        compensation: Compensation | None,
    ) -> None:
        self.name = name
        self.format = format
        self._parameter = parameter
        self._device = find_exact_device(parameter.device)  # of scales and rounding errors
        self.element = format.element
        self._scaling = get_applied_scaling(format, scaling)
        self._scales: Tensor | None = None  # 0 where all weights have been 0
        self.lost: Tensor | None = None
        if compensation is not None:
            # bf16 has the exponent range of float32, so that small errors do not become 0.
            self.lost = torch.zeros_like(
                parameter, dtype=torch.bfloat16, device=self._device, requires_grad=False
            )

    @torch.no_grad()
    def store_first(self) -> None:
        """Round the weights to nearest, at `attach`.

        Weights that are values of the format already, as in a resumed run, do not change.
        """
        with editing_on_exact_device(self._parameter.detach()) as weights:
            before = weights.clone()
            store_(weights, self.element, self._update_scales(weights))
            if self.lost is not None:
                self.lost += (before - weights).nan_to_num(0.0)  # inf − inf is NaN

    @torch.no_grad()
    def store(
        self,
        rounding: StorageRounding,
        generator: torch.Generator | None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Add the kept rounding errors to the weights, and round them, after a step.

        Args:
            rounding: The way to round.
            generator: The random number generator for ``"stochastic"``, on the device of the
                layer, or on the CPU if that lacks float64.
            found_inf: The flag of a GradScaler that a fused optimizer reads on the device, a tensor
                of one element: not 0 if the step is skipped. None without it.
        """
        lost = self.lost
        with editing_on_exact_device(self._parameter.detach()) as weights:
            wanted = weights if lost is None else weights + lost.to(weights.dtype)
            scale = self._update_scales(wanted)
            stays = None if lost is None else self._find_unstepped(weights, scale, found_inf)
            store_(
                weights,
                self.element,
                scale,
                rounding=rounding,
                generator=generator,
                lost=lost,
                stays=stays,
            )

    def _find_unstepped(
        self, weights: Tensor, scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor | None:
        """Return a mask of weights that a step has left as they were stored; None if it has none.

        These are values of the format in a layer without a gradient, or in a skipped step.
        """
        has_gradient = self._parameter.grad is not None
        if has_gradient and found_inf is None:
            return None
        store_(stored := weights.clone(), self.element, scale)
        stays = stored == weights
        if has_gradient and found_inf is not None:
            stays &= found_inf.to(stays.device) != 0
        return stays

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the layer, as described in `WeightStorage.state_dict`."""
        return {
            "format": self.format.name,
            "scaling": self._scaling,
            "scales": self._scales,
            "lost": None if self.lost is None else self.lost.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the layer.

        A state of another format is ignored, and so are scales of another scaling.

        Args:
            state: A dict from `state_dict`.

        Raises:
            ValueError: The state lacks a key, or a tensor has another shape than this layer needs.
        """
        if not {"format", "scaling", "scales", "lost"} <= {*state}:
            raise ValueError(
                f"the state of {self.name} has the keys {[*state]}: expected the result of "
                "WeightStorage.state_dict()"
            )
        if state["format"] != self.format.name:
            return
        scaling, scales = self._scaling, state["scales"]
        if scaling is not None and scaling == state["scaling"] and scales is not None:
            (weights,) = move_to_exact_device([self._parameter.detach()])
            needed = self._needed_scales(weights, scaling)
            self._scales = self._check_shape(scales, needed.shape, "scales")
        if state["lost"] is not None and self.lost is not None:
            self.lost.copy_(self._check_shape(state["lost"], self.lost.shape, "rounding errors"))

    def _check_shape(self, loaded: Tensor, shape: torch.Size, what: str) -> Tensor:
        """Return a loaded tensor on the device where the weights are rounded.

        Args:
            loaded: The tensor from the state.
            shape: The shape that the layer needs.
            what: The contents of the tensor in plural, for the error.

        Returns:
            The tensor, of that shape.

        Raises:
            ValueError: The tensor has another shape.
        """
        if loaded.shape != shape:
            raise ValueError(
                f"the state of {self.name} has {what} of shape {tuple(loaded.shape)}: expected "
                f"{tuple(shape)} for a parameter of shape {tuple(self._parameter.shape)}"
            )
        return loaded.to(self._device)

    def _update_scales(self, weights: Tensor) -> Tensor | None:
        """Raise the kept scales until no weight exceeds the format's largest value; return them.

        Returns:
            Scales that broadcast to the shape of the weights, float64; None without scaling.
        """
        if self._scaling is not None:
            needed = self._needed_scales(weights, self._scaling)
            # All scales are powers of two, so that a weight on the grid stays on the grid or is a
            # tie after its scale has grown.
            self._scales = needed if self._scales is None else torch.maximum(self._scales, needed)
        return self.expand_scales()

    def expand_scales(self) -> Tensor | None:
        """Return scales that broadcast to the weights; None without scales.

        The scale is 1 where all weights have been 0.
        """
        if self._scaling is None or self._scales is None:
            return None
        scales = torch.where(self._scales == 0, 1.0, self._scales)
        return expand_scales(scales, self._parameter.shape, self._scaling)

    def _needed_scales(self, weights: Tensor, scaling: Scaling) -> Tensor:
        """Return the smallest scales with which weights fit the format, float64; 0 for all zeros.

        Where all weights that share a scale are 0, the scale is 0.
        """
        amax = compute_amax(weights, scaling)
        return torch.where(amax == 0, 0.0, compute_format_scales(amax, self.format))


def _one_format(formats: Any) -> NumberFormat:
    """Return the format that `formats` stands for: exactly one, with powers of two as scales.

    Raises:
        ValueError: There is not exactly one format, or its scales are not powers of two.
    """
    found = get_formats(formats)
    if len(found) != 1:
        raise ValueError(
            f"formats={tuple(map(str, found))}: expected exactly one format to store weights in"
        )
    if not found[0].power_of_two:
        raise ValueError(
            f"format={found[0].name!r} has scales that are not powers of two, so that each change "
            "of a scale would round all weights again: expected 'mxfp4', or a format such as "
            "'e2m1' with scaling=('block', 16)"
        )
    return found[0]


def _named_parameters(optimizer: Optimizer) -> list[tuple[str | None, Tensor]]:
    """Return name and parameter of each parameter of an optimizer; None for a missing name.

    An optimizer created from ``named_parameters()`` keeps the names as ``"param_names"`` in its
    groups: https://docs.pytorch.org/docs/stable/optim.html
    """
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(
            group.get("param_names", [None] * len(group["params"])), group["params"], strict=True
        )
    ]


def _check_can_be_stored(name: str, parameter: Tensor, format: NumberFormat) -> None:
    """Raise ValueError if a parameter is sharded, or its dtype is no finer than the format."""
    _check_is_whole(name, parameter)
    leave_out = f"exclude the layer with SamplingRule({name!r}, enabled=False)"
    if parameter.dtype not in INPUT_DTYPES:
        raise ValueError(
            f"{name} has dtype {parameter.dtype}; expected float16, bfloat16, float32 or float64: "
            f"{leave_out}"
        )
    if not format.is_coarser_than(parameter.dtype):
        raise ValueError(
            f"{name} has dtype {parameter.dtype}, which is not finer than {format.name}: expected "
            f"float32; convert the weights, or {leave_out}"
        )


def _check_is_whole(name: str, parameter: Tensor) -> None:
    """Raise ValueError if a parameter is sharded."""
    if is_sharded(parameter):
        raise ValueError(
            f"{name} is sharded, and scales of a local shard differ from those of the layer: "
            "expected a parameter that is not sharded; exclude the layer with "
            f"SamplingRule({name!r}, enabled=False)"
        )
