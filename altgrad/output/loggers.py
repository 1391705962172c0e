"""Log numbers, pictures, histograms and verdicts with loggers such as those of Lightning.

A logger has a method `log_metrics`. Numbers go to every logger. TensorBoard and wandb also get
pictures, histograms and verdicts. Each function has a branch for each kind of logger. Errors of
loggers pass to the caller, `output`, which handles them.

Keys are ``altgrad/{key}``, with keys such as ``steps/{format}`` and ``steps/{format}/{layer}`` for
histograms and ``verdict`` for the table of verdicts. TensorBoard has tags of its own, for its
groups of cards: see `tensorboard`, which is the next file.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from altgrad.measurement.histogram import Histogram
from altgrad.output.charts import Row
from altgrad.output.panels import Lines
from altgrad.output.summary_writer import WriterLogger
from altgrad.output.tensorboard import HEADLINE_GROUP, TensorBoardRuns, find_tag, make_layout
from altgrad.report import (
    list_actions,
    rank_layers,
    write_answer,
    write_sentence,
    write_verdicts,
    write_word,
)
from altgrad.report.canvas import draw_pixels

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from altgrad.report import Advice, Assessment, Header, RunAdvice

_COLUMNS = ("layer", "recipe", "verdict", "kept", "frozen_frac", "reason")
_WHOLE_RUN = "(whole run)"  # in the column of layers
# Of a name: some put all hyperparameters into it. The header of a run file takes 10,000.
_MOST_CHARACTERS = 1000


def can_show(loggers: Iterable[Any]) -> bool:
    """Return True if at least one logger shows pictures."""
    return any(_is_tensorboard(logger) or _is_wandb(logger) for logger in loggers)


def describe_runs(loggers: Iterable[Any]) -> list[dict[str, str | None]]:
    """Describe the run by the name, id and version that each logger has for it.

    Args:
        loggers: Loggers of the Trainer.

    Returns:
        For each logger the name of its class under ``logger``, then ``name``, ``id`` and
        ``version`` of the run, each cut to 1,000 characters, or None if the logger has no such
        value.
    """
    return [
        {
            "logger": type(logger).__name__,
            "name": _ask(_find_run_name, logger),
            "id": _ask(_find_run_id, logger),
            "version": _ask(_find_version, logger),
        }
        for logger in loggers
    ]


def wrap_loggers(loggers: Iterable[Any]) -> list[Any]:
    """Return the loggers for `log_row`, those of TensorBoard wrapped in `TensorBoardRuns`.

    The wrapper adds a TensorBoard run for each format and recipe beside the user's run.
    """
    return [TensorBoardRuns(each) if _is_tensorboard(each) else each for each in loggers]


def close_runs(logger: Any) -> None:
    """Close what `wrap_loggers` has added to a logger, and leave the user's own run open."""
    if isinstance(logger, TensorBoardRuns):
        logger.close()


def name_logger(logger: Any) -> str:
    """Return the name of the class of a logger, for notices."""
    return logger.name if isinstance(logger, TensorBoardRuns) else type(logger).__name__


def log_row(logger: Any, row: Row) -> None:
    """Log the numbers of a step in one call, with the keys ``altgrad/{metric}…``.

    For MLflow the keys of the model get the end ``/model``, and characters that MLflow does not
    allow become ``_``. TensorBoard has tags of its own: see `tensorboard`.

    Args:
        logger: A logger of the Trainer, or one of `wrap_loggers`.
        row: The numbers of the step.
    """
    if isinstance(logger, TensorBoardRuns):
        logger.log_row(row)
        return
    model, others = row.flatten()
    if _is_mlflow(logger):
        # MLflow's FileStore keeps a metric as a file at the path of its key. The keys of layers
        # make a folder of altgrad/stall_frac/bf16, which therefore cannot be a file, too.
        # https://github.com/mlflow/mlflow/blob/master/mlflow/store/tracking/file_store.py
        model = {f"{key}/model": value for key, value in model.items()}
        model, others = _clean_for_mlflow(model), _clean_for_mlflow(others)
    logger.log_metrics({**model, **others}, step=row.step)


