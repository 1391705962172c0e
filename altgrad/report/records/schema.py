"""The header of a run file: its formats, layers and settings.

`Header` is the first line of a run file. It holds a `FormatInfo` for each format, a `LayerInfo` for
each layer and a `RecipeInfo` for each recipe. `fields` declares the bounds of each value.

The modules `lines` and `writing` come next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from altgrad.measurement.catalogue import NOW
from altgrad.monitor.header import describe_format
from altgrad.quantization.formats import Scaling
from altgrad.report.names import replace_unprintable
from altgrad.report.records.fields import HEADER, SCHEMA
from altgrad.report.records.kinds import number_as_json

if TYPE_CHECKING:
    from altgrad.quantization import NumberFormat


class RunFileError(ValueError):
    """An error of a run file that cannot be read or resumed; its message is one sentence.

    Args:
        message: The sentence. Unprintable characters, as in paths, become �.
    """

    def __init__(self, message: str) -> None:
        super().__init__(replace_unprintable(message))


class Unobserved(NamedTuple):
    """The steps of a run that ended without an observed step.

    Attributes:
        steps: Number of steps that the run made.
        skipped: Number of steps that were looked at and moved no weight, by reason.
        every_n_steps: Number of steps from one observed step to the next, 0 for no step; None if
            unknown.
    """

    steps: int
    skipped: Mapping[str, int]
    every_n_steps: int | None = None


class Predecessor(NamedTuple):
    """A reference from a run file to the file of the earlier run that it continues.

    Attributes:
        path: Path of the earlier file, absolute or relative to the folder of the later file.
        before_step: Number of the first step that the later run replaced; only lower steps of the
            earlier file count.
    """

    path: str | Path
    before_step: int


@dataclass(frozen=True)
class FormatInfo:
    """A number format that a run judges: its name and range, as the run file's header has them.

    Attributes:
        name: Name of the format, as in the keys of figures.
        bits: Bits of one stored number, without the bits of a shared scale.
        max: Largest finite value.
        smallest: Smallest positive value.
        smallest_normal: Smallest positive value with full precision.
        eps: Distance from 1 to the next larger value.
        scaled: If True, weights in this format are stored under a scale.
    """

    name: str
    bits: int
    max: float
    smallest: float
    smallest_normal: float
    eps: float
    scaled: bool

    @classmethod
    def from_format(cls, format: NumberFormat, scaling: Scaling | None) -> FormatInfo:
        """Describe a format under a scaling.

        Args:
            format: The number format.
            scaling: Which weights share a scale in the run, as in `altgrad.measure`.

        Returns:
            The name and the range of the format.
        """
        return cls(format.name, **describe_format(format, scaling))


class StateSize(NamedTuple):
    """The size of a state that the run's optimizer keeps of a layer.

    Attributes:
        elements: How many numbers it has that could be stored in another format; 0 for counters of
            steps, tables and scales.
        bytes: Its number of bytes, on all ranks together.
    """

    elements: int
    bytes: int


@dataclass(frozen=True)
class LayerInfo:
    """An observed layer (one parameter tensor), as the header of a run file describes it.

    Attributes:
        shape: Shape of the parameter.
        dtype: Name of the parameter's dtype, such as ``"float32"``.
        elements: Maximum number of elements that are measured in a step.
        formats: Names of the formats that the layer is judged for.
        every_n_steps: Number of optimizer steps from one observed step to the next.
        states: Sizes of the states that the run's optimizer keeps of the layer, by name; None if
            unknown, as before the first observed step and in older files.
        twin_elements: Maximum number of elements that twins, samples stored by a recipe, step; None
            if unknown, as in older files.
    """

    shape: tuple[int, ...]
    dtype: str
    elements: int
    formats: tuple[str, ...]
    every_n_steps: int = 1
    states: Mapping[str, StateSize] | None = None
    twin_elements: int | None = None


class FormatSize(NamedTuple):
    """The size of numbers in a format.

    Attributes:
        bits: Bits of one stored number.
        scaling: Which numbers share a scale of 8 bits, as in `altgrad.measure`; None for no scale.
    """

    bits: int
    scaling: Scaling | None


class PackedSize(NamedTuple):
    """The layers whose states an optimizer packs, as `altgrad.recipes.PackedStates` has them.

    Attributes:
        block: Number of neighbouring elements that share a scale.
        least: Fewest elements of a layer whose states are packed.
        states: Number of states of a layer.
        only_whole: True if layers are packed only if they consist of whole blocks.
        table_bytes: Bytes of a table that each packed state has of its own.
    """

    block: int
    least: int
    states: int
    only_whole: bool
    table_bytes: int


class OptimizerSize(NamedTuple):
    """The bytes that the optimizer of a recipe keeps for each weight, beside the weight.

    A *recipe* says how weights and optimizer states are stored.

    Attributes:
        state_bytes: The bytes; NaN if unknown. If states are packed, those of a packed layer.
        compensation_bytes: How many of these are the rounding error of the weight.
        packed: The layers whose states are packed; None if none is.
    """

    state_bytes: float
    compensation_bytes: float
    packed: PackedSize | None


class RecipeSizes(NamedTuple):
    """The sizes from which the memory of a layer follows that is stored as a recipe says.

    Attributes:
        weights: Size of the format of the weights; None if they have the recipe's dtype.
        states: Sizes of the formats of states, by name, ``"*"`` for all others; states without a
            format have the recipe's dtype.
        optimizer: What the recipe's own optimizer keeps; None for the run's class of optimizer.
    """

    weights: FormatSize | None
    states: Mapping[str, FormatSize]
    optimizer: OptimizerSize | None


@dataclass(frozen=True)
class RecipeInfo:
    """A recipe, how weights and optimizer states are stored, as a run file's header describes it.

    The run tried the recipe on a sample of each layer, which is called a twin. `Header.now`
    describes in the same way how the run itself is stored, under the name ``"now"``.

    Attributes:
        name: Name of the recipe, as in the keys of figures.
        weights: Name of the format in which weights are stored; None for float32.
        rounding: ``"nearest_even"`` or ``"stochastic"``.
        compensation: ``"kahan"`` if the rounding error of each weight is kept; otherwise None.
        states: By name of an optimizer state, such as ``"exp_avg"``, the name of its format. The
            name ``"*"`` stands for all other floating-point states of the parameter's shape.
        dtype: Name of the dtype of the tensors to step, such as ``"bfloat16"``. None for float32,
            and for float64 in a run in float64. The run itself has a name in any case.
        optimizer: Module and name of the function or class that makes the optimizer; None for the
            run's own class. For the run itself it is that class.
        fused: If True, the optimizer's fused implementation steps.
        bytes_per_parameter: Bytes of weights and states for each parameter; NaN if unknown.
        accumulate: Name of the format in which gradients are added up over several backward passes;
            None for the sum that the run itself had.
        sizes: Bits, scales and bytes from which the memory of a layer follows; None if unknown, as
            in older files and for the run itself.
    """

    name: str
    weights: str | None
    rounding: str
    compensation: str | None
    states: Mapping[str, str]
    dtype: str | None
    optimizer: str | None
    fused: bool
    bytes_per_parameter: float
    accumulate: str | None = None
    sizes: RecipeSizes | None = None


class RunDescription(Protocol):
    """A description of a run without its figures: a `Header`, or an `altgrad.report.Run`.

    Attributes are those of `Header`.
    """

    @property
    def formats(self) -> Mapping[str, FormatInfo]:
        """Judged number formats, by name."""

    @property
    def layers(self) -> Mapping[str, LayerInfo]:
        """Observed layers (parameter tensors), by name."""

    @property
    def scaling(self) -> Scaling | None:
        """The sharing of scales among weights, as in `altgrad.measure`."""

    @property
    def recipes(self) -> Mapping[str, RecipeInfo]:
        """Recipes that were tried on samples (twins), by name."""

    @property
    def now(self) -> RecipeInfo | None:
        """The storage of the run itself; None if unknown."""

    @property
    def optimizers(self) -> Mapping[str, int]:
        """The number of optimizers of each class."""


@dataclass(frozen=True)
class Header:
    """The first line of a run file: the settings of the whole run.

    Attributes:
        formats: Judged number formats, by name.
        layers: Observed layers (parameter tensors), by name.
        scaling: Which weights share a scale in the formats, as in `altgrad.measure`.
        versions: Versions of the packages that wrote the file, by name.
        created: Time at which the file was created, in ISO 8601.
        predecessor: File of the run that this run continues; None for a new run.
        loggers: For each logger of the run, its class under ``logger``, and the run's ``name``,
            ``id`` and ``version`` in it, each a text or None.
        recipes: By name, the recipes for storing weights that are tried on samples (twins).
        now: How the run itself stores and steps its weights; None if unknown. If layers differ, it
            is how most weights below 32 bits are stored, or most weights if there are none.
        optimizers: The number of optimizers of each class, by module and name of the class; empty
            if unknown.
        kernel: Which code measured tensors on the CPU: ``"native"``, ``"eager"``, or ``"eager, then
            native"`` if the native code was still being compiled; None if unknown.
        schema: Version of the run file's schema, in which its lines are written.
    """

    formats: Mapping[str, FormatInfo]
    layers: Mapping[str, LayerInfo]
    scaling: Scaling | None = "tensor"
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    predecessor: Predecessor | None = None
    loggers: Sequence[Mapping[str, str | None]] = ()
    recipes: Mapping[str, RecipeInfo] = field(default_factory=dict)
    now: RecipeInfo | None = None
    optimizers: Mapping[str, int] = field(default_factory=dict)
    kernel: str | None = None
    schema: int = SCHEMA

    def is_like(self, other: Header) -> bool:
        """Return True if both have equal schemas, formats, scaling, layers, recipes and storage.

        Figures of the two runs then mean the same, and can stand in one file. Where a header does
        not say how the run is stored, as in older files, that makes no difference. Neither do the
        sizes of optimizer states, which are unknown before the first step.
        """
        mine, others = self._describe(), other._describe()
        keys = ["formats", "scaling", "layers", "recipes"]
        if None not in (self.now, other.now):
            keys.append("now")
        return self.schema == other.schema and all(mine[key] == others[key] for key in keys)

    def _describe(self) -> dict[str, Any]:
        """Return the header as JSON values, without the sizes of optimizer states."""
        layers = {name: replace(each, states=None) for name, each in self.layers.items()}
        return replace(self, layers=layers).as_json()

    def as_json(self) -> dict[str, Any]:
        """Return the header as JSON values, in the order of the first line of a run file."""
        before = self.predecessor
        return {
            "altgrad": SCHEMA,
            "formats": {name: info_as_json(each) for name, each in self.formats.items()},
            "scaling": list(self.scaling) if isinstance(self.scaling, tuple) else self.scaling,
            "layers": layers_as_json(self.layers),
            "versions": dict(self.versions),
            "created": self.created,
            "predecessor": before and {"path": str(before.path), "before_step": before.before_step},
            "loggers": [dict(each) for each in self.loggers],
            "recipes": {name: info_as_json(each) for name, each in self.recipes.items()},
            "now": self.now and info_as_json(self.now),
            "optimizers": dict(self.optimizers),
            "kernel": self.kernel,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Header:
        """Restore a header from the JSON values that `as_json` returns.

        Returns:
            The header.

        Raises:
            FieldError: A required key is missing, or a value is invalid.
        """
        known = HEADER.parse(value)
        before, now = known["predecessor"], known["now"]
        return cls(
            **known
            | {
                "formats": {
                    name: FormatInfo(name, **each) for name, each in known["formats"].items()
                },
                "layers": make_layers(known["layers"]),
                "predecessor": before and Predecessor(**before),
                "recipes": {
                    name: _make_recipe(name, each) for name, each in known["recipes"].items()
                },
                "now": now and _make_recipe(NOW, now),
                "schema": known.pop("altgrad"),
            }
        )


def _make_recipe(name: str, known: Mapping[str, Any]) -> RecipeInfo:
    """Return the description of a recipe from its parsed JSON object."""
    sizes = known["sizes"]
    return RecipeInfo(name, **{**known, "sizes": sizes and _make_sizes(**sizes)})


def _make_sizes(
    weights: Mapping[str, Any] | None,
    states: Mapping[str, Mapping[str, Any]],
    optimizer: Mapping[str, Any] | None,
) -> RecipeSizes:
    packed = optimizer and optimizer["packed"]
    return RecipeSizes(
        weights and FormatSize(**weights),  # type: ignore[arg-type]  # no mapping is empty
        {name: FormatSize(**each) for name, each in states.items()},
        optimizer and OptimizerSize(**{**optimizer, "packed": packed and PackedSize(**packed)}),  # type: ignore[arg-type]
    )


def make_layers(known: Mapping[str, Mapping[str, Any]]) -> dict[str, LayerInfo]:
    """Return a `LayerInfo` for each layer, by name, from the parsed JSON object of each layer."""
    return {name: _make_layer(each) for name, each in known.items()}


def _make_layer(known: Mapping[str, Any]) -> LayerInfo:
    states: Mapping[str, Any] | None = known["states"]
    sizes = None if states is None else {name: StateSize(**each) for name, each in states.items()}
    return LayerInfo(**{**known, "states": sizes})


def layers_as_json(layers: Mapping[str, LayerInfo]) -> dict[str, Any]:
    """Return the descriptions of layers as JSON objects, by name of the layer."""
    return {
        name: asdict(each)
        | {"shape": [*each.shape], "formats": [*each.formats]}
        | {"states": _states_as_json(each.states)}
        for name, each in layers.items()
    }


def _states_as_json(states: Mapping[str, StateSize] | None) -> dict[str, Any] | None:
    return None if states is None else {name: each._asdict() for name, each in states.items()}


def info_as_json(info: FormatInfo | RecipeInfo) -> dict[str, Any]:
    """Convert the description of a format or recipe to a JSON object.

    A *recipe* says how weights and optimizer states are stored.

    Returns:
        The fields by name, without the field ``name``.
    """
    return {name: _value_as_json(each) for name, each in asdict(info).items() if name != "name"}


def _value_as_json(value: Any) -> Any:
    """Return a field of a description as a JSON value; named tuples become objects."""
    if isinstance(value, float):
        return number_as_json(value)
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _value_as_json(each) for key, each in value.items()}
    return [*value] if isinstance(value, tuple) else value
