"""Every metric against its definition."""

import math

import gfloat
import numpy as np
import pytest
import torch
from torch import Tensor

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.measurement.columns import FORMAT_SUMS, SUMS
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measure import measure
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.metrics import FORMULAS
from altgrad.quantization import FloatFormat, get_format, quantize
from altgrad.quantization.format_set import FormatSet
from tests.measurement.definitions import (
    DTYPES,
    INFOS,
    SCALINGS,
    UNSCALED,
    a_step,
    assert_figures,
    make_key,
    rounded,
    scales,
)


@pytest.mark.parametrize("scaling", SCALINGS, ids=make_key)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_metric_equals_its_definition(dtype: torch.dtype, scaling: object) -> None:
    step = a_step(dtype)
    assert_figures(step, list(INFOS), scaling)
    figures = measure(*step, "e2m1", scaling)  # the data has elements of both kinds
    for metric in ("stall_frac", "visible_frac", "on_grid_frac", "unmoved_frac", "underflow_frac"):
        assert 0 < figures.get(f"{metric}/e2m1", figures.get(metric)) < 1, metric
    assert (figures["saturated_frac/e2m1"] > 0) is (scaling is None)
    assert figures["subnormal_frac/e2m1"] > 0


@pytest.mark.parametrize("scaling", SCALINGS, ids=make_key)
def test_updates_past_the_top_equal_the_definition(scaling: object) -> None:
    """Above the top, a scaled grid goes on with wider spacings, and an unscaled grid ends."""
    before = torch.linspace(-6, 6, 64).view(2, 32)
    after = before + before.sign() * torch.linspace(0.1, 9, 64).view(2, 32)
    assert_figures((before, after, torch.ones_like(before)), ["e2m1"], scaling)


def test_stochastic_noise_above_the_top_uses_the_wider_spacing() -> None:
    """The weight moves from 6 to 9, which rounds to 12 with probability 1/4, else to 8."""
    before, after = torch.tensor([6.0]), torch.tensor([9.0])
    figure = measure(before, after, formats="e2m1")["stochastic_noise_ratio/e2m1"]
    assert figure == pytest.approx(math.sqrt(3) / 3, rel=1e-12)


def test_stochastic_noise_is_0_at_a_top_that_clamps() -> None:
    """The weight moves from 6 to 7, which is always clamped to 6."""
    before, after = torch.tensor([6.0]), torch.tensor([7.0])
    figures = measure(before, after, formats="e2m1", scaling=None)
    assert figures["stall_frac/e2m1"] == 1
    assert figures["stochastic_noise_ratio/e2m1"] == 0


def test_stochastic_noise_equals_the_variance_of_draws() -> None:
    """The expected variance is that of draws of `quantize(rounding="stochastic")`."""
    before, after = torch.tensor([1.0]), torch.tensor([1.03])
    generator = torch.Generator().manual_seed(0)
    goals = after.double().expand(200_000)  # 1 is on the grid, so that Q(1) + update is after
    draws = quantize(goals, "e4m3fn", rounding="stochastic", generator=generator)
    figures = measure(before, after, formats="e4m3fn", scaling=None)
    update = (after.double() - 1).item()
    assert figures["stochastic_noise_ratio/e4m3fn"] == pytest.approx(
        draws.std().item() / update, rel=1e-2
    )
    assert figures["stochastic_move_frac/e4m3fn"] == pytest.approx(
        (draws != 1).double().mean().item(), rel=1e-2
    )


def draw_moved_share(
    before: Tensor, after: Tensor, name: str, scaling: object, draws: int = 4000
) -> float:
    """Draw stochastically rounded weights, and count those that left their grid point."""
    w, v = before.double().numpy(), after.double().numpy()
    s = scales(w, v, name, scaling, before.dtype)
    stored = rounded(w, name, s, clamped=True)
    goal = stored + v - w
    if scaling is None or name in UNSCALED:  # a top that clamps
        goal = goal.clip(-INFOS[name].max, INFOS[name].max)
    ends = (gfloat.RoundMode.TowardNegative, gfloat.RoundMode.TowardPositive)
    low, high = (rounded(goal, name, s, mode, clamped=False) for mode in ends)
    uniform = np.random.default_rng(0).random((draws, len(w)))
    drawn = np.where(uniform * (high - low) < goal - low, high, low)
    return (drawn != stored).mean()


