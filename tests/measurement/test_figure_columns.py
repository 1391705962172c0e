"""`split_columns`: columns have what each layer has, read one by one; and each is computed once."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from altgrad import Figures, UpdateMonitor
from altgrad.measurement import standard_errors
from altgrad.measurement.figure_columns import split_columns
from altgrad.measurement.merging import merge_records
from altgrad.measurement.metrics import FORMULAS
from altgrad.observation.rules import SamplingRule
from tests.report.twin_runs import draw_gradients, make_layers


def observe(**settings: Any) -> dict[str, Figures]:
    """Return the figures of layers of one optimizer, of another one, and of other formats."""
    torch.manual_seed(0)
    net = make_layers(
        **{name: torch.randn(30, 100) for name in ("a", "b", "c")},
        small=torch.randn(5),
    )
    optimizers = [
        torch.optim.AdamW([net["a"], net["c"], net["small"]], 1e-3),
        torch.optim.SGD([net["b"]], 1e-3),
    ]
    sampling = [SamplingRule("c", formats=["bf16"])]
    monitor = UpdateMonitor(
        net,
        formats=["bf16", "e4m3fn"],
        sampling=sampling,
        max_elements=500,
        strict=True,
        **settings,
    )
    records = []
    with monitor.attach(*optimizers):
        for number, optimizer in enumerate(optimizers):
            draw_gradients(net, number)
            optimizer.step()
            records.append(monitor.latest)
    return dict(merge_records(records).layers)


@pytest.mark.parametrize("recipes", [(), ("bf16", "bf16-sr")])
def test_columns_have_the_figures_and_errors_of_each_layer(recipes: tuple[str, ...]) -> None:
    layers = observe(recipes=recipes)
    groups = split_columns(layers)
    assert sorted(name for each in groups for name in each.layers) == sorted(layers)
    assert len(groups) == 3  # two optimizers, and a layer with other formats
    for columns in groups:
        own = [layers[name] for name in columns.layers]
        for key in own[0]:
            expected = [figures[key] for figures in own]
            assert columns.figures[key] == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
            expected = [figures.standard_error(key) for figures in own]
            assert columns.errors[key] == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
        assert [*columns.figures] == [*columns.errors] == [*own[0]]
        assert len(columns.figures) == len(own[0])
        assert columns.list_names("stall_frac") == [*own[0].formats]
        assert columns.list_names("progress_kept") == [*own[0].recipes]
        for row in columns.rows:
            assert row.figures is layers[row.layer]
            known = row.errors["stall_frac/bf16"]
            assert known == row.figures.standard_error("stall_frac/bf16")
        for unknown in ("stall_frac/e5m2", "progress_kept/e5m2", "nothing"):
            assert unknown not in columns.figures
            with pytest.raises(KeyError):
                columns.figures[unknown]


def test_each_figure_and_error_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {name: own for name, own in observe(recipes=()).items() if name != "b"}
    calls: Counter[str] = Counter()
    for name, formula in FORMULAS.items():

        def call(n: Any, name: str = name, formula: Any = formula) -> Any:
            calls[name] += 1
            return formula(n)

        monkeypatch.setitem(FORMULAS, name, call)
    for _ in range(2):
        for columns in split_columns(layers):
            for key in columns.figures:
                columns.figures[key]
        for figures in layers.values():
            assert len(figures.in_order()) == len({**figures})
            assert math.isnan(figures.get("unknown", math.nan))
    # Those that the monitor itself read were computed before the count.
    assert calls.keys() | {"update_rms", "saturated_frac"} == FORMULAS.keys()
    assert {*calls.values()} == {1}


def test_errors_that_verdicts_and_files_need_are_computed_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []
    real = standard_errors.standard_errors

    def count(sums: Any, *others: Any) -> Any:
        calls.append(sums.a.shape)
        return real(sums, *others)

    layers = {name: own for name, own in observe(recipes=("bf16",)).items() if name != "b"}
    for module in ("step_table", "twin_table"):
        monkeypatch.setattr(f"altgrad.measurement.{module}.standard_errors", count)
    stated = ("kept_update_ratio", "stall_frac", "never_moved_frac")
    twins = ("progress_kept", "window_progress_kept", "frozen_frac", "still_frac")
    for columns in split_columns(layers):
        for metric in stated + twins:
            columns.errors[f"{metric}/bf16"]
    for figures in layers.values():
        figures.errors_in_order((*stated, "underflow_frac", "saturated_frac"))
        figures.twins.errors_in_order(twins)
    assert len(calls) == 2
    # Rows are the layers and the models; keys are 5 metrics under 2 formats, and 4 of twins.
    assert [columns for _, columns in calls] == [10, 4]
    layers["a"].standard_error("visible_frac/bf16")
    assert len(calls) == 3
