"""The catalogue of metrics: the name, unit and range of each, and what a high value means.

An element that is not finite before the step, after it or in the gradient is counted in
`nonfinite_frac` and left out of every other metric. A figure is NaN if it has no value.
A twin is a sample of each layer that is stored and stepped as a recipe says. The twin "fp32" has
float32 weights and states, and gets the same gradients. The recipe "now" stands for the run itself,
if its weights are in 16 bits or a `WeightStorage` rounds them. An element of the sample that is not
finite in the twin or in fp32 is counted in `twin_nonfinite_frac` and left out of the twin's other
metrics.

`altgrad.measurement.metrics` comes next and has the formulas: a new metric is a row of this file
and a formula of that one. This file does not import torch, so that reports start fast.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import NamedTuple


class Metric(NamedTuple):
    """A metric, a quantity computed from optimizer steps: its name, and how to read its figures.

    A figure is the value of a metric, such as 0.3 for ``stall_frac``.

    Attributes:
        name: Name of the metric, with which the keys of its figures begin.
        unit: Unit of its figures.
        range: Range of its figures.
        high: Meaning of a high figure.
    """

    name: str
    unit: str
    range: str
    high: str


def _by_name(*metrics: Metric) -> Mapping[str, Metric]:
    return {metric.name: metric for metric in metrics}


NOW = "now"
"""The name of the training itself among the recipes, as in the key ``frozen_frac/now``.

A *recipe* says how weights and optimizer states are stored.

It has figures under this name if its weights have 16 bits, or a `WeightStorage` rounds them.
"""

_SHARE = ("share", "0 … 1")

LAYER_METRICS = _by_name(
    Metric("update_rms", "weight", "≥ 0", "large updates"),
    Metric("weight_rms", "weight", "≥ 0", "large weights"),
    Metric("gradient_rms", "gradient", "≥ 0", "large gradients"),
    Metric(
        "update_weight_ratio", "1", "≥ 0", "large updates beside the weights; about 1e-3 is usual"
    ),
    Metric("zero_gradient_frac", *_SHARE, "gradients that are 0"),
    Metric("nonfinite_frac", *_SHARE, "NaN or inf"),
    Metric("unmoved_frac", *_SHARE, "updates stall already, in the dtype of the weights"),
    Metric("ulp_mean", "ULP", "≥ 0", "updates far from stalling in the dtype of the weights"),
    Metric("ulp_max", "ULP", "≥ 0", "one weight moved far"),
    Metric("ulp_zero_frac", *_SHARE, "weights that did not move"),
    Metric("ulp_median_log2", "log2 ULP", "≥ 0.5", "moved weights moved by many ULPs"),
    Metric("energy_concentration", "1", "1 … n", "few elements carry the update"),
)
"""Metrics of a layer's steps that need no number format, by name, such as ``update_rms``."""

FORMAT_METRICS = _by_name(
    Metric("kept_update_ratio", "1", "real", "the update is kept; 1 is all"),
    Metric("stall_frac", *_SHARE, "updates stall"),
    Metric("update_error", "1", "≥ 0", "the update is distorted"),
    Metric("visible_frac", *_SHARE, "a cast to the format shows the updates"),
    Metric("never_moved_frac", *_SHARE, "weights that no observed step moved"),
    Metric("stochastic_move_frac", *_SHARE, "stochastic rounding would move weights"),
    Metric("stochastic_noise_ratio", "1", "≥ 0", "stochastic rounding would add much noise"),
    Metric(
        *("steps_median_log2", "log2 stiffness", "−31.5 … 31.5"),
        "updates far above −1, below which they stall",
    ),
    Metric("stiffness_mean", "weight", "> 0", "a coarse grid"),
    Metric("stiffness_min", "weight", "> 0", "a grid that is coarse at every weight"),
    Metric("stiffness_max", "weight", "> 0", "a grid that is coarse at some weight"),
    Metric("grid_error_mean", "weight", "≥ 0", "weights off the grid"),
    Metric("grid_error_max", "weight", "≥ 0", "one weight far off the grid"),
    Metric("grid_error_std", "weight", "≥ 0", "grid errors differ"),
    Metric("on_grid_frac", *_SHARE, "weights are grid points"),
    Metric("sqnr_db", "dB", "real or inf", "errors of rounding are small beside the weights"),
    Metric("underflow_frac", *_SHARE, "weights are rounded to 0"),
    Metric("saturated_frac", *_SHARE, "weights are rounded beyond the largest value"),
    Metric("subnormal_frac", *_SHARE, "weights are subnormal: few digits are left"),
    Metric(
        *("grad_stiff_correlation", "1", "−1 … 1"),
        "descriptive: gradients are large where the grid is coarse",
    ),
    Metric(
        *("grad_stiff_ratio_mean", "gradient / weight", "≥ 0"),
        "descriptive: gradients exceed spacings",
    ),
    Metric("grad_below_stiffness_frac", *_SHARE, "descriptive: gradients below spacings"),
)
"""Metrics that say how a layer fares in a number format, by name, such as ``stall_frac``."""

