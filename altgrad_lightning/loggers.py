"""What loggers are given: numbers all of them, pictures those that can show them.

Tags are `altgrad/` and what is shown: histograms `steps/{format}` and `steps/{format}/{layer}`,
pictures and the `verdict`. What a logger raises is raised.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from altgrad import Histogram
from altgrad.measurement import FORMAT_METRICS
from altgrad.report import Verdict, cell_text, png

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from altgrad.report import Advice, Assessment

_LEADING = (
    *("kept_update_ratio", "stall_frac", "never_moved_frac"),
    *("update_error", "visible_frac", "steps_median_log2"),
)
_OF_LAYERS = ("kept_update_ratio", "stall_frac")
_COLUMNS = ("layer", "format", "verdict", "kept_update_ratio", "stall_frac", "reason")
_MOST_ROWS = 100  # of the verdict's text; all layers are in the run file


def can_show(loggers: Iterable[Any]) -> bool:
    """Whether any of them shows pictures, so that they are worth making."""
    return any(_is_tensorboard(logger) or _is_wandb(logger) for logger in loggers)


def scalars(
    logger: Any, step: int, of_model: Mapping[str, float], others: Mapping[str, float]
) -> None:
    """Numbers, in one call.

    MLflow keeps a key as a file, and ``altgrad/stall_frac/bf16`` cannot be one and the folder of
    the layers' as well: there the keys of the model end in ``/model``.

    Args:
        logger: One of the Trainer's.
        step: The step to log at.
        of_model: By key, those of the model.
        others: By key, all others.
    """
    if "MLFlowLogger" in _classes(logger):
        of_model = {f"{key}/model": value for key, value in of_model.items()}
    logger.log_metrics({**of_model, **others}, step=step)


def layout(loggers: Iterable[Any], formats: Sequence[str], *, layers: bool = True) -> None:
    """The page "Custom Scalars" of TensorBoard: charts of several lines, those that say most first.

    Of the model a chart per metric with a line per format; of the charted layers, two charts per
    format with a line per layer. Once per run: it replaces the layout that the run has had.

    Args:
        loggers: Those of the Trainer.
        formats: Names of the formats, each of which gets charts of its layers.
        layers: Whether any layer is charted.
    """
    for logger in loggers:
        if _is_tensorboard(logger):
            logger.experiment.add_custom_scalars(_layout(formats, layers=layers))


def histograms(loggers: Iterable[Any], step: int, histograms: Mapping[str, Histogram]) -> None:
    """Histograms of log2(abs(update) / stiffness), each octave a bin.

    Args:
        loggers: Those of the Trainer.
        step: The step to log at.
        histograms: By ``steps/{format}`` of the model, and ``steps/{format}/{layer}``. One without
            an element is left out.
    """
    some = {f"altgrad/{key}": each for key, each in histograms.items() if any(each.counts)}
    for logger in loggers if some else ():
        if _is_tensorboard(logger):
            for tag, each in some.items():
                logger.experiment.add_histogram_raw(tag, **_raw(each), global_step=step)
        elif _is_wandb(logger):
            from wandb import Histogram as Chart

            charts = {tag: Chart(np_histogram=_with_edges(each)) for tag, each in some.items()}
            logger.log_metrics(charts, step)


def pictures(loggers: Iterable[Any], step: int, figures: Mapping[str, Figure]) -> None:
    """Drawings, each under ``altgrad/{key}``."""
    able = [logger for logger in loggers if can_show([logger])]
    images = {f"altgrad/{key}": _image(figure) for key, figure in figures.items()} if able else {}
    for logger in able if images else ():
        if _is_tensorboard(logger):
            import numpy as np

            for tag, image in images.items():
                pixels = np.asarray(image)
                logger.experiment.add_image(tag, pixels, step, dataformats="HWC")
        else:
            from wandb import Image as Picture

            logger.log_metrics({tag: Picture(image) for tag, image in images.items()}, step)


def verdict(loggers: Iterable[Any], step: int, assessment: Assessment) -> None:
    """What to do, layer by layer: a text in TensorBoard, a table in wandb."""
    for logger in loggers:
        if _is_tensorboard(logger):
            logger.experiment.add_text("altgrad/verdict", verdict_markdown(assessment), step)
        elif _is_wandb(logger):
            from wandb import Table

            rows = [_row(advice) for advice in assessment.advice]
            table = Table(columns=[*_COLUMNS], data=rows)
            logger.log_metrics({"altgrad/verdict": table}, step)


def verdict_markdown(assessment: Assessment) -> str:
    """The verdict as Markdown: the summary, and a table of layers by formats, the worst first."""
    by_layer = assessment.by_layer
    formats = list(dict.fromkeys(advice.format for advice in assessment.advice))
    lines = [_escaped(assessment.summary), ""]
    if len(by_layer) > _MOST_ROWS:
        lines += [f"The worst {_MOST_ROWS} of {len(by_layer):,} layers:", ""]
    lines += [_table_row(["layer", *map(_escaped, formats), "smallest that stores it"])]
    lines += [_table_row(["---"] * (len(formats) + 2))]
    for layer in [*by_layer][:_MOST_ROWS]:
        cells = [_escaped(cell_text(by_layer[layer].get(format)) or "–") for format in formats]
        suggestion = assessment.suggestions.get(layer)
        lines += [_table_row([_escaped(layer), *cells, _escaped(suggestion or "none: fp32")])]
    lines += ["", "The number is kept_update_ratio, the share of the update that the format keeps."]
    seen = {advice.verdict for advice in assessment.advice}
    lines += ["", *(f"- {each.short}: {_escaped(each.value)}" for each in Verdict if each in seen)]
    return "\n".join(lines)


# --- the loggers, by name: each Lightning has its own classes, and an import of wandb is slow


def _is_tensorboard(logger: Any) -> bool:
    return "TensorBoardLogger" in _classes(logger)


def _is_wandb(logger: Any) -> bool:
    return "WandbLogger" in _classes(logger)


def _classes(logger: Any) -> Iterator[str]:
    return (each.__name__ for each in type(logger).__mro__)


# --- layout


def _layout(formats: Sequence[str], *, layers: bool) -> dict[str, dict[str, list[Any]]]:
    """Categories of charts; a chart's lines are those whose tags match a regular expression."""
    leading = {metric: _lines(f"altgrad/{metric}/", "[^/]+") for metric in _LEADING}
    others = [metric for metric in FORMAT_METRICS if metric not in _LEADING]
    categories = {"AltGrad: model": leading}
    if layers:
        categories["AltGrad: layers that keep least"] = {
            f"{metric}, {format}": _lines(f"altgrad/{metric}/{format}/", ".+")
            for format in formats
            for metric in _OF_LAYERS
        }
    more = {metric: _lines(f"altgrad/{metric}/", "[^/]+") for metric in others}
    return categories | {"AltGrad: model, more": more}


