"""The catalogue: names, ranges and tables of metrics."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from altgrad.measurement.catalogue import (
    FORMAT_METRICS,
    LAYER_METRICS,
    STATE_METRICS,
    TWIN_METRICS,
    Metric,
    as_markdown,
    get_metric,
    twin_keys,
)
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measure import measure
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.twin_figures import split_twins
from altgrad.quantization.format_set import FormatSet
from tests.measurement.definitions import DTYPES, INFOS, SCALINGS, SPECIAL, a_step, make_key
from tests.measurement.twins import measure_layers

CATALOGUE = {**LAYER_METRICS, **FORMAT_METRICS, **TWIN_METRICS}


def lies_in(value: float, text: str, n: int) -> bool:
    """Return True if a range of the catalogue includes a value; NaN is in every range."""
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
def test_lies_in_reads_ranges(text: str, inside: list[float], outside: list[float]) -> None:
    assert all(lies_in(value, text, 7) for value in (*inside, math.nan))
    assert not any(lies_in(value, text, 7) for value in outside)


@pytest.mark.parametrize("metric", CATALOGUE.values(), ids=list(CATALOGUE))
def test_every_metric_has_a_readable_range_and_is_in_the_docs_table(metric: Metric) -> None:
    assert CATALOGUE[metric.name] is metric
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
    assert metric.unit
    assert metric.high
    assert lies_in(math.nan, metric.range, 1)
    assert lies_in(1.0, metric.range, 2)  # the range has a known form
    assert f"| {metric.name} | {metric.unit} | {metric.range} | {metric.high} |" in as_markdown()
    assert metric.unit != "share" or metric.range == "0 … 1"


def test_names_in_the_catalogue_are_unique() -> None:
    assert len(CATALOGUE) == len(LAYER_METRICS) + len(FORMAT_METRICS) + len(TWIN_METRICS)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_metric_is_found_by_its_name(name: str) -> None:
    assert get_metric(name) is CATALOGUE[name]


@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq", "momentum_buffer", "v"])
@pytest.mark.parametrize(
    ("ending", "unit"), [("ratio", "1"), ("error", "1"), ("zero_frac", "share")]
)
def test_a_metric_of_a_state_has_the_name_of_the_state_in_it(
    state: str, ending: str, unit: str
) -> None:
    metric = get_metric(f"{state}_{ending}")
    assert metric == STATE_METRICS[f"{{state}}_{ending}"]._replace(name=f"{state}_{ending}")
    assert metric.unit == unit
    assert f"| {{state}}_{ending} | {unit} | {metric.range} | {metric.high} |" in as_markdown()


@pytest.mark.parametrize(
    ("name", "near"),
    [("stal_frac", "stall_frac"), ("progres_kept", "progress_kept"), ("_zero_frac", "zero_frac")],
)
def test_an_unknown_metric_is_answered_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown metric '{name}'; nearest: .*{near}"):
        get_metric(name)


def test_the_keys_of_twins_are_those_of_each_recipe_in_turn() -> None:
    keys = twin_keys(("bf16", "bf16-sr"), ("exp_avg_sq",))
    own = [*TWIN_METRICS, "exp_avg_sq_ratio", "exp_avg_sq_error", "exp_avg_sq_zero_frac"]
    assert [*keys] == [f"{metric}/{recipe}" for recipe in ("bf16", "bf16-sr") for metric in own]
    assert twin_keys((), ("exp_avg_sq",)) == ()


@pytest.mark.parametrize("seed", range(5))
def test_figures_of_twins_lie_in_the_stated_range(seed: int) -> None:
    layers, model = split_twins(measure_layers(("a", "b"), seed), ("a", "b"))
    for figures in (*layers.values(), model):
        for key, value in figures.items():
            assert lies_in(value, get_metric(key.split("/")[0]).range, 1), (key, value)
            assert not math.isnan(value)


@pytest.mark.parametrize("scaling", SCALINGS, ids=make_key)
@pytest.mark.parametrize("seed", range(5))
def test_figures_lie_in_the_stated_range(seed: int, scaling: object) -> None:
    steps = [a_step(dtype, seed) for dtype in DTYPES] + list(SPECIAL.values()) * (seed == 0)
    for step in steps:
        for key, value in measure(*step, list(INFOS), scaling).items():
            metric = CATALOGUE[key.split("/")[0]]
            assert lies_in(value, metric.range, step[0].numel()), (key, value)


def test_figures_have_a_key_for_each_metric_of_the_catalogue() -> None:
    names = ["bf16", "e5m2"]
    figures = tensor_figures(names, Measurer(FormatSet(names)).measure_tensor(*torch.zeros(2, 0)))
    assert list(figures) == [
        *LAYER_METRICS,
        *(f"{metric}/{name}" for name in ("bf16", "e5m2") for metric in FORMAT_METRICS),
    ]


# Adding a metric

ROOT = Path(__file__).parents[2]
MEASURED = """
import torch
from altgrad import UpdateMonitor, measure

model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with UpdateMonitor(model, formats="bf16", strict=True).attach(optimizer) as monitor:
    model(torch.tensor([[1.0, 0.0, 0.0, 2.0]])).sum().backward()
    optimizer.step()
record = monitor.latest
name = "nonzero_gradient_frac"
print(record.layers["weight"][name], record.layers["bias"][name], record.model[name])
print(record.layers["weight"].standard_error(name))
print(measure(torch.ones(2), torch.ones(2), torch.tensor([0.0, 1.0]))[name])
"""


def test_the_two_lines_in_docs_architecture_add_a_metric(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    blocks = re.findall(r'^```python title="(\S+), .*"\n(.*)\n```$', page, re.MULTILINE)
    after = {
        "measurement/catalogue.py": '"few elements carry the update"),\n',
        "measurement/metrics.py": '"energy_concentration": _energy_concentration,\n',
    }
    assert [file for file, _ in blocks] == [*after]
    shutil.copytree(ROOT / "altgrad", tmp_path / "altgrad")
    for file, line in blocks:
        module = tmp_path / "altgrad" / file
        text, place = module.read_text(), after[file]
        assert text.count(place) == 1
        module.write_text(text.replace(place, f"{place}    {line.strip('{}')},\n"))
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    # Two of four inputs are not 0: 8 of 16 weights, and all 4 biases, have a gradient.
    assert ran.stdout.split() == ["0.5", "1.0", "0.6", "0.0", "0.5"], ran.stderr
