"""Both kernels on nine elements, with every sum computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from altgrad.measurement.columns import (
    FORMAT_ROW_MAXIMA,
    FORMAT_ROW_MINIMA,
    FORMAT_ROW_SQUARES,
    FORMAT_ROW_SUMS,
    OCTAVES,
    ROW_MAXIMA,
    ROW_MINIMA,
    ROW_SQUARES,
    ROW_SUMS,
)
from altgrad.measurement.kernel import EverMoved, Rows, row_sums
from altgrad.measurement.native_code import native_code
from altgrad.measurement.native_rows import native_row_sums
from altgrad.measurement.totals import Layers
from altgrad.measurement.workspace import Workspace
from altgrad.quantization import E2M1
from altgrad.quantization.binary64 import LARGEST
from altgrad.quantization.grids import Grids, make_grids

pytestmark = pytest.mark.usefixtures("both_kernels")

NAN = math.nan
Found = tuple[Tensor, Tensor]
"""Sums and extrema of one call of the kernel."""
CPU = torch.device("cpu")
FLOAT32 = 2.0**-23, 2.0**-126
TINY = 2.0**-23
ELEMENTS = (
    # before, after, gradient
    (1.0, 1.25, -2.0),  # stalls in both formats: 1.25 is a tie, or nearer to 1
    (3.0, -1.0, 0.25),  # fully kept
    (0.0, 0.75, 8.0),  # from 0; becomes 1 in both formats
    (9.0, 9.0, 1.0),  # above the top of E2M1; no update
    (NAN, 1.0, 1.0),  # no element
    (2.0, 2.0 - TINY, 0.5),  # one float32 down, where they lie closer than above 2
    (0.125, 0.125, 0.5),  # stored as 0
    (-0.5, -0.5, 0.125),  # subnormal in E2M1, stored as 0 at twice its size
    (6.0, 15.0, 4.0),  # moves past the top of both formats
)
LAYER = {
    "finite": 8,
    "nonzero_weights": 7,
    "moved": 5,
    "ever_moved": 5,
    "ulps": 2**21 + 2**24 + 3 * 2**22 + 1 + 9 * 2**20,
    "gradients": 8,
    "nonzero_gradients": 8,
    "moved_with_gradient": 5,
    "paired_gradient_abs": 8.375,
    "weight_sq": 131.265625,
    "update_sq": 97.625 + TINY**2,
    "update_4th": 6817.3203125 + TINY**4,
    "gradient_sq": 85.578125,
    "paired_gradient_sq": 21.578125,
    "max ulps": 2**24,
    "max paired_gradient_abs": 4.0,
    "min paired_gradient_abs": 0.125,
}
FORMATS = {
    # E2M1, whose positive numbers are 0.5, 1, 1.5, 2, 3, 4 and 6; and the same times a scale of 2.
    "stiffness": (7.5, 11.0),
    "stiffness_gradient": (12.0625, 15.375),
    "gradient_per_stiffness": (8.5, 5.625),
    "gradient_below_stiffness": (4, 5),
    "grid_error": (3.125, 1.625),
    "off_grid": (2, 3),
    "stored_nonzero": (6, 5),
    "stored_normal": (5, 4),
    "saturated": (1, 0),
    "visible": (2, 3),
    "effective": (2, 3),
    "ever_effective": (2, 3),
    "kept": (16.75, 106.75),
    "kept_update_cubed": (256.421875, 7546.421875),
    "stochastic_move": (2.5 + 2 * TINY, 3.0 + TINY),  # 6 moves to the top it has: not at all
    "stochastic_variance": (0.125 + (0.5 - TINY) * TINY, 3.375 + (1 - TINY) * TINY),
    "stiffness_sq": (10.75, 25.0),
    "grid_error_sq": (9.015625, 1.265625),
    "kept_sq": (256.5625, 8356.5625),
    "lost_sq": (81.125 + TINY**2, 1.125 + TINY**2),
    "max grid_error": (3.0, 1.0),
    "max stiffness": (2.0, 4.0),
    "min grid_error": (0.0, 0.0),
    "min stiffness": (0.5, 1.0),
}
ULPS = {0: 5, 21: 1, 23: 2, 24: 1}  # counts by octave of updates in ULPs of float32
WEIGHTS = {0: 2, 45: 1, 47: 1, 48: 1, 49: 2, 50: 1, 51: 1}  # 2**0 is in bin 48
STEPS = ({0: 4, 9: 1, 31: 1, 32: 1, 34: 2}, {0: 4, 9: 1, 30: 1, 31: 1, 34: 2})


def tensors(*elements: tuple[float, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return before, after and gradient, one row each."""
    columns = zip(*elements, strict=True)
    return [torch.tensor(column, dtype=dtype).view(1, 1, -1) for column in columns]