def weights_at_edges(name: str) -> Tensor:
    """Return powers of two, weights that round to one, 0, the top, and their negatives."""
    top = INFOS[name].max
    powers = torch.tensor([1.0, 2.0**-3, 2.0**-5, 4.0])
    near = torch.cat([powers * (1 - 2.0**-12), powers * (1 + 2.0**-12)])
    some = torch.cat([powers, near, torch.tensor([0.0, top, top * 0.75])])
    return torch.cat([some, -some])


@pytest.mark.parametrize("scaling", [None, "tensor"], ids=str)
@pytest.mark.parametrize("side", [-1, 1], ids=["down", "up"])
@pytest.mark.parametrize("name", ["fp16", "e4m3fn", "e5m2", "e2m1"])
def test_stochastic_moves_equal_those_of_draws(name: str, side: int, scaling: object) -> None:
    before = weights_at_edges(name)
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(len(before), generator=generator) * before.abs().clamp(2.0**-12)
    after = before + side * size * 2.0 ** -INFOS[name].precision
    figures = measure(before, after, formats=name, scaling=scaling)
    assert figures[f"stochastic_move_frac/{name}"] == pytest.approx(
        draw_moved_share(before, after, name, scaling), abs=0.01
    )


def test_gains_at_1_that_shrink_move_twice_as_often_as_those_that_grow() -> None:
    """The gap below a power of two is half of the gap above it."""
    before = torch.ones(64)
    generator = torch.Generator().manual_seed(0)
    update = torch.randint(0, 2**14, (64,), generator=generator) * 2.0**-23  # exact on both sides
    shares = {}
    for side in (-1, 1):
        after = before + side * update
        shares[side] = measure(before, after, formats="bf16")["stochastic_move_frac/bf16"]
        drawn = draw_moved_share(before, after, "bf16", "tensor")
        assert shares[side] == pytest.approx(drawn, abs=0.01)
    assert shares[-1] == 2 * shares[1]


