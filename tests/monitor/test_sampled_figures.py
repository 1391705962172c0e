"""Figures of samples: the elements, and the distance from figures of all elements."""

import math

import pytest
import torch

from altgrad import measure
from altgrad.measurement.columns import POPULATION
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.monitor.elements import sample_elements
from altgrad.quantization.format_set import FormatSet
from tests.monitor.watching import (
    FORMATS,
    assert_equal_figures,
    net,
    train,
    watched,
)


def test_sampled_figures_are_over_the_elements_that_the_seed_draws() -> None:
    model = net()
    optimizer, _, records = watched(model, max_elements=500, seed=3, scaling=None)
    train(model, optimizer, 2)
    indices = sample_elements("3.weight", (32, 720), 500, seed=3)
    for record, step in zip(records, optimizer.steps, strict=True):
        part = [each.flatten()[indices] for each in step["3.weight"]]
        assert_equal_figures(record.layers["3.weight"], measure(*part, FORMATS, None))
        assert record.layers["3.weight"].elements == 500
        assert record.layers["3.weight"].population == 32 * 720
        small = measure(*step["2.weight"], FORMATS, None)  # all 720 elements
        assert_equal_figures(record.layers["2.weight"], small)


def test_block_formats_sample_whole_blocks() -> None:
    model = net()
    optimizer, _, records = watched(model, formats=("mxfp4", "nvfp4"), max_elements=512)
    train(model, optimizer)
    indices = sample_elements("3.weight", (32, 720), 512, block=32)
    step = optimizer.steps[0]["3.weight"]
    blocks = [each.flatten()[indices].view(1, -1) for each in step]  # whole blocks, side by side
    expected = measure(*blocks, ("mxfp4",))
    assert_equal_figures(
        {k: v for k, v in records[0].layers["3.weight"].items() if not k.endswith("nvfp4")},
        expected,
    )


def test_the_models_sampled_figure_is_near_that_of_all_elements() -> None:
    """Layers are weighted by their number of elements; otherwise small layers would dominate."""
    model = net()
    with torch.no_grad():  # updates of large layers stall, those of small layers do not
        model[3].weight.add_(0.5)
    optimizer, _, records = watched(model, max_elements=500, scaling=None)
    train(model, optimizer)
    together = [
        torch.cat([each.flatten() for each in part])
        for part in zip(*optimizer.steps[0].values(), strict=True)
    ]
    truth = measure(*together, FORMATS, None)
    for key in ("stall_frac/bf16", "stall_frac/e4m3fn", "visible_frac/e4m3fn", "on_grid_frac/bf16"):
        error = records[0].model.standard_error(key)
        assert 0 <= error < 0.03
        assert abs(records[0].model[key] - truth[key]) <= 4 * error + 1e-15, key
    unweighted = torch.tensor([f["stall_frac/bf16"] for f in records[0].layers.values()]).mean()
    assert abs(unweighted.item() - truth["stall_frac/bf16"]) > 0.1
    assert records[0].model["update_rms"] == pytest.approx(truth["update_rms"], rel=0.2)


@pytest.mark.parametrize(
    "key", ["stall_frac/e4m3fn", "kept_update_ratio/e4m3fn", "on_grid_frac/bf16"]
)
def test_standard_errors_equal_the_spread_of_two_hundred_draws(key: str) -> None:
    torch.manual_seed(0)
    before = torch.randn(20_000) * 0.05
    after = before + torch.randn(20_000) * 2e-3
    before[::3] = before[::3].bfloat16().float()
    measurer = Measurer(FormatSet(("e4m3fn", "bf16"), None))
    truth = tensor_figures(measurer.formats.names, measurer.measure_tensor(before, after, after))
    values, errors = [], []
    for seed in range(200):
        indices = sample_elements("w", (20_000,), 1000, seed=seed)
        row = measurer.measure_tensor(before[indices], after[indices], after[indices])
        row[POPULATION] = 20_000
        figures = tensor_figures(measurer.formats.names, row)
        values.append(figures[key])
        errors.append(figures.standard_error(key))
    observed = torch.tensor(values).std().item()
    assert observed == pytest.approx(sum(errors) / 200, rel=0.2)
    assert abs(sum(values) / 200 - truth[key]) < 4 * observed / math.sqrt(200)
    assert truth.standard_error(key) == 0


def test_a_standard_error_that_cannot_be_trusted_is_nan() -> None:
    torch.manual_seed(0)
    before = torch.randn(4000)
    heavy = torch.distributions.StudentT(1.0).sample((4000,)) * 1e-3
    row = Measurer(FormatSet("bf16", None)).measure_tensor(before, before + heavy, heavy)
    row[POPULATION] = 1e6
    figures = tensor_figures(["bf16"], row)
    assert 4000 / figures["energy_concentration"] < 30
    assert math.isnan(figures.standard_error("kept_update_ratio/bf16"))
    assert 0 < figures.standard_error("stall_frac/bf16") < 0.01
    assert math.isnan(figures.standard_error("update_rms"))