def two_formats(scale: float = 2.0) -> Grids:
    """Return grids of an unscaled format and of a scaled one, whose ceiling is inf."""
    scales = torch.tensor([1.0, scale], dtype=torch.float64).view(1, 2, 1)
    return make_grids([E2M1, E2M1], [False, True], scales)


def measured(
    rows: Rows, grids: Grids | None, ever: EverMoved | None = None
) -> tuple[Found, Tensor]:
    """Return sums and maxima, and the histogram of each row."""
    count, formats = len(rows.before), 0 if grids is None else grids.eps.shape[1]
    counted = torch.ones(count, 3, dtype=torch.float64)
    histograms = Layers.create(torch.arange(count), counted, [True] * formats).histograms
    native = native_code.function
    if native is not None:
        found = native_row_sums(native, rows, grids, FLOAT32, histograms, ever)
        return found, histograms.counts.view(count, 2 + formats, OCTAVES)
    buffers = Workspace().buffers(count, formats, rows.before.shape[-1], CPU)
    for each in (*buffers.per_format, *buffers.shared, *buffers.stacked):
        each.fill_(NAN)  # the kernel does not read old contents
    found = row_sums(rows, grids, FLOAT32, buffers, histograms, ever)
    return found, histograms.counts.view(count, 2 + formats, OCTAVES)


def named(found: Found, formats: int) -> dict[str, list[float]]:
    """Return the sums of the first row by name: one number of the layer, or one for each format."""
    groups = [
        *((ROW_SUMS, 1, "{}"), (FORMAT_ROW_SUMS, formats, "{}")),
        *((ROW_SQUARES, 1, "{}"), (FORMAT_ROW_SQUARES, formats, "{}")),
        *((ROW_MAXIMA, 1, "max {}"), (FORMAT_ROW_MAXIMA, formats, "max {}")),
        *((ROW_MINIMA, 1, "min {}"), (FORMAT_ROW_MINIMA, formats, "min {}")),
    ]
    numbers = iter((*found[0][0].tolist(), *found[1][0].tolist()))
    columns = [(how.format(name), count) for names, count, how in groups for name in names]
    result = {name: [next(numbers) for _ in range(count)] for name, count in columns}
    assert next(numbers, None) is None
    return {k: [-x for x in v] if k.startswith("min ") else v for k, v in result.items()}


def histogram(counts: Tensor) -> dict[int, int]:
    return {bin: int(count) for bin, count in enumerate(counts.tolist()) if count}


def test_sums_equal_those_computed_by_hand() -> None:
    found, counts = measured(Rows(*tensors(*ELEMENTS)), two_formats())
    expected = {name: [value] for name, value in LAYER.items()}
    expected |= {name: [*values] for name, values in FORMATS.items()}
    actual = named(found, 2)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        exact = not name.endswith(("_sq", "_4th"))  # computed as norms
        tolerance = 0 if exact else 1e-15
        assert actual[name] == pytest.approx(values, rel=tolerance, abs=0), name
    assert histogram(counts[0, 0]) == ULPS
    assert histogram(counts[0, 1]) == WEIGHTS
    assert tuple(map(histogram, counts[0, 2:])) == STEPS


@pytest.mark.parametrize("scale", [0.25, 2.0, 3.0])
def test_sums_scale_with_weights_and_scale(
    scale: float,
) -> None:
    """Scales other than powers of two, such as 3, are not folded into the grid's constants."""
    before, after, gradient = tensors(*ELEMENTS)
    rows = Rows(before.double() * scale, after.double() * scale, gradient)
    scales = torch.tensor([scale, 2 * scale], dtype=torch.float64).view(1, 2, 1)
    grids = make_grids([E2M1, E2M1], [True, True], scales, power_of_two=scale != 3)
    assert (grids.scale is None) is (scale != 3)
    actual = named(measured(rows, grids)[0], 2)
    counts = ("off_grid", "stored_nonzero", "stored_normal", "saturated")
    assert {name: actual[name] for name in counts} == {name: [*FORMATS[name]] for name in counts}
    for name in ("stiffness", "grid_error", "max stiffness", "min stiffness", "max grid_error"):
        expected = [scale * each for each in FORMATS[name]]
        assert actual[name] == pytest.approx(expected, rel=1e-15), name
    for name, power in {"kept": 2, "kept_update_cubed": 4, "lost_sq": 2, "kept_sq": 4}.items():
        expected = FORMATS[name][1] * scale**power
        assert actual[name][1] == pytest.approx(expected, rel=1e-14), name


