"""`Recipe`: how weights and optimizer states are stored and stepped.

A twin runs a recipe on a sample of each layer, to predict; `Recipe.attach` applies it to a whole
model, by a `WeightStorage`.

Read `optimizer_maker` first; `libraries_8bit` comes next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from altgrad._messages import check_type
from altgrad.measurement.catalogue import NOW
from altgrad.observation.rules import SamplingRule
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import NumberFormat, get_applied_scaling
from altgrad.recipes.optimizer_maker import OptimizerFactory, OptimizerMaker
from altgrad.recipes.rounding import Compensation, StorageRounding, check_rounding
from altgrad.recipes.storage import WeightStorage

_PRECISIONS = {
    torch.float16: "16-true",
    torch.bfloat16: "bf16-true",
    torch.float32: "32-true",
    torch.float64: "64-true",
}
"""The dtypes that a recipe may have, and Lightning's `Trainer(precision=…)` for each."""
_ADAM_STATES = frozenset({"exp_avg", "exp_avg_sq"})
_KAHAN_BITS = 16
_SCALE_BITS = 8  # e8m0 and E4M3, the scales of blocks, are numbers of 8 bits
_FP32 = FloatFormat("fp32", 8, 23, 127, num_high_nans=2**23 - 1, has_inf=True)


