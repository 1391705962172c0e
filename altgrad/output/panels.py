"""`Panels`: keep the headline of a run in bounded memory, for charts with a line per recipe.

wandb draws a panel for each key. Charts that compare recipes are therefore made of all values so
far, and logged anew with the pictures.

Read `history` first. The next file is `loggers`, which logs the panels.
"""

from __future__ import annotations

import math

from altgrad.output.charts import Row

PANELS = ("progress_kept", "frozen_layers")
"""Metrics with a panel in which each recipe, a way to store weights, has a line."""

Lines = dict[str, tuple[list[int], list[float]]]
"""Steps and values of each line, by name of the recipe.

A *recipe* says how weights and optimizer states are stored.
"""


class Panels:
    """The values of the headline over a run, at a limited number of steps.

    Args:
        most_steps: Maximum number of steps; before one more, every second step is dropped.
    """

    def __init__(self, most_steps: int = 200) -> None:
        self._most_steps = most_steps
        self._every = 1  # rows of the run for each row that is kept
        self._seen = 0
        self._rows: list[tuple[int, dict[str, float]]] = []

    def add(self, row: Row) -> None:
        """Keep the headline of a row, or of every second, fourth, … in a long run."""
        self._seen += 1
        if (self._seen - 1) % self._every:
            return
        if len(self._rows) == self._most_steps:
            self._rows = self._rows[::2]
            self._every *= 2
            if (self._seen - 1) % self._every:
                return
        shown = {k: v for k, v in row.model.items() if k.partition("/")[0] in PANELS}
        self._rows.append((row.step, shown))

    def list_lines(self) -> dict[str, Lines]:
        """Return the lines of each panel, by name of the metric, without missing values.

        Returns:
            Steps and values by name of the metric, and then of the recipe.
        """
        panels: dict[str, Lines] = {}
        for step, values in self._rows:
            for key, value in values.items():
                if math.isfinite(value):
                    metric, _, recipe = key.partition("/")
                    steps, points = panels.setdefault(metric, {}).setdefault(recipe, ([], []))
                    steps.append(step)
                    points.append(value)
        return panels
