"""The thresholds of the verdicts, and the outcomes of real runs they were calibrated on.

`calibration` reads calibration.json, which benchmarks/calibration in the repository regenerates.
`verdicts` uses the thresholds and quotes the outcomes; that module comes next.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

_MOST_NAMED_FORMATS = 3
"""Evidence from at most this many formats names them, because it says nothing of other formats."""


@dataclass(frozen=True)
class Thresholds:
    """The figures at which one verdict ends and another begins; all are between 0 and 1.

    Attributes:
        stores_fine: Least kept_update_ratio of a format that stores a layer fine.
        needs_remedy: Least kept_update_ratio with which a layer needs no remedy.
        frozen: Least never_moved_frac of a frozen layer.
        underflow: Least share of weights stored as 0 for the verdict “range”.
        saturated: Least share of weights beyond the largest value for the verdict “range”.
    """

    stores_fine: float
    needs_remedy: float
    frozen: float
    underflow: float
    saturated: float


@dataclass(frozen=True)
class Calibration:
    """The content of calibration.json: thresholds, and the outcomes of real runs.

    Attributes:
        thresholds: Thresholds of the verdicts.
        rules: Rule by which each threshold was found, in words, by threshold.
        outcomes: Outcomes of the runs that set the thresholds, by name of the verdict: number of
            runs and layers with this verdict, their formats, and how many lost progress.
        held_out: Outcomes in the same form, for tasks and optimizers that set no threshold.
    """

    thresholds: Thresholds
    rules: Mapping[str, str]
    outcomes: Mapping[str, Mapping[str, Any]]
    held_out: Mapping[str, Mapping[str, Any]]

    def evidence(self, verdict: str) -> str:
        """Return the outcome of real runs with a verdict, in one sentence.

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
    """Return the calibration of this version of AltGrad; the file is read once."""
    content = json.loads(
        files("altgrad.report").joinpath("calibration.json").read_text(encoding="utf-8")
    )
    return Calibration(
        Thresholds(**content["thresholds"]),
        content["rules"],
        content["calibration"],
        content["held_out"],
    )
