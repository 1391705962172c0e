"""`Settings`: the arguments of `PrecisionMonitor`, checked before a training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Signature
from typing import Any

import torch

from altgrad import SamplingRule, StepSchedule, UpdateMonitor
from altgrad.quantization import NumberFormat, Scaling, get_formats
from altgrad_lightning.output import OutputSettings

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "economy": {"max_elements": 256, "layer_charts": 4, "overhead_budget": 0.01},
    "standard": {},
    "full": {"max_elements": None, "layer_charts": 16, "histograms": True},
}
"""Named sets of arguments of `PrecisionMonitor`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `PrecisionMonitor`, which documents them, with the preset applied.

    Raises:
        ValueError: A number is out of range, or `scaling` is unknown.
        TypeError: An argument has the wrong type.
    """

    formats: tuple[NumberFormat, ...]
    every_n_steps: int | None
    scaling: Scaling | None
    layer_charts: int | tuple[str, ...]
    histograms: bool
    run_file: bool
    max_elements: int | None
    sampling: tuple[SamplingRule, ...]
    overhead_budget: float | None
    seed: int
    strict: bool

    def __post_init__(self) -> None:
        """Raise here, and not in the middle of a training, what is wrong whatever the module is."""
        if self.every_n_steps is not None:
            StepSchedule(self.every_n_steps)
        # Rules are checked when training starts: they name layers of the module.
        UpdateMonitor([("", torch.zeros(1))], **self.for_monitor() | {"sampling": ()})

    def for_monitor(self) -> dict[str, Any]:
        """Return the arguments of `UpdateMonitor` among these."""
        return {
            "formats": self.formats,
            "scaling": self.scaling,
            "max_elements": self.max_elements,
            "sampling": self.sampling,
            "overhead_budget": self.overhead_budget,
            "seed": self.seed,
            "strict": self.strict,
        }

    def for_output(self) -> OutputSettings:
        """Return those that say where figures go."""
        return OutputSettings(self.layer_charts, self.histograms, self.run_file, self.strict)


def checked_formats(
    formats: str | NumberFormat | Sequence[str | NumberFormat],
) -> tuple[NumberFormat, ...]:
    """Look up formats that may be given by name.

    Raises:
        ValueError: There is no format, an unknown name, or two formats have one name.
    """
    found = get_formats(formats)
    if not found:
        raise ValueError(f"formats={formats!r}: expected one or more formats")
    return found


def checked_layer_charts(layer_charts: int | Sequence[str]) -> int | tuple[str, ...]:
    """Check the argument `layer_charts`, and copy a list of patterns.

    Raises:
        ValueError: The number is negative.
        TypeError: It is neither a number nor a list of strings.
    """
    expected = "expected how many layers, or a list of patterns"
    if isinstance(layer_charts, int):
        if isinstance(layer_charts, bool):
            raise TypeError(f"layer_charts={layer_charts!r}: {expected}")
        if layer_charts < 0:
            raise ValueError(f"layer_charts={layer_charts}: expected 0 or more")
        return layer_charts
    if isinstance(layer_charts, str) or not all(isinstance(each, str) for each in layer_charts):
        raise TypeError(f"layer_charts={layer_charts!r}: {expected}")
    return tuple(layer_charts)


def apply_preset(preset: str | None, defaults: Signature, **arguments: Any) -> dict[str, Any]:
    """Replace arguments that were left at their default by those of a preset.

    Args:
        preset: A name in `PRESETS`; None changes nothing.
        defaults: The signature that the arguments belong to.
        **arguments: All arguments that a preset may set.

    Returns:
        The arguments that hold.

    Raises:
        ValueError: The preset is unknown.
    """
    if preset is None:
        return arguments
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: expected one of {', '.join(map(repr, PRESETS))}")
    unset = {
        name for name, value in arguments.items() if value == defaults.parameters[name].default
    }
    return arguments | {k: value for k, value in PRESETS[preset].items() if k in unset}
