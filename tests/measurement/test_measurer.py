"""`Measurer`: chunks and merged parts give the figures of the whole tensor."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from altgrad.measurement.columns import (
    FORMAT_SUMS,
    OCTAVES,
    POPULATION,
    SUMS,
    sum_count,
)
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measure import measure
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.step_table import StepTable
from altgrad.quantization import get_format
from altgrad.quantization.format_set import FormatSet
from tests.strategies import thorough

pytestmark = pytest.mark.usefixtures("both_kernels")

FORMATS = [get_format(name) for name in ("bf16", "e4m3fn", "e5m2", "e2m1")]
UNSCALED = Measurer(FormatSet(FORMATS, None))
NAMES = tuple(format.name for format in FORMATS)
WHOLE_NUMBERS = {
    *("population", "elements", "finite", "nonzero_weights", "moved", "ever_moved"),
    *("gradients", "nonzero_gradients", "moved_with_gradient"),
    *("gradient_below_stiffness", "off_grid", "stored_nonzero", "stored_normal", "saturated"),
    *("judged", "ever_judged", "effective", "ever_effective", "visible"),
    *(f"{name}[{bin}]" for name in ("ulps", "steps") for bin in range(1, OCTAVES)),
}
SUM_NAMES = (*SUMS, *FORMAT_SUMS * len(FORMATS))
EXACT = torch.tensor([name in WHOLE_NUMBERS for name in SUM_NAMES])


def assert_same_row(actual: Tensor, expected: Tensor) -> None:
    """Assert that whole numbers and maxima are equal, and other sums to 1e-12 (terms are ≥ 0)."""
    middle = sum_count(len(FORMATS))
    assert torch.equal(actual[middle:], expected[middle:])
    assert actual.dtype == torch.float64
    actual, expected = actual[:middle], expected[:middle]
    assert (expected >= 0).all()
    error = (actual - expected).abs()
    allowed = torch.where(EXACT, 0.0, 1e-12 * expected)
    wrong = (~(error <= allowed)).nonzero().flatten().tolist()
    assert not wrong, [(SUM_NAMES[i], actual[i], expected[i]) for i in wrong[:5]]


def merged(rows: Sequence[Tensor], names: Sequence[str] = NAMES) -> Tensor:
    """Return the row of the model that some layers form."""
    vectors = torch.stack([*rows]).numpy()
    table, model_rows = StepTable.with_model(names, vectors, [names] * len(rows))
    return torch.from_numpy(table.vectors[model_rows[None]])


def all_at_once(step: tuple[Tensor, ...]) -> Tensor:
    """Measure a step in one chunk."""
    assert step[0].numel() <= UNSCALED.capacity
    return UNSCALED.measure_tensor(*step)


@contextlib.contextmanager
def chunk_size(elements: int) -> Iterator[None]:
    with mock.patch.object(UNSCALED, "capacity", elements):
        yield


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, ...]:
    """Draw before, after and perhaps a gradient: 0, subnormal, huge, NaN and inf included."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    value = st.one_of(
        st.floats(width=32),
        st.floats(-2, 2, width=32),
        st.sampled_from([0.0, -0.0, 1.0, 448.0, 465.0, 6.0, 2.0**-10, 1e-30, 1e-40]),
    )
    n = draw(st.integers(0, 30))
    lists = st.lists(value, min_size=n, max_size=n)
    before, other = (torch.tensor(draw(lists), dtype=torch.float32) for _ in range(2))
    share = draw(st.sampled_from([0.0, 1e-3, 0.1]))
    after = torch.where(other > 0, before, other if not share else before * (1 + share * other))
    gradient = [torch.tensor(draw(lists), dtype=torch.float32)] if draw(st.booleans()) else []
    return tuple(each.to(dtype) for each in (before, after, *gradient))


