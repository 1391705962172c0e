"""`describe_lagging_average` says how far a real average of torch in 16 bits lags behind."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from altgrad import UpdateMonitor
from altgrad.monitor.lagging_average import (
    describe_lagging_average,
    describe_lags,
    read_decay,
)

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}


def average_once(start: Tensor, weight: Tensor, decay: float) -> Tensor:
    """Return the averages after a real update, from averages `start`."""
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(start.clone())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    averaged.update_parameters(model)  # copies
    with torch.no_grad():
        model.weight.copy_(weight)
    averaged.update_parameters(model)
    return averaged.module.weight.detach()


def read_lags(averaged: AveragedModel) -> tuple[float, float]:
    """Return the two numbers of the notice."""
    [notice] = describe_lagging_average(averaged)
    found = re.search(r"by less than (\S+) to (\S+) times", notice)
    assert found is not None
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("decay", [0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [*MANTISSA_BITS], ids=str)
def test_an_average_stays_below_one_bound_and_moves_above_the_other(
    dtype: torch.dtype, decay: float
) -> None:
    numbers = (1 + torch.arange(2 ** MANTISSA_BITS[dtype]) / 2 ** MANTISSA_BITS[dtype]).to(dtype)
    model = nn.Linear(4, 4).to(dtype)
    least, most = read_lags(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)))
    for sign in (-1, 1):
        near = numbers.float() * (1 + sign * 0.95 * least)
        far = numbers.float() * (1 + sign * 1.1 * most)
        assert torch.equal(average_once(numbers, near.to(dtype), decay), numbers)
        assert (average_once(numbers, far.to(dtype), decay) != numbers).all()


FUNCTIONS = {
    "multi_avg_fn": get_ema_multi_avg_fn,
    "avg_fn": get_ema_avg_fn,
}


def follow(dtype: torch.dtype, decay: float, option: str) -> tuple[float, int]:
    """Return the error of averages in 16 bits against float64, and the number of notices.

    The weights wander by 1 % around a mean that moves by a fifth of their size.
    """
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    nn.init.normal_(model.weight, std=0.05)
    averages = [
        AveragedModel(model, **{option: FUNCTIONS[option](decay)}).to(each)
        for each in (dtype, torch.float64)
    ]
    start, aim = model.weight.detach().clone(), model.weight.detach() * 1.2
    steps = round(2 / (1 - decay))
    for number in range(steps):
        mean = start + (aim - start) * min(1.0, 2 * number / steps)
        with torch.no_grad():
            model.weight.copy_(mean * (1 + 0.01 * torch.randn_like(mean)))
        for averaged in averages:
            kind = next(averaged.parameters()).dtype
            averaged.update_parameters(model.to(kind))
            model.float()
    low, exact = (averaged.module.weight.detach().double() for averaged in averages)
    return float((low - exact).norm() / exact.norm()), len([*describe_lagging_average(averages[0])])


@pytest.mark.parametrize("option", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "decay"), [(torch.bfloat16, 0.99), (torch.float16, 0.999)])
def test_averages_with_a_notice_are_far_off(dtype: torch.dtype, decay: float, option: str) -> None:
    error, notices = follow(dtype, decay, option)
    assert notices == 1
    assert error > 0.03


@pytest.mark.parametrize(
    ("dtype", "decay"), [(torch.float16, 0.9), (torch.float32, 0.999)], ids=str
)
def test_averages_without_a_notice_are_near(dtype: torch.dtype, decay: float) -> None:
    error, notices = follow(dtype, decay, "multi_avg_fn")
    assert notices == 0
    assert error < 0.003


def make_as_advised(model: nn.Module, decay: float) -> AveragedModel:
    """Return the average that the notice advises, by the code in it."""
    [notice] = describe_lags(dict(model.named_parameters()), decay)
    _, _, code = notice.partition("Keep averages in float32, as by ")
    names = {"AveragedModel": AveragedModel, "model": model}
    averaged: AveragedModel = eval(code, names)
    return averaged


@pytest.mark.parametrize(
    ("dtype", "decay"),
    [
        *((torch.bfloat16, decay) for decay in (0.9, 0.99, 0.999, 0.99995)),
        *((torch.float16, decay) for decay in (0.99, 0.999, 0.99995)),
    ],
    ids=str,
)
def test_the_average_that_a_notice_advises_stays_at_weights_that_stay(
    dtype: torch.dtype, decay: float
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16).to(dtype)
    averaged = make_as_advised(model, decay)
    assert [*describe_lagging_average(averaged)] == []
    for _ in range(300):
        averaged.update_parameters(model)
    for kept, weight in zip(averaged.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(kept, weight.float(), rtol=1e-6, atol=0.0)


def test_the_average_that_a_notice_advises_follows_weights_in_bf16() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16).bfloat16()
    averaged = make_as_advised(model, 0.99)
    exact = [weight.detach().double() for weight in model.parameters()]
    averaged.update_parameters(model)
    for _ in range(300):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.01 * torch.randn_like(weight))
        averaged.update_parameters(model)
        new = [weight.detach().double() for weight in model.parameters()]
        exact = [0.99 * old + 0.01 * weight for old, weight in zip(exact, new, strict=True)]
    for kept, want in zip(averaged.module.parameters(), exact, strict=True):
        torch.testing.assert_close(kept.double(), want, rtol=0.0, atol=1e-6)


def test_the_average_that_a_notice_advises_has_figures_without_errors() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged, said = make_as_advised(model, 0.99), []
    monitor = UpdateMonitor(model, formats=["e5m2"], recipes=["bf16-sr"], warn=said.append)
    with monitor.watch_average(averaged).attach(optimizer):
        for _ in range(5):
            for weight in model.parameters():
                weight.grad = torch.randn_like(weight)
            optimizer.step()
            averaged.update_parameters(model)
    assert not [notice for notice in said if "average" in notice]
    assert monitor.latest is not None
    assert math.isfinite(monitor.latest.layers["weight"]["average_error/bf16-sr"])


def test_the_average_that_a_notice_advises_may_have_buffers_of_integers() -> None:
    model = nn.BatchNorm1d(4).bfloat16()
    function = make_as_advised(model, 0.999).avg_fn
    averaged = AveragedModel(model, avg_fn=function, use_buffers=True).float()
    for _ in range(2):
        averaged.update_parameters(model)
    assert torch.equal(averaged.module.running_var, torch.ones(4))


@pytest.mark.parametrize("option", FUNCTIONS)
def test_the_decay_is_read_from_the_functions_of_torch(option: str) -> None:
    averaged = AveragedModel(nn.Linear(1, 1), **{option: FUNCTIONS[option](0.95)})
    assert read_decay(averaged) == 0.95


def halve(average: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    return (average + weight) / 2


@pytest.mark.parametrize(
    "options",
    [{}, {"avg_fn": halve}, {"avg_fn": get_swa_avg_fn()}, {"multi_avg_fn": get_swa_multi_avg_fn()}],
    ids=["none", "own", "swa", "multi swa"],
)
def test_other_averages_have_no_known_decay_and_no_notice(options: dict[str, object]) -> None:
    averaged = AveragedModel(nn.Linear(1, 1).bfloat16(), **options)
    assert read_decay(averaged) is None
    assert [*describe_lagging_average(averaged)] == []


@pytest.mark.parametrize("use_buffers", [True, False])
def test_buffers_are_named_only_where_they_are_averaged(use_buffers: bool) -> None:
    model = nn.BatchNorm1d(4, affine=False).bfloat16()
    function = get_ema_multi_avg_fn(0.999)
    averaged = AveragedModel(model, multi_avg_fn=function, use_buffers=use_buffers)
    notices = [*describe_lagging_average(averaged)]
    assert [notice.split(" to lag")[0] for notice in notices] == [
        "expects averages of running_mean, running_var"
    ] * use_buffers


def test_averages_of_a_known_decay_are_named_by_their_dtype() -> None:
    averages = {"low": torch.ones(2).half(), "high": torch.ones(2), "count": torch.ones(2).long()}
    [notice] = describe_lags(averages, 0.999)
    assert notice.startswith("expects averages of low to lag behind: with a decay of 0.999")
    assert [*describe_lags(averages, 1.0)] == []  # they never move


def test_an_average_without_elements_is_not_named() -> None:
    averages = {"empty": torch.zeros(0).bfloat16(), "full": torch.zeros(3).bfloat16()}
    [notice] = describe_lags(averages, 0.999)
    assert "averages of full to lag" in notice
