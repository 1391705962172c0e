"""The self-check: equal, equal but for tails, not checkable or different."""

import math

import pytest
import torch
from torch import Tensor

from altgrad.twins.self_check import Check, compare, judge


def check(run: Tensor, twin: Tensor, start: Tensor, **facts: bool) -> Check:
    mask = torch.ones_like(run, dtype=torch.bool)
    [result] = judge(compare(run[None], twin[None], start[None], mask[None]).numpy(), **facts)
    return result


def weights(count: int = 100, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(0.5, 1.5, count, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_equal_weights_are_equal(dtype: torch.dtype) -> None:
    run = weights(dtype=dtype)
    assert check(run, run.clone(), run - 0.125) is Check.EQUAL


def test_nan_equals_nan_and_nothing_else() -> None:
    run = weights()
    run[3] = math.nan
    assert check(run, run.clone(), weights() - 0.1) is Check.EQUAL
    twin = weights()
    mask = torch.ones(1, 100, dtype=torch.bool)
    assert compare(run[None], twin[None], weights()[None], mask)[0, :2].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_few_elements_that_round_otherwise_are_tails(dtype: torch.dtype) -> None:
    run = weights(dtype=dtype)
    twin = run.clone()
    twin[:3] = torch.nextafter(run[:3].float(), torch.tensor(9.0)).to(dtype) * 1.01
    assert check(run, twin, run - 0.25) is Check.TAILS


def test_rounding_of_the_last_bit_in_every_element_is_near_in_float32() -> None:
    run = weights()
    twin = torch.nextafter(run, torch.tensor(9.0))
    assert check(run, twin, run - 0.25) is Check.TAILS


def test_another_update_of_most_elements_is_different() -> None:
    run, start = weights(), weights() - 1e-3
    assert check(run, start + 2e-3, start) is Check.DIFFERENT


def test_a_twin_that_moves_where_the_run_does_not_is_different() -> None:
    start = weights(dtype=torch.bfloat16)
    assert check(start, start * 1.25, start) is Check.DIFFERENT


def test_the_rest_of_the_layer_need_not_have_moved() -> None:
    # 10 of 100 elements moved, by another amount than in the run.
    start = weights()
    run, twin = start.clone(), start.clone()
    run[:10] += 0.01
    twin[:10] += 0.02
    assert check(run, twin, start) is Check.DIFFERENT


def test_random_rounding_by_one_spacing_is_not_checkable() -> None:
    run = weights(dtype=torch.bfloat16)
    twin = run + torch.finfo(torch.bfloat16).eps / 2
    facts = {"draws": True, "is_first": True}
    assert check(run, twin, run - 0.25, **facts) is Check.NOT_CHECKABLE
    assert check(run, run * 1.5, run - 0.25, **facts) is Check.DIFFERENT


def test_random_rounding_drifts_apart_later() -> None:
    run = weights(dtype=torch.bfloat16)
    assert check(run, run * 1.5, run - 0.25, draws=True) is Check.NOT_CHECKABLE


def test_padding_is_left_out() -> None:
    run = weights()[None]
    mask = torch.zeros(1, 100, dtype=torch.bool)
    assert not compare(run, run * 2, run, mask).any()


def test_the_largest_difference_is_in_spacings() -> None:
    run = torch.tensor([[1.0, 1.0]])
    twin = torch.tensor([[1.0 + 3 * 2**-23, 1.0]])
    assert compare(run, twin, run, torch.ones(1, 2, dtype=torch.bool))[0, 3] == 3
