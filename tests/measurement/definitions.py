"""Every metric by its definition, in numpy and gfloat, without functions of AltGrad."""

import functools
import math

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

from altgrad.measurement.catalogue import (
    FORMAT_METRICS,
    LAYER_METRICS,
    NEED_TRACKING,
)
from altgrad.measurement.measure import measure

INFOS = {
    "bf16": format_info_bfloat16,
    "fp16": format_info_binary16,
    "e4m3fn": format_info_ocp_e4m3,
    "e5m2": format_info_ocp_e5m2,
    "e2m1": format_info_ocp_e2m1,
}
UNSCALED = {"bf16", "fp16"}
"""Names of formats whose scale is 1 under every scaling."""
DTYPES = {
    torch.float32: (-126, 23),
    torch.float64: (-1022, 52),
    torch.bfloat16: (-126, 7),
    torch.float16: (-14, 10),
}
"""Smallest exponent and mantissa bits of the dtypes in which weights are stored."""
SCALINGS = (None, "tensor", "channel", ("block", 32))
EXACT = {
    *(name for name in (*LAYER_METRICS, *FORMAT_METRICS) if name.endswith("_frac")),
    *("ulp_max", "ulp_median_log2", "steps_median_log2"),
    *("stiffness_min", "stiffness_max", "grid_error_max"),
} - {"stochastic_move_frac"}


@functools.cache
def extended(name: str) -> gfloat.FormatInfo:
    """Return the same grid without a top."""
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
    """Return for each element the smallest power of two that clips nothing; from v if w is 0."""
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


def layer_oracle(w0: Tensor, w1: Tensor, gradient: Tensor) -> dict[str, float]:
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
        "zero_gradient_frac": ratio((g == 0).sum(), n),
        "nonfinite_frac": ratio(total - n, total),
        "unmoved_frac": ratio(((g != 0) & (d == 0)).sum(), (g != 0).sum()),
        "ulp_mean": ratio(ulps.sum(), n),
        "ulp_max": ulps.max() if n else math.nan,
        "ulp_zero_frac": ratio((ulps == 0).sum(), n),
        "ulp_median_log2": octave_median(ulps[ulps != 0], 0),
        "energy_concentration": ratio(n * (d**4).sum(), (d**2).sum() ** 2),
    }


def format_oracle(
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
    clips = rounded(w, name, s, clamped=False) != stored
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
    # A draw is `high` with this probability, and `low` otherwise.
    chance = np.divide(goal - low, high - low, out=np.zeros_like(goal), where=high > low)
    variance = (goal - low) * (high - goal)
    moves = chance * (high != stored) + (1 - chance) * (low != stored)

    # The gradient relative to the stiffness
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
        "stochastic_move_frac": ratio(moves[judged].sum(), judged.sum()),
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
        "saturated_frac": ratio(clips.sum(), n),
        "subnormal_frac": ratio(((stored != 0) & (np.abs(stored) < s * 2.0**emin)).sum(), n),
        "grad_stiff_correlation": np.corrcoef(size, gap)[0, 1] if defined else math.nan,
        "grad_stiff_ratio_mean": (size / gap).mean() if gap.size else math.nan,
        "grad_below_stiffness_frac": (size < gap).mean() if gap.size else math.nan,
    }


def assert_figures(step: tuple[Tensor, Tensor, Tensor], names: list[str], scaling: object) -> None:
    """Assert that figures of `measure` equal the definitions: counts, bins and extrema exactly."""
    figures = measure(*step, names, scaling)
    expected = layer_oracle(*step)
    assert set(expected) == set(LAYER_METRICS)
    for name in names:
        format_figures = format_oracle(*step, name, scaling)
        assert set(format_figures) == set(FORMAT_METRICS) - NEED_TRACKING
        expected |= {f"{metric}/{name}": value for metric, value in format_figures.items()}
    assert set(figures) == set(expected)
    wrong = {}
    for key, value in expected.items():
        tolerance = 0 if key.split("/")[0] in EXACT else 1e-12
        if figures[key] != pytest.approx(value, rel=tolerance, abs=tolerance * 1e-3, nan_ok=True):
            wrong[key] = figures[key], value
    assert not wrong, wrong


def a_step(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Make weights over many binades, some 0 or beyond the top of e2m1; updates over many more."""
    generator = np.random.default_rng(seed)
    shape = 6, 80  # the last block of 32 in a row is shorter
    w = generator.normal(size=shape) * 2.0 ** generator.integers(-12, 1, size=shape)
    w.flat[::37] = 0
    w.flat[1::101] *= 12 / np.abs(w.flat[1::101])
    d = generator.normal(size=shape) * np.abs(w) * 10.0 ** generator.uniform(-6, -0.5, shape)
    d = np.where(np.abs(w) > 0.5, -np.abs(d) * np.sign(w), d)  # large weights shrink
    d.flat[::111] = 1e-3  # some weights of 0 move, too
    d.flat[3::7] = 0
    g = generator.normal(size=shape) * 10.0 ** generator.uniform(-4, 0, shape)
    g.flat[2::9] = 0
    before = torch.from_numpy(w).to(dtype)
    after = (before.double() + torch.from_numpy(d)).to(dtype)
    return before, after, torch.from_numpy(g).to(dtype)


def make_key(parameter: object) -> str:
    return "-".join(map(str, parameter)) if isinstance(parameter, tuple) else str(parameter)


TINY, HUGE = 1e-40, torch.finfo(torch.float32).max
W, V, G = a_step()
_DIRTY = [each.clone() for each in (W, V, G)]
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
    "unmoved": (W, W, G),
    "NaN and inf": tuple(_DIRTY),
    "NaN alone": (torch.full((4,), math.nan),) * 3,
    "subnormal": (W * TINY, V * TINY, G * TINY),
    "huge": (W.clamp(-1, 1) * HUGE, V.clamp(-0.9, 0.9) * HUGE, G.clamp(-1, 1) * HUGE),
    "empty": (torch.zeros(0), torch.zeros(0), torch.zeros(0)),
    "empty rows": (torch.zeros(3, 0), torch.zeros(3, 0), torch.zeros(3, 0)),
    "no rows": (torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3)),
    "0-dim": (torch.tensor(0.7), torch.tensor(0.701), torch.tensor(-1e-3)),
    "one element": (torch.tensor([0.7]), torch.tensor([0.701]), torch.tensor([-1e-3])),
    "transposed": (W.T, V.T, G.T),
    "strided": (W[::2, ::3], V[::2, ::3], G[1::2, ::3]),
    "expanded": (W[:1].expand(4, 80), V[:1].expand(4, 80), G[:4]),
}
