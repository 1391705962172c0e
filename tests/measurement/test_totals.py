"""`Layers`: rows in any order add up to layers, in the right columns."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from altgrad.measurement.columns import (
    FORMAT_MAXIMA,
    FORMAT_ROW_MAXIMA,
    FORMAT_ROW_MINIMA,
    FORMAT_ROW_SQUARES,
    FORMAT_ROW_SUMS,
    FORMAT_SUMS,
    MAXIMA,
    ROW_MAXIMA,
    ROW_MINIMA,
    ROW_SQUARES,
    ROW_SUMS,
    SUMS,
)
from altgrad.measurement.totals import Clusters, Layers
from tests.strategies import thorough

Found = tuple[Tensor, Tensor]
"""Sums and extrema of rows."""
Column = tuple[str, int | None]
"""Name of a sum or maximum, and the index of its format."""


def list_row_columns(formats: int) -> tuple[list[Column], list[Column]]:
    """List the columns of the kernel, in which all formats of a name follow each other."""

    def columns(layer_names: tuple[str, ...], format_names: tuple[str, ...]) -> list[Column]:
        return [(n, None) for n in layer_names] + [
            (n, f) for n in format_names for f in range(formats)
        ]

    sums = columns(ROW_SUMS, FORMAT_ROW_SUMS) + columns(ROW_SQUARES, FORMAT_ROW_SQUARES)
    minima = columns(ROW_MINIMA, FORMAT_ROW_MINIMA)
    maxima = columns(ROW_MAXIMA, FORMAT_ROW_MAXIMA)
    return sums, maxima + [(f"minus_{name}", format) for name, format in minima]


def list_vector_columns(formats: int) -> tuple[list[Column], list[Column]]:
    """List the columns of a vector, in which all names of a format follow each other."""
    sums = [(n, None) for n in SUMS] + [(n, f) for f in range(formats) for n in FORMAT_SUMS]
    maxima = [(n, None) for n in MAXIMA] + [(n, f) for f in range(formats) for n in FORMAT_MAXIMA]
    return sums, maxima


def some_rows(rows: int, formats: int, seed: int) -> Found:
    """Make rows of whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    sums, maxima = list_row_columns(formats)
    return (
        torch.randint(0, 1000, (rows, len(sums)), generator=generator).double(),
        torch.randint(-1000, 1000, (rows, len(maxima)), generator=generator).double(),
    )


def by_numpy(rows: Found, layer: list[int], layers: int, formats: int) -> list[dict]:
    """Compute every sum and maximum of each layer by numpy, by column."""
    sums, maxima = (each.numpy() for each in rows)
    names, max_names = list_row_columns(formats)
    result = []
    for number in range(layers):
        own = np.array(layer) == number
        values = dict(zip(names, sums[own].sum(0).tolist(), strict=True))
        largest = maxima[own].max(0, initial=-math.inf).tolist()
        values |= {(f"max {n}", f): v for (n, f), v in zip(max_names, largest, strict=True)}
        result.append(values)
    return result


def named(vector: Tensor, formats: int) -> dict[Column, float]:
    sums, maxima = list_vector_columns(formats)
    names = sums + [(f"max {name}", format) for name, format in maxima]
    return dict(zip(names, vector.tolist(), strict=True))


def make_layers(layer: list[int], counted: Tensor, judged: list[bool]) -> Layers:
    return Layers.create(torch.tensor(layer, dtype=torch.int64), counted, judged)


@thorough
@given(st.data(), st.integers(0, 3), st.integers(1, 4), st.integers(1, 12))
def test_rows_in_any_order_add_up_to_their_layers(
    data: st.DataObject, formats: int, layers: int, count: int
) -> None:
    rows = some_rows(count, formats, data.draw(st.integers(0, 99)))
    layer = data.draw(st.lists(st.integers(0, layers - 1), min_size=count, max_size=count))
    counted = torch.arange(3.0 * layers, dtype=torch.float64).view(layers, 3)
    vectors = make_layers(layer, counted, [True] * formats).add_up(*rows)
    assert vectors.dtype is torch.float64
    for number, expected in enumerate(by_numpy(rows, layer, layers, formats)):
        actual = named(vectors[number], formats)
        for column, value in expected.items():
            assert actual[column] == value, column
        assert actual["population", None] == 3 * number
        assert actual["elements", None] == 3 * number + 1
        for format in range(formats):
            assert actual["judged", format] == expected["moved", None]
            assert actual["ever_judged", format] == expected["ever_moved", None]
            assert actual["judged_sq", format] == expected["update_sq", None]
            assert actual["judged_4th", format] == expected["update_4th", None]


