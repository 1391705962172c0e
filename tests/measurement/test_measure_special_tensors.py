"""Figures of zeros, constants, NaN, extreme numbers, empty and strided tensors."""

import math

import pytest
import torch

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, NEED_TRACKING
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measure import DEFAULT_FORMATS, measure
from altgrad.measurement.measurer import Measurer
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.scale_groups import Amaxes
from tests.measurement.definitions import SCALINGS, SPECIAL, G, V, W, assert_figures, make_key

pytestmark = pytest.mark.usefixtures("both_kernels")


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("scaling", SCALINGS, ids=make_key)
@pytest.mark.parametrize("case", SPECIAL)
def test_figures_of_special_tensors_equal_their_definitions(case: str, scaling: object) -> None:
    step = SPECIAL[case]
    assert_figures(step, ["bf16", "e4m3fn", "e5m2"], scaling)
    for key, value in measure(*step, scaling=scaling).items():
        assert not math.isinf(value) or key.startswith("sqnr_db"), key


def test_figures_without_a_value_are_nan() -> None:
    def nan_keys(case: str) -> set[str]:
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
    zero_figures = paired | {"update_weight_ratio", "sqnr_db"}
    assert nan_keys("empty") == nan_keys("empty rows") == nan_keys("no rows") == everything
    assert nan_keys("NaN alone") == everything - {"nonfinite_frac"}
    assert nan_keys("zero-initialised") == zero_figures
    assert nan_keys("zero throughout") == zero_figures | unmoved | {"unmoved_frac"}
    assert nan_keys("unmoved") == unmoved
    assert nan_keys("constant") == {"grad_stiff_correlation"}
    assert nan_keys("one element") == {"grad_stiff_correlation", "grid_error_std"}


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e-80, 1e80, 1e160, 1e280])
def test_extreme_float64_numbers_raise_no_exception(size: float) -> None:
    """Figures are inf, 0 or NaN if squares or fourth powers leave the range of float64."""
    step = tuple((each.double() * size) for each in (W, V, G))
    for gradient in (step[2], step[2] / size, None):
        for scaling in SCALINGS:
            figures = measure(step[0], step[1], gradient, ["bf16", "e4m3fn"], scaling)
            assert 0 < figures["unmoved_frac" if gradient is not None else "ulp_zero_frac"] < 1


def test_float64_numbers_near_the_end_of_the_range_count_as_not_finite() -> None:
    """Rounding such numbers would leave the range of float64."""
    step = tuple(each.double().clone() for each in (W, V, G))
    expected = measure(*step)
    wild = torch.cat([step[0].flatten(), torch.tensor([1e290, 1.0, 1.0], dtype=torch.float64)])
    after = torch.cat([step[1].flatten(), torch.tensor([1.0, -1e300, 1.0], dtype=torch.float64)])
    gradient = torch.cat([step[2].flatten(), torch.tensor([1.0, 1.0, 1e305], dtype=torch.float64)])
    amax = step[0].abs().max().view(1)
    row = Measurer(FormatSet(DEFAULT_FORMATS)).measure_tensor(
        wild, after, gradient, Amaxes.from_groups(amax)
    )
    figures = tensor_figures(DEFAULT_FORMATS, row)
    assert figures["nonfinite_frac"] == 3 / 483
    for key in expected.keys() - {"nonfinite_frac"}:
        assert figures[key] == pytest.approx(expected[key], rel=1e-12, nan_ok=True), key


def test_a_correlation_with_overflowing_sums_is_nan() -> None:
    """The result is NaN; ``min(1.0, nan)`` would give 1."""
    before, after, gradient = (each.double() for each in (W, V, G))
    for size in (1e160, 1e280):
        figures = measure(before, after, gradient * size, "bf16")
        assert math.isnan(figures["grad_stiff_correlation/bf16"])