@dataclass(frozen=True)
class Recipe:
    """A description of how weights and optimizer states are stored and stepped.

    Two recipes are equal if all their fields are. A recipe without `optimizer` can be pickled, and
    is written in YAML with names: ``weights: bf16``, ``dtype: bfloat16``. The *run* is the training
    that a monitor watches. A *twin* steps a sample of its layers as the recipe says.

    Attributes:
        name: The name in log keys: letters, digits, ``-`` and ``_``.
        weights: The format of the weights, a name or dtype that `altgrad.quantization.get_formats`
            accepts; a `NumberFormat` afterwards. None for weights as they are.
        rounding: The way to round weights, states and the sums of `accumulate`:
            ``"nearest_even"`` or ``"stochastic"``.
        compensation: ``"kahan"`` keeps the rounding error of each weight in bf16.
        states: The format of each state of the optimizer, by its name. The name ``"*"`` stands for
            all other floating-point states of the shape of the parameter. Names that an optimizer
            does not have after its first step store nothing, and a warning or notice says so. Twins
            also store by name what else a training keeps: averages of the weights, and
            ``running_mean`` and ``running_var`` of BatchNorm.
        dtype: The dtype of the tensors that the training's own class of optimizer steps, as after
            ``model.to(dtype)``; a torch dtype or its name. None for float32, and for float64 in a
            training in float64.
        optimizer: A function that makes an optimizer of any class. It takes parameters, and the
            training's parameter group without ``"params"``. Twins call it again when that group
            changes, as by a learning rate schedule, and take over what it then chooses: it must be
            quick, and depend on its arguments alone. In YAML it is an import path, and the function
            needs the annotation ``-> torch.optim.Optimizer``. An `OptimizerMaker` adds facts about
            the optimizer.
        fused: If True, twins step with the fused implementation of the training's class of
            optimizer.
        accumulate: The format in which gradients are added up over several backward passes
            (gradient accumulation), such as ``"bf16"``; 16 bits or more, without scales. A twin
            adds up the gradient of each backward pass itself, and rounds the sum after each as
            `rounding` says. Sums in bf16 were measured to be harmless up to 128 backward passes,
            and to be off by 2 to 5 % at 512. With ``"fp32"``, a twin shows what a training in bf16
            loses by adding up in bf16. None for the sum that the training itself has.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is invalid, or two contradict each other. Formats whose scales are not
            powers of two, such as ``nvfp4``, are invalid: each change of a scale would round all
            elements again.

    Examples:
        >>> from altgrad import Recipe
        >>> recipe = Recipe("small-v", weights="bf16", states={"exp_avg_sq": "e5m2"})
        >>> recipe.weights.name, recipe.bytes_per_parameter  # 2 + 4 for exp_avg + 1
        ('bf16', 7.0)
    """

    name: str
    weights: str | torch.dtype | NumberFormat | None = None
    rounding: StorageRounding = "nearest_even"
    compensation: Compensation | None = None
    states: Mapping[str, str | torch.dtype | NumberFormat] = field(default_factory=dict)
    dtype: str | torch.dtype | None = None
    optimizer: OptimizerFactory | None = None
    fused: bool = False
    accumulate: str | torch.dtype | NumberFormat | None = None

    def __post_init__(self) -> None:
        check_type("name", self.name, str)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(
                f"name={self.name!r}: expected letters, digits, '-' and '_', because log keys such "
                "as progress_kept/bf16-sr contain the name; rename the recipe"
            )
        if self.name == NOW:
            raise ValueError(
                f"name={NOW!r}: expected another name, because the figures of the run itself have "
                "this one; rename the recipe"
            )
        check_rounding(self.rounding, self.compensation)
        check_type("states", self.states, Mapping)
        check_type("fused", self.fused, bool)
        if self.optimizer is not None and not callable(self.optimizer):
            raise TypeError(
                f"optimizer={self.optimizer!r}: expected a function of parameters and their group "
                "that returns an optimizer, or None"
            )
        weights = None if self.weights is None else _get_format("weights", self.weights)
        states = {
            _get_state_name(name): _get_format(f"states[{name!r}]", format)
            for name, format in self.states.items()
        }
        accumulate = None if self.accumulate is None else _get_sum_format(self.accumulate)
        # A frozen dataclass sets its fields through object.__setattr__.
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "states", MappingProxyType(states))
        object.__setattr__(self, "accumulate", accumulate)
        object.__setattr__(self, "dtype", None if self.dtype is None else _get_dtype(self.dtype))
        self._check_together()

    def __hash__(self) -> int:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return hash((*(values | {"states": frozenset(self.states.items())}).values(),))

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only view of a dict cannot be pickled.
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return type(self), (*(values | {"states": dict(self.states)}).values(),)

    @property
    def weights_format(self) -> NumberFormat | None:
        """The format of the weights, typed as a `NumberFormat`; None for weights as they are."""
        assert self.weights is None or isinstance(self.weights, NumberFormat)
        return self.weights

    @property
    def state_formats(self) -> Mapping[str, NumberFormat]:
        """The format of each state by its name or ``"*"``, typed as a `NumberFormat`."""
        return self.states  # type: ignore[return-value]  # names have become formats

    @property
    def sum_format(self) -> NumberFormat | None:
        """The `accumulate` field, the format of added gradients, typed as a `NumberFormat`."""
        assert self.accumulate is None or isinstance(self.accumulate, NumberFormat)
        return self.accumulate

    @property
    def tensor_dtype(self) -> torch.dtype | None:
        """The `dtype` field, typed as a torch dtype or None."""
        assert not isinstance(self.dtype, str)
        return self.dtype

    @property
    def maker(self) -> OptimizerMaker | None:
        """The `optimizer` field, typed as an `OptimizerMaker`; None without it."""
        if self.optimizer is None or isinstance(self.optimizer, OptimizerMaker):
            return self.optimizer
        return OptimizerMaker(self.optimizer)

    @property
    def bytes_per_parameter(self) -> float:
        """The number of bytes per weight for the weight, its rounding error, and its states.

        - A weight or state takes the bits of its format, or else of `dtype`, or else 32. A block
          format adds the 8 bits of a scale to each block; scales of larger groups are not counted.
        - A rounding error takes 16 bits.
        - States take the bytes that an `OptimizerMaker` says. Without one, they are assumed to be
          those of Adam, ``exp_avg`` and ``exp_avg_sq``; or those that `states` names, if it has
          another name than these two and ``"*"``.

        Gradients, buffers and step counters are left out.
        """
        states, maker = self.state_formats, self.maker
        named = {*states} - {"*"}
        names = named if named - _ADAM_STATES else _ADAM_STATES
        bits = self._count_bits(self.weights_format) + _KAHAN_BITS * (self.compensation is not None)
        if maker is not None and maker.state_bytes is not None:
            return bits / 8 + maker.state_bytes
        bits += sum(self._count_bits(states.get(name, states.get("*"))) for name in names)
        return bits / 8

    @property
    def needs_blocks(self) -> int | None:
        """The least common multiple of the recipe's block sizes, in elements; None without blocks.

        A *recipe* says how weights and optimizer states are stored.

        A block is the neighbouring elements that share a scale in a `BlockFormat` of weights or
        states.
        """
        formats = (self.weights_format, *self.state_formats.values())
        sizes = [each.block_size for each in formats if each is not None]
        blocks = [size for size in sizes if size is not None]
        return math.lcm(*blocks) if blocks else None

    @property
    def only_weights(self) -> bool:
        """True if the recipe says only how weights are stored.

        A sample of the training that is stepped as such a recipe says needs no optimizer of its
        own: it can add the updates of the training.
        """
        others = (self.dtype, self.optimizer, self.accumulate)
        return not self.states and not self.fused and others == (None, None, None)

    def attach(
        self,
        *optimizers: Any,
        module: nn.Module | None = None,
        scaling: Scaling | None = "tensor",
        layers: Sequence[SamplingRule] = (),
        seed: int = 0,
    ) -> WeightStorage:
        """Round the weights and states of optimizers as the recipe says, now and after each step.

        Args:
            optimizers: One or several optimizers, as in `WeightStorage.attach`.
            module: The module with the names of the layers.
            scaling: The weights that share a scale, as in `WeightStorage`.
            layers: Rules for single layers, as in `WeightStorage`.
            seed: The seed of stochastic rounding.

        Returns:
            The attached storage, a context manager that detaches on exit. A resumed run calls its
            `WeightStorage.load_state_dict` with the saved `state_dict`.

        Raises:
            TypeError: An argument is not an optimizer.
            ValueError: The recipe needs other tensors or another optimizer, or a layer cannot be
                stored.
            RuntimeError: An optimizer is observed already.
        """
        storage = self.make_storage(scaling=scaling, layers=layers, seed=seed)
        return storage.attach(*optimizers, module=module)

    def make_storage(
        self,
        *,
        scaling: Scaling | None = "tensor",
        layers: Sequence[SamplingRule] = (),
        seed: int = 0,
    ) -> WeightStorage:
        """Return an object that can round weights and optimizer states to this recipe's formats.

        The object is a `WeightStorage`. Its `attach` takes optimizers, and it then rounds at once
        and after each of their steps.

        Args:
            scaling: The weights that share a scale, as in `WeightStorage`.
            layers: Rules for single layers, as in `WeightStorage`.
            seed: The seed of stochastic rounding.

        Returns:
            The storage, not yet attached. A resumed run calls its `load_state_dict`, then `attach`.

        Raises:
            ValueError: The recipe needs other tensors or another optimizer, or an argument is
                invalid.
        """
        self._check_can_be_attached()
        return WeightStorage(
            self.weights,
            scaling,
            rounding=self.rounding,
            compensation=self.compensation,
            states=self.states,
            layers=layers,
            seed=seed,
        )

    def _check_can_be_attached(self) -> None:
        """Raise ValueError if a field is set that `attach`, which stores tensors, cannot apply."""
        remedies = {
            "optimizer": "create that optimizer for the parameters of the model",
            "dtype": f"call model.to({self.dtype}) before you create the optimizer, which in "
            f"Lightning is Trainer(precision={_PRECISIONS[self.tensor_dtype or torch.float32]!r})",
            "fused": "create the optimizer with fused=True",
            "accumulate": "add up the gradients in tensors of that dtype in your training loop, "
            "and leave out accumulate= here",
        }
        for argument, remedy in remedies.items():
            value = getattr(self, argument)
            if value:
                shown = repr(value.name if isinstance(value, NumberFormat) else value)
                raise ValueError(
                    f"the recipe {self.name!r} has {argument}={shown}: expected a recipe of "
                    "formats of weights and states, because an existing optimizer and its "
                    f"gradients cannot be changed; do {remedy}"
                )

    def _count_bits(self, format: NumberFormat | None) -> float:
        """Return the number of bits of an element in a format; None stands for `dtype`, or float32.

        The bits of a block's scale are shared among its elements.
        """
        if format is not None:
            shared = 0.0 if format.block_size is None else _SCALE_BITS / format.block_size
            return format.element.bits + shared
        return 8 * (self.tensor_dtype or torch.float32).itemsize

    def _check_together(self) -> None:
        """Raise ValueError if two fields contradict each other."""
        weights, states = self.weights_format, self.state_formats
        if weights is None and self.compensation is not None:
            raise ValueError(
                f"compensation={self.compensation!r} without weights=: expected a format of the "
                "weights, whose rounding errors are kept; do add weights='bf16', for example"
            )
        has_format = weights is not None or states or self.accumulate is not None
        if self.rounding != "nearest_even" and not has_format:
            raise ValueError(
                f"rounding={self.rounding!r} without weights= and states=: expected a format to "
                "round to; do add weights='bf16', for example"
            )
        if self.optimizer is not None and self.fused:
            raise ValueError(
                "fused=True and optimizer=…: expected only one of them; let the function make a "
                "fused optimizer"
            )
        dtype = self.tensor_dtype
        formats = {"weights": weights} | {
            f"states[{name!r}]": each for name, each in states.items()
        }
        for name, format in formats.items():
            if format is not None and not format.is_coarser_than(dtype or torch.float64):
                raise ValueError(
                    f"{name}={format.name!r} and dtype={dtype}: expected a format with fewer "
                    "significant bits than the dtype; leave out one of them"
                )


