"""Standard errors of ratios against SciPy, all possible samples, and the spread of many draws."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from altgrad.measurement.intervals import WIDTH
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.standard_errors import EstimateSums, estimate_sums, standard_errors

Units = tuple[Numbers, Numbers]
"""a and b of each unit of a sample: of an element, or of a cluster."""


def stack_sums(*samples: Units, carrying: float = 1e6, is_share: bool = False) -> EstimateSums:
    """Stack the sums of samples, (samples, 1) each."""
    columns = [
        [a.sum(), b.sum(), (a * a).sum(), (a * b).sum(), (b * b).sum(), carrying, float(is_share)]
        for a, b in samples
    ]
    return EstimateSums(*np.array(columns).T[:, :, None])


def with_model(sums: EstimateSums, weights: list[float]) -> EstimateSums:
    """Append the row of a model, whose layers are weighted."""
    a, b = (np.dot(weights, each[:, 0]) for each in sums[:2])
    row = [a, b, np.nan, np.nan, np.nan, np.nan, sums.is_share[0, 0]]
    return EstimateSums(
        *(np.append(each, [[value]], axis=0) for each, value in zip(sums, row, strict=True))
    )


def a_sample(count: int, seed: int) -> Units:
    generator = np.random.default_rng(seed)
    b = 0.5 + generator.random(count)
    return b * generator.random(count), b


def zeros_and_ones(count: int, elements: int) -> Units:
    return (np.arange(elements) < count).astype(float), np.ones(elements)


def counted(*each: tuple[float, ...]) -> Numbers:
    """Return populations, elements and clusters; clusters are 0 if they are left out."""
    return np.array([(*numbers, 0)[:3] for numbers in each], dtype=float)


def student(freedom: float) -> float:
    """Return by how much an interval is wider for few degrees of freedom."""
    return stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)


# --- a layer


def test_the_variance_is_unbiased_over_all_possible_samples() -> None:
    """Over all samples, the mean of the estimated variances equals the variance of their sums."""
    values, size = a_sample(37, 0)[0], 35
    drawn = [[*chosen] for chosen in combinations(range(37), size)]
    truth = np.var([values[each].sum() for each in drawn])
    estimates = []
    for each in drawn:
        error = standard_errors(
            stack_sums((values[each], np.ones(size))), counted((37, size)), {}
        ).item()
        carriers = values[each].sum() ** 2 / (values[each] ** 2).sum()
        estimates.append((error / student(carriers - 1) * size) ** 2)
    assert np.mean(estimates) == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("population", [51, 1000, 10**6])
def test_the_error_of_a_layer_follows_from_its_residuals(population: int) -> None:
    a, b = a_sample(50, 1)
    residuals = a - a.sum() / b.sum() * b
    variance = (1 - 50 / population) * 50 / 49 * (residuals**2).sum()
    error = standard_errors(stack_sums((a, b)), counted((population, 50)), {}).item()
    fewest = min(each.sum() ** 2 / (each * each).sum() for each in (a, b))
    widened = student(fewest - 1)
    assert error == pytest.approx(widened * math.sqrt(variance) / b.sum(), rel=1e-4)


@pytest.mark.parametrize(("count", "elements"), [(0, 7), (2, 2), (3, 41), (41, 41), (900, 4096)])
def test_the_error_of_a_share_is_half_of_wilsons_interval(count: int, elements: int) -> None:
    sums = stack_sums(zeros_and_ones(count, elements), is_share=True)
    error = standard_errors(sums, counted((1e12, elements)), {}).item()
    wilson = stats.binomtest(count, elements).proportion_ci(0.95, method="wilson")
    # 0 < share < 1 has elements − 1 in place of elements: the variance is that of a sample.
    assert error == pytest.approx((wilson.high - wilson.low) / 2 / WIDTH, rel=1 / elements)
    assert error > 0


def test_two_moved_weights_of_a_large_layer_leave_their_share_open() -> None:
    """The share is of 2 weights that moved, and not of 4,096 that were measured."""
    a, b = (np.append(each, np.zeros(4094)) for each in zeros_and_ones(2, 2))
    sums = stack_sums((a, b), carrying=2.0, is_share=True)
    assert standard_errors(sums, counted((1e6, 4096)), {}).item() > 0.15


def test_layers_that_are_measured_whole_have_an_error_of_0() -> None:
    for sums in (
        stack_sums(a_sample(5, 2), carrying=5.0),
        stack_sums(zeros_and_ones(1, 5), carrying=5.0, is_share=True),
        stack_sums(zeros_and_ones(5, 5), carrying=5.0, is_share=True),
    ):
        assert standard_errors(sums, counted((5, 5)), {}).item() == 0


@pytest.mark.parametrize(("moved", "is_nan"), [(99.0, True), (100.0, False)])
def test_the_error_of_a_ratio_is_nan_if_few_elements_of_a_sample_moved(
    moved: float, is_nan: bool
) -> None:
    sums = stack_sums(a_sample(200, 2), carrying=moved)
    assert math.isnan(standard_errors(sums, counted((999, 200)), {}).item()) is is_nan
    share = stack_sums(a_sample(200, 2), carrying=moved, is_share=True)
    assert standard_errors(share, counted((999, 200)), {}).item() > 0


@pytest.mark.parametrize(("heavy", "is_nan"), [(3.0, True), (1.0, False)])
def test_the_error_of_a_ratio_is_nan_if_few_elements_carry_it(heavy: float, is_nan: bool) -> None:
    b = np.exp(np.random.default_rng(0).normal(0, heavy, 500))
    assert bool(b.sum() ** 2 / (b * b).sum() < 30) is is_nan
    error = standard_errors(stack_sums((b / 2, b)), counted((999, 500)), {}).item()
    assert math.isnan(error) is is_nan


def test_the_error_is_nan_if_the_ratio_has_no_value() -> None:
    nothing = (np.zeros(50), np.zeros(50))
    for pair in ((99, 50), (50, 50)):
        for is_share in (True, False):
            sums = stack_sums(nothing, is_share=is_share)
            assert np.isnan(standard_errors(sums, counted(pair), {})).all()


def test_a_ratio_of_which_a_sample_keeps_nothing_may_be_larger() -> None:
    sums = stack_sums((np.zeros(400), np.ones(400)))
    assert standard_errors(sums, counted((1e9, 400)), {}).item() == pytest.approx(1 / 400, rel=0.01)


# --- clusters


def draw_clusters(draws: int, *, is_share: bool) -> tuple[Numbers, Numbers]:
    """Draw 60 clusters of 32 alike elements each: the figures, and the errors that are stated."""
    random = np.random.default_rng(0)
    shares = random.beta(2, 3, 900)
    b = np.full(900, 32.0) if is_share else random.uniform(0.5, 1.5, 900)
    a = random.binomial(32, shares).astype(float) if is_share else b * shares
    figures, errors = [], []
    for _ in range(draws):
        drawn = random.choice(900, 60, replace=False)
        sums = stack_sums((a[drawn], b[drawn]), is_share=is_share)
        figures.append((sums.a / sums.b).item())
        errors.append(standard_errors(sums, counted((900 * 32, 60 * 32, 60)), {}).item())
    return np.array(figures), np.array(errors)


@pytest.mark.parametrize("is_share", [True, False], ids=["share", "ratio"])
def test_errors_of_clusters_equal_the_spread_of_many_draws(is_share: bool) -> None:
    figures, errors = draw_clusters(1000, is_share=is_share)
    assert errors.mean() == pytest.approx(figures.std(), rel=0.1)


@pytest.mark.parametrize(
    ("clusters", "is_share", "is_nan"),
    [(4, True, True), (5, True, False), (4, False, True), (5, False, False)],
)
def test_the_error_is_nan_if_few_clusters_carry_a_figure(
    clusters: int, is_share: bool, is_nan: bool
) -> None:
    a = np.where(np.arange(clusters) % 2, 8.0, 24.0)
    sums = stack_sums((a, np.full(clusters, 32.0)), is_share=is_share)
    pairs = counted((1e6, 32 * clusters, clusters))
    assert math.isnan(standard_errors(sums, pairs, {}).item()) is is_nan


def test_a_share_of_0_in_clusters_may_be_as_large_as_if_clusters_were_elements() -> None:
    sums = stack_sums((np.zeros(60), np.full(60, 32.0)), is_share=True)
    error = standard_errors(sums, counted((1e9, 1920, 60)), {}).item()
    wilson = stats.binomtest(0, 60).proportion_ci(0.95, method="wilson")
    assert error == pytest.approx(wilson.high / 2 / WIDTH, rel=0.05)  # Student's is wider


def test_a_share_that_few_clusters_carry_has_a_wider_interval() -> None:
    """Three of 64 clusters hold all stalled elements: the spread rests on these three."""
    few, many = np.zeros(64), np.zeros(64)
    few[:3], many[:48] = 16.0, 1.0
    both = stack_sums(*((a, np.full(64, 32.0)) for a in (few, many)), is_share=True)
    pair = (1e9, 2048, 64)
    errors = standard_errors(both, counted(pair, pair), {}).flatten()
    assert errors[0] > 4 * errors[1]


# --- models


def draw_models(draws: int, *, is_share: bool) -> tuple[Numbers, Numbers]:
    """Draw samples of two layers that differ: figures of the model, and errors stated."""
    random = np.random.default_rng(1)
    layers = []
    for population, share in ((4000, 0.95), (9000, 0.1)):
        b = np.ones(population) if is_share else random.uniform(0.5, 1.5, population)
        a = random.random(population) < share
        layers.append((a * b, b))
    weights = [4000 / 300, 9000 / 300]
    pairs = counted((4000, 300), (9000, 300), (13_000, 13_000))
    figures, errors = [], []
    for _ in range(draws):
        drawn = [random.choice(len(b), 300, replace=False) for _, b in layers]
        samples = [(a[d], b[d]) for (a, b), d in zip(layers, drawn, strict=True)]
        sums = with_model(stack_sums(*samples, is_share=is_share), weights)
        figures.append((sums.a / sums.b)[2, 0])
        errors.append(standard_errors(sums, pairs, {2: (0, 1)})[2, 0])
    return np.array(figures), np.array(errors)


@pytest.mark.parametrize("is_share", [True, False], ids=["share", "ratio"])
def test_the_error_of_a_model_equals_the_spread_of_many_draws(is_share: bool) -> None:
    """Layers are strata: that they differ from each other is no reason for an error."""
    figures, errors = draw_models(1000, is_share=is_share)
    assert errors.mean() == pytest.approx(figures.std(), rel=0.1)


def test_a_layer_that_stalls_throughout_and_one_that_nowhere_does_leave_little_error() -> None:
    sums = stack_sums(zeros_and_ones(0, 1000), zeros_and_ones(1000, 1000), is_share=True)
    pairs = counted((1e5, 1000), (1e5, 1000), (2e5, 2e5))
    errors = standard_errors(with_model(sums, [100.0, 100.0]), pairs, {2: (0, 1)})
    assert 0 < errors[2, 0] < 0.001


def test_a_model_of_whole_layers_and_a_sampled_one_has_the_error_of_the_sample() -> None:
    a, b = zeros_and_ones(100, 1000)
    sums = stack_sums((a, b), zeros_and_ones(500, 1000), is_share=True)
    pairs = counted((1e5, 1000), (1000, 1000), (101_000, 101_000))
    errors = standard_errors(with_model(sums, [100.0, 1.0]), pairs, {2: (0, 1)}).flatten()
    assert errors[1] == 0
    assert errors[2] == pytest.approx(errors[0] * 100 / 101, rel=0.02)


def test_layers_without_a_ratio_do_not_change_the_error_of_a_model() -> None:
    sample, nothing = a_sample(150, 3), (np.zeros(40), np.zeros(40))
    sums = with_model(stack_sums(sample, nothing), [10.0, 10.0])
    sums.carrying[1] = 0.0
    pairs = counted((1500, 150), (400, 40), (1900, 1900))
    with_it, without = (
        standard_errors(sums, pairs, {2: layers})[2].item() for layers in ((0, 1), (0,))
    )
    assert with_it == without > 0


def test_the_kept_ratio_of_a_model_counts_the_moved_elements_of_all_its_samples() -> None:
    sums = stack_sums(a_sample(60, 4), a_sample(60, 5), carrying=60.0)
    pairs = counted((600, 60), (600, 60), (1200, 1200))
    errors = standard_errors(with_model(sums, [10.0, 10.0]), pairs, {2: (0, 1)}).flatten()
    assert np.isnan(errors).tolist() == [True, True, False]


# --- sums


class Columns:
    """A `Sums` of some rows and formats; sums over clusters are 0 unless they are given."""

    def __init__(self, **columns: Numbers) -> None:
        self._columns = columns

    def sum(self, name: str) -> Numbers:
        zeros = np.zeros_like(next(iter(self._columns.values())))
        return self._columns.get(name, zeros[:, :1] if name == "clusters" else zeros)


def test_a_share_equals_a_ratio_of_zeros_and_ones() -> None:
    judged = np.array([[5.0, 0.0, 9.0], [7.0, 7.0, 1.0]])
    effective = np.array([[2.0, 0.0, 9.0], [0.0, 7.0, 1.0]])
    n = Columns(judged=judged, effective=effective)
    for row, (stack_all, kept) in enumerate(zip(judged.tolist(), effective.tolist(), strict=True)):
        for place in range(3):
            b = np.ones(int(stack_all[place]))
            a = np.arange(len(b)) >= kept[place]
            sums = estimate_sums("stall_frac", n, 3)
            assert {each.shape for each in sums} == {(2, 3)}
            found = [each[row, place].item() for each in sums]
            expected = [a.sum(), b.sum(), (a * a).sum(), (a * b).sum(), (b * b).sum(), len(b), 1]
            assert found == expected


def test_kept_update_ratio_is_a_ratio_of_energies_of_the_elements_that_moved() -> None:
    effective = np.array([0.5, 0.0, -2.0, 1.0])
    update = np.array([0.4, 0.3, -2.5, 1.0])
    a, b = effective * update, update**2
    names = ("kept", "judged_sq", "kept_sq", "kept_update_cubed", "judged_4th")
    values = [each.sum().reshape(1, 1) for each in (a, b, a * a, a * b, b * b)]
    n = Columns(**dict(zip(names, values, strict=True)), judged=np.array([[4.0]]))
    found = [each.item() for each in estimate_sums("kept_update_ratio", n, 1)]
    assert found == [*(each.item() for each in values), 4.0, 0.0]


def test_rows_with_clusters_take_the_sums_over_clusters() -> None:
    products = {
        f"stall_frac {name}": np.array([[value], [value]])
        for name, value in {"aa": 10.0, "ab": 20.0, "bb": 40.0}.items()
    }
    n = Columns(
        judged=np.array([[8.0], [8.0]]),
        effective=np.array([[5.0], [5.0]]),
        clusters=np.array([[2.0], [0.0]]),
        **products,
    )
    rows = np.concatenate(estimate_sums("stall_frac", n, 1), axis=1).tolist()
    assert rows == [[3, 8, 10, 20, 40, 8, 1], [3, 8, 3, 3, 8, 8, 1]]
