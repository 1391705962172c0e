"""From the tensors of a step to sums, from sums to metrics, from metrics to figures.

Read the files in the order of the data:

- `columns` names the sums. `workspace` holds the memory in which `kernel` sums rows of elements for
  every format at once.
- `totals` adds rows up to layers. `chunks` cuts large tensors. `measurer` combines these four, for
  one tensor of any size and for batches of small ones. `ever_moved` keeps flags between steps.
- `catalogue` lists the metrics, `metrics` has a formula for each, `standard_errors` computes how
  well a sample knows them.
- `step_table` adds layers up to a model, `figures` reads one layer or model, `histogram` holds
  counts.
- `measure` judges one tensor; `step_record` is the result of one observed step. The room
  `altgrad.monitor` comes next.
"""

from altgrad.measurement.catalogue import (
    FORMAT_METRICS,
    LAYER_METRICS,
    STATE_METRICS,
    TWIN_METRICS,
    Metric,
    get_metric,
)

__all__ = [
    "FORMAT_METRICS",
    "LAYER_METRICS",
    "STATE_METRICS",
    "TWIN_METRICS",
    "Metric",
    "get_metric",
]
