"""`WriterLogger`: log to a SummaryWriter of torch as to the TensorBoard logger of Lightning.

Read `loggers` first, which knows a logger for TensorBoard by the attribute `experiment`, a
SummaryWriter. This is the last file of this room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from altgrad.output.scalars import write_scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class WriterLogger:
    """A logger that writes to a ``torch.utils.tensorboard.SummaryWriter``.

    Args:
        writer: The SummaryWriter. It is never closed here.

    Attributes:
        experiment: The SummaryWriter.
        name: Name of the run, which a SummaryWriter does not know: None.
        version: The folder of the SummaryWriter.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self.experiment = writer
        self.name = None
        self.version = getattr(writer, "log_dir", None)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write numbers as scalars, all in one event.

        Args:
            metrics: The numbers by tag.
            step: The step to write them at.
        """
        write_scalars(self.experiment, metrics, step)
