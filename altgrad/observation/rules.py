"""Which layers are observed, and how: ordered rules, the first that matches a name wins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Literal

from altgrad._messages import check_int, check_type

_NEAR = 0.6  # difflib's own cutoff for a close match
_MOST_SUGGESTED = 3


@dataclass(frozen=True)
class SamplingRule:
    """How the layers whose names match a pattern are observed; None is the monitor's own setting.

    Args:
        layers: A glob pattern for whole names of layers, upper and lower case apart: ``*`` is any
            run of characters, dots included, ``?`` one character, ``[ab]`` one of these.
        enabled: False leaves the layers out.
        every_n_steps: Optimizer steps from one observed step to the next, at least 1.
        max_elements: How many elements of a layer are observed at most, at least 1; ``"all"``
            for every element.
        formats: Names of the formats that the layers are judged for, kept as a tuple; a string
            is one name, and an empty sequence judges for none.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has a value that cannot be meant.

    Examples:
        >>> SamplingRule("*.bias", enabled=False)
        SamplingRule(layers='*.bias', enabled=False, every_n_steps=None, max_elements=None, \
formats=None)
        >>> SamplingRule("head.*", max_elements="all", formats="bf16").formats
        ('bf16',)
    """

    layers: str
    enabled: bool = True
    every_n_steps: int | None = None
    max_elements: int | Literal["all"] | None = None
    # A string is a sequence of strings, but readers of configuration files do not think so.
    formats: str | Sequence[str] | None = None

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
        if self.formats is not None:
            object.__setattr__(self, "formats", _checked_formats(self.formats))

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the whole name of a layer."""
        return fnmatchcase(name, self.layers)


@dataclass(frozen=True)
class LayerSampling:
    """How one layer is observed.

    Attributes:
        name: The layer's name.
        rule: The rule that decided; None where none matched and the monitor's settings hold.
        enabled: Whether the layer is observed at all.
        every_n_steps: Optimizer steps from one observed step to the next.
        max_elements: How many elements are observed at most; None for every element.
        formats: Names of the formats that the layer is judged for.
    """

    name: str
    rule: SamplingRule | None
    enabled: bool
    every_n_steps: int
    max_elements: int | None
    formats: tuple[str, ...]


def resolve_layers(
    names: Sequence[str],
    rules: Sequence[SamplingRule],
    *,
    every_n_steps: int,
    max_elements: int | None,
    formats: tuple[str, ...],
) -> dict[str, LayerSampling]:
    """The settings of each layer: of the first rule that matches its name, else the monitor's.

    A rule that matches names, but none that earlier rules left, is no error: `describe_layers`
    says so.

    Args:
        names: Names of all layers.
        rules: In order of precedence.
        every_n_steps: The monitor's own setting, in optimizer steps, at least 1.
        max_elements: The monitor's own, at least 1; None for every element.
        formats: The monitor's own.

    Returns:
        An entry for each name, in the order of names.

    Raises:
        TypeError: A rule is not a `SamplingRule`, or a setting has the wrong type.
        ValueError: A pattern matches no name, or a setting is below 1.
    """
    check_int("every_n_steps", every_n_steps, 1)
    if max_elements is not None:
        check_int("max_elements", max_elements, 1)
    _check_rules(names, rules)
    default = LayerSampling("", None, True, every_n_steps, max_elements, formats)
    return {name: _layer(name, rules, default) for name in names}


def _layer(name: str, rules: Sequence[SamplingRule], default: LayerSampling) -> LayerSampling:
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
    )


def _checked_formats(formats: object) -> tuple[str, ...]:
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
            raise ValueError(_no_match(rule.layers, names))


def _no_match(pattern: str, names: Sequence[str]) -> str:
    near = _near_matches(pattern, names)
    if near:
        known = "near matches are " + ", ".join(map(repr, near))
    elif names:
        known = "none is like it; they begin with " + ", ".join(map(repr, names[:_MOST_SUGGESTED]))
    else:
        known = "there are none"
    return (
        f"layers={pattern!r} matches none of {len(names)} layers: {known}. Expected a pattern for "
        "whole names, such as 'encoder.*' or '*.weight', in which '*' also stands for dots: "
        "correct it or remove the rule"
    )


def _near_matches(pattern: str, names: Sequence[str]) -> list[str]:
    """The names most like the pattern, the most like first."""
    parts = [part.strip("*?") for part in _parts(pattern)]
    parts = [part for part in parts if part]
    scores = {name: _likeness(parts, name) for name in names}
    near = [name for name in names if scores[name] >= _NEAR]
    return sorted(near, key=lambda name: -scores[name])[:_MOST_SUGGESTED]


def _parts(name: str) -> list[str]:
    """What is between dots and underscores: ``atn`` is to suggest ``self_attn``."""
    return name.casefold().replace("_", ".").split(".")


def _likeness(parts: Sequence[str], name: str) -> float:
    """From 0 to 1: how like the name's own parts, or all of it, those of a pattern are."""
    if not parts:
        return 0.0
    own = _parts(name)
    each = [max(SequenceMatcher(None, part, other).ratio() for other in own) for part in parts]
    whole = SequenceMatcher(None, ".".join(parts), ".".join(own)).ratio()
    return max(whole, sum(each) / len(each))
