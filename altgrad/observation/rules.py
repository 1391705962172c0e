"""Decide which layers are observed, and how, by an ordered list of rules.

A `SamplingRule` has a pattern for names of layers, and settings. `resolve_layers` gives each layer
the settings of the first rule that matches its name, as a `LayerSampling`. What the rule leaves
open is set by the arguments of the `UpdateMonitor`.

This file stands alone. `altgrad.monitor.layer_settings` uses it, and `altgrad.recipes.storage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Literal

from altgrad._messages import check_int, check_type, format_count

# The default cutoff of difflib.get_close_matches:
# https://docs.python.org/3/library/difflib.html#difflib.get_close_matches
_NEAR_CUTOFF = 0.6
_MOST_SUGGESTED = 3
# The models of peft have it before each name: peft/peft_model.py, and peft/tuners/tuners_utils.py,
# which keep the model in the attributes `base_model` and `model`.
_PEFT_PREFIX = "base_model.model."

TWIN_ELEMENTS = 256
"""Default maximum number of elements of each layer that twins step.

A twin is a sample of a layer that is stored and stepped as a recipe says.
"""


@dataclass(frozen=True)
class SamplingRule:
    """A rule for observing the layers whose names match a pattern.

    A setting that is None is that of the `UpdateMonitor` to which the rule is given.

    Args:
        layers: A glob pattern for the whole name of a layer, case-sensitive. ``*`` matches any
            characters including dots, ``?`` one character, and ``[ab]`` one of those listed. The
            prefix ``base_model.model.`` of names in peft may be left out.
        enabled: If False, do not observe the layers.
        every_n_steps: Interval between observed steps, in optimizer steps, at least 1.
        max_elements: Maximum number of elements observed in each layer, at least 1; ``"all"`` for
            every element.
        formats: Names of the formats for which figures of the layers are computed, kept as a tuple.
            A string is one name; an empty sequence is no format.
        twin_elements: Maximum number of elements of each layer in the sample that is stored and
            stepped as the monitor's recipes say; 0 for no such twins. Layers of fewer than 64
            elements are stepped whole.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has an invalid value.

    Examples:
        >>> SamplingRule("*.bias", enabled=False)
        SamplingRule(layers='*.bias', enabled=False, every_n_steps=None, max_elements=None, \
formats=None, twin_elements=None)
        >>> SamplingRule("head.*", max_elements="all", formats="bf16").formats
        ('bf16',)
    """

    layers: str
    enabled: bool = True
    every_n_steps: int | None = None
    max_elements: int | Literal["all"] | None = None
    # Both types are named, although a string is a sequence of strings for Python: parsers of
    # configuration files such as jsonargparse do not take it for one.
    formats: str | Sequence[str] | None = None
    twin_elements: int | None = None

    def __post_init__(self) -> None:
        check_type("layers", self.layers, str)
        if not self.layers:
            raise ValueError("layers='': expected a pattern such as '*.weight', or '*' for all")
        check_type("enabled", self.enabled, bool)
        if self.every_n_steps is not None:
            check_int("every_n_steps", self.every_n_steps, 1)
        if isinstance(self.max_elements, str):
            if self.max_elements != "all":
                raise ValueError(f"max_elements={self.max_elements!r}: expected a number or 'all'")
        elif self.max_elements is not None:
            check_int("max_elements", self.max_elements, 1)
        if self.twin_elements is not None:
            check_int("twin_elements", self.twin_elements, 0)
        if self.formats is not None:
            # How to set a field of a frozen dataclass:
            # https://docs.python.org/3/library/dataclasses.html#frozen-instances
            object.__setattr__(self, "formats", _check_formats(self.formats))

    def matches(self, name: str) -> bool:
        """Return True if the pattern matches the whole name of a layer.

        A name that peft made is matched without its prefix ``base_model.model.``, too.
        """
        return any(
            fnmatchcase(each, self.layers) for each in {name, name.removeprefix(_PEFT_PREFIX)}
        )


@dataclass(frozen=True)
class LayerSampling:
    """The settings by which one layer is observed.

    Attributes:
        name: The layer's name.
        rule: The first rule that matched the name; None if no rule matched.
        enabled: True if the layer is observed.
        every_n_steps: Interval between observed steps, in optimizer steps.
        max_elements: Maximum number of elements observed; None for every element.
        formats: Names of the formats for which figures (values of metrics) of the layer are
            computed.
        twin_elements: Maximum number of elements in twins, samples of the layer that are stored and
            stepped as recipes say; 0 for no twins.
    """

    name: str
    rule: SamplingRule | None
    enabled: bool
    every_n_steps: int
    max_elements: int | None
    formats: tuple[str, ...]
    twin_elements: int = TWIN_ELEMENTS


def resolve_layers(
    names: Sequence[str],
    rules: Sequence[SamplingRule],
    *,
    every_n_steps: int,
    max_elements: int | None,
    formats: tuple[str, ...],
    twin_elements: int = TWIN_ELEMENTS,
) -> dict[str, LayerSampling]:
    """Return the settings of each layer, from the first rule that matches its name.

    Settings that the rule leaves open are those of the monitor; so are all settings of a layer that
    no rule matches. A rule has no effect if earlier rules match all of its layers: that is no error
    here, and `describe_layers` reports it.

    Args:
        names: Names of all layers.
        rules: Rules in order of precedence.
        every_n_steps: The monitor's interval between observed steps, in optimizer steps, at least
            1.
        max_elements: The monitor's maximum number of elements observed in each layer, at least 1;
            None for every element.
        formats: Names of the monitor's formats.
        twin_elements: The monitor's maximum number of elements of each layer in twins, samples that
            are stored and stepped as recipes say; at least 0.

    Returns:
        The settings by name of the layer, in the order of `names`.

    Raises:
        TypeError: A rule is not a `SamplingRule`, or a setting has the wrong type.
        ValueError: A pattern matches no name, or a setting is too small.
    """
    check_int("every_n_steps", every_n_steps, 1)
    if max_elements is not None:
        check_int("max_elements", max_elements, 1)
    check_int("twin_elements", twin_elements, 0)
    _check_rules(names, rules)
    default = LayerSampling("", None, True, every_n_steps, max_elements, formats, twin_elements)
    return {name: _resolve_layer(name, rules, default) for name in names}


def _resolve_layer(
    name: str, rules: Sequence[SamplingRule], default: LayerSampling
) -> LayerSampling:
    rule = next((rule for rule in rules if rule.matches(name)), None)
    if rule is None:
        return replace(default, name=name)
    max_elements = default.max_elements
    if rule.max_elements is not None:
        max_elements = None if rule.max_elements == "all" else rule.max_elements
    return LayerSampling(
        name=name,
        rule=rule,
        enabled=rule.enabled,
        every_n_steps=rule.every_n_steps or default.every_n_steps,
        max_elements=max_elements,
        formats=default.formats if rule.formats is None else tuple(rule.formats),
        twin_elements=(default.twin_elements if rule.twin_elements is None else rule.twin_elements),
    )


def _check_formats(formats: object) -> tuple[str, ...]:
    if isinstance(formats, str):
        formats = (formats,)
    if not isinstance(formats, Sequence):
        raise TypeError(
            f"formats={formats!r}: expected names of formats such as ['bf16', 'e4m3fn'],"
            f" got {type(formats).__name__}"
        )
    for format in formats:
        check_type("formats: each name", format, str)
    return tuple(formats)


def _check_rules(names: Sequence[str], rules: Sequence[SamplingRule]) -> None:
    if isinstance(rules, SamplingRule) or not isinstance(rules, Sequence):
        raise TypeError(
            f"rules={rules!r}: expected a list of SamplingRule such as "
            "[SamplingRule('*.bias', enabled=False)]"
        )
    for rule in rules:
        if not isinstance(rule, SamplingRule):
            raise TypeError(
                f"rules: expected a SamplingRule such as SamplingRule('*.bias', enabled=False), "
                f"got {rule!r}"
            )
        if not any(map(rule.matches, names)):
            raise ValueError(_describe_no_match(rule.layers, names))


def _describe_no_match(pattern: str, names: Sequence[str]) -> str:
    near = _find_near_matches(pattern, names)
    if near:
        known = "near matches are " + ", ".join(map(repr, near))
    elif names:
        known = "no name is similar; the first are " + ", ".join(map(repr, names[:_MOST_SUGGESTED]))
    else:
        known = "the model has no layers"
    count = format_count(len(names), "layer")
    return (
        f"layers={pattern!r} matches none of {count}: {known}. Expected a pattern for "
        "whole names, such as 'encoder.*' or '*.weight', in which '*' also matches dots; "
        "correct it or remove the rule"
    )


def _find_near_matches(pattern: str, names: Sequence[str]) -> list[str]:
    """Return up to three names similar to a pattern, the most similar first."""
    # Wildcards are no part of names, and would lower the similarity to every name.
    parts = [part.strip("*?") for part in _split_name(pattern)]
    parts = [part for part in parts if part]
    scores = {name: _score_similarity(parts, name) for name in names}
    near = [name for name in names if scores[name] >= _NEAR_CUTOFF]
    return sorted(near, key=lambda name: -scores[name])[:_MOST_SUGGESTED]


def _split_name(name: str) -> list[str]:
    """Return the parts of a name between dots and underscores, in lower case.

    Splitting at underscores, too, makes the pattern ``atn`` similar to ``self_attn``.
    """
    return name.casefold().replace("_", ".").split(".")


def _score_similarity(parts: Sequence[str], name: str) -> float:
    """Return the similarity of a pattern to a name, from 0 to 1.

    The result is the larger of two similarities. One compares each part of the pattern with the
    most similar part of the name, and is the mean over the parts of the pattern. The other compares
    the whole pattern with the whole name.
    """
    if not parts:
        return 0.0
    name_parts = _split_name(name)
    each = [
        max(SequenceMatcher(None, part, other).ratio() for other in name_parts) for part in parts
    ]
    whole = SequenceMatcher(None, ".".join(parts), ".".join(name_parts)).ratio()
    return max(whole, sum(each) / len(each))