def test_rows_are_independent_and_have_separate_scales() -> None:
    before, after, gradient = (each.view(3, 1, 3) for each in tensors(*ELEMENTS))
    scales = torch.tensor([[1.0, 2.0], [4.0, 0.5], [8.0, 1.0]], dtype=torch.float64)[..., None]
    grids = make_grids([E2M1, E2M1], [False, True], scales)
    found, counts = measured(Rows(before, after, gradient), grids)
    for row in range(3):
        row_grids = make_grids([E2M1, E2M1], [False, True], scales[row : row + 1])
        rows = Rows(*(each[row : row + 1] for each in (before, after, gradient)))
        alone, own = measured(rows, row_grids)
        assert torch.allclose(found[0][row], alone[0][0], rtol=1e-15, atol=0)
        assert torch.equal(found[1][row], alone[1][0])
        assert torch.equal(counts[row], own[0])


def test_rows_are_not_changed_and_may_share_memory() -> None:
    apart = tensors(*ELEMENTS)
    together = torch.cat(apart, dim=1)
    copies = [each.clone() for each in (*apart, together)]
    one = measured(Rows(*apart), two_formats())
    other = measured(Rows(*together.split(1, dim=1), together), two_formats())
    assert all(map(torch.equal, (*one[0], one[1]), (*other[0], other[1])))
    for each, copy in zip((*apart, together), copies, strict=True):
        assert torch.equal(each.nan_to_num(-1), copy.nan_to_num(-1))


@pytest.mark.parametrize("wild", [NAN, math.inf, -math.inf, LARGEST, -LARGEST])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["before", "after", "gradient"])
def test_elements_with_a_non_finite_value_are_in_no_sum(place: int, wild: float) -> None:
    three = [4.0, 5.0, 6.0]
    three[place] = wild
    clean, _ = measured(Rows(*tensors(*ELEMENTS, dtype=torch.float64)), two_formats())
    rows = Rows(*tensors(*ELEMENTS, tuple(three), dtype=torch.float64))
    found, counts = measured(rows, two_formats())
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1], clean[1])
    assert counts.sum(-1).tolist() == [[10.0] * 4]  # updates and weights of 0 included


def test_rows_without_elements_have_sums_of_0() -> None:
    found, _ = measured(Rows(*tensors((NAN, 1.0, 1.0), (NAN, 2.0, 2.0))), two_formats())
    assert not found[0].any()
    by_name = named(found, 2)
    assert {v for k, vs in by_name.items() if k.startswith("max") for v in vs} == {0.0}
    assert {v for k, vs in by_name.items() if k.startswith("min") for v in vs} == {math.inf}


def test_without_a_gradient_only_gradient_sums_are_0() -> None:
    before, after, gradient = tensors(*ELEMENTS)
    whole = named(measured(Rows(before, after, gradient), two_formats())[0], 2)
    without = named(measured(Rows(before, after, None), two_formats())[0], 2)
    differ = {name for name, values in whole.items() if without[name] != values}
    below = "gradient_below_stiffness"
    assert differ == {name for name in whole if "gradient" in name}
    assert {name: without[name] for name in differ - {below}} == {
        name: [0.0] * len(whole[name]) for name in differ - {below}
    }
    assert without[below] == [7, 7]  # 0 is less than any stiffness


def test_layer_sums_are_the_same_without_formats() -> None:
    rows = Rows(*tensors(*ELEMENTS))
    alone, counts = measured(rows, None)
    whole = named(measured(rows, two_formats())[0], 2)
    assert {name: values for name, values in named(alone, 0).items() if values} == {
        name: whole[name] for name in LAYER
    }
    assert histogram(counts[0, 0]) == ULPS


def test_flags_of_earlier_steps_are_kept_and_counted() -> None:
    ever = EverMoved(torch.zeros(1, 1, 9, dtype=torch.bool), torch.zeros(1, 2, 9, dtype=torch.bool))
    ever.moved[0, 0, [3, 4]] = True
    ever.effective[0, 1, [0, 8]] = True
    found, _ = measured(Rows(*tensors(*ELEMENTS)), two_formats(), ever)
    assert ever.moved[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 8]
    assert ever.effective[0, 0].nonzero().flatten().tolist() == [1, 2]
    assert ever.effective[0, 1].nonzero().flatten().tolist() == [0, 1, 2, 8]
    by_name = named(found, 2)
    assert by_name["ever_moved"] == [7]
    assert by_name["ever_effective"] == [2, 4]
    assert (by_name["moved"], by_name["effective"]) == ([5], [2, 3])