@st.composite
def splits(draw: st.DrawFn) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Draw a step, and positions of its elements in disjoint parts, some of them empty."""
    step = draw(steps())
    n = step[0].numel()
    order = torch.tensor(draw(st.permutations(range(n))), dtype=torch.long)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=6)))
    return step, list(order.tensor_split(cuts))


@thorough
@given(splits())
def test_any_split_in_any_order_merges_to_the_whole(
    split: tuple[tuple[Tensor, ...], list[Tensor]],
) -> None:
    step, parts = split
    part_figures = [all_at_once(tuple(each[part] for each in step)) for part in parts]
    assert_same_row(merged(part_figures), all_at_once(step))


@thorough
@given(steps(), st.integers(1, 31), st.sampled_from([None, "tensor", "channel", ("block", 4)]))
def test_chunks_equal_the_whole(step: tuple[Tensor, ...], chunk: int, scaling: object) -> None:
    step = tuple(each[: each.numel() // 2 * 2].view(2, -1) for each in step)
    measurer = Measurer(FormatSet(FORMATS, scaling))
    whole = measurer.measure_tensor(*step)
    with chunk_size(chunk):
        assert_same_row(measurer.measure_tensor(*step), whole)
        apart = [torch.stack((each, each), -1)[..., 0] for each in step]  # not contiguous
        assert_same_row(measurer.measure_tensor(*apart), whole)


def a_step(n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before, noise, gradient = torch.randn(3, n, generator=generator)
    return before, before + 1e-2 * noise, gradient


def test_chunks_of_the_full_capacity_equal_smaller_chunks() -> None:
    step = a_step(UNSCALED.capacity + 1000)
    in_two = UNSCALED.measure_tensor(*step)
    with chunk_size(10_007):
        assert_same_row(UNSCALED.measure_tensor(*step), in_two)


def test_two_layers_merge_to_the_whole() -> None:
    """The layers differ in size: with equal sizes, a mean of averages would pass, too."""
    one, two = a_step(50, seed=1), tuple(10 * each for each in a_step(150, seed=2))
    both = merged([all_at_once(one), all_at_once(two)])
    together = tuple(torch.cat(pair) for pair in zip(one, two, strict=True))
    figures = tensor_figures(NAMES, both)
    expected = measure(*together, FORMATS, None)
    assert {key: figures[key] for key in expected} == pytest.approx(
        expected, rel=1e-12, nan_ok=True
    )


def test_merging_an_empty_tensor_changes_nothing() -> None:
    some, none = all_at_once(a_step()), all_at_once(tuple(torch.zeros(3, 0)))
    middle = sum_count(len(FORMATS))
    assert not none[:middle].any()
    assert (none[middle:] == -math.inf).all()
    for both in ([some, none], [none, some]):
        assert torch.equal(merged(both), some)
    assert all(map(math.isnan, tensor_figures(NAMES, none).values()))
    assert torch.equal(merged([none]), none)


def test_merging_does_not_change_its_operands() -> None:
    rows = [standing_for(all_at_once(a_step(seed=seed)), 3) for seed in (1, 2)]
    copies = [each.clone() for each in rows]
    merged(rows)
    for each, copy in zip(rows, copies, strict=True):
        assert torch.equal(each, copy)


def standing_for(sample: Tensor, factor: float) -> Tensor:
    """Return the row as that of a sample from a layer with `factor` times as many elements."""
    row = sample.clone()
    row[POPULATION] *= factor
    return row


@pytest.mark.parametrize("factor", [1, 3, 2.5])
def test_a_sample_is_weighted_to_its_population(factor: float) -> None:
    sample = all_at_once(a_step())
    weighted, middle = merged([standing_for(sample, factor)]), sum_count(len(FORMATS))
    assert torch.equal(weighted[:middle], sample[:middle] * factor)
    assert torch.equal(weighted[middle:], sample[middle:])
    if factor == 3:
        assert_same_row(weighted, all_at_once(tuple(each.repeat(3) for each in a_step())))
    scaled = tensor_figures(NAMES, weighted)
    for key, value in tensor_figures(NAMES, sample).items():
        if "grid_error_std" not in key:  # divides by n − 1
            assert scaled[key] == pytest.approx(value, rel=1e-12, nan_ok=True), key


# --- precision of raw sums -----------------------------------------------------------------------


def in_parts(step: tuple[Tensor, ...], format: str) -> dict[str, float]:
    """Return the figures after a merge of many small parts, without a scale."""
    measurer = Measurer(FormatSet(format, None))
    parts = zip(*(each.split(37) for each in step), strict=True)
    row = merged([measurer.measure_tensor(*part) for part in parts], [format])
    return tensor_figures([format], row)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e30])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_correlation_survives_small_gradients_and_large_means(size: float, mean: float) -> None:
    before, after, noise = (each.double() for each in a_step(2000))
    before, after = (each.float() for each in (before, after))
    magnitude = before.abs().double() + 0.5 * noise.abs() + mean
    gradient = (size * magnitude * noise.sign()).float()
    stiffness = 2.0 ** (np.frexp(before.double().abs().numpy())[1] - 1 - 7)
    expected = scipy.stats.pearsonr(gradient.abs().double().numpy(), stiffness).statistic
    figure = in_parts((before, after, gradient), "bf16")["grad_stiff_correlation/bf16"]
    # Raw sums may lose eps · (mean / deviation)².
    assert figure == pytest.approx(expected, abs=1e-6 if mean else 1e-12)
    assert 0.5 < expected < 0.99


@pytest.mark.parametrize("size", [1e-30, 1.0])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_deviation_of_the_grid_error_survives_small_errors_and_large_means(
    size: float, mean: float
) -> None:
    """Weights below half of the smallest subnormal round to 0: each equals its grid error."""
    before, after, _ = a_step(2000)
    limit = 2.0**-10 * size / (mean + 5)
    weights = (limit * (mean + before.double())).double()
    before, after = weights, weights + limit * 1e-3 * after
    figures = in_parts((before, after, torch.ones_like(before)), "e4m3fn")
    expected = float(np.std(before.abs().numpy().astype(np.longdouble), ddof=1))
    assert figures["underflow_frac/e4m3fn"] == 1
    assert figures["grid_error_std/e4m3fn"] == pytest.approx(expected, rel=1e-6 if mean else 1e-12)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-3, 1e-30, 1e30])
def test_constant_grid_errors_deviate_by_exactly_0(value: float) -> None:
    """The smallest and largest value decide: sums of 0.1 · 0.1 leave a rounding error."""
    before, after, gradient = a_step(1001)
    constant = torch.full_like(before, value)
    figures = in_parts((before, after, constant), "bf16")
    assert math.isnan(figures["grad_stiff_correlation/bf16"])
    figures = in_parts((constant, constant * 1.5, gradient), "bf16")
    assert math.isnan(figures["grad_stiff_correlation/bf16"])
    assert figures["grid_error_std/bf16"] == 0


def test_merged_parts_with_different_constants_deviate() -> None:
    ones, small = torch.ones(10), torch.full((10,), 2.0**-5)
    one, other = (all_at_once((w, w * 1.5, w)) for w in (ones, small))
    key = "grad_stiff_correlation/bf16"
    assert math.isnan(tensor_figures(NAMES, one)[key])
    assert tensor_figures(NAMES, merged([one, other]))[key] == pytest.approx(1, rel=1e-12)
