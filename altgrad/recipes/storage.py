"""`WeightStorage`: weights that really live on the grid of a number format.

It does what `UpdateMonitor` predicts: no fp32 copy of the weights is kept, so that what an update
loses in rounding is lost. It is a simulation, to find out what a run would come to: the weights
stay in tensors of their dtype, with values that the format has, and all arithmetic is done in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from altgrad._messages import few
from altgrad.observation.dtensor import is_sharded
from altgrad.observation.optimizers import unwrap
from altgrad.observation.parameter_names import parameter_names
from altgrad.observation.rules import SamplingRule, resolve_layers
from altgrad.observation.step_hooks import is_hooked, step_depth
from altgrad.observation.stored import forget_stored, register_stored
from altgrad.quantization import quantize, spacing
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.formats import Scaling, check_scaling
from altgrad.quantization.number_format import NumberFormat, applied_scaling
from altgrad.quantization.scaling import amax_of, format_scales

StorageRounding = Literal["nearest_even", "stochastic"]
Compensation = Literal["kahan"]


class WeightStorage:
    """Keeps the weights that an optimizer steps in a number format.

    From `attach` on, and after each step of the optimizer, every weight is a number of the format
    (times the scale that it shares). Scales are powers of two and only ever grow, when a weight
    would exceed them; one of zeros is taken once they have moved. These are the scales of
    `UpdateMonitor` but that it takes them anew after 100 observed steps, and those of blocks of
    elements at each step, which may lower them. A weight beyond the top is stored as the top; NaN
    and ±inf stay what they are, so that a run that diverges looks like one.

    Examples:
        >>> import torch
        >>> from altgrad import WeightStorage
        >>> gain = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = torch.optim.Adam([gain], lr=1e-3)
        >>> with WeightStorage("bf16").attach(optimizer):
        ...     for _ in range(100):
        ...         gain.grad = torch.ones(4)
        ...         optimizer.step()
        >>> gain.tolist()  # each step was less than half of what bf16 can tell apart here
        [1.0, 1.0, 1.0, 1.0]

    Args:
        format: As in `altgrad.measure`, one; not nvfp4.
        scaling: As in `altgrad.measure`: what shares a scale, in formats below 16 bits.
        rounding: ``"nearest_even"``, or ``"stochastic"``: up or down at random, so that the mean
            is exact and small updates arrive in the long run. What is stored first is rounded to
            nearest in any case.
        compensation: ``"kahan"`` keeps what rounding to nearest lost of each weight in bf16, and
            adds it before the next rounding: 16 bits more for each weight. They lose in turn what
            is less than about 2**-(M + 10) of the weight, for a format of M mantissa bits: 8e-6 of
            it in bf16, 1e-4 in e4m3fn, where only stochastic rounding helps below.
        layers: Rules for single layers, the first that matches a name holds: `formats`, one, or
            ``enabled=False`` to leave layers as they are. How they are sampled plays no role here.
        seed: Of the stochastic rounding, which draws nothing from torch's own generators.

    Attributes:
        scaling: The `scaling` argument.

    Raises:
        TypeError, ValueError: An argument that cannot be meant.

    References:
        Zamirai et al., "Revisiting BFloat16 Training", arXiv 2010.06192, for stochastic rounding
        and Kahan summation of weights.
    """

    def __init__(
        self,
        format: str | torch.dtype | NumberFormat,
        scaling: Scaling | None = "tensor",
        *,
        rounding: StorageRounding = "nearest_even",
        compensation: Compensation | None = None,
        layers: Sequence[SamplingRule] = (),
        seed: int = 0,
    ) -> None:
        if scaling is not None:
            check_scaling(scaling)
        if rounding not in get_args(StorageRounding):
            raise ValueError(f"rounding={rounding!r}: expected 'nearest_even' or 'stochastic'")
        if compensation not in (None, "kahan"):
            raise ValueError(f"compensation={compensation!r}: expected None or 'kahan'")
        if compensation is not None and rounding == "stochastic":
            raise ValueError(
                "rounding='stochastic' with compensation='kahan': expected one of them; what is "
                "kept and rounded at random again would move weights that have no step"
            )
        self._format = _one_format((format,))
        for rule in layers:
            if rule.formats:
                _one_format(rule.formats)
        self.scaling = scaling
        self._rounding: StorageRounding = rounding
        self._compensation = compensation
        self._rules = tuple(layers)
        self._seed = seed
        self._generators: dict[str, torch.Generator] = {}
        self._layers: dict[Tensor, _Layer] = {}
        self._seen: set[Tensor] = set()  # at attach, and those that were told of
        self._handles: list[RemovableHandle] = []
        self._loaded: dict[str, Mapping[str, Any]] = {}

    @property
    def formats(self) -> dict[str, str]:
        """By layer the name of the format that it is stored in."""
        return {layer.name: layer.format.name for layer in self._layers.values()}

    def attach(self, *optimizers: Any, module: nn.Module | None = None) -> WeightStorage:
        """Store the weights that these optimizers step, now and after each of their steps.

        Attach it before a monitor or observer, which then sees the weights as they are stored.

        Args:
            optimizers: As in `StepObserver.attach`.
            module: Says the names of the layers. Without it they are those that the optimizers
                know, if they were made from ``named_parameters()``.

        Raises:
            TypeError: No optimizer.
            ValueError: A weight that cannot be stored so, by name; a rule that matches no layer;
                rules, and no names that they could match.
            RuntimeError: The optimizer is observed already, or this storage is attached.
        """
        if self._handles:
            raise RuntimeError(
                "the storage is attached: give all optimizers to one attach(), or detach() first"
            )
        unwrapped = [unwrap(optimizer) for optimizer in optimizers]
        for optimizer in unwrapped:
            if is_hooked(optimizer):
                raise RuntimeError(
                    f"this {type(optimizer).__name__} is observed already, and its observer would "
                    "see weights before they are stored: attach the storage first"
                )
        names = self._names(unwrapped, module)
        found = resolve_layers(
            [*names.values()],
            self._rules,
            every_n_steps=1,
            max_elements=None,
            formats=(self._format.name,),
        )
        layers: dict[Tensor, _Layer] = {}
        for parameter, name in names.items():
            layer = found[name]
            if layer.enabled and layer.formats:
                of_rule = layer.rule is not None and layer.rule.formats is not None
                format = _one_format(layer.formats) if of_rule else self._format
                layers[parameter] = self._layer(name, parameter, format)
        self._tell_of_unknown({layer.name for layer in layers.values()})
        self._layers, self._loaded = layers, {}
        self._seen = {*names}
        for each in layers.values():
            each.store_first()
        for optimizer in unwrapped:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
            stored = {parameter: layer.element for parameter, layer in layers.items()}
            register_stored(optimizer, self, stored)
        return self

    def detach(self) -> None:
        """Store no more; the weights stay where they are. Attached again, it goes on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        forget_stored(self)

    def __enter__(self) -> WeightStorage:  # noqa: PYI034 - typing has Self only from 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly: scales, what was lost, random numbers."""
        return {
            "layers": {layer.name: layer.state_dict() for layer in self._layers.values()},
            "generators": {name: each.get_state() for name, each in self._generators.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, before `attach`, but for layers stored in another way now.

        Raises:
            RuntimeError: It is attached.
            ValueError: It is none.
        """
        if self._handles:
            raise RuntimeError("the storage is attached: load_state_dict() before attach()")
        if not {"layers", "generators"} <= {*state}:
            raise ValueError(
                f"state has the keys {[*state]}: expected what WeightStorage.state_dict() gives"
            )
        self._layers = {}
        self._loaded = dict(state["layers"])
        for device, generator_state in state["generators"].items():
            self._generator(torch.device(device)).set_state(generator_state)

    # --- layers

    def _names(
        self, optimizers: Sequence[Optimizer], module: nn.Module | None
    ) -> dict[Tensor, str]:
        stepped = [_named_parameters(optimizer) for optimizer in optimizers]
        known = {} if module is None else parameter_names(module)
        pairs = [(known.get(p, name), p) for each in stepped for name, p in each]
        if self._rules and any(name is None for name, _ in pairs):
            raise ValueError(
                "layers= are rules for names, and not all parameters have one: "
                "attach(optimizer, module=model), or make the optimizer from "
                "model.named_parameters()"
            )
        return parameter_names(
            (name or f"parameter {index}", p) for index, (name, p) in enumerate(pairs)
        )

    def _layer(self, name: str, parameter: Tensor, format: NumberFormat) -> _Layer:
        """As it was, if it is known; nothing is stored yet."""
        _check_can_be_stored(name, parameter, format)
        layer = _Layer(name, parameter, format, self.scaling, self._compensation)
        known = self._layers.get(parameter)
        state = self._loaded.get(name) if known is None else known.state_dict()
        if state is not None:
            layer.load_state_dict(state)
        return layer

    def _tell_of_unknown(self, names: set[str]) -> None:
        if unknown := [name for name in self._loaded if name not in names]:
            warnings.warn(
                f"the state that was loaded has {len(unknown)} layers that are not stored now, "
                f"among them {few(unknown)}: their scales and what was lost of them are "
                "dropped; layers have other names with module= than without: attach() as before",
                stacklevel=3,
            )

    def _generator(self, device: torch.device) -> torch.Generator:
        if str(device) not in self._generators:
            self._generators[str(device)] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[str(device)]

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if step_depth(optimizer) > 1:
            return  # super().step() of one that is not over
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._layers:
                    generator = None
                    if self._rounding == "stochastic":
                        generator = self._generator(parameter.device)
                    self._layers[parameter].store(self._rounding, generator)
                elif parameter not in self._seen:
                    self._tell_of(parameter)

    def _tell_of(self, parameter: Tensor) -> None:
        self._seen.add(parameter)
        warnings.warn(
            f"a parameter of shape {tuple(parameter.shape)} was added to the optimizer after "
            "attach(), and is not stored in a format: attach the storage when all are there",
            stacklevel=2,
        )


class _Layer:
    """The weights of one layer, the scales they share, and what was lost of each."""

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
        self.element = format.element
        self._scaling = applied_scaling(format, scaling)
        self._scales: Tensor | None = None  # 0 where all weights have been 0 so far
        self._lost: Tensor | None = None
        if compensation is not None:
            self._lost = torch.zeros_like(parameter, dtype=torch.bfloat16, requires_grad=False)

    @torch.no_grad()
    def store_first(self) -> None:
        """Put the weights on the grid; those that are there already, as of a resumed run, stay."""
        weights = self._parameter.detach()
        stored = self._rounded(weights, self._scale_of_each(weights), "nearest_even", None)
        if self._lost is not None:
            self._lost += (weights - stored).nan_to_num(0.0)  # of what is not finite
        self._parameter.copy_(stored)

    @torch.no_grad()
    def store(self, rounding: StorageRounding, generator: torch.Generator | None) -> None:
        """Round what a step has made of the weights."""
        wanted = self._parameter.detach()
        if self._lost is not None:
            wanted = wanted + self._lost.to(wanted.dtype)
        scale = self._scale_of_each(wanted)
        stored = self._rounded(wanted, scale, rounding, generator)
        if self._lost is not None:
            # Beyond the top no more than rounding can lose.
            most = spacing(stored, self.element, scale)
            self._lost.copy_(torch.clamp(wanted - stored, -most, most).nan_to_num(0.0))
        self._parameter.copy_(stored)

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": self.format.name,
            "scaling": self._scaling,
            "scales": self._scales,
            "lost": None if self._lost is None else self._lost.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was stored in another format begins anew, as do scales that were shared otherwise.

        Raises:
            ValueError: It is none of this layer.
        """
        if not {"format", "scaling", "scales", "lost"} <= {*state}:
            raise ValueError(
                f"the state of {self.name} has the keys {[*state]}: expected what "
                "WeightStorage.state_dict() gives"
            )
        if state["format"] != self.format.name:
            return
        scaling, scales = self._scaling, state["scales"]
        if scaling is not None and scaling == state["scaling"] and scales is not None:
            needed = self._needed_scales(self._parameter.detach(), scaling)
            self._scales = self._of_shape(scales, needed.shape, "scales")
        if state["lost"] is not None and self._lost is not None:
            self._lost.copy_(self._of_shape(state["lost"], self._lost.shape, "what was lost"))

    def _of_shape(self, loaded: Tensor, shape: torch.Size, what: str) -> Tensor:
        if loaded.shape != shape:
            raise ValueError(
                f"the state of {self.name} has {what} of shape {tuple(loaded.shape)}: expected "
                f"{tuple(shape)}, as of a parameter of shape {tuple(self._parameter.shape)}"
            )
        return loaded.to(self._parameter.device)

    def _rounded(
        self,
        weights: Tensor,
        scale: float | Tensor,
        rounding: StorageRounding,
        generator: torch.Generator | None,
    ) -> Tensor:
        rounded = quantize(weights, self.element, scale, rounding=rounding, generator=generator)
        return torch.where(weights.isfinite(), rounded, weights)

    def _scale_of_each(self, weights: Tensor) -> float | Tensor:
        """Grown, where that is needed for these weights."""
        if self._scaling is None:
            return 1.0
        needed = self._needed_scales(weights, self._scaling)
        # Powers of two all of them, so that what was on the grid stays on it or is a tie.
        self._scales = needed if self._scales is None else torch.maximum(self._scales, needed)
        scales = torch.where(self._scales == 0, 1.0, self._scales)
        if isinstance(self._scaling, str) or not weights.dim():
            return scales
        size = max(min(self._scaling[1], weights.shape[-1]), 1)
        return scales.repeat_interleave(size, dim=-1)[..., : weights.shape[-1]]

    def _needed_scales(self, weights: Tensor, scaling: Scaling) -> Tensor:
        amax = amax_of(weights, scaling)
        return torch.where(amax == 0, 0.0, format_scales(amax, self.format))


def _one_format(formats: Any) -> NumberFormat:
    found = get_formats(formats)
    if len(found) != 1:
        raise ValueError(
            f"formats={tuple(map(str, found))}: expected one, weights are stored in one format"
        )
    if not found[0].power_of_two:
        raise ValueError(
            f"format={found[0].name!r} has scales that are no powers of two, so that each change "
            "of them would round all weights anew: expected 'mxfp4', or a format such as 'e2m1' "
            "with scaling=('block', 16)"
        )
    return found[0]


def _named_parameters(optimizer: Optimizer) -> list[tuple[str | None, Tensor]]:
    """Torch keeps the names, if the optimizer was made from ``named_parameters()``."""
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(
            group.get("param_names", [None] * len(group["params"])), group["params"], strict=True
        )
    ]


def _check_can_be_stored(name: str, parameter: Tensor, format: NumberFormat) -> None:
    leave_out = f"leave it out: SamplingRule({name!r}, enabled=False)"
    if is_sharded(parameter):
        raise ValueError(
            f"{name} is sharded: scales would be those of its shards and not of it; {leave_out}"
        )
    if parameter.dtype not in INPUT_DTYPES:
        raise ValueError(
            f"{name} has dtype {parameter.dtype}, which cannot be rounded; {leave_out}"
        )
    if not format.is_coarser_than(parameter.dtype):
        raise ValueError(
            f"{name} has dtype {parameter.dtype}, which is no finer than {format.name}: expected "
            f"weights in float32, as those that are to be stored in fewer bits; or {leave_out}"
        )