TWIN_METRICS = _by_name(
    Metric("progress_kept", "1", "real", "the movement of fp32 since the start is kept; 1 is all"),
    Metric(
        *("window_progress_kept", "1", "real"),
        "the movement of fp32 since the last observed step is kept; 1 is all",
    ),
    Metric("drift", "1", "≥ 0", "weights far from those of fp32; 1 is as far as fp32 moved"),
    Metric("moved_rms", "weight", "≥ 0", "fp32 moved weights far since the start"),
    Metric("frozen_frac", *_SHARE, "weights that fp32 moved since the start, and the twin never"),
    Metric(
        *("still_frac", *_SHARE),
        "weights that fp32 moved since the last observed step, and the twin did not",
    ),
    Metric("step_projection", "1", "real", "the last update of fp32 is kept; 1 is all"),
    Metric(
        *("decay_projection", "1", "real"),
        "weights are larger than those of fp32: weight decay was lost",
    ),
    Metric(*("moved_since_start_frac", *_SHARE), "weights that differ from those at the start"),
    Metric("twin_nonfinite_frac", *_SHARE, "NaN or inf in the sample"),
)
"""Metrics of a twin, by name, such as ``drift``.

A twin is a sample of a layer that is stored and stepped as a recipe says. The metrics compare a
twin with the twin ``fp32``, which has float32 weights and states.
"""

STATE_METRICS = _by_name(
    Metric("{state}_ratio", "1", "real", "the state is larger than that of fp32; 1 is equal"),
    Metric("{state}_error", "1", "≥ 0", "the state is far from that of fp32; 1 is as far as 0 is"),
    Metric("{state}_zero_frac", *_SHARE, "numbers of the state are 0 that are not 0 in fp32"),
)
"""Metrics of an optimizer state of a twin, by name.

A twin is a sample of a layer that is stored and stepped as a recipe says. The states of the twin
are compared with those of the twin ``fp32``, which are float32.

``{state}`` stands for the name of the state, such as ``exp_avg_sq``.
"""

NEED_GRADIENT = frozenset(
    {
        *("gradient_rms", "zero_gradient_frac", "unmoved_frac"),
        *("grad_stiff_correlation", "grad_stiff_ratio_mean", "grad_below_stiffness_frac"),
    }
)
"""Names of metrics that are NaN unless the gradient was measured, too."""

NEED_TRACKING = frozenset({"never_moved_frac"})
"""Names of metrics that take in all observed steps so far, and not a single one.

These metrics are NaN unless flags are kept that say for each element whether any step has moved it.
"""

STATED_ERRORS = (
    *("kept_update_ratio", "stall_frac", "never_moved_frac"),
    *("underflow_frac", "saturated_frac"),
)
"""Metrics of a format whose standard errors every observed step needs: for verdicts and files.

The errors of these metrics are computed together, and those of all others when one is read.
"""
STATED_TWIN_ERRORS = ("progress_kept", "window_progress_kept", "frozen_frac", "still_frac")
"""Metrics of twins whose standard errors every observed step needs: for verdicts and files.

A twin is a sample of a layer that is stored and stepped as a recipe says.
"""


