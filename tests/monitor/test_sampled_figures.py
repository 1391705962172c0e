"""Figures of samples: the elements, and the distance from figures of all elements."""

import math

import pytest
import torch
from torch import nn

from altgrad import Figures, SamplingRule, UpdateMonitor, measure
from altgrad.measurement.columns import CLUSTERS, FORMAT_SUMS, POPULATION, SUMS
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.monitor.elements import sample_elements
from altgrad.quantization.format_set import FormatSet
from tests.monitor.watching import (
    FORMATS,
    assert_equal_figures,
    net,
    sharing_out,
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


def a_step_of_rows(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make weights and a gradient of rows with different norms: elements of a block are alike."""
    generator = torch.Generator().manual_seed(0)
    weights, gradient = torch.randn(2, 400, columns, generator=generator)
    weight_norms, norms = (torch.randn(2, 400, 1, generator=generator) * 0.7).exp()
    return weights * 0.02 * weight_norms, gradient * 0.1 * norms


def measure_sample(
    step: tuple[torch.Tensor, torch.Tensor],
    formats: tuple[str, ...],
    max_elements: int | None,
    capacity: int = 100_000,
    **settings: object,
) -> Figures:
    parameter = nn.Parameter(step[0].clone())
    optimizer = torch.optim.SGD([parameter], lr=0.01)
    settings = {"formats": formats, "max_elements": max_elements, "strict": True} | settings
    with (
        sharing_out(capacity),
        UpdateMonitor([("w", parameter)], **settings).attach(optimizer) as monitor,
    ):
        parameter.grad = step[1]
        optimizer.step()
    return monitor.latest.layers["w"]


BLOCKS = ("bf16", "e4m3fn", "mxfp8", "nvfp4")


@pytest.mark.parametrize("columns", [256, 250], ids=["whole blocks", "shorter last blocks"])
def test_errors_of_samples_of_blocks_equal_the_spread_of_forty_draws(columns: int) -> None:
    step = a_step_of_rows(columns)
    draws = [measure_sample(step, BLOCKS, 2048, seed=seed) for seed in range(40)]
    whole = measure_sample(step, BLOCKS, None)
    for key in ("stall_frac/bf16", "stall_frac/e4m3fn", "stall_frac/mxfp8_e4m3"):
        spread = math.sqrt(sum((each[key] - whole[key]) ** 2 for each in draws) / 40)
        stated = sum(each.standard_error(key) for each in draws) / 40
        assert spread / 1.35 < stated < spread * 1.35, key
        intervals = [each.interval(key) for each in draws]
        assert sum(low <= whole[key] <= high for low, high in intervals) >= 35


def test_products_over_clusters_are_those_of_rows_of_a_block() -> None:
    """A block of 32 is a row of the arena: NumPy adds up the elements of each drawn block."""
    step = a_step_of_rows(256)
    figures = measure_sample(step, ("bf16", "mxfp8"), 640)
    indices = sample_elements("w", (400, 256), 640, block=32)
    ((vector, _),) = figures.layer_vectors(figures.formats)
    found = dict(zip(SUMS, vector.tolist(), strict=False))
    format_sums = vector[len(SUMS) : len(SUMS) + len(FORMAT_SUMS)].tolist()
    found |= dict(zip(FORMAT_SUMS, format_sums, strict=True))
    before, gradient = (each.flatten()[indices].double() for each in step)
    update = (step[0] - 0.01 * step[1]).flatten()[indices].double() - before
    stored = before.float().bfloat16().double()
    effective = (stored + update).float().bfloat16().double() - stored
    stalled = ((update != 0) & (effective == 0)).double().view(20, 32).sum(1)
    moved = (update != 0).double().view(20, 32).sum(1)
    assert found["clusters"] == 20
    assert found["stall_frac aa"] == stalled @ stalled
    assert found["stall_frac ab"] == stalled @ moved
    assert found["stall_frac bb"] == moved @ moved
    kept, energy = ((each * update).view(20, 32).sum(1) for each in (effective, update))
    assert found["kept_update_ratio ab"] == pytest.approx((kept @ energy).item(), rel=1e-9)
    zero = (gradient == 0).double().view(20, 32).sum(1)
    assert found["zero_gradient_frac aa"] == zero @ zero


def test_a_sample_of_blocks_that_is_measured_alone_has_clusters_too() -> None:
    step = a_step_of_rows(256)
    together = measure_sample(step, BLOCKS, 4096)
    alone = measure_sample(step, BLOCKS, 4096, capacity=1000)
    key = "stall_frac/e4m3fn"
    assert alone[key] == together[key]
    assert alone.standard_error(key) == pytest.approx(together.standard_error(key), rel=0.6)
    ((vector, _),) = alone.layer_vectors(alone.formats)
    assert vector[CLUSTERS] >= 32


def test_only_layers_that_are_judged_for_block_formats_draw_blocks() -> None:
    rules = [SamplingRule("w", formats=["bf16", "e4m3fn"])]
    ruled = measure_sample(a_step_of_rows(256), BLOCKS, 2048, sampling=rules)
    alone = measure_sample(a_step_of_rows(256), ("bf16", "e4m3fn"), 2048)
    for key in alone:
        assert ruled[key] == pytest.approx(alone[key], rel=1e-12, nan_ok=True)
        same = pytest.approx(alone.standard_error(key), rel=1e-9, nan_ok=True)
        assert ruled.standard_error(key) == same
    whole_blocks = measure_sample(a_step_of_rows(256), BLOCKS, 2048)
    key = "stall_frac/e4m3fn"
    assert whole_blocks.standard_error(key) > 2 * ruled.standard_error(key)


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
