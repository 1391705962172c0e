"""`merge_records`: make one record of several optimizer steps that are one step of the training.

Read `step_record` first. The monitor merges the steps of one backward pass, and the callbacks merge
those of several optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence

from altgrad.measurement.figures import model_figures
from altgrad.measurement.step_record import StepRecord


def merge_records(records: Sequence[StepRecord]) -> StepRecord:
    """Merge the records of optimizer steps that belong to one step of the training.

    Args:
        records: One or more records, in the order of the steps. Of a layer in several of them, the
            last one counts.

    Returns:
        A record with all layers, the figures of the model over them, and the sum of the times.
    """
    last = records[-1]
    if len(records) == 1:
        return last
    layers = {name: figures for each in records for name, figures in each.layers.items()}
    return StepRecord(
        last.index,
        layers,
        model_figures([*layers.values()]),
        sum(each.own_seconds for each in records),
        sum(each.training_seconds for each in records),
    )
