"""`Figures` of the rows of one table: whichever way they are read, and of models of models."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from altgrad import Figures, SamplingRule, StepRecord, UpdateMonitor
from altgrad.measurement.columns import FORMAT_SUMS, SUMS, LayerStatistics
from altgrad.measurement.figures import keys_of, metrics_of, model_figures
from altgrad.measurement.measurer import Measurer

FORMATS = ("bf16", "e4m3fn", "e2m1")
ERRORS = ("kept_update_ratio", "stall_frac", "never_moved_frac")
RULES = [SamplingRule("p1", formats=["bf16"]), SamplingRule("p2", formats=["e2m1", "e4m3fn"])]


def a_record(seed: int = 0, sampling: object = ()) -> StepRecord:
    """Of samples, none of which stands for a power of two as many elements."""
    torch.manual_seed(seed)
    parameters = {f"p{i}": torch.randn(3000 + 137 * i) for i in range(7)}
    parameters["small"] = torch.ones(40)
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-3)
    settings = {"formats": FORMATS, "max_elements": 1000, "sampling": sampling, "strict": True}
    with UpdateMonitor([*parameters.items()], **settings).attach(optimizer) as monitor:
        for each in parameters.values():
            each.grad = torch.randn_like(each)
        optimizer.step()
    return monitor.latest


def all_of(record: StepRecord) -> list[Figures]:
    return [*record.layers.values(), record.model, model_figures([*record.layers.values()])]


@pytest.mark.parametrize("seed", range(10))
def test_the_medians_of_a_model_of_samples_have_a_value(seed: int) -> None:
    """The first octave is what is not in the others, which rounding may make less than nothing."""
    model = a_record(seed).model
    assert model["ulp_median_log2"] > 0
    assert all(abs(model[f"steps_median_log2/{name}"]) < 32 for name in FORMATS)
    assert all(min(model.histogram(f"steps/{name}").counts) >= 0 for name in FORMATS)
    assert sum(model.histogram("steps/bf16").counts) == pytest.approx(
        model.population * (1 - model["zero_update_frac"]), rel=1e-9
    )


@pytest.mark.parametrize("sampling", [(), RULES], ids=["all", "rules"])
def test_values_in_their_order_are_those_of_the_keys(sampling: object) -> None:
    for figures in all_of(a_record(sampling=sampling)):
        assert [*figures] == [*keys_of(figures.formats)]
        assert list(figures.in_order()) == pytest.approx([*figures.values()], rel=0, nan_ok=True)
        expected = [
            figures.standard_error(f"{metric}/{format}")
            for format in figures.formats
            for metric in ERRORS
        ]
        assert list(figures.errors_in_order(ERRORS)) == pytest.approx(expected, rel=0, nan_ok=True)


def test_a_model_of_models_is_that_of_all_their_layers() -> None:
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
def test_the_standard_error_of_a_model_is_that_of_strata(sampling: object) -> None:
    """Cochran: Σ w² (1 − f) n / (n − 1) Σ residual², over the layers judged; by hand."""
    torch.manual_seed(0)
    measurer, several = Measurer(("bf16",), None), []
    for population, size in ((5000, 1000), (12_345, 777), (300, 300)):
        before = torch.randn(size)
        statistics = measurer.statistics_of(before, before + torch.randn(size) * 2e-3)
        statistics.sums[0] = population
        several.append(statistics)
    if sampling:  # and one that is not judged, and counts for nothing
        several.append(LayerStatistics.empty([]))
        several[-1].sums[:2] = torch.tensor([999.0, 100.0])
    model = model_figures(metrics_of(several))
    named = [dict(zip((*SUMS, *FORMAT_SUMS), s.sums.tolist(), strict=False)) for s in several[:3]]
    share, variance, total = model["stall_frac/bf16"], 0.0, 0.0
    for sums in named:
        n, weight = sums["elements"], sums["population"] / sums["elements"]
        judged, stalled = sums["judged"], sums["judged"] - sums["effective"]
        squares = stalled * (1 - share) ** 2 + (judged - stalled) * share**2
        variance += weight**2 * (1 - 1 / weight) * n / (n - 1) * squares
        total += weight * judged
    assert model.standard_error("stall_frac/bf16") == pytest.approx(
        math.sqrt(variance) / total, rel=1e-9
    )
    assert share == pytest.approx(
        sum(s["population"] / s["elements"] * (s["judged"] - s["effective"]) for s in named) / total
    )


def test_figures_are_copied_and_pickled() -> None:
    record = a_record()
    for figures in all_of(record):
        for other in (copy.deepcopy(figures), pickle.loads(pickle.dumps(figures))):
            assert other == figures
            assert other.formats == figures.formats


def test_a_record_holds_nothing_that_the_next_step_writes_to() -> None:
    parameter = torch.ones(40)
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    records: list[StepRecord] = []
    with UpdateMonitor([("w", parameter)], records.append, strict=True).attach(optimizer):
        for size in (1.0, 7.0):
            parameter.grad = torch.full((40,), size)
            optimizer.step()
    rms = [record.layers["w"]["gradient_rms"] for record in records]
    assert rms == pytest.approx([1.0, 7.0], rel=1e-12)


def test_a_metric_is_evaluated_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from altgrad.measurement.metrics import FORMAT_METRICS

    record, calls = a_record(), 0
    metric = FORMAT_METRICS["update_error"]

    def counted(numbers: object) -> Tensor:
        nonlocal calls
        calls += 1
        return formula(numbers)

    formula = metric.formula
    monkeypatch.setitem(metric.__dict__, "formula", counted)
    for figures in (*record.layers.values(), record.model):
        for name in FORMATS:
            assert figures[f"update_error/{name}"] > 0
    assert calls == 1
