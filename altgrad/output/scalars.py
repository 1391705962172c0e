"""Write the numbers of a step to TensorBoard as one event, where a call per number makes many.

TensorBoard reads the same tags, steps and values from one event with all numbers of a step as from
an event for each number.

Read `tensorboard` first, which says which numbers go to which run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def write_scalars(writer: Any, scalars: Mapping[str, float], step: int) -> None:
    """Write numbers as `SummaryWriter.add_scalar` does, all in one event.

    A SummaryWriter of another package than torch, or one with an `add_scalar` of its own, gets a
    call of `add_scalar` for each number.

    Args:
        writer: The SummaryWriter.
        scalars: The numbers by tag.
        step: The step to write them at.
    """
    # tensorboardX has events of its own, and a method that a user has replaced does more.
    is_plain = _find_module(writer, "add_scalar") == "torch.utils.tensorboard.writer"
    # The file of a writer that was closed is None, until add_scalar opens the next one.
    file = writer.file_writer if is_plain else None
    if file is None:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

    values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
    file.add_summary(Summary(value=values), step)


def log_scalars(logger: Any, scalars: Mapping[str, float], step: int) -> None:
    """Log numbers as `log_metrics` of a logger does, in one event if it has Lightning's method.

    Args:
        logger: A logger with a SummaryWriter as ``experiment``.
        scalars: The numbers by tag.
        step: The step to log them at.
    """
    prefix = _find_prefix(logger)
    if prefix is None:
        logger.log_metrics(scalars, step=step)
    else:
        named = {f"{prefix}-{tag}" if prefix else tag: each for tag, each in scalars.items()}
        write_scalars(logger.experiment, named, step)


def _find_prefix(logger: Any) -> str | None:
    """Return the prefix of the tags of a TensorBoardLogger; None for another logger.

    None also stands for a subclass with a `log_metrics` of its own.
    """
    # Lightning's method adds the prefix, which no public attribute has, and calls add_scalar:
    # https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/fabric/loggers/tensorboard.py
    if not _find_module(logger, "log_metrics").endswith("fabric.loggers.tensorboard"):
        return None
    prefix = getattr(logger, "_prefix", None)
    return prefix if isinstance(prefix, str) else None


def _find_module(owner: Any, method: str) -> str:
    """Return the name of the module that defines a method; empty if it is unknown."""
    return str(getattr(getattr(owner, method, None), "__module__", ""))
