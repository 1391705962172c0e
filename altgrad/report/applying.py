"""Write lines of Python that store each layer in the smallest format that stores it fine.

Which formats store a layer fine is the result of `judging`. `write_code` picks a format for each
layer and writes code. `write_rules` merges layers with similar names into one
`altgrad.SamplingRule`, and `group_by_pattern` finds its pattern.

Read `optimizer_lines` first; `simulation_lines` comes next. `exports` has the code in JSON.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from altgrad._messages import format_count
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.formats import Scaling
from altgrad.report.judging.judge import find_smallest
from altgrad.report.judging.verdicts import Advice, Assessment, Verdict
from altgrad.report.optimizer_lines import list_makers, name_optimizers
from altgrad.report.records.run import Run
from altgrad.report.records.schema import FormatInfo, RunDescription

_UNTRIED = "# Judged by single updates: formats without a recipe were not tried over many steps."
_SHORT_DTYPES, _SHORT_BITS = ("bfloat16", "float16"), 16


def write_code(run: Run, assessment: Assessment) -> str:
    """Return Python code that stores each layer in the smallest format that stores it fine.

    The code calls `altgrad.WeightStorage`. Layers whose names differ only in numbers share a rule
    if they share a format. Layers that no judged format stores fine stay unchanged, and a comment
    in the code names a remedy.

    Args:
        run: The run, for its formats, layers and scaling.
        assessment: Verdicts on how each format would store each layer.

    Returns:
        The code; empty if there is nothing to apply.
    """
    chosen = _choose_formats(run, assessment)
    stored = Counter(format for format in chosen.values() if format is not None)
    scaling = ""
    if run.scaling != "tensor":
        scaling = f", scaling={write_scaling(run.scaling)}"
    if not stored:
        return _write_remedy(run, assessment, scaling)
    ((most, count),) = stored.most_common(1)
    settings = quote(most) + scaling
    untried = [_UNTRIED] if _is_untried(chosen, assessment) else []
    if count == len(chosen):
        return _join_lines(
            run,
            "from altgrad import WeightStorage\n",
            *untried,
            "# Stores layers that were not observed, too.",
            f"storage = WeightStorage({settings})",
        )
    lines = [
        "from altgrad import SamplingRule, WeightStorage\n",
        *untried,
        "# A rule stores all layers that it matches, also layers that were not observed.",
        f"storage = WeightStorage(\n    {settings},\n    layers=[",
        *(f"        {rule}," for rule in write_rules(chosen, most)),
        '        SamplingRule("*", enabled=False),\n    ],\n)',
    ]
    if unchanged := [name for name, format in chosen.items() if format is None]:
        layers = format_count(len(chosen), "layer")
        lines.append(
            f"# {len(unchanged):,} of {layers} stay unchanged: no judged format\n"
            "# that WeightStorage supports is known to store them fine."
        )
        if any(_loses_updates(a) for name in unchanged for a in _list_advice(assessment, name)):
            lines.append(
                "# If these layers lose updates, store them with another WeightStorage that has\n"
                '# rounding="stochastic" or compensation="kahan".'
            )
    return _join_lines(run, *lines)


def _write_remedy(run: Run, assessment: Assessment, scaling: str) -> str:
    """Return Python code for a run in which no judged format stores a layer fine.

    The code stores all layers with stochastic rounding, in the largest of the formats that lose
    updates if they round to nearest. The result is empty without such a format. `scaling` is an
    argument of `WeightStorage` as source code, or empty.
    """
    lossy = dict.fromkeys(each.recipe for each in assessment.advice if _loses_updates(each))
    judged = [
        name
        for name in lossy
        if name in run.formats
        and can_store(run, name)
        and all(_is_finer(run, layer, name) for layer in run.layers)
    ]
    if not judged:
        return ""
    largest = max(judged, key=lambda format: run.formats[format].bits)
    return _join_lines(
        run,
        "from altgrad import WeightStorage\n",
        "# Rounded to nearest, no judged format that WeightStorage supports is known to\n"
        "# store a layer fine.",
        f'storage = WeightStorage({quote(largest)}{scaling}, rounding="stochastic")',
    )


def _is_untried(chosen: Mapping[str, str | None], assessment: Assessment) -> bool:
    """Return True if a layer's chosen format was judged by single updates only.

    It was then not tried over many steps on a twin, a sample of the layer stored so.
    """
    by_layer = assessment.by_layer
    return any(
        format is not None and not by_layer[name][format].has_twin
        for name, format in chosen.items()
    )


def _list_advice(assessment: Assessment, layer: str) -> Iterable[Advice]:
    return assessment.by_layer.get(layer, {}).values()


def _loses_updates(advice: Advice) -> bool:
    """Return True if the verdict on a layer in a format is that the format loses updates.

    Stochastic rounding or Kahan summation is a remedy.
    """
    return advice.verdict in (Verdict.WATCH, Verdict.NEEDS_REMEDY, Verdict.FROZEN)


def _join_lines(run: Run, *lines: str) -> str:
    """Return lines of code as text, and after them the line that attaches the `WeightStorage`."""
    optimizers = name_optimizers(list_makers(run))
    return "\n".join([*lines, f"storage.attach({optimizers}, module=model)  # before the monitor"])


def _choose_formats(run: Run, assessment: Assessment) -> dict[str, str | None]:
    """Return by name of the layer the smallest format that stores the layer fine.

    Only formats that `WeightStorage` supports count. A layer without such a format has None.
    """
    chosen: dict[str, str | None] = {}
    for layer in run.layers:
        advice = assessment.by_layer.get(layer, {})
        fine = [f for f, each in advice.items() if each.verdict is Verdict.STORES_FINE]
        storable = [
            name
            for name in fine
            if name in run.formats and can_store(run, name) and _is_finer(run, layer, name)
        ]
        chosen[layer] = find_smallest(storable, run.formats)
    return chosen


def _is_finer(run: Run, layer: str, format: str) -> bool:
    """Return True if the weights of a layer have more bits than a format of the run, by name.

    Otherwise `WeightStorage` has nothing to round.
    """
    return run.layers[layer].dtype not in _SHORT_DTYPES or run.formats[format].bits < _SHORT_BITS


def can_store(run: RunDescription, format: str) -> bool:
    """Return True if `WeightStorage` can store weights in a format of this name.

    Formats that the user defined, and nvfp4, give False.

    Args:
        run: The run, for the formats that it judged.
        format: Name of the format.
    """
    try:
        (found,) = get_formats(format)
    except ValueError:
        return False
    judged = run.formats.get(format)
    if judged is not None and FormatInfo.from_format(found, run.scaling) != judged:
        return False  # a user's format with the name of a built-in one
    return found.power_of_two  # WeightStorage supports power-of-two scales only


def write_rules(chosen: Mapping[str, str | None], default: str) -> list[str]:
    """Return source code of `SamplingRule` objects that store each layer in its chosen format.

    Args:
        chosen: The format by name of the layer; a layer with None gets no rule. Layers whose names
            differ only in numbers share a rule.
        default: The format of the `WeightStorage` itself, which rules therefore do not name.

    Returns:
        The code of each rule, such as ``SamplingRule("blocks.*.weight", formats="bf16")``.
    """
    return [
        f"SamplingRule({quote(pattern)}"
        + ("" if format == default else f", formats={quote(format)}")
        + ")"
        for pattern, format in group_by_pattern(chosen).items()
    ]


def group_by_pattern(chosen: Mapping[str, str | None]) -> dict[str, str]:
    """Return a few `fnmatch` patterns that give each name its value.

    The names ``blocks.0.weight`` and ``blocks.1.weight``, both with the value ``"bf16"``, become
    ``{"blocks.*.weight": "bf16"}``.

    Args:
        chosen: A value, such as a format, by name of the layer; None for a layer without one. No
            pattern matches a name that has another value, or None.

    Returns:
        The value by pattern.
    """
    found: dict[str, str] = {}
    covered: set[str] = set()
    patterns = _Patterns(chosen)
    for name, value in chosen.items():
        if value is None or name in covered:
            continue
        pattern, matched = patterns.widen(name)
        covered |= matched
        found[pattern] = value
    return found


class _Patterns:
    """A finder of patterns, such as ``blocks.*.weight``, for layers to be stored in one format.

    No pattern matches a layer for which another format is chosen. A name consists of parts between
    dots. A name that a pattern matches has every part of the pattern other than ``*``. A pattern is
    therefore compared only with the names that have its rarest part: to compare each pattern with
    all names of 10,000 layers would take a minute.

    Args:
        chosen: Format by layer; None for a layer that stays unchanged.
    """

    def __init__(self, chosen: Mapping[str, str | None]) -> None:
        self._chosen = chosen
        self._names_by_part: dict[str, list[str]] = {}
        for name in chosen:
            for part in {*name.split(".")}:
                self._names_by_part.setdefault(part, []).append(name)
        self._matches: dict[str, set[str]] = {}  # empty for a pattern of several formats

    def widen(self, name: str) -> tuple[str, set[str]]:
        """Return a pattern for a layer, and the names of all layers that the pattern matches.

        The pattern has ``*`` for every number in the name if all matched layers then have the same
        format, or else for a single number. Otherwise the pattern matches the layer alone.
        """
        parts = name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
        groups = [numbers, *([number] for number in numbers)] if numbers else []
        for wild in groups:
            fixed = [part for index, part in enumerate(parts) if index not in wild]
            pattern = ".".join(
                "*" if index in wild else glob.escape(part) for index, part in enumerate(parts)
            )
            if pattern not in self._matches:
                self._matches[pattern] = self._match(pattern, fixed)
            if matched := self._matches[pattern]:
                return pattern, matched
        return glob.escape(name), {name}

    def _match(self, pattern: str, fixed: Iterable[str]) -> set[str]:
        """Return the names of layers that a pattern matches; empty if their chosen formats differ.

        `fixed` has the parts of the pattern other than ``*``.
        """
        names_by_part: Iterable[Collection[str]] = (self._names_by_part[part] for part in fixed)
        candidates = min(names_by_part, key=len, default=self._chosen)
        matches = re.compile(fnmatch.translate(pattern)).match
        matched = {name for name in candidates if matches(name)}
        return matched if len({self._chosen[name] for name in matched}) == 1 else set()


def quote(text: str) -> str:
    """Return a text as a string literal of Python, in double quotes if possible."""
    return f'"{text}"' if text.isprintable() and not {*text} & {'"', "\\"} else repr(text)


def write_scaling(scaling: Scaling | None) -> str:
    """Return a scaling, such as ``("block", 32)``, as Python source code."""
    if scaling is None:
        return "None"
    if isinstance(scaling, tuple):
        return f"({quote(scaling[0])}, {scaling[1]!r})"
    return quote(scaling)
