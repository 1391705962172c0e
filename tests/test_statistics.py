"""`LayerStatistics`: parts of a tensor merge into the whole, whatever the parts and their order."""

import contextlib
import functools
import math
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from altgrad.measurement.columns import (
    FORMAT_MAXIMA,
    FORMAT_SUMS,
    MAXIMA,
    OCTAVES,
    SUMS,
    LayerStatistics,
    max_count,
    pack,
    sum_count,
    unpack,
)
from altgrad.measurement.figures import metrics_of
from altgrad.measurement.measurer import Measurer, measure
from altgrad.quantization import get_format
from tests.strategies import thorough

FORMATS = [get_format(name) for name in ("bf16", "e4m3fn", "e5m2", "e2m1")]
UNSCALED = Measurer(FORMATS, None)
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


def assert_same_statistics(actual: LayerStatistics, expected: LayerStatistics) -> None:
    """Whole numbers and maxima exactly, other sums to 1e-12: no term of a sum is negative."""
    assert actual.formats == expected.formats
    assert torch.equal(actual.maxima, expected.maxima)
    assert actual.sums.dtype == actual.maxima.dtype == torch.float64
    assert (expected.sums >= 0).all()
    error = (actual.sums - expected.sums).abs()
    allowed = torch.where(EXACT, 0.0, 1e-12 * expected.sums)
    wrong = (~(error <= allowed)).nonzero().flatten().tolist()
    assert not wrong, [(SUM_NAMES[i], actual.sums[i], expected.sums[i]) for i in wrong[:5]]


def merged(parts: list[LayerStatistics]) -> LayerStatistics:
    return functools.reduce(LayerStatistics.merge, parts, LayerStatistics.empty(NAMES))


def all_at_once(step: tuple[Tensor, ...]) -> LayerStatistics:
    """In one chunk and through no merge but that with `empty`."""
    assert step[0].numel() <= UNSCALED.capacity
    return UNSCALED.statistics_of(*step)


@contextlib.contextmanager
def chunks_of(elements: int) -> Iterator[None]:
    with mock.patch.object(UNSCALED, "capacity", elements):
        yield


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, ...]:
    """Before, after and perhaps a gradient: zeros, subnormals, huge ones, NaN and infinities."""
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
    """A step and the positions of its elements in disjoint parts, some of them empty."""
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
    of_parts = [all_at_once(tuple(each[part] for each in step)) for part in parts]
    assert_same_statistics(merged(of_parts), all_at_once(step))