def log_layout(loggers: Iterable[Any], row: Row) -> None:
    """Arrange charts of several lines on the page "Custom Scalars" of TensorBoard.

    A later call replaces the arrangement.

    Args:
        loggers: Loggers of the Trainer; only TensorBoard has such a page.
        row: A row with all figures that are logged.
    """
    for logger in loggers:
        if _is_tensorboard(logger):
            logger.experiment.add_custom_scalars(make_layout(row))


def log_histograms(loggers: Iterable[Any], step: int, histograms: Mapping[str, Histogram]) -> None:
    """Log histograms of log2(abs(update) / spacing), one bin per octave, a factor of two.

    The spacing is the distance between neighbouring numbers of the format at a weight.

    Args:
        loggers: Loggers of the Trainer.
        step: The step to log at.
        histograms: Histograms by key: ``steps/{format}`` for the model, ``steps/{format}/{layer}``
            for a layer. Empty histograms are left out.
    """
    filled = {key: each for key, each in histograms.items() if any(each.counts)}
    for logger in loggers if filled else ():
        if _is_tensorboard(logger):
            for key, each in filled.items():
                raw = _convert_for_tensorboard(each)
                logger.experiment.add_histogram_raw(find_tag(key), **raw, global_step=step)
        elif _is_wandb(logger):
            from wandb import Histogram as Chart

            charts = {
                f"altgrad/{key}": Chart(np_histogram=_convert_for_numpy(each))
                for key, each in filled.items()
            }
            logger.log_metrics(charts, step)


def log_pictures(loggers: Iterable[Any], step: int, figures: Mapping[str, Figure]) -> None:
    """Log matplotlib figures as images.

    Args:
        loggers: Loggers of the Trainer.
        step: The step to log at.
        figures: Figures by key.
    """
    able = [logger for logger in loggers if can_show([logger])]
    images = {key: draw_pixels(figure) for key, figure in figures.items()} if able else {}
    for logger in able if images else ():
        if _is_tensorboard(logger):
            for key, image in images.items():
                logger.experiment.add_image(find_tag(key), image, step, dataformats="HWC")
        else:
            from wandb import Image as Picture

            shown = {f"altgrad/{key}": Picture(image) for key, image in images.items()}
            logger.log_metrics(shown, step)


def log_panels(loggers: Iterable[Any], step: int, panels: Mapping[str, Lines]) -> None:
    """Log a chart of the headline with a line for each recipe, a way to store weights, to wandb.

    Args:
        loggers: Loggers of the Trainer; only wandb has such panels.
        step: The step to log at.
        panels: Steps and values of each line, by name of the metric and of the recipe.
    """
    for logger in loggers:
        if _is_wandb(logger) and panels:
            from wandb.plot import line_series

            charts = {
                f"{HEADLINE_GROUP}/{metric}": line_series(
                    [steps for steps, _ in lines.values()],
                    [values for _, values in lines.values()],
                    keys=[*lines],
                    title=metric,
                    xname="step",
                )
                for metric, lines in panels.items()
            }
            logger.log_metrics(charts, step)


def log_verdict(
    loggers: Iterable[Any], step: int, assessment: Assessment, header: Header | None = None
) -> None:
    """Log the verdicts on a run and its layers, as text in TensorBoard and as a table in wandb.

    wandb also gets the answer and the verdict on each recipe in the summary of the run.

    Args:
        loggers: Loggers of the Trainer.
        step: The step to log at.
        assessment: The verdicts.
        header: The header of the run file, for how the run is stored, and the next recipe; None
            leaves both out.
    """
    for logger in loggers:
        if _is_tensorboard(logger):
            logger.experiment.add_text("altgrad/verdict", write_verdicts(assessment, header), step)
        elif _is_wandb(logger):
            from wandb import Table

            rows = [_make_run_row(advice) for advice in assessment.runs.values()]
            rows += [_make_row(a) for own in rank_layers(assessment).values() for a in own.values()]
            table = Table(columns=[*_COLUMNS], data=rows)
            logger.log_metrics({"altgrad/verdict": table}, step)
            logger.experiment.summary.update(_summarize(assessment.runs))


# --- the kinds of loggers
#
# Loggers of others are known by the names of their classes: `lightning` and `pytorch_lightning`
# define each logger twice, and an import of wandb is slow.


def _is_tensorboard(logger: Any) -> bool:
    known = (WriterLogger, TensorBoardRuns)
    return isinstance(logger, known) or "TensorBoardLogger" in _class_names(logger)


