"""The lines of Python that would store each layer in the smallest format that stores it fine."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from altgrad.quantization.block_formats import get_formats
from altgrad.report.records.run import Run
from altgrad.report.records.schema import FormatInfo
from altgrad.report.verdicts import Advice, Assessment, Verdict, smallest

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name


def applying(run: Run, assessment: Assessment) -> str:
    """Python that applies the suggestions with `altgrad.WeightStorage`; empty where there are none.

    Layers whose names differ in numbers alone share a rule where they share a format. A layer that
    no judged format stores fine is left as it is, and the lines name what would help.
    """
    chosen = _chosen(run, assessment)
    stored = Counter(format for format in chosen.values() if format is not None)
    scaling = ""
    if run.scaling != "tensor":
        scaling = f", scaling={run.scaling!r}".replace("'", '"')
    if not stored:
        return _with_remedy(run, assessment, scaling)
    ((most, count),) = stored.most_common(1)
    settings = _quoted(most) + scaling
    if count == len(chosen):
        return _lines(
            "from altgrad import WeightStorage\n",
            "# Stores layers that were not watched, too.",
            f"storage = WeightStorage({settings})",
        )
    lines = [
        "from altgrad import SamplingRule, WeightStorage\n",
        "# A rule stores all layers that it matches, those that were not watched, too.",
        f"storage = WeightStorage(\n    {settings},\n    layers=[",
        *(f"        {rule}," for rule in _rules(chosen, most)),
        '        SamplingRule("*", enabled=False),\n    ],\n)',
    ]
    if left := [name for name, format in chosen.items() if format is None]:
        lines.append(
            f"# {len(left):,} of {len(chosen):,} layers stay as they are: no judged format that\n"
            "# weights can be stored in is known to store them fine."
        )
        if any(_is_mended(advice) for name in left for advice in _advice(assessment, name)):
            lines.append(
                '# What helps where updates are lost is rounding="stochastic", or\n'
                '# compensation="kahan", in a storage of their own.'
            )
    return _lines(*lines)


def _with_remedy(run: Run, assessment: Assessment, scaling: str) -> str:
    """No layer is stored fine: the largest of the formats that lose updates, and the remedy."""
    lossy = dict.fromkeys(each.format for each in assessment.advice if _is_mended(each))
    judged = [format for format in lossy if _can_store(run, format)]
    if not judged:
        return ""
    largest = max(judged, key=lambda format: run.formats[format].bits)
    return _lines(
        "from altgrad import WeightStorage\n",
        "# Rounded to nearest, no judged format that weights can be stored in is\n"
        "# known to store a layer fine.",
        f'storage = WeightStorage({_quoted(largest)}{scaling}, rounding="stochastic")',
    )


def _advice(assessment: Assessment, layer: str) -> Iterable[Advice]:
    return assessment.by_layer.get(layer, {}).values()


def _is_mended(advice: Advice) -> bool:
    """Whether what is wrong is what stochastic rounding and Kahan summation mend."""
    return advice.verdict in (Verdict.WATCH, Verdict.NEEDS_REMEDY, Verdict.FROZEN)


def _lines(*lines: str) -> str:
    return "\n".join([*lines, "storage.attach(optimizer, module=model)  # before the monitor"])


def _chosen(run: Run, assessment: Assessment) -> dict[str, str | None]:
    """For each layer the smallest format that stores it fine and that weights can be stored in."""
    chosen: dict[str, str | None] = {}
    for layer in run.layers:
        advice = assessment.by_layer.get(layer, {})
        fine = [f for f, each in advice.items() if each.verdict is Verdict.STORES_FINE]
        storable = [format for format in fine if _can_store(run, format)]
        chosen[layer] = smallest(storable, run.formats)
    return chosen


def _can_store(run: Run, format: str) -> bool:
    """Not those of the user's own, which no name stands for, nor nvfp4."""
    try:
        (found,) = get_formats(format)
    except ValueError:
        return False
    if FormatInfo.of(found, run.scaling) != run.formats[format]:
        return False  # one of the user's own, of the same name
    return found.power_of_two


def _rules(chosen: Mapping[str, str | None], default: str) -> list[str]:
    """Source of the rules, for the layers that are stored."""
    rules: list[str] = []
    covered: set[str] = set()
    for name, format in chosen.items():
        if format is None or name in covered:
            continue
        pattern, alike = _widest(name, chosen)
        covered |= alike
        more = "" if format == default else f", formats={_quoted(format)}"
        rules.append(f"SamplingRule({_quoted(pattern)}{more})")
    return rules


def _widest(name: str, chosen: Mapping[str, str | None]) -> tuple[str, set[str]]:
    """A pattern for a layer and those that differ in numbers, and share its format; and all these.

    Numbers are left open all of them, or else one of them.
    """
    whole = glob.escape(name)
    numbers = [*_NUMBER.finditer(whole)]
    patterns = [_NUMBER.sub("*", whole)]
    patterns += [f"{whole[: each.start()]}*{whole[each.end() :]}" for each in numbers]
    for pattern in patterns:
        matches = re.compile(fnmatch.translate(pattern)).match
        if all(format == chosen[name] for each, format in chosen.items() if matches(each)):
            return pattern, {each for each in chosen if matches(each)}
    return whole, {name}


def _quoted(text: str) -> str:
    """As source, in double quotes where that is possible."""
    return f'"{text}"' if text.isprintable() and not {*text} & {'"', "\\"} else repr(text)
