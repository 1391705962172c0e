"""`store_`: every bit pattern against gfloat, Kahan errors against fractions, and its cost."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import pytest
import torch
from torch import nn

from altgrad import FloatFormat, get_format
from altgrad.recipes.rounding import check_rounding, store_
from tests import oracles
from tests.counting import operations
from tests.oracles import assert_same_values
from tests.quantization.matrix import EVERY_FORMAT

pytestmark = pytest.mark.usefixtures("both_kernels")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def inputs(format: FloatFormat, dtype: torch.dtype) -> torch.Tensor:
    if dtype in (torch.float16, torch.bfloat16):
        return oracles.every_value_of(dtype)
    patterns = oracles.random_bit_patterns(4096, dtype)
    return torch.cat([patterns, oracles.critical_inputs(format, dtype), torch.tensor([-0.0])])


def stored_by_gfloat(x: torch.Tensor, format: FloatFormat, scale: float = 1.0) -> torch.Tensor:
    """Round on the grid in float64, then to the dtype; NaN and ±inf stay."""
    rounded = oracles.round_with_gfloat(x, format, scale=scale).to(x.dtype)
    return torch.where(x.isfinite(), rounded, x)


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_is_stored_as_gfloat_rounds_it(format, dtype) -> None:
    x = inputs(format, dtype)
    weights = x.clone()
    store_(weights, format, None)
    assert_same_values(weights, stored_by_gfloat(x, format), x)


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("scale", [0.125, 2.0**20, torch.tensor(2.0**-9), torch.tensor([[4.0]])])
def test_the_grid_is_multiplied_by_the_scale(format, scale) -> None:
    x = inputs(format, torch.float32).view(1, -1)
    # Scaled values below the normal numbers of float32 are rounded once more.
    x = torch.where(x.abs() < 2.0**-90, 0.0, x)
    weights = x.clone()
    store_(weights, format, scale)
    expected = stored_by_gfloat(x.double(), format, float(scale))
    assert_same_values(weights, expected.float(), x)


def test_a_float64_scale_is_applied_in_float64() -> None:
    x = oracles.random_bit_patterns(4096)
    weights, e4m3 = x.clone(), get_format("e4m3fn")
    store_(weights, e4m3, torch.tensor(2.0**-130, dtype=torch.float64))
    assert_same_values(weights, stored_by_gfloat(x.double(), e4m3, 2.0**-130).float(), x)


def test_each_channel_has_its_own_scale() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weights, scales = x.clone(), torch.tensor([[0.5], [1.0], [4.0]])
    store_(weights, get_format("e2m1"), scales)
    for row, scale, original in zip(weights, (0.5, 1.0, 4.0), x, strict=True):
        assert_same_values(row, stored_by_gfloat(original, get_format("e2m1"), scale))


@pytest.mark.parametrize("format", ["bf16", "fp16", "e4m3fn", "e5m2", "e2m1", "e7m0"])
def test_stochastic_rounding_has_the_exact_value_as_its_mean(format) -> None:
    generator = torch.Generator().manual_seed(0)
    element = get_format(format)
    x = torch.randn(3, generator=generator).clamp(-5, 5)
    draws = x.repeat(4000, 1)
    store_(draws, element, None, rounding="stochastic", generator=generator)
    for value, column in zip(x.tolist(), draws.T, strict=True):
        below, above = map(float, oracles.neighbours(value, element))
        assert set(column.tolist()) <= {below, above}
        spread = (above - below) * 0.5 / 4000**0.5
        assert column.double().mean().item() == pytest.approx(value, abs=4.5 * spread)


def test_kahan_errors_are_those_of_fractions() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(32, generator=generator)
    bf16 = get_format("bf16")
    store_(weights, bf16, None)
    lost = torch.zeros(32, dtype=torch.bfloat16)
    expected = [(Fraction(w), Fraction(0)) for w in weights.tolist()]
    for _ in range(50):
        update = torch.randn(32, generator=generator) / 1024
        weights += update
        for i, (w, error) in enumerate(expected):
            moved = float(torch.tensor(float(w)) + update[i])  # in float32, as an optimizer adds
            wanted = float(torch.tensor(moved) + torch.tensor(float(error)))
            stored = Fraction(float(ml_dtypes.bfloat16(wanted)))
            kept = torch.tensor(float(Fraction(wanted) - stored)).bfloat16().item()
            expected[i] = stored, Fraction(kept)
        store_(weights, bf16, None, lost=lost)
        assert [Fraction(w) for w in weights.tolist()] == [w for w, _ in expected]
        assert [Fraction(e) for e in lost.tolist()] == [e for _, e in expected]


@pytest.mark.parametrize("scale", [None, 2.0, torch.tensor(2.0)])
def test_at_most_one_spacing_is_kept_beyond_the_largest_value(scale) -> None:
    factor = 1.0 if scale is None else 2.0
    weights = torch.tensor([1e6, -1e6, torch.inf, torch.nan, 6.0]) * factor
    lost = torch.zeros(5, dtype=torch.bfloat16)
    store_(weights, get_format("e4m3fn"), scale, lost=lost)
    assert lost.tolist() == [32.0 * factor, -32.0 * factor, 0, 0, 0]
    expected = torch.tensor([448.0, -448.0, torch.inf, torch.nan, 6.0]) * factor
    assert_same_values(weights, expected)


def test_a_parameter_is_changed_in_place_and_stays_differentiable() -> None:
    weight = nn.Parameter(torch.randn(8))
    # torch has no public name; it notices by this number that saved weights have changed.
    pointer, version = weight.data_ptr(), weight._version
    store_(weight, get_format("bf16"), None)
    assert (weight.data_ptr(), weight._version > version) == (pointer, True)
    (weight * 2).sum().backward()
    assert weight.grad is not None
    assert not weight.is_inference()


@pytest.mark.parametrize(
    ("format", "scale", "most"),
    [
        *(("bf16", None, 12), ("fp16", None, 11), ("e5m2", None, 11)),
        *(("e4m3fn", torch.tensor(0.5), 13), ("e2m1", torch.ones(1024), 13)),
    ],
)
def test_a_step_takes_few_operations(format, scale, most) -> None:
    weights, generator = torch.randn(1024), torch.Generator().manual_seed(0)
    lost = torch.zeros(1024, dtype=torch.bfloat16)
    element = get_format(format)

    def stochastic() -> None:
        store_(weights, element, scale, rounding="stochastic", generator=generator)

    stochastic()  # the dtype of the arithmetic is found once
    assert operations(lambda: store_(weights, element, scale)).total() <= most
    assert operations(stochastic).total() <= most + 6
    kept = operations(lambda: store_(weights, element, scale, lost=lost)).total()
    assert kept <= most + (7 if scale is None else 9)


def test_each_step_draws_from_the_given_generator_alone() -> None:
    before = torch.get_rng_state()
    drawn = [torch.full((64,), 1.001) for _ in range(3)]
    for weights, seed in zip(drawn, (0, 0, 1), strict=True):
        generator = torch.Generator().manual_seed(seed)
        store_(weights, get_format("bf16"), None, rounding="stochastic", generator=generator)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("up", None), "rounding='up': expected 'nearest_even' or 'stochastic'"),
        (("nearest_even", "neumaier"), "compensation='neumaier': expected None or 'kahan'"),
        (("stochastic", "kahan"), "use compensation=None or rounding='nearest_even'"),
    ],
)
def test_a_wrong_way_to_round_is_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_rounding(*arguments)
