"""`History` against a plain record of all added figures."""

import math

import pytest
from matplotlib.text import Text

from altgrad.measurement.layer_columns import LayerRow, gather_columns
from altgrad.output.history import History


def add(history: History, step: int, layers: dict[str, dict[str, float]]) -> None:
    history.add(step, gather_columns(LayerRow(name, own, {}) for name, own in layers.items()))


def test_a_short_run_keeps_the_figures_of_every_step() -> None:
    history = History("kept_update_ratio")
    add(history, 9, {"a": {"kept_update_ratio/bf16": 0.5, "stall_frac/bf16": 0.25}})
    add(history, 19, {"a": {"kept_update_ratio/bf16": 1.5}, "b": {"kept_update_ratio/e5m2": 0.75}})
    add(history, 29, {"b": {"kept_update_ratio/e5m2": math.nan}})
    assert history.get_means("bf16") == {"a": {9: 0.5, 19: 1.5}}
    means = history.get_means("e5m2")["b"]
    assert means.pop(29) != means.get(29)
    assert means == {19: 0.75}
    assert history.get_means("fp16") == {}


@pytest.mark.parametrize("most", [1, 2, 3, 8])
@pytest.mark.parametrize("steps", [1, 7, 8, 9, 16, 17, 100])
def test_a_long_run_has_means_over_columns_of_equal_width(most: int, steps: int) -> None:
    history = History(most_columns=most)
    added: dict[str, dict[int, float]] = {"always": {}, "rarely": {}, "never": {}}
    for step in range(steps):
        added["always"][step] = step / 128
        if step % 5 == 0:
            added["rarely"][step] = 1 - step / 128
        added["never"][step] = math.nan
        now = {layer: figures[step] for layer, figures in added.items() if step in figures}
        add(history, step, {layer: {"stall_frac/bf16": value} for layer, value in now.items()})
    width = history.per_column
    assert width == next(2**k for k in range(10) if most * 2**k >= steps)
    values = history.get_means("bf16")
    for layer, figures in added.items():
        columns: dict[int, list[float]] = {}
        for step, value in figures.items():
            columns.setdefault(step // width * width, []).append(value)
        expected = {first: sum(each) / len(each) for first, each in columns.items()}
        assert values[layer] == pytest.approx(expected, nan_ok=True, rel=1e-6)
    assert len(values["always"]) <= most


def test_the_title_of_a_heat_map_gives_the_steps_per_column() -> None:
    history = History(most_columns=2)
    for step in range(4):
        add(history, step, {"a": {"stall_frac/bf16": 0.5}})
    figures = history.draw_heat_maps()
    assert list(figures) == ["stall_frac_map/bf16"]
    texts = [text.get_text() for text in figures["stall_frac_map/bf16"].findobj(Text)]
    assert "stall_frac in bf16, means of 2 observed steps" in texts