def get_metric(name: str) -> Metric:
    """Return the unit, the range and the meaning of a metric, given its name.

    A metric of an optimizer's state has the name of the state in it: ``exp_avg_sq_ratio``.

    Raises:
        ValueError: The name is unknown; the message lists the nearest names.
    """
    metric = LAYER_METRICS.get(name) or FORMAT_METRICS.get(name) or TWIN_METRICS.get(name)
    metric = metric or _find_state_metric(name)
    if metric is not None:
        return metric
    catalogue = (*LAYER_METRICS, *FORMAT_METRICS, *TWIN_METRICS, *STATE_METRICS)
    near = difflib.get_close_matches(name, catalogue, n=3) or catalogue
    raise ValueError(f"unknown metric {name!r}; nearest: {', '.join(near)}")


def _find_state_metric(name: str) -> Metric | None:
    """Return the metric of an optimizer state, given a name such as ``exp_avg_sq_ratio``.

    None if the name is not that of a state's metric.
    """
    for pattern, metric in STATE_METRICS.items():
        ending = pattern.removeprefix("{state}")
        if name.endswith(ending) and name != ending:
            return metric._replace(name=name)
    return None


@functools.lru_cache(maxsize=64)  # a run uses few sets of formats, and asks at every step
def figure_keys(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys of the figures of a step: ``metric``, then ``metric/format``.

    A figure is the value of a metric. `twin_keys` returns the keys of twins, which are left out
    here.

    Args:
        formats: Names of the formats.

    Returns:
        Keys of the layer's metrics, then those of each format in turn.
    """
    format_keys = (f"{metric}/{format}" for format in formats for metric in FORMAT_METRICS)
    return (*LAYER_METRICS, *format_keys)


@functools.lru_cache(maxsize=64)
def twin_keys(recipes: tuple[str, ...], states: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys of the figures, values of metrics, of twins: ``metric/recipe``.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Args:
        recipes: Names of the recipes.
        states: Names of the optimizer's states, such as ``exp_avg_sq``.

    Returns:
        Keys of each recipe in turn, in the order of `twin_metrics`.
    """
    return tuple(f"{metric}/{recipe}" for recipe in recipes for metric in twin_metrics(states))


@functools.lru_cache(maxsize=64)
def twin_metrics(states: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the metrics of a twin.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Args:
        states: Names of the optimizer's states, such as ``exp_avg_sq``.

    Returns:
        The names in `TWIN_METRICS`, then those in `STATE_METRICS` for each state.
    """
    return (*TWIN_METRICS, *(name.format(state=s) for s in states for name in STATE_METRICS))


def as_markdown() -> str:
    """Return all metrics with unit, range and meaning, as Markdown: the text of docs/metrics.md."""
    tables = {
        "Metrics of a layer: `altgrad/{metric}/{layer}`": LAYER_METRICS,
        "Metrics of a layer and a format: `altgrad/{metric}/{format}/{layer}`": FORMAT_METRICS,
        "Metrics of a layer and a recipe: `altgrad/{metric}/{recipe}/{layer}`": TWIN_METRICS,
        "Metrics of a recipe and a state, such as `exp_avg_sq_ratio`": STATE_METRICS,
    }
    # The second paragraph of this file's docstring, which holds for every metric.
    about = (__doc__ or "").strip().split("\n\n")[1]
    lines = ["# Metrics", "", *about.splitlines()]
    for title, metrics in tables.items():
        lines += ["", f"## {title}", "", "| metric | unit | range | high means |"]
        lines.append("| --- | --- | --- | --- |")
        lines += [f"| {m.name} | {m.unit} | {m.range} | {m.high} |" for m in metrics.values()]
    return "\n".join(lines) + "\n"
