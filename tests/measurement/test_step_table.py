"""`StepTable`: rows of layers and of the model, and all figures as a matrix."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, figure_keys
from altgrad.measurement.columns import ELEMENTS, POPULATION, SUMS, max_count, sum_count
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.metrics import FORMULAS, Estimate, Sums, quiet
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.step_table import StepTable
from altgrad.quantization.format_set import FormatSet


@pytest.mark.parametrize("layers", [2, 3, 7, 8, 64, 101])
@pytest.mark.parametrize("formats", [1, 4])
def test_equal_sums_of_layers_stay_equal_in_the_model(layers: int, formats: int) -> None:
    """A share of 0 is exactly 0, and not −3e-16, whatever the weights of the layers are."""
    generator = torch.Generator().manual_seed(layers)
    counts = torch.randint(1, 1000, (layers, 1), generator=generator).double()
    sums = counts.expand(layers, sum_count(formats)).clone()
    sums[:, POPULATION] = 1000.0 + torch.arange(layers) * 7
    maxima = torch.zeros(layers, max_count(formats), dtype=torch.float64)
    names = [f"f{k}" for k in range(formats)]
    vectors = torch.cat((sums, maxima), dim=1).numpy()
    table, rows = StepTable.with_model(names, vectors, [names] * layers)
    model_sums = table.vectors[rows[None], : sum_count(formats)]
    assert model_sums[POPULATION] == model_sums[ELEMENTS]
    assert len({*model_sums.tolist()}) == 1
    assert [table.figure("unmoved_frac", row) for row in range(layers + 1)] == [0.0] * (layers + 1)
    assert (SUMS[POPULATION], SUMS[ELEMENTS]) == ("population", "elements")


NAMES = ("bf16", "e4m3fn", "e2m1")
JUDGED = [NAMES, ("bf16",), ("e2m1", "e4m3fn"), NAMES]


def a_table() -> StepTable:
    """Make four sampled layers of different sizes, not all judged for all formats."""
    measurer, rows = Measurer(FormatSet(NAMES)), []
    for seed, judged in enumerate(JUDGED):
        generator = torch.Generator().manual_seed(seed)
        before, noise, gradient = torch.randn(3, 300 + 10 * seed, generator=generator)
        rows.append(measurer.measure_tensor(before, before + noise * 1e-2, gradient))
        rows[-1][POPULATION] = 1000.0 + 37 * seed + len(judged)
    return StepTable.with_model(NAMES, torch.stack(rows).numpy(), JUDGED)[0]


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the evaluations of each formula from now on."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> None:
        formula = FORMULAS[name]

        def call(n: Sums) -> Numbers:
            calls[name] += 1
            return formula(n)

        monkeypatch.setitem(FORMULAS, name, call)

    for name in (*LAYER_METRICS, *FORMAT_METRICS):
        counting(name)
    return calls


def test_figures_of_a_row_are_ordered_by_format() -> None:
    table = a_table()
    assert [*table.columns] == [*figure_keys(NAMES)]
    for metric, formula in FORMULAS.items():
        with quiet():
            values = formula(table)
        formats = [None] if metric in LAYER_METRICS else NAMES
        assert values.shape == (len(table.vectors), len(formats))
        for place, format in enumerate(formats):
            column = table.columns[metric if format is None else f"{metric}/{format}"]
            expected = values[:, place].tolist()
            found = [row[column] for row in table.figures]
            assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True), metric


@pytest.mark.parametrize("first", ["saturated_frac/e2m1", "update_rms", None])
def test_figures_do_not_depend_on_the_order_of_reading(first: str | None) -> None:
    table, expected = a_table(), a_table().figures
    for key in [first] if first else figure_keys(NAMES):
        for row, figures in enumerate(expected):
            value = figures[table.columns[key]]
            assert table.figure(key, row) == value or math.isnan(value)
    assert len(expected) == len(table.vectors) == 4 + 3


def test_each_metric_is_computed_once_for_all_rows_and_formats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, calls = a_table(), counted(monkeypatch)
    rows = range(len(table.vectors))
    for key in ("saturated_frac/bf16", "saturated_frac/e2m1"):
        assert all(table.figure(key, row) >= 0 for row in rows)
    assert calls == {"saturated_frac": 1}
    for key in figure_keys(NAMES):
        for row in rows:
            table.figure(key, row)
    assert table.figures.shape == (len(table.vectors), len(table.columns))
    assert calls == dict.fromkeys(FORMULAS, 1)


def test_only_estimates_have_standard_errors() -> None:
    table = a_table()
    for key in figure_keys(NAMES):
        errors = [table.error(key, row) for row in range(len(table.vectors))]
        if isinstance(FORMULAS[key.partition("/")[0]], Estimate):
            assert all(0 <= error < 0.2 for error in errors), key
        else:
            assert all(map(math.isnan, errors)), key


def test_histograms_count_all_moved_elements() -> None:
    table = a_table()
    for row in range(len(table.vectors)):
        moved = table.sum("moved")[row].item()
        assert sum(table.counts("ulps", row)) == pytest.approx(moved, rel=1e-12)
        weights = table.sum("nonzero_weights")[row].item()
        assert sum(table.counts("weights", row)) == pytest.approx(weights, rel=1e-12)
        for place, format in enumerate(NAMES):
            judged = table.sum("judged")[row, place].item()
            assert sum(table.counts(f"steps/{format}", row)) == pytest.approx(judged, rel=1e-12)
            counts = table.histogram("steps")[:, place, row].tolist()
            assert table.counts(f"steps/{format}", row) == counts
        for key in ("ulps", "weights"):
            assert table.counts(key, row) == table.histogram(key)[:, 0, row].tolist()


def test_without_formats_there_are_the_figures_of_the_layer() -> None:
    row = Measurer(FormatSet([])).measure_tensor(torch.ones(5), torch.full((5,), 1.5))
    table = StepTable([], row.unsqueeze(0).numpy())
    assert [*table.columns] == [*LAYER_METRICS]
    assert table.figure("update_rms", 0) == 0.5
    assert len(table.figures[0]) == len(LAYER_METRICS)
    assert table.error("ulp_zero_frac", 0) == 0.0
    assert sum(table.counts("ulps", 0)) == sum(table.counts("weights", 0)) == 5


def test_converted_rows_are_empty_for_unknown_formats() -> None:
    table = a_table()
    wanted = ("e2m1", "fp16", "bf16")
    other = StepTable(wanted, table.convert_row(wanted, 0)[None])
    for key in figure_keys(("e2m1", "bf16")):
        value = table.figure(key, 0)
        assert other.figure(key, 0) == value or math.isnan(value)
    assert not other.vectors[0, sum_count(1) : sum_count(2)].any()
    assert other.max("stiffness")[0].tolist()[1] == -math.inf
    assert np.array_equal(table.convert_row(NAMES, 2), table.vectors[2])
