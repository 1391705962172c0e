"""`TensorBoardRuns`: log rows to TensorBoard, in groups of cards, with one colour per recipe.

A *recipe* says how weights and optimizer states are stored.

TensorBoard opens on a page that groups cards by the first part of a tag, sorts groups and cards by
name, and colours lines by run. A tag is therefore ``{group}/{metric}[/{layer}]``, and each format
and recipe writes to a run of its own, in the folder ``altgrad/{name}`` of the user's run: a card
shows all of them, each in the colour of its run. Figures without a format, and those of the
training itself (``now``), are in the user's run.

Read `loggers` first, which knows what each logger can show. The next file is `scalars`, which
writes the numbers of a step.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from altgrad.measurement.catalogue import NOW
from altgrad.output.charts import HEADLINE, Row
from altgrad.output.scalars import log_scalars, write_scalars

HEADLINE_GROUP = "1-AltGrad"
MODEL_GROUP = "2-AltGrad-model"
LAYERS_GROUP = "3-AltGrad-layers"
MAPS_GROUP = "4-AltGrad-maps"
RANGES_GROUP = "5-AltGrad-ranges"
STEPS_GROUP = "6-AltGrad-steps"
"""The groups of cards in TensorBoard, which sorts them by name: digits come before letters."""
# tensorboardX replaces other characters in tags than these and "-", "/", ".":
# https://github.com/lanpa/tensorboardX/blob/master/tensorboardX/summary.py, _clean_tag
_PLAIN = re.compile(r"[^\w.+-]")


class TensorBoardRuns:
    """A TensorBoard run of the user, and beside it a run for each format and recipe.

    A recipe says how weights and optimizer states are stored.

    Args:
        logger: A logger with a SummaryWriter as ``experiment``.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._writers: dict[str, Any] = {}
        # A run that is never closed is complete all the same when the process ends.
        self._closing = weakref.finalize(self, _close, self._writers)

    @property
    def experiment(self) -> Any:
        """The SummaryWriter of the user's run."""
        return self._logger.experiment

    @property
    def name(self) -> str:
        """The name of the class of the user's logger."""
        return type(self._logger).__name__

    def log_row(self, row: Row) -> None:
        """Write the numbers of a step, each to the run of its format or recipe."""
        own: dict[str, float] = {}
        others: dict[str, dict[str, float]] = {}
        for tag, name, value in _list_tags(row):
            if name in ("", NOW):
                own[tag] = value
            elif self._find_writer(name) is None:
                own[f"{tag}/{name}"] = value
            else:
                others.setdefault(name, {})[tag] = value
        for name, scalars in others.items():
            write_scalars(self._find_writer(name), scalars, row.step)
        log_scalars(self._logger, own, row.step)

    def close(self) -> None:
        """Close the runs of formats and recipes, and leave that of the user open."""
        _close(self._writers)
        self._writers.clear()

    def _find_writer(self, name: str) -> Any:
        """Return the writer of a format or recipe; None if the user's writer has no folder."""
        if name not in self._writers:
            main = self.experiment
            folder = getattr(main, "log_dir", None) or getattr(main, "logdir", None)
            # A subclass may have other arguments. tensorboardX has a class of this name, too.
            kinds = [each for each in type(main).__mro__ if each.__name__ == "SummaryWriter"]
            if not (folder and kinds):
                return None
            self._writers[name] = kinds[-1](f"{folder}/altgrad/{_PLAIN.sub('_', name)}")
        return self._writers[name]


def find_tag(key: str) -> str:
    """Return the tag of a picture or histogram with this key, such as ``ranges``."""
    group = {"ranges": RANGES_GROUP, "steps": STEPS_GROUP}.get(key.partition("/")[0], MAPS_GROUP)
    return f"{group}/{key}"


def make_layout(row: Row) -> dict[str, dict[str, list[Any]]]:
    """Return the charts of the page “Custom Scalars”: those of the cards, with a line per run.

    A chart of layers has a line for each layer and run: colours say the format, markers the layer.

    Args:
        row: A row with all figures that are logged.

    Returns:
        By title of the group and chart, the pattern of the tags that the chart shows.
    """
    groups: dict[str, dict[str, list[Any]]] = {}
    for tag, _, _ in _list_tags(row):
        group, _, rest = tag.partition("/")
        is_layer = group == LAYERS_GROUP
        metric = rest.partition("/")[0] if is_layer else rest
        pattern = f"^{re.escape(f'{group}/{metric}')}{'/.+' if is_layer else ''}$"
        # TensorBoard draws a line for each tag that matches a regular expression:
        # https://github.com/tensorflow/tensorboard/tree/master/tensorboard/plugins/custom_scalar
        groups.setdefault(group, {})[metric] = ["Multiline", [pattern]]
    return {group: groups[group] for group in sorted(groups)}


def _list_tags(row: Row) -> Iterator[tuple[str, str, float]]:
    """Yield the tag of each number of a row, the name of its format or recipe, and the number."""
    monitor = {f"monitor/{name}": value for name, value in row.monitor.items()}
    for key, value in (row.model | monitor).items():
        is_monitor = key in monitor
        metric, _, name = (key, "", "") if is_monitor else key.partition("/")
        is_headline = _is_headline(key.rpartition("/")[2] if is_monitor else metric, key, row.model)
        yield f"{HEADLINE_GROUP if is_headline else MODEL_GROUP}/{metric}", name, value
    for layer, figures in row.layers.items():
        for key, value in figures.items():
            metric, _, name = key.partition("/")
            yield f"{LAYERS_GROUP}/{metric}/{layer}", name, value


def _is_headline(metric: str, key: str, model: Mapping[str, float]) -> bool:
    """Return True if a figure belongs to the headline, the group of cards that sums up a run.

    This includes kept_update_ratio of a format that no twin, a sample stored so, tries.

    Args:
        metric: Name of the metric.
        key: Key of the figure, ``{metric}`` or ``{metric}/{format}``.
        model: All figures of the model, by key.
    """
    if metric != "kept_update_ratio":
        return metric in HEADLINE
    name = key.partition("/")[2]
    return f"progress_kept/{name}" not in model and f"frozen_layers/{name}" in model


def _close(writers: Mapping[str, Any]) -> None:
    for writer in [*writers.values()]:
        with suppress(Exception):  # a full disk, while others may be closed
            writer.close()