def _get_format(argument: str, format: str | torch.dtype | NumberFormat) -> NumberFormat:
    """Return the format that a field of a recipe stands for; errors name the field.

    Raises:
        TypeError: The argument is neither a name nor a dtype nor a format.
        ValueError: The name is unknown, or the scales of the format are not powers of two.
    """
    if not isinstance(format, (str, torch.dtype, NumberFormat)):
        raise TypeError(
            f"{argument}={format!r}: expected a format's name, a torch dtype or a format, got "
            f"{type(format).__name__}"
        )
    try:
        (found,) = get_formats(format)
    except ValueError as error:
        raise ValueError(f"{argument}={format!r}: {error}") from None
    if not found.power_of_two:
        raise ValueError(
            f"{argument}={found.name!r} has scales that are not powers of two, so that each change "
            "of a scale would round all elements again: expected 'mxfp4', or another format whose "
            "scales are powers of two"
        )
    return found


def _get_sum_format(format: str | torch.dtype | NumberFormat) -> NumberFormat:
    """Return the format that `accumulate` stands for, in which gradients are added up.

    Raises:
        ValueError: The format has scales, or the name is unknown.
    """
    if format in ("fp32", "float32", torch.float32, _FP32):
        return _FP32
    found = _get_format("accumulate", format)
    if get_applied_scaling(found, "tensor") is not None:
        raise ValueError(
            f"accumulate={found.name!r}: expected a format of 16 bits or more, because gradients "
            "are added up without scales; do take 'bf16' or 'fp16'"
        )
    return found


def _get_state_name(name: object) -> str:
    """Return a key of `states`, which must be a string that is not empty.

    Raises:
        TypeError: The key is something else.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"states has the key {name!r}: expected the name of a state, such as 'exp_avg_sq', or "
            "'*' for all others"
        )
    return name


def _get_dtype(dtype: object) -> torch.dtype:
    """Return the torch dtype for a dtype or its name.

    Raises:
        ValueError: The dtype is not one of the four that a recipe may have, or the name is unknown.
    """
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    found = getattr(torch, name, None) if isinstance(name, str) else name
    for each in _PRECISIONS:
        if found is each:
            return each
    raise ValueError(
        f"dtype={dtype!r}: expected 'float16', 'bfloat16', 'float32' or 'float64'; use weights= "
        "for a format that torch does not compute in"
    )
