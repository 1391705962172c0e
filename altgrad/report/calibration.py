"""The thresholds of the verdicts, and the outcomes of the real runs that set the thresholds.

A verdict says whether a layer would still train if its weights were stored in a number format. The
real runs are small trainings that stored their weights in a format; what they lost of their
progress set the thresholds. `calibration` reads calibration.json, which benchmarks/calibration in
the repository regenerates.

The module `verdicts` comes next, which uses the thresholds and quotes the outcomes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

_MOST_NAMED_FORMATS = 3
"""Largest number of formats for which `Calibration.evidence` names the formats of its runs.

Runs in so few formats say nothing about other formats, so that the reader must know which they are.
"""


@dataclass(frozen=True)
class Thresholds:
    """The figures, all between 0 and 1, at which one verdict ends and the next begins.

    A verdict says whether a layer would still train if its weights were stored in a number format.
    The metric kept_update_ratio is how much of the layer's updates the format keeps,
    never_moved_frac the share of the weights with updates that would never have moved.

    Attributes:
        stores_fine: Least kept_update_ratio of a format that stores a layer fine.
        needs_remedy: Least kept_update_ratio with which a layer needs no remedy.
        frozen: Least never_moved_frac of a frozen layer.
        underflow: Least share of weights stored as 0 for the verdict “range”.
        saturated: Least share of weights beyond the format's largest value for the verdict “range”.
    """

    stores_fine: float
    needs_remedy: float
    frozen: float
    underflow: float
    saturated: float


@dataclass(frozen=True)
class Calibration:
    """The content of calibration.json: thresholds of verdicts, and outcomes of real runs.

    A verdict says whether a layer would still train if its weights were stored in a number format.
    The real runs are trainings that really stored their weights in a format.

    Attributes:
        thresholds: Figures at which one verdict on a layer and format ends, and the next begins.
        rules: By name of the threshold, the rule in words by which the threshold was found.
        outcomes: Outcomes of the runs that set the thresholds, by name of the verdict: number of
            runs with the verdict, their formats, and how many of them lost 1 % or 10 % of their
            progress. For ``"FROZEN"`` also the number of layers with the verdict, and how many of
            them were really frozen.
        held_out: Outcomes in the form of `outcomes`, for tasks and optimizers that set no
            threshold.
    """

    thresholds: Thresholds
    rules: Mapping[str, str]
    outcomes: Mapping[str, Mapping[str, Any]]
    held_out: Mapping[str, Mapping[str, Any]]

    def evidence(self, verdict: str) -> str:
        """Return a sentence on the real runs that had a verdict: how many of them lost progress.

        An example is “3 of 4 runs like this lost over 10 % of their progress”.

        Args:
            verdict: Name of the verdict, such as ``"WATCH"``.

        Returns:
            The sentence; empty for ``"UNCERTAIN"`` and ``"NOT_JUDGED"``.
        """
        counts = self.outcomes.get(verdict)
        if counts is None:
            return ""
        if verdict == "FROZEN":  # this evidence counts layers; all other counts whole runs
            return (
                f"{counts['frozen']} of {counts['layers']} layers like this were frozen when the "
                "run was really done"
            )
        formats = counts["formats"]
        in_which = f" ({', '.join(formats)})" if len(formats) <= _MOST_NAMED_FORMATS else ""
        lost = (
            f"{counts['lost_10_percent']} of {counts['runs']} runs like this{in_which} lost over "
            "10 % of their progress"
        )
        if verdict != "RANGE":
            return lost
        mended = f"{counts['mended_by_a_scale']} of {counts['without_a_scale']}"
        return f"{lost}; a scale halved the loss in {mended} that had none"


@functools.cache
def calibration() -> Calibration:
    """Return the thresholds by which layers are judged, and results of trainings that set these.

    A verdict says whether a layer would still train if its weights were stored in a number format.
    The trainings really stored their weights in formats. Thresholds and results come from the file
    calibration.json of the package, which is read once.
    """
    content = json.loads(
        files("altgrad.report").joinpath("calibration.json").read_text(encoding="utf-8")
    )
    return Calibration(
        Thresholds(**content["thresholds"]),
        content["rules"],
        content["calibration"],
        content["held_out"],
    )
