"""The verdicts on a run as JSON values, with the same keys in the run file and in exports.

A *recipe* says how weights and optimizer states are stored. A verdict says what a recipe would make
of the run, or what the run, under the name ``now``, loses.

`writing` writes the line of a run file that has them, and `fields` declares its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from altgrad.report.judging.summaries import write_sentence
from altgrad.report.judging.verdicts import RunAdvice
from altgrad.report.records.kinds import number_as_json


def runs_as_json(runs: Mapping[str, RunAdvice]) -> dict[str, dict[str, Any]]:
    """Convert the verdicts on a run to JSON objects.

    Returns:
        The object of each verdict, by name of the recipe.
    """
    return {name: _convert(each) for name, each in runs.items()}


def _convert(advice: RunAdvice) -> dict[str, Any]:
    return {
        "verdict": advice.verdict.name,
        "sentence": write_sentence(advice),
        "progress_kept": number_as_json(advice.kept),
        "interval": [*map(number_as_json, advice.interval)],
        "weight_error": number_as_json(advice.weight_error),
        "frozen_frac": number_as_json(advice.frozen_frac),
        "frozen_layers": [*advice.frozen],
        "frozen_share": number_as_json(advice.frozen_share),
        "layers": advice.layers,
        "evidence": advice.evidence,
        "to_do": advice.to_do,
        "has_twin": advice.has_twin,
        "behind_share": number_as_json(advice.behind_share),
        "tested_runs": advice.outcome.runs if advice.outcome else 0,
        "lost_runs": advice.outcome.lost if advice.outcome else 0,
        "observed_steps": advice.steps,
        "saved_share": number_as_json(advice.saved_share),
    }