@pytest.mark.parametrize("formats", [0, 2])
def test_a_single_row_is_the_vector_of_its_layer(formats: int) -> None:
    rows, counted = some_rows(1, formats, 0), torch.ones(1, 3, dtype=torch.float64)
    alone = make_layers([0], counted, [True] * formats).add_up(*rows)
    none = make_layers([0, 0], counted, [True] * formats)
    both = [torch.cat(pair) for pair in zip(rows, none.make_empty_row(), strict=True)]
    assert torch.equal(none.add_up(*both), alone)
    assert alone[0].isfinite().all()


@pytest.mark.parametrize("formats", [0, 2])
def test_layers_without_rows_have_sums_of_0_and_maxima_of_minus_infinity(formats: int) -> None:
    counted = torch.zeros(3, 3, dtype=torch.float64)
    none = make_layers([], counted, [True] * formats)
    alone = make_layers([0], counted[:1], [True] * formats)
    rows = [each[:0] for each in none.make_empty_row()]
    for vector in (*none.add_up(*rows), *alone.add_up(*alone.make_empty_row())):
        values = named(vector, formats)
        assert {v for (name, _), v in values.items() if not name.startswith("max ")} == {0.0}
        assert {v for (name, _), v in values.items() if name.startswith("max ")} == {-math.inf}


@pytest.mark.parametrize("formats", [0, 1, 3])
def test_octaves_are_counted_by_layer_then_by_format(formats: int) -> None:
    layers = make_layers([0, 1], torch.zeros(2, 3, dtype=torch.float64), [True] * formats)
    counts = layers.histograms.counts
    assert counts.tolist() == [0.0] * (2 * (2 + formats) * 64)
    counts.copy_(torch.arange(len(counts)))
    vectors = layers.add_up(*some_rows(2, formats, 0))
    for layer in range(2):
        values, start = named(vectors[layer], formats), layer * (2 + formats) * 64
        for bin in range(1, 64):
            assert values[f"ulps[{bin}]", None] == start + bin
            assert values[f"weights[{bin}]", None] == start + 64 + bin
            for format in range(formats):
                assert values[f"steps[{bin}]", format] == start + 64 * (2 + format) + bin


def test_bins_of_a_row_begin_at_those_of_its_layer() -> None:
    """The kernel adds the biased exponent of a float64, which is 1023 for 2**0."""
    layer, counted = [2, 0, 2], torch.zeros(3, 3, dtype=torch.float64)
    _, ulps_at, weights_at, steps_at, ones = make_layers(layer, counted, [True] * 3).histograms
    assert (ulps_at.shape, steps_at.shape) == ((3, 1, 1), (3, 3, 1))
    assert weights_at.shape == ulps_at.shape
    for row, number in enumerate(layer):
        first = number * 5 * 64
        assert ulps_at[row, 0, 0] + 1023 == first  # ULPs begin at 2**0
        assert weights_at[row, 0, 0] + 1023 - 48 == first + 64  # at 2**-48
        for format in range(3):
            assert steps_at[row, format, 0] + 1023 - 32 == first + 64 * (2 + format)  # at 2**-32
    assert ones[:5].tolist() == [1.0] * 5
    assert len(ones) >= 2**40
    assert ones.untyped_storage().nbytes() == 8


WHAT_IF = {
    *("visible", "effective", "ever_effective", "kept", "kept_update_cubed", "kept_sq", "lost_sq"),
    *("stochastic_move", "stochastic_variance"),
    *("judged", "ever_judged", "judged_sq", "judged_4th"),
    *(f"steps[{bin}]" for bin in range(1, 64)),
    *(
        f"{metric} {product}"
        for metric in ("kept_update_ratio", "stall_frac", "visible_frac", "never_moved_frac")
        for product in ("aa", "ab", "bb")
    ),
}


@pytest.mark.parametrize("judged", [[], [True], [False], [True, False, True], [False, False]])
def test_exactly_the_what_if_columns_of_unjudged_formats_are_0(
    judged: list[bool],
) -> None:
    formats, layer = len(judged), [0, 0, 0]
    rows, counted = some_rows(3, formats, 1), torch.full((1, 3), 5.0, dtype=torch.float64)
    rows[0].add_(1)  # so that no sum is 0
    every, some = (make_layers(layer, counted, each) for each in ([True] * formats, judged))
    for each in (every, some):
        each.histograms.counts.fill_(7)
        each.products.fill_(9)
    whole, meant = (named(each.add_up(*rows)[0], formats) for each in (every, some))
    assert all(value for (name, _), value in whole.items() if not name.startswith("max "))
    unseen = {(name, format) for format in range(formats) if not judged[format] for name in WHAT_IF}
    assert unseen < whole.keys()
    assert meant == {column: 0.0 if column in unseen else whole[column] for column in whole}


