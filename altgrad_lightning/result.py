"""`Result`: hold what a `PrecisionMonitor` found in a training, during and after the training.

The properties of `PrecisionMonitor` are read from a `Result`. A `Result` is plain data: it can be
pickled, and keeps no module or optimizer alive.

Nothing needs to be read before this file. `session` fills a `Result`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from altgrad import Figures, StepRecord
from altgrad.observation import SkipReason
from altgrad.report import Assessment


@dataclass
class Result:
    """The findings of a `PrecisionMonitor` in a training: figures, verdicts, run file and state.

    Attributes:
        latest: The figures of every layer at the last observed step; empty before that step.
        latest_model: The figures of the model at the last observed step; None before that step.
        latest_step: The step at which the latest figures were logged; None without figures.
        skipped: The number of steps that were to be observed but moved no weight, by reason.
        path: The run file; None if no run file is written.
        assessment: The verdicts, how well each format would store each layer, at the end of
            writing; None until then.
        state: The state for checkpoints: before the training the state to resume from, after the
            training the final state. Empty if there is no state.
    """

    latest: Mapping[str, Figures] = field(default_factory=dict)
    latest_model: Figures | None = None
    latest_step: int | None = None
    skipped: Counter[SkipReason] = field(default_factory=Counter)
    path: Path | None = None
    assessment: Assessment | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def note(self, step: int, record: StepRecord) -> None:
        """Replace the latest figures by the figures of a record.

        Args:
            step: The step at which the record is logged.
            record: The record of a batch: the figures of its observed steps.
        """
        self.latest, self.latest_model, self.latest_step = record.layers, record.model, step
