"""From the tensors of a step to sums, from sums to metrics, from metrics to figures.

In the order of the data: `kernel` sums rows of elements for every format at once, `totals` adds
rows up to layers, `step_table` adds layers up to a model, `metrics` has a formula for each metric
of `catalogue`, `standard_errors` says how well a sample knows it, and `figures` reads them.
`columns` names the sums. `measurer` does this for tensors of any size and for batches of small
ones; `measure` for one tensor.
"""

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, Metric, get_metric

__all__ = ["FORMAT_METRICS", "LAYER_METRICS", "Metric", "get_metric"]
