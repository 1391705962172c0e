"""Standard errors of ratios against loops over samples and strata."""

import math
from itertools import combinations

import numpy as np
import pytest

from altgrad.measurement.columns import Numbers
from altgrad.measurement.metrics import FORMULAS
from altgrad.measurement.standard_errors import estimate_sums, standard_errors

Elements = tuple[np.ndarray, np.ndarray]
"""a and b of each element of a sample."""


def stack_sums(*samples: Elements, carrying: float = 1e6) -> Numbers:
    """Stack the six sums of `estimate_sums`, (6, rows, 1)."""
    columns = [
        [a.sum(), b.sum(), (a * a).sum(), (a * b).sum(), (b * b).sum(), carrying]
        for a, b in samples
    ]
    return np.array(columns).T[:, :, None]


def a_sample(count: int, seed: int) -> Elements:
    generator = np.random.default_rng(seed)
    b = generator.random(count)
    return b * generator.random(count), b


def counted(*pairs: tuple[int, int]) -> Numbers:
    return np.array(pairs, dtype=np.float64)


def test_the_variance_is_unbiased_over_all_possible_samples() -> None:
    """Over all samples, the mean of the estimated variances equals the variance of Σ residuals."""
    a, b = a_sample(9, 0)
    ratio, size = a.sum() / b.sum(), 4
    residuals = a - ratio * b
    drawn = [[*chosen] for chosen in combinations(range(9), size)]
    truth = np.var([residuals[each].sum() for each in drawn])
    estimates = []
    for each in drawn:
        # Residuals about a ratio of 0 are the elements: the variance of their sum is estimated.
        about = residuals[each] - residuals[each].mean()
        sums = stack_sums((about, np.ones(size)))
        sums[0] = 0.0
        error = standard_errors(sums, counted((9, size)), {}).item()
        estimates.append((error * size) ** 2)
    assert np.mean(estimates) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("population", [50, 51, 1000, 10**6])
def test_the_error_of_a_layer_follows_from_its_residuals(population: int) -> None:
    a, b = a_sample(50, 1)
    residuals = a - a.sum() / b.sum() * b
    variance = (1 - 50 / population) * 50 / 49 * (residuals**2).sum()
    error = standard_errors(stack_sums((a, b)), counted((population, 50)), {}).item()
    assert error == pytest.approx(math.sqrt(variance) / b.sum(), rel=1e-9)


def test_the_error_of_a_model_uses_residuals_about_the_models_ratio() -> None:
    sizes, populations = (40, 60, 31), (400, 66, 31)
    samples = [a_sample(size, seed) for seed, size in enumerate(sizes)]
    weights = [n / size for n, size in zip(populations, sizes, strict=True)]
    a, b = (
        sum(w * each[k].sum() for w, each in zip(weights, samples, strict=True)) for k in (0, 1)
    )
    variance = 0.0
    for weight, size, (own_a, own_b) in zip(weights, sizes, samples, strict=True):
        residuals = own_a - a / b * own_b
        variance += weight**2 * (1 - 1 / weight) * size / (size - 1) * (residuals**2).sum()
    sums = np.concatenate((stack_sums(*samples), np.full((6, 1, 1), 1e6)), axis=1)
    sums[0, 3], sums[1, 3] = a, b
    pairs = counted(*zip(populations, sizes, strict=True), (sum(populations), sum(populations)))
    errors = standard_errors(sums, pairs, {3: (0, 1, 2)}).flatten().tolist()
    assert errors[2] == 0  # all elements were measured
    assert errors[3] == pytest.approx(math.sqrt(variance) / b, rel=1e-12)


@pytest.mark.parametrize(("carrying", "is_nan"), [(29.9, True), (30.0, False)])
def test_the_error_is_nan_if_few_elements_carry_the_ratio(carrying: float, is_nan: bool) -> None:
    sums = stack_sums(a_sample(50, 2), carrying=carrying)
    assert math.isnan(standard_errors(sums, counted((99, 50)), {}).item()) is is_nan
    assert standard_errors(sums, counted((50, 50)), {}).item() == 0


def test_the_error_is_nan_if_the_ratio_has_no_value() -> None:
    nothing = (np.zeros(50), np.zeros(50))
    for pair in ((99, 50), (50, 50)):
        assert np.isnan(standard_errors(stack_sums(nothing), counted(pair), {})).all()


def test_layers_without_a_ratio_do_not_change_the_error_of_a_model() -> None:
    sample, nothing = a_sample(50, 3), (np.zeros(40), np.zeros(40))
    sums = stack_sums(sample, nothing, sample, carrying=50.0)
    sums[5, 1] = 0.0  # no element carries the ratio
    pairs = counted((99, 50), (400, 40), (499, 499))
    with_it, without = (
        standard_errors(sums, pairs, {2: layers})[2].item() for layers in ((0, 1), (0,))
    )
    assert with_it == without > 0


class Columns:
    """A `Sums` of two rows and three formats."""

    def __init__(self, **columns: Numbers) -> None:
        self._columns = columns

    def sum(self, name: str) -> Numbers:
        return self._columns[name]


def test_a_share_equals_a_ratio_of_zeros_and_ones() -> None:
    judged = np.array([[5.0, 0.0, 9.0], [7.0, 7.0, 1.0]])
    effective = np.array([[2.0, 0.0, 9.0], [0.0, 7.0, 1.0]])
    n = Columns(judged=judged, effective=effective, elements=np.array([[10.0], [20.0]]))
    for row, (stack_all, kept) in enumerate(zip(judged.tolist(), effective.tolist(), strict=True)):
        for place in range(3):
            b = np.ones(int(stack_all[place]))
            a = np.arange(len(b)) >= kept[place]
            sums = estimate_sums(FORMULAS["stall_frac"], n, 3)
            assert {each.shape for each in sums} == {(2, 3)}
            found = [each[row, place].item() for each in sums]
            assert found[:5] == [a.sum(), b.sum(), (a * a).sum(), (a * b).sum(), (b * b).sum()]
            assert found[5] == [10.0, 20.0][row]


def test_kept_share_is_carried_by_elements_over_energy_concentration() -> None:
    effective = np.array([0.5, 0.0, -2.0, 1.0])
    update = np.array([0.4, 0.3, -2.5, 1.0])
    a, b = effective * update, update**2
    names = ("kept", "judged_sq", "kept_sq", "kept_update_cubed", "judged_4th")
    values = [each.sum().reshape(1, 1) for each in (a, b, a * a, a * b, b * b)]
    n = Columns(**dict(zip(names, values, strict=True)))
    found = [each.item() for each in estimate_sums(FORMULAS["kept_update_ratio"], n, 1)]
    assert found[:5] == [each.item() for each in values]
    assert found[5] == pytest.approx(b.sum().item() ** 2 / (b * b).sum().item(), rel=1e-15)
    nothing = Columns(**dict.fromkeys(names, np.zeros((1, 1))))
    assert not any(estimate_sums(FORMULAS["kept_update_ratio"], nothing, 1))