@thorough
@given(steps(), st.integers(1, 31), st.sampled_from([None, "tensor", "channel", ("block", 4)]))
def test_chunks_equal_the_whole(step: tuple[Tensor, ...], chunk: int, scaling: object) -> None:
    step = tuple(each[: each.numel() // 2 * 2].view(2, -1) for each in step)
    measurer = Measurer(FORMATS, scaling)
    whole = measurer.statistics_of(*step)
    with chunks_of(chunk):
        assert_same_statistics(measurer.statistics_of(*step), whole)
        apart = [torch.stack((each, each), -1)[..., 0] for each in step]  # not contiguous
        assert_same_statistics(measurer.statistics_of(*apart), whole)


def a_step(n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before, noise, gradient = torch.randn(3, n, generator=generator)
    return before, before + 1e-2 * noise, gradient


def test_the_real_chunk_equals_smaller_ones() -> None:
    step = a_step(UNSCALED.capacity + 1000)
    in_two = UNSCALED.statistics_of(*step)
    with chunks_of(10_007):
        assert_same_statistics(UNSCALED.statistics_of(*step), in_two)


def test_two_layers_merge_to_what_they_are_together() -> None:
    """Also a sum of averages would pass for parts of one size: these differ."""
    one, two = a_step(50, seed=1), tuple(10 * each for each in a_step(150, seed=2))
    both = all_at_once(one).merge(all_at_once(two))
    together = tuple(torch.cat(pair) for pair in zip(one, two, strict=True))
    figures = metrics_of([both])[0]
    expected = measure(*together, FORMATS, None)
    assert {key: figures[key] for key in expected} == pytest.approx(
        expected, rel=1e-12, nan_ok=True
    )


def test_empty_is_neutral() -> None:
    some, none = all_at_once(a_step()), LayerStatistics.empty(NAMES)
    for both in (some.merge(none), none.merge(some)):
        assert torch.equal(both.sums, some.sums)
        assert torch.equal(both.maxima, some.maxima)
    nothing = all_at_once(tuple(torch.zeros(3, 0)))
    assert torch.equal(nothing.sums, none.sums)
    assert torch.equal(nothing.maxima, none.maxima)
    assert (none.maxima == -math.inf).all()
    assert all(map(math.isnan, metrics_of([none])[0].values()))


def test_different_formats_do_not_merge() -> None:
    one, other = LayerStatistics.empty(["bf16", "e5m2"]), LayerStatistics.empty(["e5m2", "bf16"])
    with pytest.raises(ValueError, match=r"\('bf16', 'e5m2'\) do not merge with \('e5m2', 'bf16"):
        one.merge(other)
    with pytest.raises(ValueError, match="do not merge"):
        one.merge(LayerStatistics.empty(["bf16"]))


def test_merging_and_weighting_change_neither_operand() -> None:
    one, other = all_at_once(a_step(seed=1)), all_at_once(a_step(seed=2))
    copies = [each.clone() for each in (one.sums, one.maxima, other.sums, other.maxima)]
    one.merge(other)
    standing_for(one, 3).weighted()
    for each, copy in zip((one.sums, one.maxima, other.sums, other.maxima), copies, strict=True):
        assert torch.equal(each, copy)


def standing_for(sample: LayerStatistics, factor: float) -> LayerStatistics:
    """The same, drawn from a parameter of so many times as many elements."""
    sums = sample.sums.clone()
    sums[SUMS.index("population")] *= factor
    return LayerStatistics(sample.formats, sums, sample.maxima)


@pytest.mark.parametrize("factor", [1, 3, 2.5])
def test_weighted_is_so_many_copies_of_each_element(factor: float) -> None:
    sample = all_at_once(a_step())
    weighted = standing_for(sample, factor).weighted()
    assert torch.equal(weighted.sums, sample.sums * factor)
    assert torch.equal(weighted.maxima, sample.maxima)
    if factor == 3:
        assert_same_statistics(weighted, all_at_once(tuple(each.repeat(3) for each in a_step())))
    scaled = metrics_of([weighted])[0]
    for key, value in metrics_of([sample])[0].items():
        if "grid_error_std" not in key:  # has n − 1
            assert scaled[key] == pytest.approx(value, rel=1e-12, nan_ok=True), key


def test_nothing_weighted_is_nothing() -> None:
    assert torch.equal(LayerStatistics.empty(NAMES).weighted().sums, torch.zeros(sum_count(4)))


def test_what_is_packed_unpacks() -> None:
    several = [
        Measurer(names, None).statistics_of(*a_step(seed=seed))
        for seed, names in enumerate([["bf16"], [], ["e4m3fn", "e5m2"]])
    ]
    sums, maxima = pack(several)
    assert sums.dim() == maxima.dim() == 1
    for one, other in zip(unpack(sums, maxima, [s.formats for s in several]), several, strict=True):
        assert one.formats == other.formats
        assert torch.equal(one.sums, other.sums)
        assert torch.equal(one.maxima, other.maxima)
    with pytest.raises(ValueError, match=r"2 layers have .* expected"):
        unpack(sums, maxima, [s.formats for s in several[:2]])
    assert unpack(*pack([]), []) == ()


@pytest.mark.parametrize(("sums", "maxima"), [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_wrong_shapes_are_an_error(sums: int, maxima: int) -> None:
    lengths = sum_count(2), max_count(2)
    assert lengths == (
        len(SUMS) + 2 * len(FORMAT_SUMS),
        len(MAXIMA) + 2 * len(FORMAT_MAXIMA),
    )
    with pytest.raises(ValueError, match=rf"2 formats .* expected \({lengths[0]},\) and"):
        LayerStatistics(
            ("bf16", "e5m2"), torch.zeros(lengths[0] + sums), torch.zeros(lengths[1] + maxima)
        )
    with pytest.raises(ValueError, match="have shapes"):
        LayerStatistics(("bf16", "e5m2"), torch.zeros(1, lengths[0]), torch.zeros(1, lengths[1]))


def test_names_of_sums_and_maxima_are_distinct() -> None:
    for names in ((*SUMS, *FORMAT_SUMS), (*MAXIMA, *FORMAT_MAXIMA)):
        assert len(set(names)) == len(names)


# --- what raw sums could lose --------------------------------------------------------------------


def in_parts(step: tuple[Tensor, ...], format: str) -> dict[str, float]:
    """The metrics after a merge of many small parts, without a scale."""
    measurer = Measurer(format, None)
    parts = zip(*(each.split(37) for each in step), strict=True)
    of_parts = [measurer.statistics_of(*part) for part in parts]
    return metrics_of([functools.reduce(LayerStatistics.merge, of_parts)])[0]


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
    # eps · (mean / deviation)² is what raw sums may lose.
    assert figure == pytest.approx(expected, abs=1e-6 if mean else 1e-12)
    assert 0.5 < expected < 0.99


@pytest.mark.parametrize("size", [1e-30, 1.0])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_deviation_of_the_grid_error_survives(size: float, mean: float) -> None:
    """Weights below half the smallest subnormal: each is its own error."""
    before, after, _ = a_step(2000)
    limit = 2.0**-10 * size / (mean + 5)
    weights = (limit * (mean + before.double())).double()
    before, after = weights, weights + limit * 1e-3 * after
    figures = in_parts((before, after, torch.ones_like(before)), "e4m3fn")
    expected = float(np.std(before.abs().numpy().astype(np.longdouble), ddof=1))
    assert figures["underflow_frac/e4m3fn"] == 1
    assert figures["grid_error_std/e4m3fn"] == pytest.approx(expected, rel=1e-6 if mean else 1e-12)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-3, 1e-30, 1e30])
def test_what_is_constant_deviates_by_exactly_nothing(value: float) -> None:
    """By its smallest and largest value: sums of 0.1 · 0.1 alone would leave a rounding error."""
    before, after, gradient = a_step(1001)
    constant = torch.full_like(before, value)
    figures = in_parts((before, after, constant), "bf16")
    assert math.isnan(figures["grad_stiff_correlation/bf16"])
    figures = in_parts((constant, constant * 1.5, gradient), "bf16")
    assert math.isnan(figures["grad_stiff_correlation/bf16"])
    assert figures["grid_error_std/bf16"] == 0


def test_parts_that_are_constant_alone_are_not_constant_together() -> None:
    ones, small = torch.ones(10), torch.full((10,), 2.0**-5)
    one, other = (all_at_once((w, w * 1.5, w)) for w in (ones, small))
    key = "grad_stiff_correlation/bf16"
    assert math.isnan(metrics_of([one])[0][key])
    assert metrics_of([one.merge(other)])[0][key] == pytest.approx(1, rel=1e-12)
