"""Zeros, constants, NaN, ends of the range, empty and strided tensors: figures are as defined."""

import math

import pytest
import torch

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, NEED_TRACKING
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measure import DEFAULT_FORMATS, measure
from altgrad.measurement.measurer import Measurer
from altgrad.quantization.format_set import FormatSet
from tests.measurement.definitions import SCALINGS, SPECIAL, G, V, W, assert_figures, key_of


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
    step = tuple((each.double() * size) for each in (W, V, G))
    for gradient in (step[2], step[2] / size, None):
        for scaling in SCALINGS:
            figures = measure(step[0], step[1], gradient, ["bf16", "e4m3fn"], scaling)
            assert 0 < figures["unmoved_frac" if gradient is not None else "ulp_zero_frac"] < 1


def test_float64_numbers_near_its_end_count_as_not_finite() -> None:
    """Rounding them would leave float64."""
    step = tuple(each.double().clone() for each in (W, V, G))
    expected = measure(*step)
    wild = torch.cat([step[0].flatten(), torch.tensor([1e290, 1.0, 1.0], dtype=torch.float64)])
    after = torch.cat([step[1].flatten(), torch.tensor([1.0, -1e300, 1.0], dtype=torch.float64)])
    gradient = torch.cat([step[2].flatten(), torch.tensor([1.0, 1.0, 1e305], dtype=torch.float64)])
    amax = step[0].abs().max().view(1)
    row = Measurer(FormatSet(DEFAULT_FORMATS)).measure_tensor(wild, after, gradient, amax)
    figures = tensor_figures(DEFAULT_FORMATS, row)
    assert figures["nonfinite_frac"] == 3 / 483
    for key in expected.keys() - {"nonfinite_frac"}:
        assert figures[key] == pytest.approx(expected[key], rel=1e-12, nan_ok=True), key


def test_a_correlation_whose_sums_overflow_is_no_perfect_one() -> None:
    """NaN, and not the 1 that ``min(1.0, nan)`` gives."""
    before, after, gradient = (each.double() for each in (W, V, G))
    for size in (1e160, 1e280):
        figures = measure(before, after, gradient * size, "bf16")
        assert math.isnan(figures["grad_stiff_correlation/bf16"])