@pytest.mark.parametrize("name", ["ftz", "ftz_m0", "e7m0"])
def test_stochastic_moves_of_grids_with_a_hole_at_0_equal_those_of_draws(name: str) -> None:
    """Without subnormals, the gap below the smallest normal number is wider than that above it."""
    format = {
        "ftz": FloatFormat("ftz", 3, 2, 3, has_subnormals=False),
        "ftz_m0": FloatFormat("ftz_m0", 4, 0, 7, has_subnormals=False),
        "e7m0": get_format("e7m0"),
    }[name]
    points = format.values()[len(format.values()) // 2 :][:12]
    before = points.repeat_interleave(40)
    span = points[3] * 1.5
    generator = torch.Generator().manual_seed(2)
    after = before + span * (2 * torch.rand(len(before), generator=generator).double() - 1)
    figures = measure(before, after, formats=format, scaling=None)
    goals = after.expand(2000, -1)  # all weights are on the grid
    drawn = quantize(goals, format, rounding="stochastic", generator=generator)
    assert figures[f"stochastic_move_frac/{name}"] == pytest.approx(
        (drawn != before).double().mean().item(), abs=0.005
    )


@pytest.mark.parametrize(
    ("name", "weight", "clips"),
    [
        *(("e2m1", 6.9, False), ("e2m1", 7.1, True), ("e2m1", -6.9, False), ("e2m1", 9.0, True)),
        *(("e4m3fn", 463.0, False), ("e4m3fn", 465.0, True)),
        *(("e0m7", 0.995, False), ("e0m7", 1.0, True)),
    ],
)
def test_a_weight_is_saturated_if_the_clamp_changes_its_rounding(
    name: str, weight: float, clips: bool
) -> None:
    before = torch.tensor([weight, 0.25])
    figures = measure(before, before * 0.9, formats=name, scaling=None)
    assert figures[f"saturated_frac/{name}"] == clips / 2


@pytest.mark.parametrize("scaling", SCALINGS, ids=make_key)
@pytest.mark.parametrize("name", ["bf16", "e4m3fn", "e2m1"])
def test_histograms_count_octaves(name: str, scaling: object) -> None:
    before, after, gradient = a_step()
    row = Measurer(FormatSet(name, scaling)).measure_tensor(before, after, gradient)
    sums = dict(zip((*SUMS, *FORMAT_SUMS), row.tolist(), strict=False))
    w, v = before.double().numpy(), after.double().numpy()
    s = scales(w, v, name, scaling, before.dtype)
    info = INFOS[name]
    binade = np.frexp(w / s)[1] - 1
    binade = np.where(w == 0, 1 - info.bias, binade).clip(
        1 - info.bias, math.frexp(info.max)[1] - 1
    )
    steps = np.abs(v - w) / (np.ldexp(s, binade) * 2.0 ** (1 - info.precision))
    octaves = np.floor(np.log2(steps[steps > 0])).clip(-32, 31)
    histogram = [int((octaves == octave).sum()) for octave in range(-32, 32)]
    figures = tensor_figures([name], row)
    first, counts = figures.histogram(f"steps/{name}")
    assert (first, list(counts)) == (-32, histogram)
    assert sum(histogram) == sums["judged"] == sums["moved"]
    assert sum(figures.histogram("ulps").counts[1:]) > 0


def test_the_histogram_of_ulps_begins_at_one() -> None:
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0])
    after = (
        before + torch.tensor([0.0, 1, 2, 3, 8]) * 2**-23
    )  # above 2 an ULP is twice as large: 8 are 4
    figures = tensor_figures(["bf16"], Measurer(FormatSet("bf16")).measure_tensor(before, after))
    first, counts = figures.histogram("ulps")
    assert (first, counts[:4], sum(counts)) == (0, (1, 2, 1, 0), 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_histogram_of_weights_equals_that_of_numpy(dtype: torch.dtype) -> None:
    """Weights of 0 are left out, and those beyond the ends are in the outer bins."""
    before, after, gradient = a_step(dtype)
    ends = torch.tensor([2.0**-49, 2.0**-48, 2.0**15, 65535.0, 65536.0, 2.0**17, 0.0]).to(dtype)
    before.view(-1)[: len(ends)] = ends
    row = Measurer(FormatSet([])).measure_tensor(before, after, gradient)
    first, counts = tensor_figures([], row).histogram("weights")
    finite = before.isfinite() & after.isfinite() & gradient.isfinite()
    sizes = np.abs(before[finite].double().numpy())
    inside = sizes[sizes > 0].clip(2.0**-48, 2.0**16 * (1 - 2.0**-53))
    edges = 2.0 ** np.arange(-48, 17)
    assert first == -48
    assert [*counts] == np.histogram(inside, edges)[0].tolist()


@pytest.mark.parametrize("scaling", SCALINGS, ids=make_key)
def test_sums_for_the_standard_error_of_the_kept_update(scaling: object) -> None:
    before, after, gradient = a_step()
    row = Measurer(FormatSet("e4m3fn", scaling)).measure_tensor(before, after, gradient)
    sums = dict(zip((*SUMS, *FORMAT_SUMS), row.tolist(), strict=False))
    w, v = before.double().numpy(), after.double().numpy()
    d, s = v - w, scales(w, v, "e4m3fn", scaling, before.dtype)
    stored = rounded(w, "e4m3fn", s, clamped=True)
    kept = (rounded(stored + d, "e4m3fn", s, clamped=scaling is None) - stored) * d
    assert sums["kept_sq"] == pytest.approx((kept**2).sum(), rel=1e-12)
    assert sums["kept_update_cubed"] == pytest.approx((kept * d**2).sum(), rel=1e-12)
    assert sums["judged_4th"] == pytest.approx((d**4).sum(), rel=1e-12)


def test_the_first_and_last_bin_of_steps_are_open() -> None:
    before = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for update, median in ((2.0**-52, -31.5), (2.0**40, 31.5)):
        figures = measure(before, before + update, formats="e2m1", scaling=None)
        assert figures["steps_median_log2/e2m1"] == median


def test_an_update_of_more_steps_than_float64_holds_is_in_the_last_bin() -> None:
    before = torch.tensor([0.0], dtype=torch.float64)
    figures = measure(before, before + 1e280, formats="e4m3fn", scaling=None)
    assert figures["steps_median_log2/e4m3fn"] == 31.5


def test_a_deviation_lost_in_rounding_is_nan() -> None:
    """Gradients differ from 1 by one ULP of float32."""
    before = torch.tensor([1.0, 2.0, 4.0, 8.0])
    gradient = torch.tensor([1.0, 1.0 + 2**-23, 1.0, 1.0])
    figures = measure(before, before * 1.01, gradient, ["bf16"])
    assert math.isnan(figures["grad_stiff_correlation/bf16"])


def test_formulas_and_catalogue_have_the_same_names() -> None:
    assert [*FORMULAS] == [*LAYER_METRICS, *FORMAT_METRICS]
