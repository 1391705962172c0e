"""`Result`: hold the findings of a training, during the training and afterwards.

This file stands alone. `session` fills a `Result`, and the properties of `PrecisionMonitor` read
it. A `Result` is plain data: it can be pickled, and keeps no module or optimizer alive.
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
    """The results of a training so far: latest figures, verdicts, run file and state.

    Attributes:
        latest: The figures of every layer at the last observed step; empty before the first.
        latest_model: The figures of the model at the last observed step; None before the first.
        latest_step: The step at which the latest figures were logged; None before the first.
        skipped: The number of steps that were due and skipped, by reason.
        path: The run file; None if no run file is written.
        assessment: The verdicts when writing ended; None until then.
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
            record: The record of a batch.
        """
        self.latest, self.latest_model, self.latest_step = record.layers, record.model, step
