"""`Figures`: reading them in several ways, and models of models."""

import copy
import math
import pickle
import statistics

import numpy as np
import pytest
import torch
from scipy import stats

from altgrad import Figures, SamplingRule, StepRecord, UpdateMonitor
from altgrad.measurement.catalogue import figure_keys
from altgrad.measurement.columns import ELEMENTS, FORMAT_SUMS, POPULATION, SUMS
from altgrad.measurement.figures import model_figures, tensor_figures, vector_figures
from altgrad.measurement.measurer import Measurer
from altgrad.quantization.format_set import FormatSet

FORMATS = ("bf16", "e4m3fn", "e2m1")
ERRORS = ("kept_update_ratio", "stall_frac", "never_moved_frac")
RULES = [SamplingRule("p1", formats=["bf16"]), SamplingRule("p2", formats=["e2m1", "e4m3fn"])]


def a_record(seed: int = 0, sampling: object = (), recipes: object = ()) -> StepRecord:
    """Make a record of samples, none of which is weighted by a power of two."""
    torch.manual_seed(seed)
    parameters = {f"p{i}": torch.randn(3000 + 137 * i) for i in range(7)}
    parameters["small"] = torch.ones(40)
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-3)
    settings = {"formats": FORMATS, "max_elements": 1000, "sampling": sampling, "recipes": recipes}
    monitor = UpdateMonitor([*parameters.items()], strict=True, **settings)
    with monitor.attach(optimizer):
        for each in parameters.values():
            each.grad = torch.randn_like(each)
        optimizer.step()
    return monitor.latest


def list_figures(record: StepRecord) -> list[Figures]:
    return [*record.layers.values(), record.model, model_figures([*record.layers.values()])]


@pytest.mark.parametrize("seed", range(10))
def test_medians_of_a_sampled_model_are_not_nan(seed: int) -> None:
    """The first octave is a difference, which rounding may make negative."""
    model = a_record(seed).model
    assert model["ulp_median_log2"] > 0
    assert all(abs(model[f"steps_median_log2/{name}"]) < 32 for name in FORMATS)
    assert all(min(model.histogram(f"steps/{name}").counts) >= 0 for name in FORMATS)
    assert sum(model.histogram("steps/bf16").counts) == pytest.approx(
        model.population * (1 - model["ulp_zero_frac"]), rel=1e-9
    )


@pytest.mark.parametrize("sampling", [(), RULES], ids=["all", "rules"])
def test_in_order_returns_figures_in_the_order_of_keys(sampling: object) -> None:
    for figures in list_figures(a_record(sampling=sampling)):
        assert [*figures] == [*figure_keys(figures.formats)]
        assert list(figures.in_order()) == pytest.approx([*figures.values()], rel=0, nan_ok=True)
        expected = [
            figures.standard_error(f"{metric}/{format}")
            for format in figures.formats
            for metric in ERRORS
        ]
        assert list(figures.errors_in_order(ERRORS)) == pytest.approx(expected, rel=0, nan_ok=True)


def test_a_model_of_models_equals_the_model_of_all_layers() -> None:
    record = a_record(sampling=RULES)
    layers = [*record.layers.values()]
    parts = model_figures([model_figures(layers[:3]), *layers[3:5], model_figures(layers[5:])])
    assert parts.elements == record.model.elements
    assert parts.population == record.model.population
    for key, value in record.model.items():
        assert parts[key] == pytest.approx(value, rel=1e-12, nan_ok=True), key
        assert parts.standard_error(key) == pytest.approx(
            record.model.standard_error(key), rel=1e-9, nan_ok=True
        ), key


