"""What verdicts rest on: thresholds, and what became of runs that were really done.

All of it is in calibration.json, which benchmarks/calibration in the repository regenerates.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

_FEW = 3
"""So many formats, and fewer, are named: what came to be in no others says nothing of these."""


@dataclass(frozen=True)
class Thresholds:
    """Where one verdict ends and another begins.

    Attributes:
        stores_fine: kept_update_ratio from which on a format stores a layer fine.
        needs_remedy: kept_update_ratio below which rounding to nearest loses too much.
        frozen: never_moved_frac from which on a layer is frozen.
        underflow, saturated: Shares of weights, stored as 0 and beyond the top, from which on the
            range is at fault.
    """

    stores_fine: float
    needs_remedy: float
    frozen: float
    underflow: float
    saturated: float


@dataclass(frozen=True)
class Calibration:
    """What the file says.

    Attributes:
        thresholds: Of the verdicts.
        rules: How each of them was found, in words.
        outcomes: By the name of a verdict, of how many runs it would have been said if a model
            had but one, in which formats, and what became of them.
        held_out: The same, of models and optimizers that had no say in the thresholds.
    """

    thresholds: Thresholds
    rules: Mapping[str, str]
    outcomes: Mapping[str, Mapping[str, Any]]
    held_out: Mapping[str, Mapping[str, Any]]

    def evidence(self, verdict: str) -> str:
        """In one sentence what became of those that the verdict would have been said of.

        Args:
            verdict: Its name, such as ``"WATCH"``.

        Returns:
            Nothing for a verdict that claims nothing.
        """
        counts = self.outcomes.get(verdict)
        if counts is None:
            return ""
        if verdict == "FROZEN":
            return (
                f"{counts['frozen']} of {counts['layers']} layers like this were frozen when the "
                "run was really done"
            )
        formats = counts["formats"]
        in_which = f" ({', '.join(formats)})" if len(formats) <= _FEW else ""
        of_runs = (
            f"{counts['lost_10_percent']} of {counts['runs']} runs like this{in_which} lost over "
            "10 % of their progress"
        )
        if verdict != "RANGE":
            return of_runs
        mended = f"{counts['mended_by_a_scale']} of {counts['without_a_scale']}"
        return f"{of_runs}, and a scale halved that, where there was none, in {mended}"


@functools.cache
def calibration() -> Calibration:
    """The one that this version of AltGrad comes with."""
    said = json.loads(
        files("altgrad.report").joinpath("calibration.json").read_text(encoding="utf-8")
    )
    return Calibration(
        Thresholds(**said["thresholds"]), said["rules"], said["calibration"], said["held_out"]
    )
