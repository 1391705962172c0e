"""`Result`: what `PrecisionMonitor` shows of a training, during it and afterwards."""

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
    """What a training has shown so far: plain data that outlives it.

    Attributes:
        latest: The figures of every layer at the last observed step; empty before the first.
        latest_model: The figures of the model at that step; None before the first.
        latest_step: The step that these were logged at; None before the first.
        skipped: The number of steps that were due and skipped, by reason.
        path: The run file; None without one.
        assessment: The verdicts as they stood when writing ended; None before.
        state: The state for checkpoints: before the training the one that it resumes from, after it
            the one that it came to; empty where there is none.
    """

    latest: Mapping[str, Figures] = field(default_factory=dict)
    latest_model: Figures | None = None
    latest_step: int | None = None
    skipped: Counter[SkipReason] = field(default_factory=Counter)
    path: Path | None = None
    assessment: Assessment | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def note(self, step: int, record: StepRecord) -> None:
        """Take the figures of a record as the latest.

        Args:
            step: The step that it is logged at.
            record: The record of the batch.
        """
        self.latest, self.latest_model, self.latest_step = record.layers, record.model, step