@pytest.mark.parametrize("sampling", [(), RULES], ids=["all", "rules"])
def test_the_standard_error_of_a_model_equals_that_of_strata(sampling: object) -> None:
    """The expected value is Cochran's Σ w² (1 − f) n² / (n − 1) variance of the residuals."""
    torch.manual_seed(0)
    measurer, several = Measurer(FormatSet(("bf16",), None)), []
    for population, size in ((5000, 1000), (12_345, 777), (300, 300)):
        before = torch.randn(size)
        row = measurer.measure_tensor(before, before + torch.randn(size) * 2e-3)
        row[POPULATION] = population
        several.append(row)
    figures = [tensor_figures(measurer.formats.names, row) for row in several]
    if sampling:  # a layer that is not judged does not count
        row = Measurer(FormatSet([])).measure_tensor(*torch.zeros(2, 0))
        row[POPULATION], row[ELEMENTS] = 999.0, 100.0
        figures.append(tensor_figures([], row))
    model = model_figures(figures)
    named = [dict(zip((*SUMS, *FORMAT_SUMS), row.tolist(), strict=False)) for row in several]
    share, variance, total = model["stall_frac/bf16"], 0.0, 0.0
    for sums in named:
        n, weight = int(sums["elements"]), sums["population"] / sums["elements"]
        judged, stalled = int(sums["judged"]), int(sums["judged"] - sums["effective"])
        residuals = [1 - share] * stalled + [-share] * (judged - stalled) + [0.0] * (n - judged)
        variance += weight**2 * (1 - 1 / weight) * n * statistics.variance(residuals)
        total += weight * judged
    # Wilson's interval is a little wider than twice the standard deviation.
    assert model.standard_error("stall_frac/bf16") == pytest.approx(
        math.sqrt(variance) / total, rel=0.01
    )
    assert share == pytest.approx(
        sum(s["population"] / s["elements"] * (s["judged"] - s["effective"]) for s in named) / total
    )


def test_the_histogram_of_weights_of_a_model_stands_for_all_elements() -> None:
    """The expected counts are those of all weights; a sample of 1,000 knows a share to 0.05."""
    torch.manual_seed(0)
    large = torch.full((30, 1000), 0.75)
    large[:10] = 3.0
    parameters = {"large": large, "small": torch.tensor([0.5, 0.0, torch.nan, -0.25])}
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-6)
    with UpdateMonitor([*parameters.items()], max_elements=1000).attach(optimizer) as monitor:
        for each in parameters.values():
            each.grad = torch.ones_like(each)
        optimizer.step()
    first, counts = monitor.latest.model.histogram("weights")
    found = {first + k: count for k, count in enumerate(counts) if count}
    assert found[1] == pytest.approx(10_000, rel=0.15)
    assert found[-1] == pytest.approx(20_001, rel=0.15)
    assert found[-2] == 1
    assert sum(counts) == pytest.approx(30_002)


def test_the_interval_lies_around_the_figure_and_is_wilsons_for_a_share() -> None:
    torch.manual_seed(0)
    measurer, before = Measurer(FormatSet(("bf16",), None)), torch.randn(500)
    row = measurer.measure_tensor(before, before + torch.randn(500) * 2e-3)
    row[POPULATION] = 1e9
    figures = tensor_figures(("bf16",), row)
    stalled = round(500 * figures["stall_frac/bf16"])
    wilson = stats.binomtest(stalled, 500).proportion_ci(0.95, method="wilson")
    assert figures.interval("stall_frac/bf16") == pytest.approx((wilson.low, wilson.high), rel=0.01)
    kept, error = (
        read("kept_update_ratio/bf16") for read in (figures.__getitem__, figures.standard_error)
    )
    low, high = figures.interval("kept_update_ratio/bf16")
    assert (low, high) == pytest.approx((kept - 1.96 * error, kept + 1.96 * error), rel=1e-4)
    assert all(map(math.isnan, figures.interval("update_rms")))
    with pytest.raises(KeyError, match="stall"):
        figures.interval("stall")


def test_figures_survive_copy_and_pickle() -> None:
    record = a_record(recipes=("bf16", "bf16-sr"))
    for figures in list_figures(record):
        for other in (copy.deepcopy(figures), pickle.loads(pickle.dumps(figures))):
            assert other == figures
            assert other.formats == figures.formats
            assert other.recipes == figures.recipes


def test_the_next_step_does_not_change_an_earlier_record() -> None:
    parameter = torch.ones(40)
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    records: list[StepRecord] = []
    with UpdateMonitor([("w", parameter)], records.append, strict=True).attach(optimizer):
        for size in (1.0, 7.0):
            parameter.grad = torch.full((40,), size)
            optimizer.step()
    rms = [record.layers["w"]["gradient_rms"] for record in records]
    assert rms == pytest.approx([1.0, 7.0], rel=1e-12)


