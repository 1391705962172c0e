"""The catalogue: what it says of each metric is so."""

import math
import re

import pytest
import torch

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, Metric, as_markdown
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measure import measure
from altgrad.measurement.measurer import Measurer
from altgrad.quantization.format_set import FormatSet
from tests.measurement.definitions import DTYPES, INFOS, SCALINGS, SPECIAL, a_step, key_of

CATALOGUE = {**LAYER_METRICS, **FORMAT_METRICS}


def lies_in(value: float, text: str, n: int) -> bool:
    """Whether a range as the catalogue writes it has the value; NaN is in every one."""
    if math.isnan(value) or text == "real or inf":
        return True
    if text == "real":
        return math.isfinite(value)
    bound = re.fullmatch(r"([≥>]) ([\d.]+)", text)
    if bound:
        limit = float(bound[2])
        return limit <= value < math.inf and (bound[1] == "≥" or value > limit)
    low, high = text.replace("−", "-").replace("n", str(n)).split(" … ")
    return float(low) * (1 - 1e-12) <= value <= float(high) * (1 + 1e-12) or value in (
        float(low),
        float(high),
    )


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("≥ 0", [0.0, 5.0], [-1e-9, math.inf]),
        ("> 0", [1e-9], [0.0]),
        ("1 … n", [1.0, 7.0], [0.9, 7.1]),
        ("−31.5 … 31.5", [-31.5, 0.0, 31.5], [-32.5, 32.5]),
        ("real", [-3.0], [math.inf]),
    ],
)
def test_ranges_are_read_as_they_are_meant(
    text: str, inside: list[float], outside: list[float]
) -> None:
    assert all(lies_in(value, text, 7) for value in (*inside, math.nan))
    assert not any(lies_in(value, text, 7) for value in outside)


@pytest.mark.parametrize("metric", CATALOGUE.values(), ids=list(CATALOGUE))
def test_every_entry_says_what_it_is(metric: Metric) -> None:
    assert CATALOGUE[metric.name] is metric
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
    assert metric.unit
    assert metric.high
    assert lies_in(math.nan, metric.range, 1)
    assert lies_in(1.0, metric.range, 2)  # a range that can be read
    assert f"| {metric.name} | {metric.unit} | {metric.range} | {metric.high} |" in as_markdown()
    assert metric.unit != "share" or metric.range == "0 … 1"


def test_no_name_is_twice_in_the_catalogue() -> None:
    assert len(CATALOGUE) == len(LAYER_METRICS) + len(FORMAT_METRICS)


@pytest.mark.parametrize("scaling", SCALINGS, ids=key_of)
@pytest.mark.parametrize("seed", range(5))
def test_every_value_lies_in_the_stated_range(seed: int, scaling: object) -> None:
    steps = [a_step(dtype, seed) for dtype in DTYPES] + list(SPECIAL.values()) * (seed == 0)
    for step in steps:
        for key, value in measure(*step, list(INFOS), scaling).items():
            metric = CATALOGUE[key.split("/")[0]]
            assert lies_in(value, metric.range, step[0].numel()), (key, value)


def test_keys_are_those_of_the_catalogue() -> None:
    names = ["bf16", "e5m2"]
    figures = tensor_figures(names, Measurer(FormatSet(names)).measure_tensor(*torch.zeros(2, 0)))
    assert list(figures) == [
        *LAYER_METRICS,
        *(f"{metric}/{name}" for name in ("bf16", "e5m2") for metric in FORMAT_METRICS),
    ]
