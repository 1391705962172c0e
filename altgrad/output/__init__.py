"""Write the figures of a run to a run file and to loggers, draw its pictures, and judge it.

An `Output` does this for every way to train: for `altgrad.watch` and `altgrad.integrations`, and
for the callback of `altgrad_lightning`. It needs no trainer, and loads no logger.

Read `output` first. `charts` turns figures into rows of numbers, `history` and `panels` keep
figures for pictures, and `loggers` passes numbers, pictures and verdicts to each kind of logger;
`tensorboard` has the groups and runs of TensorBoard, and `scalars` writes the numbers of a step to
it. `summary_writer` makes a logger of a SummaryWriter of torch. `summary` writes the verdicts at
the end of a training. An `Output` takes one record for each step: `altgrad.measurement.merging`
merges those of several optimizers before.
"""

from altgrad.measurement.merging import merge_records
from altgrad.output.charts import ChartKind, check_charts, check_layer_charts
from altgrad.output.output import Output, OutputSettings, explain_skipped
from altgrad.output.summary import show_summary, write_state, write_summary
from altgrad.output.summary_writer import WriterLogger

__all__ = [
    "ChartKind",
    "Output",
    "OutputSettings",
    "WriterLogger",
    "check_charts",
    "check_layer_charts",
    "explain_skipped",
    "merge_records",
    "show_summary",
    "write_state",
    "write_summary",
]
