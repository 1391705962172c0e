"""`BatchStatistic`: BatchNorm's own arithmetic, and which modules have running statistics."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from altgrad.recipes.recipe import Recipe
from altgrad.twins.batch_norm import BatchStatistic, find_arithmetic, move_statistic

KINDS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, (32, 192)),
    "1d of sequences": (nn.BatchNorm1d, (8, 192, 12)),
    "2d": (nn.BatchNorm2d, (8, 192, 5, 5)),
    "3d": (nn.BatchNorm3d, (4, 192, 3, 3, 3)),
}


def draw_steps(
    kind: str, momentum: float, dtype: torch.dtype
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Return name, value before, exact number of the batch, and value after, of three steps."""
    make, shape = KINDS[kind]
    module, steps = make(shape[1], momentum=momentum).to(dtype), []
    for number in range(3):
        random = torch.Generator().manual_seed(number)
        inputs = (torch.randn(shape, generator=random) * 1.7 + 0.3).to(dtype)
        before = {n: getattr(module, n).clone() for n in ("running_mean", "running_var")}
        module(inputs)
        by_channel = inputs.double().transpose(0, 1).flatten(1)
        batch = {"running_mean": by_channel.mean(1), "running_var": by_channel.var(1)}
        steps += [(n, each, batch[n], getattr(module, n).clone()) for n, each in before.items()]
    return steps


@pytest.mark.parametrize("momentum", [0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_step_is_that_of_torch(kind: str, dtype: torch.dtype, momentum: float) -> None:
    for name, before, batch, after in draw_steps(kind, momentum, dtype):
        found = before.clone()
        factor = torch.full_like(batch, momentum)
        move_statistic(name, found, batch, factor, torch.ones_like(batch, dtype=torch.bool))
        wrong = found != after
        torch.testing.assert_close(found, after, rtol=2.1 * torch.finfo(dtype).eps, atol=1e-7)
        if dtype == torch.float32:
            continue  # torch sums up a batch in another order
        # oneDNN multiplies the variance by n / (n − 1) and the momentum at once.
        at_most = 0.1 if name == "running_var" and dtype == torch.bfloat16 else 0.01
        assert wrong.double().mean() <= at_most, (name, wrong.sum())


@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_the_short_formula_is_not_that_of_torch_in_bf16(momentum: float) -> None:
    for name, before, batch, after in draw_steps("2d", momentum, torch.bfloat16):
        short = (before.double() + momentum * (batch - before.double())).bfloat16()
        if name == "running_var":
            assert (short != after).double().mean() > 0.1


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_statistic_shrinks_by_its_factors_in_bf16_on_a_cpu_and_in_no_other_dtype(
    name: str,
) -> None:
    truth, momentum = torch.linspace(1, 2, 64).double(), torch.full((64,), 0.01).double()
    ratios = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = truth.to(dtype)
        move = find_arithmetic(name, dtype, torch.device("cpu"))
        for step in range(500):
            values = move(values, truth * (1 + 0.5 * math.sin(step)), momentum)
        ratios[dtype] = (values.double() / truth).mean().item()
    assert ratios[torch.float16] == pytest.approx(1.0, abs=0.02)
    assert ratios[torch.float32] == pytest.approx(1.0, abs=0.02)
    assert ratios[torch.bfloat16] < 0.9


def test_only_the_chosen_elements_move() -> None:
    values = torch.zeros(3)
    when = torch.tensor([True, False, True])
    move_statistic(
        "running_mean", values, torch.ones(3).double(), torch.full((3,), 0.5).double(), when
    )
    assert values.tolist() == [0.5, 0.0, 0.5]


def test_modules_without_weight_statistics_momentum_or_count_and_low_ones_are_left_out() -> None:
    net = nn.ModuleDict(
        {
            "plain": nn.BatchNorm1d(4),
            "without weight": nn.BatchNorm1d(4, affine=False),
            "without statistics": nn.BatchNorm1d(4, track_running_stats=False),
            "mean of all": nn.BatchNorm1d(4, momentum=None),
            "low": nn.BatchNorm1d(4).bfloat16(),
            "without count": nn.BatchNorm1d(4),
            "another norm": nn.LayerNorm(4),
        }
    )
    net["without count"].num_batches_tracked = None
    statistic = BatchStatistic("running_var", net, {p: n for n, p in net.named_parameters()})
    assert [*statistic.find_modules()] == ["plain.weight"]
    assert statistic.has_modules
    assert not BatchStatistic("running_mean", nn.Linear(2, 2), {}).has_modules
    assert statistic.find_tensors() == {"plain.weight": net["plain"].running_var}


def test_batches_are_noted() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4))
    statistic = BatchStatistic("running_mean", net, {p: n for n, p in net.named_parameters()})
    net(torch.randn(8, 4))
    statistic.note_batches()
    net(torch.randn(8, 4))
    assert statistic.noted == {"0.weight": 1}
    assert statistic.find_counters() == {"0.weight": 2}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe("a", dtype="bfloat16"), True),
        (Recipe("b", weights="bf16"), False),
        (Recipe("c", states={"running_var": "bf16"}), True),
        (Recipe("d", states={"*": "bf16"}), True),
        (Recipe("e", states={"exp_avg": "bf16"}), False),
    ],
)
def test_a_recipe_is_concerned_that_stores_the_statistic_low(
    recipe: Recipe, expected: bool
) -> None:
    assert BatchStatistic("running_var", nn.ReLU(), {}).concerns(recipe) is expected