def _is_wandb(logger: Any) -> bool:
    return "WandbLogger" in _class_names(logger)


def _is_mlflow(logger: Any) -> bool:
    return "MLFlowLogger" in _class_names(logger)


def _class_names(logger: Any) -> Iterator[str]:
    return (each.__name__ for each in type(logger).__mro__)


# --- the run


def _find_run_name(logger: Any) -> object:
    if _is_wandb(logger):  # the logger's own name is that of the project
        return logger.experiment.name
    if _is_mlflow(logger):  # the logger's own name is the id of the experiment
        return logger.experiment.get_run(logger.run_id).info.run_name
    return logger.name


def _find_run_id(logger: Any) -> object:
    if _is_wandb(logger):
        return logger.experiment.id
    return logger.run_id if _is_mlflow(logger) else None


def _find_version(logger: Any) -> object:
    return logger.version


def _ask(question: Callable[[Any], object], logger: Any) -> str | None:
    """Return ``question(logger)`` as text, cut to 1,000 characters; None after an error.

    A result of None stays None.
    """
    text = None
    with suppress(Exception):  # a run file is written without it
        answer = question(logger)
        text = None if answer is None else str(answer)[:_MOST_CHARACTERS]
    return text


# --- names of metrics


def _clean_for_mlflow(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers with ``_`` in place of characters in keys that MLflow does not allow."""
    # Lightning removes these characters with a warning for each key, and then two layers may have
    # one key: lightning/pytorch/loggers/mlflow.py. Here, equal keys get a number.
    cleaned: dict[str, float] = {}
    for key, value in numbers.items():
        short = re.sub("[^a-zA-Z0-9_/. -]", "_", key)
        names = itertools.chain([short], (f"{short}_{n}" for n in itertools.count(2)))
        cleaned[next(name for name in names if name not in cleaned)] = value
    return cleaned


# --- histograms and images


def _convert_for_tensorboard(histogram: Histogram) -> dict[str, Any]:
    """Return a histogram as the arguments of TensorBoard's ``SummaryWriter.add_histogram_raw``.

    Sum and sum of squares are computed as if each element were in the middle of its bin.
    """
    first, counts = histogram
    filled = [k for k, count in enumerate(counts) if count]
    middles = [first + k + 0.5 for k in range(len(counts))]
    return {
        # TensorBoard draws the first filled bin from `min` on, and the last one up to `max`:
        # https://github.com/tensorflow/tensorboard/blob/master/tensorboard/plugins/histogram/README.md
        "min": first + filled[0],
        "max": first + filled[-1] + 1,
        "num": math.fsum(counts),
        "sum": math.fsum(x * n for x, n in zip(middles, counts, strict=True)),
        "sum_squares": math.fsum(x * x * n for x, n in zip(middles, counts, strict=True)),
        "bucket_limits": [first + k + 1 for k in range(len(counts))],
        "bucket_counts": [*counts],
    }


def _convert_for_numpy(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Return a histogram as arrays: counts, (bins,), and edges of the bins in log2, (bins + 1,)."""
    import numpy as np

    first, counts = histogram
    return np.array(counts), first + np.arange(len(counts) + 1)


# --- the verdict


def _make_run_row(advice: RunAdvice) -> list[Any]:
    figures = [advice.kept, advice.frozen_frac]
    return [_WHOLE_RUN, advice.recipe, advice.verdict.short, *figures, write_sentence(advice)]


def _make_row(advice: Advice) -> list[Any]:
    figures = [advice.kept, advice.figures.get("frozen_frac", math.nan)]
    return [advice.layer, advice.recipe, advice.verdict.short, *figures, advice.reason]


def _summarize(runs: Mapping[str, RunAdvice]) -> dict[str, str | float]:
    """Return the answer, what to do, and the verdict on each recipe, for the summary of a run."""
    summary: dict[str, str | float] = {
        "altgrad/answer": write_answer(runs),
        "altgrad/to_do": " ".join(list_actions(runs)),
    }
    for recipe, advice in runs.items():
        summary[f"altgrad/verdict_word/{recipe}"] = write_word(advice)
        summary[f"altgrad/frozen_share/{recipe}"] = advice.frozen_share
    return summary