def _lines(prefix: str, rest: str) -> list[Any]:
    return ["Multiline", [f"^{re.escape(prefix)}{rest}$"]]


# --- histograms and images


def _raw(histogram: Histogram) -> dict[str, Any]:
    """What TensorBoard knows of a histogram; sums as if all elements lay in the middle of a bin."""
    first, counts = histogram
    full = [k for k, count in enumerate(counts) if count]
    middles = [first + k + 0.5 for k in range(len(counts))]
    return {
        # It draws the first bin that is not empty from `min` on, and the last one up to `max`.
        "min": first + full[0],
        "max": first + full[-1] + 1,
        "num": math.fsum(counts),
        "sum": math.fsum(x * n for x, n in zip(middles, counts, strict=True)),
        "sum_squares": math.fsum(x * x * n for x, n in zip(middles, counts, strict=True)),
        "bucket_limits": [first + k + 1 for k in range(len(counts))],
        "bucket_counts": [*counts],
    }


def _with_edges(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """As numpy has it."""
    import numpy as np

    first, counts = histogram
    return np.array(counts), first + np.arange(len(counts) + 1)


def _image(figure: Figure) -> Image:
    from PIL import Image

    return Image.open(io.BytesIO(png(figure))).convert("RGB")


# --- the verdict


def _row(advice: Advice) -> list[Any]:
    figures = [advice.figures.get(name, math.nan) for name in ("kept_update_ratio", "stall_frac")]
    return [advice.layer, advice.format, str(advice.verdict), *figures, advice.reason]


def _table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """For Markdown, which reads nothing into the number of a character."""
    return "".join(c if c.isalnum() or c in " .,:;%" else f"&#{ord(c)};" for c in text)
