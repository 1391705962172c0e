"""What the lines of a run file hold: its header, and numbers as valid JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from altgrad.monitor.header import describe_format
from altgrad.quantization.formats import Scaling

if TYPE_CHECKING:
    from altgrad.quantization import NumberFormat

SCHEMA = 1
"""Version of the format, which is the value of ``"altgrad"`` in the header."""

_WORDS: Mapping[object, float] = {None: math.nan, "inf": math.inf, "-inf": -math.inf}


class RunFileError(ValueError):
    """A run file that cannot be read or continued; the message is one sentence that says why."""


class Predecessor(NamedTuple):
    """The run file that a run goes on from.

    Attributes:
        path: Of the file; relative to the folder of the one that names it, or absolute.
        before_step: Its steps from this one on are superseded.
    """

    path: str | Path
    before_step: int


@dataclass(frozen=True)
class FormatInfo:
    """A format that was judged.

    Attributes:
        name: As in keys.
        bits: Of one number, without what it shares with others.
        max: Largest finite value.
        smallest: Smallest positive value.
        smallest_normal: Smallest value with all digits.
        eps: From 1 to the next value.
        scaled: Whether weights in it are stored under a scale.
    """

    name: str
    bits: int
    max: float
    smallest: float
    smallest_normal: float
    eps: float
    scaled: bool

    @classmethod
    def of(cls, format: NumberFormat, scaling: Scaling | None) -> FormatInfo:
        """Describe a format, under the scaling of a run."""
        return cls(format.name, **describe_format(format, scaling))


@dataclass(frozen=True)
class LayerInfo:
    """A layer that was watched.

    Attributes:
        shape: Of the parameter.
        dtype: In which it is stored, as ``"float32"``.
        elements: How many are measured at most.
        formats: Names of those that it is judged for.
        every_n_steps: Optimizer steps from one observed step to the next.
    """

    shape: tuple[int, ...]
    dtype: str
    elements: int
    formats: tuple[str, ...]
    every_n_steps: int = 1


@dataclass(frozen=True)
class Header:
    """What holds for a whole run.

    Attributes:
        formats: Those that were judged, by name.
        layers: Those that were watched, by name.
        scaling: As in `altgrad.measure`.
        versions: Of what wrote the file, by name.
        created: When that was, in ISO 8601.
        predecessor: The file of the run that this one goes on from.
    """

    formats: Mapping[str, FormatInfo]
    layers: Mapping[str, LayerInfo]
    scaling: Scaling | None = "tensor"
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    predecessor: Predecessor | None = None

    def is_like(self, other: Header) -> bool:
        """Whether figures under one may stand below the other."""
        mine, others = self.as_json(), other.as_json()
        return all(mine[key] == others[key] for key in ("formats", "scaling", "layers"))

    def as_json(self) -> dict[str, Any]:
        """As it stands in the first line."""
        before = self.predecessor
        return {
            "altgrad": SCHEMA,
            "formats": {name: _format_as_json(each) for name, each in self.formats.items()},
            "scaling": list(self.scaling) if isinstance(self.scaling, tuple) else self.scaling,
            "layers": {
                name: asdict(each) | {"shape": [*each.shape], "formats": [*each.formats]}
                for name, each in self.layers.items()
            },
            "versions": dict(self.versions),
            "created": self.created,
            "predecessor": before and {"path": str(before.path), "before_step": before.before_step},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Header:
        """The reverse.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: Something is missing or of another
                kind.
        """
        scaling, before = value["scaling"], value.get("predecessor")
        return cls(
            formats={
                name: _format_from_json(name, each) for name, each in value["formats"].items()
            },
            layers={name: _layer_from_json(each) for name, each in value["layers"].items()},
            scaling=tuple(scaling) if isinstance(scaling, list) else scaling,
            versions=dict(value.get("versions", {})),
            created=str(value.get("created", "")),
            predecessor=before and Predecessor(str(before["path"]), int(before["before_step"])),
        )


def number_as_json(value: float) -> float | str | None:
    """None for NaN; inf and −inf by name."""
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def number_from_json(value: object) -> float:
    """The reverse; TypeError for what is no number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if value is None or isinstance(value, str):
        number = _WORDS.get(value)
        if number is not None:
            return number
    raise TypeError(f"{value!r} is no number")


def numbers_from_json(values: Sequence[object]) -> list[float]:
    """`number_from_json` of each."""
    return [value if type(value) is float else number_from_json(value) for value in values]


def _format_as_json(format: FormatInfo) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(format).items() if name != "name"}
    return {
        name: number_as_json(value) if isinstance(value, float) else value
        for name, value in fields.items()
    }


def _format_from_json(name: str, value: Mapping[str, Any]) -> FormatInfo:
    numbers = {
        key: number_from_json(value[key]) for key in ("max", "smallest", "smallest_normal", "eps")
    }
    return FormatInfo(name, int(value["bits"]), **numbers, scaled=bool(value["scaled"]))


def _layer_from_json(value: Mapping[str, Any]) -> LayerInfo:
    return LayerInfo(
        shape=tuple(map(int, value["shape"])),
        dtype=str(value["dtype"]),
        elements=int(value["elements"]),
        formats=tuple(map(str, value["formats"])),
        every_n_steps=int(value["every_n_steps"]),
    )
