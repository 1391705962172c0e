"""Turn the tensors of a step into sums, the sums into metrics, and the metrics into figures.

Read the files in the order of the data:

- `columns` names the sums. `kernel` computes them, for rows of elements and every format at once,
  in the memory of `workspace`.
- `native_kernel` computes the same in machine code, on a CPU with numba. `native_bits` has its
  vocabulary, and `native_table` says what it reads. `native_rounding` rounds the samples of twins.
  `native_compiler` compiles both, `native_code` loads them and `native_rows` calls the kernel.
- `totals` adds rows up to layers. `chunks` cuts large tensors. `measurer` puts these together, for
  one tensor of any size and for batches of small ones. `ever_moved` keeps flags between steps.
- `catalogue` lists the metrics, and `metrics` has a formula for each. `intervals` and
  `standard_errors` compute how far a figure from a sample may be off.
- `step_table` adds layers up to a model, and `figures` reads one layer or model. `figure_columns`
  reads a figure of all layers at once. `numbers`, `histogram` and `layer_columns` are the types of
  their results.
- `twin_sums`, `ratio_bins`, `twin_parts`, `twin_table` and `twin_figures` are the stages from sums
  to figures for twins, which step a sample of each layer that is stored in another way.
- `measure` measures one step of one tensor, and `step_record` is the result of one observed step of
  a model; `merging` makes one record of several. The room `altgrad.monitor` makes these records.
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
