"""`TwinTable`: figures and standard errors of twins, of layers and of the model they form."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from altgrad.measurement.catalogue import twin_metrics
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.twin_figures import TwinFigures, TwinValues, split_twins
from altgrad.measurement.twin_sums import RATIOS, TwinColumns
from altgrad.measurement.twin_table import TwinTable, find_weighted_median
from tests.measurement.twins import (
    RECIPES,
    STATES,
    choose,
    flatten,
    make_stacks,
    measure_layers,
    measure_sample,
    repeat,
)

METRICS = twin_metrics(STATES)
WITHOUT_ERROR = {
    *("drift", "moved_rms"),
    *(f"{state}_{end}" for state in STATES for end in ("ratio", "error")),
}


def make_row(**pairs: tuple[float, float]) -> Numbers:
    """Make a vector with some Σ a and Σ b; all other sums are 0."""
    columns = TwinColumns(STATES)
    row = np.zeros(len(columns))
    for name, (a, b) in pairs.items():
        start = 5 * columns.ratios.index(name)
        row[start : start + 5] = a, b, a * a, a * b, b * b
    row[5 * len(columns.ratios) :] = (1.5, math.nan, 7)
    return row


def test_figures_are_quotients_roots_and_medians() -> None:
    row = make_row(
        progress_kept=(3.0, 4.0),
        drift=(9.0, 4.0),
        moved_rms=(4.0, 256.0),
        exp_avg_error=(1.0, 4.0),
    )
    table = TwinTable(STATES, row[None], np.array([[1000.0, 256.0, 0.0]]))
    figures = dict(zip(METRICS, table.figures[0], strict=True))
    known = {name: value for name, value in figures.items() if not math.isnan(value)}
    assert known == {
        "progress_kept": 0.75,
        "drift": 1.5,
        "moved_rms": 0.125,
        "exp_avg_ratio": 1.5,
        "exp_avg_error": 0.5,
    }
    assert [*table.columns] == [*METRICS]
    assert table.moved == [7]


def test_a_layer_that_never_moved_has_no_progress_and_is_not_called_frozen() -> None:
    high, _ = make_stacks(1, 64, 0)
    no = torch.zeros_like(high.moved)
    still = high._replace(
        window=high.start, before=high.start, now=high.start, moved=no, moved_in_window=no
    )
    table = measure_sample(["w"], still, [still, still], [10_000]).table
    for row, errors in zip(table.figures, list_errors(table), strict=True):
        figures = dict(zip(METRICS, row, strict=True))
        found = {name for name in RATIOS if not math.isnan(figures[name])}
        shares = {"moved_since_start_frac", "twin_nonfinite_frac"}
        assert found == {"moved_rms", "decay_projection"} | shares
        assert all(figures[name] == 0 for name in found)
        unknown = {name for name, error in zip(METRICS, errors, strict=True) if math.isnan(error)}
        assert unknown >= {*RATIOS} - found


@pytest.mark.parametrize("seed", range(20))
def test_the_weighted_median_is_that_of_numbers_repeated_by_weight(seed: int) -> None:
    random = np.random.default_rng(seed)
    numbers = random.integers(0, 6, 7).astype(float)
    weights = random.integers(0, 4, 7)
    numbers[random.random(7) < 0.2] = np.nan
    repeated = [each for each in np.repeat(numbers, weights).tolist() if not math.isnan(each)]
    expected = statistics.median_low(repeated) if repeated else math.nan
    found = find_weighted_median(numbers, weights.astype(float))
    assert found == pytest.approx(expected, rel=0, nan_ok=True)


def test_the_median_of_nothing_is_nan() -> None:
    assert math.isnan(find_weighted_median(np.array([]), np.array([])))
    assert math.isnan(find_weighted_median(np.array([np.nan]), np.array([5.0])))


def test_a_model_counts_each_sample_by_population_over_sample() -> None:
    """The expected figures are those of rows that are repeated as often as they stand for."""
    high, twins = make_stacks(3, 10, 0)
    populations = [20, 50, 10]
    split = measure_sample(["a", "b", "c"], high, twins, populations)
    _, model = split_twins(split, ["a", "b", "c"])
    everyone = torch.arange(30).repeat_interleave(torch.tensor([2, 5, 1]).repeat_interleave(10))
    high, *twins = (choose(flatten(stack), everyone.view(1, -1)) for stack in (high, *twins))
    whole, _ = split_twins(measure_sample(["w"], high, twins, [80]), ["w"])
    for key, figure in whole["w"].items():
        if not key.startswith(("exp_avg_ratio", "exp_avg_sq_ratio")):
            assert model[key] == pytest.approx(figure, rel=1e-12), key
    for key in ("exp_avg_ratio/lower", "exp_avg_sq_ratio/lower"):
        each = [split_twins(split, [name])[0][name][key] for name in ("a", "b", "c")]
        expected = statistics.median_low(np.repeat(each, populations).tolist())
        assert model[key] == pytest.approx(expected, rel=1e-12)


def test_the_moved_rms_of_a_model_is_that_of_the_elements_that_its_samples_stand_for() -> None:
    """Layers differ in sample, population and size of movements, and some elements are NaN."""
    names, sizes, populations = ["a", "b", "c"], [40, 7, 256], [40, 7_000, 512]
    high, twins = make_stacks(3, 256, 0)
    high.now[2].sub_(high.start[2]).mul_(100).add_(high.start[2])
    high.now[0, 3] = twins[1].window[1, 2] = math.nan  # the latter in the second recipe alone
    values = measure_sample(names, high, twins, populations, sizes=sizes)
    layers, model = split_twins(values, names)
    for recipe, low in zip(RECIPES, twins, strict=True):
        key, everyone = f"moved_rms/{recipe}", []
        for row, name in enumerate(names):
            elements = torch.stack([*high[:4], *low[:4]])[:, row, : sizes[row]].T.tolist()
            moves = [each[3] - each[0] for each in elements if all(map(math.isfinite, each))]
            assert layers[name][key] == pytest.approx(find_rms(moves), rel=1e-12)
            everyone += moves * (populations[row] // sizes[row])
        assert model[key] == pytest.approx(find_rms(everyone), rel=1e-12)


def find_rms(numbers: Sequence[float]) -> float:
    return math.sqrt(math.fsum(each * each for each in numbers) / len(numbers))


def test_rows_are_converted_to_other_states() -> None:
    table = measure_layers(["a", "b"], states=STATES[:1]).table
    states = ("other", "exp_avg")
    other = TwinTable(states, table.convert_rows(states, [2, 0]), table.counted[[2, 0]])
    for row, old in enumerate((2, 0)):
        for name, place in table.columns.items():
            assert other.figures[row][other.columns[name]] == table.figures[old][place]
        assert math.isnan(other.figures[row][other.columns["other_ratio"]])
        assert math.isnan(other.figures[row][other.columns["other_zero_frac"]])
    assert other.moved == [table.moved[2], table.moved[0]]
    assert np.array_equal(table.convert_rows(STATES[:1], [1]), table.vectors[1:2])


# Standard errors


def list_errors(table: TwinTable) -> np.ndarray:
    """Return the errors of each row, in the order of `METRICS`."""
    return np.stack([table.estimate_errors(name) for name in METRICS], axis=1)


def test_all_elements_leave_no_error() -> None:
    high, twins = make_stacks(2, 300, 0)
    table = measure_sample(["a", "b"], high, twins, [300, 300]).table
    for row in list_errors(table):
        errors = dict(zip(METRICS, row, strict=True))
        assert {name for name, error in errors.items() if math.isnan(error)} == WITHOUT_ERROR
        assert all(errors[name] == 0 for name in METRICS if name not in WITHOUT_ERROR)


def test_a_sample_in_which_few_elements_moved_knows_shares_but_no_progress() -> None:
    high, twins = make_stacks(1, 256, 0)
    few = torch.arange(256).view(1, -1) < 60
    high = high._replace(
        now=torch.where(few, high.now, high.start),
        moved=high.moved & few,
        moved_in_window=high.moved_in_window & few,
    )
    table = measure_sample(["w"], high, twins, [1_000_000]).table
    errors = dict(zip(METRICS, list_errors(table)[1], strict=True))
    for name in ("progress_kept", "window_progress_kept", "step_projection"):
        assert math.isnan(errors[name])
    for name in ("frozen_frac", "still_frac", "twin_nonfinite_frac", "exp_avg_sq_zero_frac"):
        assert 0 < errors[name] < 0.1
    assert errors["decay_projection"] > 0  # carried by all weights, moved or not


def draw_samples(population: int, size: int, block: int, draws: int, seed: int) -> torch.Tensor:
    """Draw indices without replacement, in whole blocks, (draws, size)."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(draws, population // block, generator=generator)
    blocks = keys.argsort(dim=1)[:, : size // block]
    return (blocks.unsqueeze(2) * block + torch.arange(block)).flatten(1)


def find_coverage(figures: Sequence[TwinFigures], truth: TwinFigures, key: str) -> float:
    """Return the share of intervals that contain the truth, and check that errors are not wide.

    Those of shares of few elements are: a sample has none or one.
    """
    intervals = [each.interval(key) for each in figures]
    if "_frac" not in key or truth[key] > 0.05:
        spread = statistics.stdev(each[key] for each in figures)
        assert statistics.median(each.standard_error(key) for each in figures) < 1.8 * spread, key
    return statistics.mean(low <= truth[key] <= high for low, high in intervals)


ESTIMATES = [
    f"{metric}/{recipe}"
    for metric in METRICS
    for recipe in RECIPES
    if metric not in {*WITHOUT_ERROR, "twin_nonfinite_frac"}
]


@pytest.mark.parametrize("block", [1, 16])
def test_intervals_of_a_layer_contain_the_truth(block: int) -> None:
    """Of 300 samples of 256 of 8,192 elements."""
    draws, population = 300, 8192
    high, twins = make_stacks(1, population, 0, alike=block)
    truth = split_twins(measure_sample(["w"], high, twins, [population]), ["w"])[0]["w"]
    indices = draw_samples(population, 256, block, draws, seed=1)
    names = [str(k) for k in range(draws)]
    high, *twins = (choose(repeat(stack, draws), indices) for stack in (high, *twins))
    values = measure_sample(names, high, twins, [population] * draws, block=block)
    figures = [*split_twins(values, names)[0].values()]
    for key in ESTIMATES:
        assert find_coverage(figures, truth, key) >= 0.9, key


def test_intervals_of_a_model_contain_the_truth() -> None:
    """Of 200 models of three layers, one of which has a sample of blocks."""
    draws, populations, blocks = 200, (2048, 8192, 4096), (1, 1, 16)
    names = [[f"{layer}-{k}" for k in range(draws)] for layer in range(3)]
    whole, samples = [], []
    for layer, (population, block) in enumerate(zip(populations, blocks, strict=True)):
        grids = 0.02 * 4**layer, 0.3
        high, twins = make_stacks(1, population, layer, coarseness=grids, alike=block)
        whole.append(measure_sample([str(layer)], high, twins, [population]))
        indices = draw_samples(population, 256, block, draws, seed=layer)
        high, *twins = (choose(repeat(stack, draws), indices) for stack in (high, *twins))
        many = [population] * draws
        samples.append(measure_sample(names[layer], high, twins, many, block=block))
    truth = split_twins(TwinValues.join(whole), ["0", "1", "2"])[1]
    values = TwinValues.join(samples)
    models = [split_twins(values, each)[1] for each in zip(*names, strict=True)]
    for key in ESTIMATES:
        assert find_coverage(models, truth, key) >= 0.9, key