@pytest.mark.parametrize("sampling", [(), RULES], ids=["all", "rules"])
def test_layer_vectors_give_the_figures_of_the_layers(sampling: object) -> None:
    record = a_record(sampling=sampling)
    found = record.model.layer_vectors(record.model.formats)
    assert len(found) == len(record.layers)
    for (vector, judged), figures in zip(found, record.layers.values(), strict=True):
        assert judged == figures.formats
        alone = vector_figures(record.model.formats, vector)
        assert {key: alone[key] for key in figures} == pytest.approx(
            dict(figures), rel=0, abs=0, nan_ok=True
        )
        ((own, _),) = figures.layer_vectors(record.model.formats)
        assert np.array_equal(own, vector)


@pytest.mark.parametrize("key", ["steps", "steps/e5m2", "ulps/bf16", "ulp", "stall_frac/bf16"])
def test_unknown_histograms_raise_key_error(key: str) -> None:
    row = Measurer(FormatSet("bf16")).measure_tensor(*torch.zeros(2, 0))
    figures = tensor_figures(["bf16"], row)
    with pytest.raises(KeyError, match=r"expected one of .*ulps.*steps/bf16"):
        figures.histogram(key)


# Twins


def test_figures_of_twins_follow_the_others() -> None:
    """A run with twins has the figures of one without, and more keys."""
    record, plain = a_record(recipes=("bf16", "bf16-sr"), sampling=RULES), a_record(sampling=RULES)
    for figures, without in zip(list_figures(record), list_figures(plain), strict=True):
        assert figures.recipes == ("bf16", "bf16-sr")
        assert [*figures] == [*without, *figures.twin_keys]
        assert len(figures) == len(dict(figures))
        assert {key: figures[key] for key in without} == dict(without)
        assert [*figures.in_order()] == pytest.approx([*without.in_order()], rel=0, nan_ok=True)
        assert [*figures.twins_in_order()] == pytest.approx(
            [figures[key] for key in figures.twin_keys], rel=0, nan_ok=True
        )
        assert figures.twin_keys[0] == "progress_kept/bf16"
        assert figures["progress_kept/bf16-sr"] == figures.twins["progress_kept/bf16-sr"]
        assert figures.moved_elements > 0
        low, high = figures.interval("frozen_frac/bf16")
        assert low <= figures["frozen_frac/bf16"] <= high
        assert without.recipes == without.twin_keys == ()
        assert [*without.twins_in_order()] == []
        assert math.isnan(without.moved_elements)


def test_the_error_of_a_sample_of_twins_is_read_by_key() -> None:
    record = a_record(recipes="bf16")
    assert 0 < record.layers["p0"].standard_error("frozen_frac/bf16") < 0.05
    assert record.layers["small"].standard_error("frozen_frac/bf16") == 0
    assert math.isnan(record.model.standard_error("drift/bf16"))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("progress_kept/e4m3fn", r"metric/recipe, with a recipe of \('bf16',\)"),
        ("progress_kept", r"metric/recipe, with a recipe of \('bf16',\)"),
        ("update_rms/bf16", "expected metric"),
        ("stall_frac/bf16-sr", "metric/format, with a format of"),
        ("progres_kept/bf16", "nearest: progress_kept"),
        ("exp_avg_ratio/bf16", "a state of"),
    ],
)
def test_unknown_keys_raise_key_error(key: str, message: str) -> None:
    figures = a_record(recipes="bf16").model
    for read in (figures.__getitem__, figures.standard_error, figures.interval):
        with pytest.raises(KeyError, match=message):
            read(key)


def test_models_of_layers_with_and_without_twins_keep_those_of_twins() -> None:
    with_twins, plain = a_record(recipes="bf16"), a_record(seed=1)
    model = model_figures([with_twins.model, plain.model])
    assert model.recipes == ("bf16",)
    for key in with_twins.model.twin_keys:
        expected = with_twins.model[key]
        assert model[key] == pytest.approx(expected, rel=1e-12, nan_ok=True)
