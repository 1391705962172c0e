"""Every metric against its definition, in numpy and gfloat: none of AltGrad's own functions."""

import contextlib
import functools
import math
import re
from unittest import mock

import gfloat
import numpy as np
import pytest
import torch
from gfloat.formats import (
    format_info_bfloat16,
    format_info_binary16,
    format_info_ocp_e2m1,
    format_info_ocp_e4m3,
    format_info_ocp_e5m2,
)
from torch import Tensor

from altgrad.measurement.columns import FORMAT_SUMS, SUMS, LayerStatistics
from altgrad.measurement.figures import metrics_of
from altgrad.measurement.measurer import Measurer, measure
from altgrad.measurement.metrics import (
    FORMAT_METRICS,
    LAYER_METRICS,
    NEED_TRACKING,
    Metric,
    as_markdown,
)
from altgrad.quantization import get_format, quantize

INFOS = {
    "bf16": format_info_bfloat16,
    "fp16": format_info_binary16,
    "e4m3fn": format_info_ocp_e4m3,
    "e5m2": format_info_ocp_e5m2,
    "e2m1": format_info_ocp_e2m1,
}
UNSCALED = {"bf16", "fp16"}
"""Their scale is 1 in every scaling."""
DTYPES = {
    torch.float32: (-126, 23),
    torch.float64: (-1022, 52),
    torch.bfloat16: (-126, 7),
    torch.float16: (-14, 10),
}
"""emin and mantissa bits of what weights are stored in."""
SCALINGS = (None, "tensor", "channel", ("block", 32))
EXACT = {
    *(name for name in (*LAYER_METRICS, *FORMAT_METRICS) if name.endswith("_frac")),
    *("ulp_max", "ulp_median_log2", "steps_median_log2"),
    *("stiffness_min", "stiffness_max", "grid_error_max"),
} - {"stochastic_move_frac"}


# --- the definitions -----------------------------------------------------------------------------


@functools.cache
def extended(name: str) -> gfloat.FormatInfo:
    """The same grid, going on above the top."""
    info = INFOS[name]
    return gfloat.FormatInfo(
        f"{name} extended",
        k=1 + 10 + info.precision - 1,
        precision=info.precision,
        bias=info.bias,
        is_signed=True,
        domain=gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )


def rounded(
    x: np.ndarray,
    name: str,
    scale: np.ndarray,
    mode: gfloat.RoundMode = gfloat.RoundMode.TiesToEven,
    *,
    clamped: bool,
) -> np.ndarray:
    info = INFOS[name]
    y = x / scale
    if clamped:
        y = y.clip(-info.max, info.max)
    return gfloat.round_ndarray(extended(name), y, mode) * scale


def scales(
    w: np.ndarray, v: np.ndarray, name: str, scaling: object, dtype: torch.dtype
) -> np.ndarray:
    """The smallest power of two with which nothing clips, for each element; v where w is 0."""
    if scaling is None or name in UNSCALED:
        return np.ones_like(w)
    sizes = [np.where(np.isfinite(each), np.abs(each), 0) for each in (w, v)]
    result = np.ones_like(w)
    lowest, highest = (-1022, 1023) if dtype == torch.float64 else (-126, 127)
    for index in groups(w.shape, scaling):
        amax = sizes[0][index].max(initial=0) or sizes[1][index].max(initial=0)
        if amax:
            exponent = math.floor(math.log2(amax) - math.log2(INFOS[name].max)) - 2
            while math.ldexp(INFOS[name].max, max(exponent, -1100)) < amax:
                exponent += 1
            result[index] = 2.0 ** min(max(exponent, lowest), highest)
    return result


def groups(shape: tuple[int, ...], scaling: object) -> list[object]:
    if scaling == "tensor" or not shape:
        return [...]
    if scaling == "channel":
        return list(range(shape[0]))
    starts = range(0, shape[-1], scaling[1])
    return [(*row, slice(i, i + scaling[1])) for row in np.ndindex(shape[:-1]) for i in starts]


