"""`measure` against definitions in exact fractions and in numpy."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from altgrad import FloatFormat, measure
from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, NEED_TRACKING
from altgrad.quantization import FORMATS, compute_scale, get_format

pytestmark = pytest.mark.usefixtures("both_kernels")


def nearest(value: Fraction, grid: list[Fraction]) -> Fraction:
    """Return the nearest point of a grid by codes 0, 1, 2, …; ties go to the even code."""
    magnitude = abs(value)
    code = min(
        range(len(grid)), key=lambda c: (abs(grid[c] - magnitude), c % 2)
    )  # a tie prefers the even code
    return grid[code] if value >= 0 else -grid[code]


def unbounded_grid(name: str, scale: float) -> list[Fraction]:
    """Return the non-negative values by code, and two binades beyond the top."""
    format = get_format(name)
    values = []
    finite = int((format.values() >= 0).sum())
    for code in range(finite + 2 * 2**format.mantissa_bits):
        field, mantissa = divmod(code, 2**format.mantissa_bits)
        significand = mantissa + (2**format.mantissa_bits if field else 0)
        exponent = max(field, 1) - format.bias - format.mantissa_bits
        values.append(significand * Fraction(2) ** exponent * Fraction(scale))
    return values


def a_step(n: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(n, generator=generator) * 0.05
    gradient = torch.randn(n, generator=generator) * 1e-2
    after = before - 2e-3 * gradient.sign() * torch.rand(n, generator=generator)
    after[:7] = before[:7]  # some weights do not move
    gradient[3:10] = 0
    return before, after, gradient


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1", "e0m7", "e7m0"])
def test_what_if_figures_equal_their_definition(name: str) -> None:
    before, after, gradient = a_step()
    figures = measure(before, after, gradient, formats=[name])
    grid = unbounded_grid(name, compute_scale(before, name).item())
    dot = moved = stalled = visible = 0
    lost = energy = Fraction(0)
    for w0, w1 in zip(before.tolist(), after.tolist(), strict=True):
        update = Fraction(w1) - Fraction(w0)
        if update == 0:
            continue
        stored = nearest(Fraction(w0), grid)
        effective = nearest(stored + update, grid) - stored
        moved += 1
        stalled += effective == 0
        visible += nearest(Fraction(w1), grid) != stored
        dot += effective * update
        energy += update**2
        lost += (effective - update) ** 2
    assert figures[f"stall_frac/{name}"] == stalled / moved
    assert figures[f"visible_frac/{name}"] == visible / moved
    assert figures[f"kept_update_ratio/{name}"] == pytest.approx(float(dot / energy), rel=1e-12)
    assert figures[f"update_error/{name}"] == pytest.approx(math.sqrt(lost / energy), rel=1e-12)
    assert 0 < stalled <= moved == 293


def test_figures_of_the_tensor_equal_numpy_in_float64() -> None:
    before, after, gradient = a_step()
    w, g = before.double().numpy(), gradient.double().numpy()
    d = after.double().numpy() - w
    figures = measure(before, after, gradient, formats=[])
    expected = {
        "weight_rms": np.sqrt(np.mean(w**2)),
        "update_rms": np.sqrt(np.mean(d**2)),
        "gradient_rms": np.sqrt(np.mean(g**2)),
        "update_weight_ratio": np.linalg.norm(d) / np.linalg.norm(w),
        "zero_gradient_frac": 7 / 300,
        "nonfinite_frac": 0,
        "unmoved_frac": 3 / 293,
        "ulp_zero_frac": 7 / 300,
    }
    for metric, value in expected.items():
        assert figures[metric] == pytest.approx(value, rel=1e-12), metric
    others = {"ulp_mean", "ulp_max", "ulp_median_log2", "energy_concentration"}
    assert set(figures) == set(expected) | others == set(LAYER_METRICS)


def test_keys_are_metric_and_metric_slash_canonical_format_name() -> None:
    before, after, gradient = a_step()
    figures = measure(before, after, gradient, formats=["E4M3", torch.bfloat16])
    per_format = {key.split("/")[0] for key in figures if "/" in key}
    for metric in per_format:
        assert f"{metric}/e4m3fn" in figures
        assert f"{metric}/bf16" in figures
    assert per_format == set(FORMAT_METRICS) - NEED_TRACKING


def test_updates_of_a_layernorm_gain_stall_in_bf16() -> None:
    """An update of 1e-3 at 1.0 is less than half of the spacing of bf16."""
    before = torch.ones(64)
    figures = measure(before, before - 1e-3)
    assert figures["stall_frac/bf16"] == 1.0
    assert figures["kept_update_ratio/bf16"] == 0.0


def test_without_a_gradient_figures_that_need_it_are_left_out() -> None:
    before, after, gradient = a_step()
    without, with_gradient = measure(before, after), measure(before, after, gradient)
    missing = {key.split("/")[0] for key in set(with_gradient) - set(without)}
    assert missing == {
        *("gradient_rms", "zero_gradient_frac", "unmoved_frac"),
        *("grad_stiff_correlation", "grad_stiff_ratio_mean", "grad_below_stiffness_frac"),
    }
    assert all(without[key] == with_gradient[key] for key in without)


def test_non_finite_elements_are_counted_and_left_out_of_everything_else() -> None:
    before, after, gradient = a_step()
    clean = measure(before, after, gradient)
    bad = torch.tensor([math.nan, math.inf, 1.0])
    dirty = measure(
        torch.cat([before, torch.tensor([1.0, 1.0, math.nan])]),
        torch.cat([after, bad]),
        torch.cat([gradient, bad]),
    )
    assert dirty.pop("nonfinite_frac") == 3 / 303
    assert clean.pop("nonfinite_frac") == 0
    # The amax is over all finite weights, those of excluded elements included.
    unscaled = {key for key in clean if "/" not in key}
    assert {k: dirty[k] for k in unscaled} == {k: clean[k] for k in unscaled}
    for key in clean:
        assert not math.isinf(dirty[key]), key


def test_a_step_without_updates_gives_nan_and_no_stalls() -> None:
    """A step at learning rate 0 has no updates, so that no update stalls."""
    before, _, gradient = a_step()
    figures = measure(before, before, gradient)
    for metric in ("kept_update_ratio", "stall_frac", "update_error", "visible_frac"):
        assert math.isnan(figures[f"{metric}/bf16"])
    assert figures["ulp_zero_frac"] == 1
    assert figures["update_rms"] == 0
    assert figures["unmoved_frac"] == 1


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_tensor_has_no_figures(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape)
    assert all(math.isnan(value) for value in measure(empty, empty, empty).values())


def test_zero_initialised_weights_have_figures() -> None:
    figures = measure(torch.zeros(8), torch.full((8,), 1e-3), torch.ones(8))
    assert figures["stall_frac/bf16"] == 0
    assert math.isnan(figures["update_weight_ratio"])  # the norm of the weights is 0
    assert math.isnan(figures["stiffness_mean/bf16"])  # no non-zero weight
    assert math.isnan(figures["grad_stiff_correlation/bf16"])  # NaN here, 0.0 only in DIAG-04
    assert figures["ulp_max"] == pytest.approx(2**23, rel=1)


@pytest.mark.parametrize(
    ("dtype", "judged", "possible"),
    [
        (torch.bfloat16, "bf16", False),
        (torch.bfloat16, "fp16", False),
        (torch.bfloat16, "e4m3fn", True),
        (torch.float16, "bf16", True),
        (torch.float16, "fp16", False),
        (torch.float32, "bf16", True),
        (torch.float64, "fp16", True),
    ],
    ids=str,
)
def test_what_if_figures_are_nan_unless_weights_are_finer_than_the_format(
    dtype: torch.dtype, judged: str, possible: bool
) -> None:
    before, after, gradient = (t.to(dtype) for t in a_step())
    figures = measure(before, after, gradient, formats=[judged])
    for metric in ("kept_update_ratio", "stall_frac", "update_error", "visible_frac"):
        assert math.isnan(figures[f"{metric}/{judged}"]) is not possible
    assert not math.isnan(figures[f"grid_error_mean/{judged}"])
    assert not math.isnan(figures["unmoved_frac"])


def test_unmoved_frac_sees_the_stall_that_bf16_weights_already_had() -> None:
    before = torch.ones(4, dtype=torch.bfloat16)
    after = before + torch.tensor([1e-3, 1e-3, 1e-2, 0.0], dtype=torch.bfloat16)
    gradient = torch.tensor([1.0, 1, 1, 0], dtype=torch.bfloat16)
    assert measure(before, after, gradient)["unmoved_frac"] == 2 / 3


@pytest.mark.parametrize("scaling", ["tensor", "channel", ("block", 32), None])
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_and_scaling_gives_figures_in_range(name: str, scaling: object) -> None:
    before, after, gradient = (t.view(3, 100) for t in a_step())
    figures = measure(before, after, gradient, [name], scaling)
    for metric in ("stall_frac", "visible_frac", "on_grid_frac", "grad_below_stiffness_frac"):
        assert 0 <= figures[f"{metric}/{name}"] <= 1, metric


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_e1m6_and_e0m7_give_equal_figures_under_amax_scales(dtype: torch.dtype) -> None:
    """The mantissa of bf16 has 7 bits, as that of e0m7, but one more with the implicit bit."""
    step = [each.to(dtype) for each in a_step()]
    assert 0 < measure(*step, ["e0m7"])["stall_frac/e0m7"] < 1
    e1m6, e0m7 = measure(*step, ["e1m6"]), measure(*step, ["e0m7"])
    for key, value in e0m7.items():
        if key.startswith("subnormal_frac"):
            continue  # all numbers of E0M7 are subnormal, and few of E1M6
        assert e1m6[key.replace("e0m7", "e1m6")] == pytest.approx(value, nan_ok=True), key


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_block_formats_ignore_the_scaling_also_where_a_channel_begins_at_0(name: str) -> None:
    before = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    before[1] = 0
    after = before * 0.9
    after[1] = 50.0  # far beyond the amax of the tensor before the step
    expected = measure(before, after, formats=name, scaling="tensor")
    for scaling in ("channel", ("block", 16), None):
        assert measure(before, after, formats=name, scaling=scaling) == pytest.approx(
            expected, nan_ok=True, rel=1e-12
        )


def test_errors_name_the_wrong_argument() -> None:
    before, after, gradient = a_step()
    with pytest.raises(ValueError, match=r"before has shape \(300,\) and after \(299,\)"):
        measure(before, after[1:])
    with pytest.raises(ValueError, match=r"before has shape \(300,\) and gradient \(1,\)"):
        measure(before, after, gradient[:1])
    with pytest.raises(TypeError, match=r"float32 and after torch\.float64"):
        measure(before, after.double())
    with pytest.raises(TypeError, match=r"before has dtype torch\.int64"):
        measure(before.long(), after)
    with pytest.raises(ValueError, match="nearest: e4m3fn"):
        measure(before, after, formats=["e4m3fm"])
    with pytest.raises(ValueError, match="scaling='row'"):
        measure(before, after, scaling="row")


def test_inputs_are_not_changed() -> None:
    before, after, gradient = a_step()
    copies = [t.clone() for t in (before, after, gradient)]
    state = torch.get_rng_state()
    parameter = torch.nn.Parameter(after)
    measure(before, parameter, gradient)
    assert torch.equal(torch.get_rng_state(), state)
    for copy, tensor in zip(copies, (before, parameter, gradient), strict=True):
        assert torch.equal(copy, tensor)
    assert parameter.grad is None


def test_a_single_format_and_a_repeated_format_are_accepted() -> None:
    before, after, gradient = a_step()
    expected = measure(before, after, gradient, ["bf16"])
    assert measure(before, after, gradient, "bf16") == expected
    assert measure(before, after, gradient, get_format("bf16")) == expected
    assert measure(before, after, gradient, ["bf16", "bfloat16"]) == expected


def test_two_formats_with_one_name_are_an_error() -> None:
    """Figures of two formats with one name would overwrite each other."""
    before, after, _ = a_step()
    with pytest.raises(ValueError, match="two different formats are named 'bf16'"):
        measure(before, after, formats=["bf16", FloatFormat("bf16", 2, 1, 1)])


def test_float64_figures_are_not_nan_if_subnormals_are_flushed() -> None:
    tiny = torch.finfo(torch.float64).tiny
    before = torch.tensor([0.0, 0.0, 1.0, tiny], dtype=torch.float64)
    after = torch.tensor([0.0, tiny, 1.0, 4 * tiny], dtype=torch.float64)
    figures = measure(before, after)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers to zero")
    try:
        flushed = measure(before, after)
    finally:
        torch.set_flush_denormal(False)
    assert flushed["ulp_max"] == figures["ulp_max"] == 3 * 2.0**51  # tiny has 2**52 ULPs
    assert flushed["ulp_mean"] == figures["ulp_mean"] == (2.0**52 + 3 * 2.0**51) / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["subnormal", "smallest normal", "small", "large"])
def test_ulps_equal_exact_fractions_at_every_magnitude(dtype: torch.dtype, scale: str) -> None:
    info = torch.finfo(dtype)
    exponent = {
        "subnormal": math.log2(info.tiny * info.eps) + 5,
        "smallest normal": math.log2(info.tiny),
        "small": math.log2(info.tiny) + 40 if dtype != torch.float16 else -3,
        "large": min(math.log2(info.max) - 4, 900),
    }[scale]
    before, after = ((part.double() * 2.0**exponent).to(dtype) for part in a_step()[:2])
    before[:3] = 2.0**exponent
    pairs = zip(before.double().tolist(), after.double().tolist(), strict=True)
    ulps = [exact_ulps(w, v, dtype) for w, v in pairs]
    figures = measure(before, after)
    assert figures["ulp_max"] == max(ulps)
    assert figures["ulp_mean"] == pytest.approx(float(sum(ulps) / len(ulps)), rel=1e-15)
    assert figures["ulp_zero_frac"] == sum(ulp == 0 for ulp in ulps) / len(ulps)


def exact_ulps(before: float, after: float, dtype: torch.dtype) -> Fraction:
    """Divide the way of a weight by the distance from the larger magnitude toward 0."""
    if before == after:
        return Fraction(0)
    larger = torch.tensor(max(abs(before), abs(after)), dtype=dtype)
    if dtype in (torch.float64, torch.float32):
        below = larger.nextafter(torch.zeros_like(larger))
    else:
        below = (larger.view(torch.int16) - 1).view(dtype)
    return abs(Fraction(after) - Fraction(before)) / (
        Fraction(larger.item()) - Fraction(below.item())
    )