def test_what_if_columns_of_unjudged_formats_are_0_even_if_not_finite() -> None:
    rows = some_rows(1, 1, 0)
    names, _ = list_row_columns(1)
    rows[0][0, names.index(("stochastic_variance", 0))] = math.nan
    rows[0][0, names.index(("kept_sq", 0))] = math.inf
    vectors = make_layers([0], torch.ones(1, 3, dtype=torch.float64), [False]).add_up(*rows)
    values = named(vectors[0], 1)
    assert values["stochastic_variance", 0] == values["kept_sq", 0] == 0


@pytest.mark.parametrize("formats", [0, 1, 3])
def test_products_are_those_of_the_sums_of_clusters(formats: int) -> None:
    """The first layer has two clusters, one of them of two rows; the others have one each."""
    layer, cluster = [0, 0, 2, 0, 1], [0, 0, 1, 2, 3]
    elements = torch.tensor([60.0, 70.0, 80.0, 9.0, 5.0], dtype=torch.float64)
    sums, extrema = some_rows(5, formats, 0)
    names, _ = list_row_columns(formats)
    rows = [dict(zip(names, row, strict=True)) for row in sums.tolist()]
    row_layers = torch.tensor(layer)
    clusters = Clusters.create(torch.tensor(cluster), row_layers, elements, formats)
    counted = torch.ones(3, 3, dtype=torch.float64)
    layers = Layers.create(row_layers, counted, [True] * formats, clusters)
    vectors = [named(vector, formats) for vector in layers.add_up(sums, extrema)]

    def add(column: Column, number: int) -> float:
        return sum(row[column] for row, own in zip(rows, cluster, strict=True) if own == number)

    ratios: dict[Column, tuple[Column, Column | None, Column]] = {
        ("unmoved_frac", None): (
            *(("nonzero_gradients", None), ("moved_with_gradient", None)),
            ("nonzero_gradients", None),
        )
    }
    for f in range(formats):
        moved, ever, finite = ((name, None) for name in ("moved", "ever_moved", "finite"))
        ratios["stall_frac", f] = moved, ("effective", f), moved
        ratios["never_moved_frac", f] = ever, ("ever_effective", f), ever
        ratios["kept_update_ratio", f] = ("kept", f), None, ("update_sq", None)
        ratios["saturated_frac", f] = ("saturated", f), None, finite
        ratios["subnormal_frac", f] = ("stored_nonzero", f), ("stored_normal", f), finite
    for (metric, format), (plus, minus, total) in ratios.items():
        for number, own in enumerate(([0, 2], [3], [1])):
            a = [add(plus, each) - (add(minus, each) if minus else 0) for each in own]
            b = [add(total, each) for each in own]
            found = [vectors[number][f"{metric} {name}", format] for name in ("aa", "ab", "bb")]
            assert found == [np.dot(a, a), np.dot(a, b), np.dot(b, b)], metric


def test_a_share_of_all_elements_counts_those_of_its_rows() -> None:
    sums, extrema = some_rows(2, 0, 0)
    finite = sums[:, ROW_SUMS.index("finite")].tolist()
    elements = torch.tensor([1500.0, 1700.0], dtype=torch.float64)
    row = torch.zeros(2, dtype=torch.int64)
    clusters = Clusters.create(torch.arange(2), row, elements, 0)
    counted = torch.ones(1, 3, dtype=torch.float64)
    (vector,) = Layers.create(row, counted, [], clusters).add_up(sums, extrema)
    found = named(vector, 0)["nonfinite_frac ab", None]
    assert found == (1500 - finite[0]) * 1500 + (1700 - finite[1]) * 1700


def test_clusters_can_be_added_one_by_one() -> None:
    """A layer that is measured alone, chunk by chunk, has the vector of one measured in rows."""
    sums, extrema = some_rows(3, 2, 0)
    sizes = [64, 64, 5]
    rows = torch.zeros(3, dtype=torch.int64)
    clusters = Clusters.create(torch.arange(3), rows, torch.tensor(sizes).double(), 2)
    counted = torch.tensor([[999.0, 133.0, 3.0]], dtype=torch.float64)
    expected = Layers.create(rows, counted, [True] * 2, clusters).add_up(sums, extrema)
    alone = make_layers([0], counted - torch.tensor([0.0, 0.0, 3.0]), [True] * 2)
    for number, size in enumerate(sizes):
        alone = alone.add_cluster(sums[number : number + 1], size)
    both = sums.sum(0, keepdim=True), extrema.amax(0, keepdim=True)
    assert torch.equal(alone.add_up(*both), expected)