def octave_median(values: np.ndarray, lowest: int) -> float:
    if not values.size:
        return math.nan
    octaves = np.sort((np.frexp(values)[1] - 1).clip(lowest, lowest + 63))
    return octaves[(len(octaves) - 1) // 2] + 0.5


def ratio(a: float, b: float) -> float:
    return float(a) / float(b) if b else math.nan


def oracle_of_layer(w0: Tensor, w1: Tensor, gradient: Tensor) -> dict[str, float]:
    dtype = w0.dtype
    w, v, g = (each.detach().double().numpy().reshape(-1) for each in (w0, w1, gradient))
    finite = np.isfinite(w) & np.isfinite(v) & np.isfinite(g)
    total, n = len(w), finite.sum()
    w, v, g = w[finite], v[finite], g[finite]
    d = v - w
    emin, mantissa = DTYPES[dtype]
    larger = np.maximum(np.abs(w), np.abs(v))
    significand, exponent = np.frexp(larger)  # from [0.5, 1)
    below = exponent - 1 - (significand == 0.5)  # the binade of the neighbour towards zero
    ulp = np.ldexp(1.0, np.maximum(below, emin) - mantissa)
    ulps = np.where(d == 0, 0, np.abs(v / ulp - w / ulp))
    return {
        "update_rms": math.sqrt(ratio((d**2).sum(), n)),
        "weight_rms": math.sqrt(ratio((w**2).sum(), n)),
        "gradient_rms": math.sqrt(ratio((g**2).sum(), n)),
        "update_weight_ratio": ratio(np.linalg.norm(d), np.linalg.norm(w)),
        "zero_update_frac": ratio((d == 0).sum(), n),
        "zero_gradient_frac": ratio((g == 0).sum(), n),
        "nonfinite_frac": ratio(total - n, total),
        "unmoved_frac": ratio(((g != 0) & (d == 0)).sum(), (g != 0).sum()),
        "ulp_mean": ratio(ulps.sum(), n),
        "ulp_max": ulps.max() if n else math.nan,
        "ulp_zero_frac": ratio((ulps == 0).sum(), n),
        "ulp_median_log2": octave_median(ulps[ulps != 0], 0),
        "energy_concentration": ratio(n * (d**4).sum(), (d**2).sum() ** 2),
    }


def oracle_of_format(
    w0: Tensor, w1: Tensor, gradient: Tensor, name: str, scaling: object
) -> dict[str, float]:
    dtype, info = w0.dtype, INFOS[name]
    w, v, g = (each.detach().double().numpy() for each in (w0, w1, gradient))
    s = np.broadcast_to(scales(w, v, name, scaling, dtype), w.shape)
    finite = np.isfinite(w) & np.isfinite(v) & np.isfinite(g)
    w, v, g, s = w[finite], v[finite], g[finite], s[finite]
    n, is_scaled = len(w), scaling is not None and name not in UNSCALED
    mantissa, emin = info.precision - 1, 1 - info.bias
    exponents = (np.frexp(w / s)[1] - 1).clip(emin, math.frexp(info.max)[1] - 1)
    stiffness = np.where(w == 0, 2.0**emin, np.ldexp(1.0, exponents)) * 2.0**-mantissa * s
    stored = rounded(w, name, s, clamped=True)
    error = np.abs(w - stored)

    # What-if
    d = v - w if 2.0**-mantissa > torch.finfo(dtype).eps else np.zeros_like(w)
    judged = d != 0
    effective = rounded(stored + d, name, s, clamped=not is_scaled) - stored
    visible = rounded(w, name, s, clamped=not is_scaled) != rounded(
        v, name, s, clamped=not is_scaled
    )
    goal = stored + d
    if not is_scaled:
        goal = goal.clip(-info.max, info.max)
    low, high = (
        rounded(goal, name, s, mode, clamped=False)
        for mode in (gfloat.RoundMode.TowardNegative, gfloat.RoundMode.TowardPositive)
    )
    variance = (goal - low) * (high - goal)  # of a draw that is high with (goal−low)/(high−low)

    # The gradient beside the stiffness
    paired = w != 0
    size, gap = np.abs(g[paired]), stiffness[paired]
    defined = paired.any() and np.ptp(size) > 0 and np.ptp(gap) > 0
    with np.errstate(divide="ignore"):
        sqnr = 10 * np.log10(np.divide((w**2).sum(), (error**2).sum())) if w.any() else math.nan
    energy = (d**2).sum()
    quotient = np.abs(d) / stiffness
    return {
        "kept_update_ratio": ratio((effective * d).sum(), energy),
        "stall_frac": ratio((judged & (effective == 0)).sum(), judged.sum()),
        "update_error": ratio(np.linalg.norm(effective - d), np.linalg.norm(d)),
        "visible_frac": ratio((judged & visible).sum(), judged.sum()),
        "stochastic_move_frac": ratio(np.minimum(quotient, 1).sum(), judged.sum()),
        "stochastic_noise_ratio": ratio(math.sqrt(variance[judged].sum()), math.sqrt(energy)),
        "steps_median_log2": octave_median(quotient[judged], -32),
        "stiffness_mean": gap.mean() if gap.size else math.nan,
        "stiffness_min": gap.min(initial=math.inf) if gap.size else math.nan,
        "stiffness_max": gap.max(initial=0) if gap.size else math.nan,
        "grid_error_mean": error.mean() if n else math.nan,
        "grid_error_max": error.max() if n else math.nan,
        "grid_error_std": error.std(ddof=1) if n > 1 else math.nan,
        "on_grid_frac": ratio((error == 0).sum(), n),
        "sqnr_db": sqnr,
        "underflow_frac": ratio((paired & (stored == 0)).sum(), n),
        "saturated_frac": ratio((np.abs(w) > s * info.max).sum(), n),
        "subnormal_frac": ratio(((stored != 0) & (np.abs(stored) < s * 2.0**emin)).sum(), n),
        "grad_stiff_correlation": np.corrcoef(size, gap)[0, 1] if defined else math.nan,
        "grad_stiff_ratio_mean": (size / gap).mean() if gap.size else math.nan,
        "grad_below_stiffness_frac": (size < gap).mean() if gap.size else math.nan,
    }


def assert_figures(step: tuple[Tensor, Tensor, Tensor], names: list[str], scaling: object) -> None:
    """All figures of `measure` equal the definitions: counts, bins and extrema exactly."""
    figures = measure(*step, names, scaling)
    expected = oracle_of_layer(*step)
    assert set(expected) == set(LAYER_METRICS)
    for name in names:
        of_format = oracle_of_format(*step, name, scaling)
        assert set(of_format) == set(FORMAT_METRICS) - NEED_TRACKING
        expected |= {f"{metric}/{name}": value for metric, value in of_format.items()}
    assert set(figures) == set(expected)
    wrong = {}
    for key, value in expected.items():
        tolerance = 0 if key.split("/")[0] in EXACT else 1e-12
        if figures[key] != pytest.approx(value, rel=tolerance, abs=tolerance * 1e-3, nan_ok=True):
            wrong[key] = figures[key], value
    assert not wrong, wrong


# --- data ----------------------------------------------------------------------------------------


def a_step(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights over many binades, zeros, some beyond the top of e2m1, updates over many more."""
    generator = np.random.default_rng(seed)
    shape = 6, 80  # blocks of 32 leave a tail
    w = generator.normal(size=shape) * 2.0 ** generator.integers(-12, 1, size=shape)
    w.flat[::37] = 0
    w.flat[1::101] *= 12 / np.abs(w.flat[1::101])
    d = generator.normal(size=shape) * np.abs(w) * 10.0 ** generator.uniform(-6, -0.5, shape)
    d = np.where(np.abs(w) > 0.5, -np.abs(d) * np.sign(w), d)  # away from the top
    d.flat[::111] = 1e-3  # of zeros too
    d.flat[3::7] = 0
    g = generator.normal(size=shape) * 10.0 ** generator.uniform(-4, 0, shape)
    g.flat[2::9] = 0
    before = torch.from_numpy(w).to(dtype)
    after = (before.double() + torch.from_numpy(d)).to(dtype)
    return before, after, torch.from_numpy(g).to(dtype)


def key_of(parameter: object) -> str:
    return "-".join(map(str, parameter)) if isinstance(parameter, tuple) else str(parameter)


# --- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS, ids=key_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_metric_equals_its_definition(dtype: torch.dtype, scaling: object) -> None:
    step = a_step(dtype)
    assert_figures(step, list(INFOS), scaling)
    figures = measure(*step, "e2m1", scaling)  # the data shows what it is to show
    for metric in ("stall_frac", "visible_frac", "on_grid_frac", "unmoved_frac", "underflow_frac"):
        assert 0 < figures.get(f"{metric}/e2m1", figures.get(metric)) < 1, metric
    assert (figures["saturated_frac/e2m1"] > 0) is (scaling is None)
    assert figures["subnormal_frac/e2m1"] > 0


@pytest.mark.parametrize("scaling", SCALINGS, ids=key_of)
def test_updates_that_pass_the_top(scaling: object) -> None:
    """Scaled, the grid goes on in ever wider steps; unscaled, it ends, and nothing is random."""
    before = torch.linspace(-6, 6, 64).view(2, 32)
    after = before + before.sign() * torch.linspace(0.1, 9, 64).view(2, 32)
    assert_figures((before, after, torch.ones_like(before)), ["e2m1"], scaling)


def test_stochastic_noise_of_an_update_past_the_wider_step_above_the_top() -> None:
    """From 6 by 3 to 9, which stochastic rounding makes 8 or, in one of four cases, 12."""
    before, after = torch.tensor([6.0]), torch.tensor([9.0])
    figure = measure(before, after, formats="e2m1")["stochastic_noise_ratio/e2m1"]
    assert figure == pytest.approx(math.sqrt(3) / 3, rel=1e-12)


def test_stochastic_noise_at_a_top_that_clamps_is_nothing() -> None:
    """From 6 to 7, which is clamped to 6 whatever is drawn."""
    before, after = torch.tensor([6.0]), torch.tensor([7.0])
    figures = measure(before, after, formats="e2m1", scaling=None)
    assert figures["stall_frac/e2m1"] == 1
    assert figures["stochastic_noise_ratio/e2m1"] == 0


def test_stochastic_noise_equals_that_of_draws() -> None:
    """The two neighbours, against `quantize(rounding="stochastic")` itself."""
    before, after = torch.tensor([1.0]), torch.tensor([1.03])
    generator = torch.Generator().manual_seed(0)
    goals = after.double().expand(200_000)  # 1 is on the grid: 1 + update is after
    draws = quantize(goals, "e4m3fn", rounding="stochastic", generator=generator)
    figures = measure(before, after, formats="e4m3fn", scaling=None)
    update = (after.double() - 1).item()
    assert figures["stochastic_noise_ratio/e4m3fn"] == pytest.approx(
        draws.std().item() / update, rel=1e-2
    )
    assert figures["stochastic_move_frac/e4m3fn"] == pytest.approx(
        (draws != 1).double().mean().item(), rel=1e-2
    )


@pytest.mark.parametrize("scaling", SCALINGS, ids=key_of)
@pytest.mark.parametrize("name", ["bf16", "e4m3fn", "e2m1"])
def test_histograms_count_octaves(name: str, scaling: object) -> None:
    before, after, gradient = a_step()
    statistics = Measurer(name, scaling).statistics_of(before, after, gradient)
    sums = dict(zip((*SUMS, *FORMAT_SUMS), statistics.sums.tolist(), strict=True))
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
    (figures,) = metrics_of([statistics])
    first, counts = figures.histogram(f"steps/{name}")
    assert (first, list(counts)) == (-32, histogram)
    assert sum(histogram) == sums["judged"] == sums["moved"]
    assert sum(figures.histogram("ulps").counts[1:]) > 0


def test_the_histogram_of_ulps_begins_at_one() -> None:
    before = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0])
    after = before + torch.tensor([0.0, 1, 2, 3, 8]) * 2**-23  # 8 are 4 units where they are two
    (figures,) = metrics_of([Measurer("bf16").statistics_of(before, after)])
    first, counts = figures.histogram("ulps")
    assert (first, counts[:4], sum(counts)) == (0, (1, 2, 1, 0), 4)


@pytest.mark.parametrize("key", ["steps", "steps/e5m2", "ulps/bf16", "ulp", "stall_frac/bf16"])
def test_there_are_no_other_histograms(key: str) -> None:
    (figures,) = metrics_of([LayerStatistics.empty(["bf16"])])
    with pytest.raises(KeyError, match=r"expected one of .*ulps.*steps/bf16"):
        figures.histogram(key)


@pytest.mark.parametrize("scaling", SCALINGS, ids=key_of)
def test_sums_for_the_standard_error_of_the_kept_update(scaling: object) -> None:
    before, after, gradient = a_step()
    statistics = Measurer("e4m3fn", scaling).statistics_of(before, after, gradient)
    sums = dict(zip((*SUMS, *FORMAT_SUMS), statistics.sums.tolist(), strict=True))
    w, v = before.double().numpy(), after.double().numpy()
    d, s = v - w, scales(w, v, "e4m3fn", scaling, before.dtype)
    stored = rounded(w, "e4m3fn", s, clamped=True)
    kept = (rounded(stored + d, "e4m3fn", s, clamped=scaling is None) - stored) * d
    assert sums["kept_sq"] == pytest.approx((kept**2).sum(), rel=1e-12)
    assert sums["kept_update_cubed"] == pytest.approx((kept * d**2).sum(), rel=1e-12)
    assert sums["judged_4th"] == pytest.approx((d**4).sum(), rel=1e-12)


def test_the_ends_of_the_histogram_of_steps_are_open() -> None:
    before = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for update, median in ((2.0**-52, -31.5), (2.0**40, 31.5)):
        figures = measure(before, before + update, formats="e2m1", scaling=None)
        assert figures["steps_median_log2/e2m1"] == median


def test_an_update_of_more_steps_than_float64_holds_is_in_the_last_bin() -> None:
    before = torch.tensor([0.0], dtype=torch.float64)
    figures = measure(before, before + 1e280, formats="e4m3fn", scaling=None)
    assert figures["steps_median_log2/e4m3fn"] == 31.5


# --- special tensors -----------------------------------------------------------------------------

TINY, HUGE = 1e-40, torch.finfo(torch.float32).max
_W, _V, _G = a_step()
_DIRTY = [each.clone() for each in (_W, _V, _G)]
_DIRTY[0][0, 5], _DIRTY[1][1, 6], _DIRTY[2][2, 7], _DIRTY[0][3, 8] = (
    math.nan,
    math.inf,
    -math.inf,
    1,
)
SPECIAL = {
    "zero-initialised": (torch.zeros(2, 40), torch.full((2, 40), 1e-3), torch.ones(2, 40)),
    "zero throughout": (torch.zeros(8), torch.zeros(8), torch.zeros(8)),
    "constant": (torch.full((2, 40), 0.1), torch.full((2, 40), 0.101), torch.full((2, 40), 1e-3)),
    "unmoved": (_W, _W, _G),
    "NaN and inf": tuple(_DIRTY),
    "NaN alone": (torch.full((4,), math.nan),) * 3,
    "subnormal": (_W * TINY, _V * TINY, _G * TINY),
    "huge": (_W.clamp(-1, 1) * HUGE, _V.clamp(-0.9, 0.9) * HUGE, _G.clamp(-1, 1) * HUGE),
    "empty": (torch.zeros(0), torch.zeros(0), torch.zeros(0)),
    "empty rows": (torch.zeros(3, 0), torch.zeros(3, 0), torch.zeros(3, 0)),
    "no rows": (torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3)),
    "0-dim": (torch.tensor(0.7), torch.tensor(0.701), torch.tensor(-1e-3)),
    "one element": (torch.tensor([0.7]), torch.tensor([0.701]), torch.tensor([-1e-3])),
    "transposed": (_W.T, _V.T, _G.T),
    "strided": (_W[::2, ::3], _V[::2, ::3], _G[1::2, ::3]),
    "expanded": (_W[:1].expand(4, 80), _V[:1].expand(4, 80), _G[:4]),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("scaling", SCALINGS, ids=key_of)
@pytest.mark.parametrize("case", SPECIAL)
def test_special_tensors_have_the_figures_of_the_definition(case: str, scaling: object) -> None:
    step = SPECIAL[case]
    assert_figures(step, ["bf16", "e4m3fn", "e5m2"], scaling)
    for key, value in measure(*step, scaling=scaling).items():
        assert not math.isinf(value) or key.startswith("sqnr_db"), key


def test_no_value_is_nan_and_never_a_made_up_zero() -> None:
    def nan_of(case: str) -> set[str]:
        figures = measure(*SPECIAL[case], formats="bf16")
        return {key.split("/")[0] for key, value in figures.items() if math.isnan(value)}

    what_if = {
        *("kept_update_ratio", "stall_frac", "update_error", "visible_frac"),
        *("stochastic_move_frac", "stochastic_noise_ratio", "steps_median_log2"),
    }
    paired = {"stiffness_mean", "stiffness_min", "stiffness_max"} | {
        *("grad_stiff_correlation", "grad_stiff_ratio_mean", "grad_below_stiffness_frac"),
    }
    unmoved = what_if | {"ulp_median_log2", "energy_concentration"}
    everything = {*LAYER_METRICS, *FORMAT_METRICS} - NEED_TRACKING
    of_zeros = paired | {"update_weight_ratio", "sqnr_db"}
    assert nan_of("empty") == nan_of("empty rows") == nan_of("no rows") == everything
    assert nan_of("NaN alone") == everything - {"nonfinite_frac"}
    assert nan_of("zero-initialised") == of_zeros
    assert nan_of("zero throughout") == of_zeros | unmoved | {"unmoved_frac"}
    assert nan_of("unmoved") == unmoved
    assert nan_of("constant") == {"grad_stiff_correlation"}
    assert nan_of("one element") == {"grad_stiff_correlation", "grid_error_std"}


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e-80, 1e80, 1e160, 1e280])
def test_float64_far_from_one_gives_no_exception(size: float) -> None:
    """Squares and fourth powers leave float64: such figures are inf, 0 or NaN."""
    step = tuple((each.double() * size) for each in (_W, _V, _G))
    for gradient in (step[2], step[2] / size, None):
        for scaling in SCALINGS:
            figures = measure(step[0], step[1], gradient, ["bf16", "e4m3fn"], scaling)
            assert 0 < figures["unmoved_frac" if gradient is not None else "ulp_zero_frac"] < 1


def test_float64_numbers_near_its_end_count_as_not_finite() -> None:
    """Rounding them would leave float64."""
    step = tuple(each.double().clone() for each in (_W, _V, _G))
    expected = measure(*step)
    wild = torch.cat([step[0].flatten(), torch.tensor([1e290, 1.0, 1.0], dtype=torch.float64)])
    after = torch.cat([step[1].flatten(), torch.tensor([1.0, -1e300, 1.0], dtype=torch.float64)])
    gradient = torch.cat([step[2].flatten(), torch.tensor([1.0, 1.0, 1e305], dtype=torch.float64)])
    amax = step[0].abs().max().view(1)
    statistics = Measurer().statistics_of(wild, after, gradient, amax)
    figures = metrics_of([statistics])[0]
    assert figures["nonfinite_frac"] == 3 / 483
    for key in expected.keys() - {"nonfinite_frac"}:
        assert figures[key] == pytest.approx(expected[key], rel=1e-12, nan_ok=True), key


def test_a_correlation_whose_sums_overflow_is_no_perfect_one() -> None:
    """NaN, and not the 1 that ``min(1.0, nan)`` gives."""
    before, after, gradient = (each.double() for each in (_W, _V, _G))
    for size in (1e160, 1e280):
        figures = measure(before, after, gradient * size, "bf16")
        assert math.isnan(figures["grad_stiff_correlation/bf16"])


# --- the catalogue -------------------------------------------------------------------------------

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


# --- one host copy -------------------------------------------------------------------------------


def test_many_statistics_are_copied_to_the_host_once() -> None:
    formats = [get_format("bf16"), get_format("e4m3fn")]
    many = [Measurer(formats).statistics_of(*a_step(seed=seed)) for seed in range(20)]
    copies = 0

    def counted(name: str) -> mock._patch:
        original = getattr(Tensor, name)

        def method(self: Tensor, *arguments: object, **options: object) -> object:
            nonlocal copies
            copies += 1
            return original(self, *arguments, **options)

        return mock.patch.object(Tensor, name, method)

    readers = "tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "__iter__", "to"
    with contextlib.ExitStack() as stack:
        for name in readers:
            stack.enter_context(counted(name))
        rows = metrics_of(many)
    assert copies == 1
    assert rows == [metrics_of([each])[0] for each in many]
    assert metrics_of([]) == []


def test_statistics_of_different_formats_can_be_read_together() -> None:
    """A layer may be judged for other formats than its neighbour."""
    names = [["bf16"], [], ["e4m3fn", "e5m2"]]
    several = [Measurer(each, None).statistics_of(*a_step()) for each in names]
    assert metrics_of(several) == [metrics_of([each])[0] for each in several]


def test_keys_are_those_of_the_catalogue() -> None:
    (figures,) = metrics_of([LayerStatistics.empty(["bf16", "e5m2"])])
    assert list(figures) == [
        *LAYER_METRICS,
        *(f"{metric}/{name}" for name in ("bf16", "e5m2") for metric in FORMAT_METRICS),
    ]


def test_a_deviation_that_the_sums_have_lost_is_nan_and_not_made_up() -> None:
    """The gradients lie one unit in the last place of float32 apart, around 1."""
    before = torch.tensor([1.0, 2.0, 4.0, 8.0])
    gradient = torch.tensor([1.0, 1.0 + 2**-23, 1.0, 1.0])
    figures = measure(before, before * 1.01, gradient, ["bf16"])
    assert math.isnan(figures["grad_stiff_correlation/bf16"])
