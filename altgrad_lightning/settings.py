"""`Settings`: check the arguments of `PrecisionMonitor` before a training starts.

`apply_preset` and the functions `check_…` prepare the arguments, and `Settings` holds them.

Read `callback` first, which documents each argument. The next file is `session`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import Signature
from typing import Any

import torch

from altgrad import Recipe, SamplingRule, StepSchedule, UpdateMonitor
from altgrad.measurement import FORMAT_METRICS, LAYER_METRICS, get_metric
from altgrad.output import ChartKind, OutputSettings
from altgrad.quantization import NumberFormat, Scaling, get_formats

# docs/sampling.md has the cost and the precision of each preset.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The steps of twins leave no room in a budget of 1 %.
    "economy": {"max_elements": 256, "layer_charts": 4, "overhead_budget": 0.01, "recipes": ()},
    "standard": {},
    "full": {"max_elements": None, "layer_charts": 16, "charts": "all", "histograms": True},
}
"""Arguments of `PrecisionMonitor` that a preset sets, by name of the preset."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `PrecisionMonitor`, after those of a named preset have been filled in.

    `PrecisionMonitor` documents each argument.

    Raises:
        ValueError: A number is out of range, or `scaling` is unknown.
        TypeError: An argument has the wrong type.
    """

    formats: tuple[NumberFormat, ...]
    every_n_steps: int | None
    scaling: Scaling | None
    layer_charts: int | tuple[str, ...] | None
    charts: ChartKind = "default"
    histograms: bool
    run_file: bool
    max_elements: int | None
    sampling: tuple[SamplingRule, ...]
    recipes: str | Recipe | Sequence[str | Recipe] | None = None
    twin_elements: int = 256
    inner_optimizers: Mapping[str, str] = field(default_factory=dict)
    overhead_budget: float | None
    seed: int
    strict: bool
    name: str | None = None
    callback_metrics: tuple[str, ...] = ()
    summary: bool = True
    progress_bar: bool = False

    def __post_init__(self) -> None:
        """Raise an error for arguments that are invalid for any module to be trained."""
        if self.every_n_steps is not None:
            StepSchedule(self.every_n_steps)
        # UpdateMonitor checks the other arguments, and chooses recipes by the formats of rules,
        # too. The patterns of rules need the module.
        rules = [replace(rule, layers="*") for rule in self.sampling]
        monitor = UpdateMonitor(
            [("", torch.zeros(1, device="cpu"))],
            **self.get_monitor_arguments() | {"sampling": rules},
        )
        _check_callback_metrics(self.callback_metrics, monitor)

    def get_monitor_arguments(self) -> dict[str, Any]:
        """Return the settings that are arguments of `UpdateMonitor`, by name."""
        return {
            "formats": self.formats,
            "scaling": self.scaling,
            "max_elements": self.max_elements,
            "sampling": self.sampling,
            "recipes": self.recipes,
            "twin_elements": self.twin_elements,
            "overhead_budget": self.overhead_budget,
            "seed": self.seed,
            "strict": self.strict,
        }

    def find_inner(self, optimizer: Any) -> Any:
        """Return the optimizer inside of a wrapper that `inner_optimizers` names.

        Args:
            optimizer: An optimizer of the Trainer.

        Returns:
            The optimizer inside of a named wrapper; any other optimizer unchanged.

        Raises:
            ValueError: The wrapper lacks the attribute that `inner_optimizers` names.
        """
        kind = type(optimizer).__name__
        if kind not in self.inner_optimizers:
            return optimizer
        attribute = self.inner_optimizers[kind]
        if not hasattr(optimizer, attribute):
            raise ValueError(
                f"inner_optimizers={{{kind!r}: {attribute!r}}}: expected the name of the attribute "
                f"of {kind} that has the optimizer inside; {kind} has no {attribute!r}"
            )
        return getattr(optimizer, attribute)

    def get_output_settings(self) -> OutputSettings:
        """Return the arguments that `Output` needs: charts, histograms, run file and `strict`."""
        return OutputSettings(
            self.layer_charts, self.charts, self.histograms, self.run_file, self.strict
        )


def check_formats(
    formats: str | NumberFormat | Sequence[str | NumberFormat],
) -> tuple[NumberFormat, ...]:
    """Look up formats by name, and check that there is at least one format.

    Args:
        formats: One or more formats, or names of formats.

    Returns:
        The formats, in the order given.

    Raises:
        ValueError: No format is given, a name is unknown, or two formats have the same name.
    """
    found = get_formats(formats)
    if not found:
        raise ValueError(f"formats={formats!r}: expected one or more formats")
    return found


def check_keys(callback_metrics: Sequence[str]) -> tuple[str, ...]:
    """Check that the argument `callback_metrics`, keys of figures, is a list of strings.

    Returns:
        A copy of the keys.

    Raises:
        TypeError: The argument is no list of strings.
    """
    if isinstance(callback_metrics, str) or not all(
        isinstance(each, str) for each in callback_metrics
    ):
        raise TypeError(
            f"callback_metrics={callback_metrics!r}: expected a list of keys of figures"
        )
    return tuple(callback_metrics)


def _check_callback_metrics(keys: Sequence[str], monitor: UpdateMonitor) -> None:
    """Raise ValueError unless each key names a number that can be logged for the model.

    Args:
        keys: Keys of figures of the model, such as ``"kept_update_ratio/bf16"``.
        monitor: A monitor with the formats and recipes of the run.

    Raises:
        ValueError: The model can have no figure with one of the keys.
    """
    formats = [format.name for format in monitor.formats]
    recipes = [recipe.name for recipe in monitor.recipes]
    if unknown := [key for key in keys if not _is_known(key, formats, recipes)]:
        twin = f" or 'progress_kept/{recipes[0]}'" if recipes else ""
        raise ValueError(
            f"callback_metrics={[*keys]}: expected keys of figures of the model, such as "
            f"'update_rms' or 'kept_update_ratio/{formats[0]}'{twin}; correct {unknown}"
        )


def _is_known(key: str, formats: Sequence[str], recipes: Sequence[str]) -> bool:
    metric, slash, name = key.partition("/")
    if metric in LAYER_METRICS:
        return not slash
    if metric in FORMAT_METRICS:
        return name in formats
    try:
        get_metric(metric)  # of a twin, also of any state of an optimizer
    except ValueError:
        return False
    return name in recipes


def check_name(name: str | None) -> str | None:
    """Check the argument `name`, which names the callback's state in checkpoints.

    Returns:
        The name, or None.

    Raises:
        ValueError: The name is empty.
        TypeError: The name is not a string.
    """
    if not isinstance(name, (str, type(None))):
        raise TypeError(f"name={name!r}: expected a string, or None")
    if name == "":
        raise ValueError("name='': expected a name, or None")
    return name


def apply_preset(preset: str | None, defaults: Signature, **arguments: Any) -> dict[str, Any]:
    """Replace arguments that have their default value by those of a preset, a named set.

    Args:
        preset: A name in `PRESETS`; None changes nothing.
        defaults: The signature with the default values.
        **arguments: All arguments that a preset may set.

    Returns:
        The arguments after the preset is applied.

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
