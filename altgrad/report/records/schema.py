"""The header of a run file: its formats, layers and settings.

`Header` is the first line of a run file. It holds a `FormatInfo` for each format, a `LayerInfo` for
each layer and a `RecipeInfo` for each recipe. `fields` declares the bounds of each value.

The modules `lines` and `writing` come next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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


@dataclass(frozen=True)
class LayerInfo:
    """An observed layer (one parameter tensor), as the header of a run file describes it.

    Attributes:
        shape: Shape of the parameter.
        dtype: Name of the parameter's dtype, such as ``"float32"``.
        elements: Maximum number of elements that are measured in a step.
        formats: Names of the formats that the layer is judged for.
        every_n_steps: Number of optimizer steps from one observed step to the next.
    """

    shape: tuple[int, ...]
    dtype: str
    elements: int
    formats: tuple[str, ...]
    every_n_steps: int = 1


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

    def is_like(self, other: Header) -> bool:
        """Return True if both headers have equal formats, scaling, layers, recipes and storage.

        Figures of the two runs then mean the same, and can stand in one file. Where a header does
        not say how the run is stored, as in older files, that makes no difference.
        """
        mine, others = self.as_json(), other.as_json()
        keys = ["formats", "scaling", "layers", "recipes"]
        if None not in (self.now, other.now):
            keys.append("now")
        return all(mine[key] == others[key] for key in keys)

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
                    name: RecipeInfo(name, **each) for name, each in known["recipes"].items()
                },
                "now": now and RecipeInfo(NOW, **now),
            }
        )


def make_layers(known: Mapping[str, Mapping[str, Any]]) -> dict[str, LayerInfo]:
    """Return a `LayerInfo` for each layer, by name, from the parsed JSON object of each layer."""
    return {name: LayerInfo(**each) for name, each in known.items()}


def layers_as_json(layers: Mapping[str, LayerInfo]) -> dict[str, Any]:
    """Return the descriptions of layers as JSON objects, by name of the layer."""
    return {
        name: asdict(each) | {"shape": [*each.shape], "formats": [*each.formats]}
        for name, each in layers.items()
    }


def info_as_json(info: FormatInfo | RecipeInfo) -> dict[str, Any]:
    """Return the description of a format or recipe as a JSON object, without its name."""
    fields = {name: value for name, value in asdict(info).items() if name != "name"}
    return {
        name: number_as_json(value) if isinstance(value, float) else value
        for name, value in fields.items()
    }
