"""`Lane`: what a step costs, and how much memory twins take."""

from __future__ import annotations

import pytest
import torch

from altgrad import UpdateMonitor
from altgrad.recipes.recipe import Recipe
from benchmarks.gpt import Gpt, train as train_gpt
from tests.counting import Operations, host_copies
from tests.twins.twinning import Watched, make_net, one_thread, train

on_one_thread = one_thread()
pytestmark = pytest.mark.default_twins

RECIPES = [
    *("bf16", "bf16-sr", "bf16-kahan", "bf16-true", "e4m3fn-sr"),
    Recipe("v-e5m2", states={"exp_avg_sq": "e5m2"}),
]


def count_unobserved(groups: int, recipes: list[str | Recipe]) -> int:
    """Count the operations that twins add to a step that is not observed, and its host copies."""
    torch.manual_seed(0)
    model = Gpt()
    parameters = [*model.parameters()]
    split = [[p for p in parameters if (p.dim() > 1) == wide] for wide in (True, False)]
    parts = split if groups == 2 else [parameters]
    optimizer = torch.optim.AdamW([{"params": part} for part in parts], 1e-3)
    counts = []
    for chosen in ((), recipes):
        settings = {"recipes": chosen, "every_n_steps": lambda index: index == 0, "strict": True}
        with UpdateMonitor(model, **settings).attach(optimizer):
            train_gpt(model, optimizer, 3)
            counter = Operations()
            with host_copies() as copies, counter.counting():
                train_gpt(model, optimizer)
            counts.append((counter.counts.total(), len(copies)))
    (before, copies_before), (after, copies_after) = counts
    # AdamW reads its counters of steps, which are on the host: one for each group.
    assert copies_after == copies_before + groups * (len(recipes) + 1)
    return after - before


@pytest.mark.parametrize("groups", [1, 2])
def test_a_step_that_is_not_observed_costs_few_operations(groups: int) -> None:
    twins = len(RECIPES) + 1  # the reference is one more
    assert count_unobserved(groups, RECIPES) <= 100 + 30 * twins + 12 * twins * (groups - 1)


@pytest.mark.parametrize(
    ("recipe", "groups"), [("e4m3fn-sr", 1), (Recipe("low", states={"exp_avg_sq": "e5m2"}), 2)]
)
def test_a_format_with_scales_costs_20_operations_more(recipe: str | Recipe, groups: int) -> None:
    # The scales of both groups are found together.
    assert count_unobserved(groups, [recipe]) <= 100 + 2 * 25 + 2 * 12 * (groups - 1) + 20


def test_memory_is_stated() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=["bf16"])
    train(net, optimizer, 2)
    # 256 + 128 + 128 + 128 + 256 + 10 elements, padded to 960: for the reference and the twin each
    # weights at four times, gradients and two moments in float32, two flags, and a counter.
    twin = 960 * (7 * 4 + 2) + 4
    # Gradients, weights of the run, whether gradients were 0, and indices.
    gathered = 960 * (2 * 4 + 1) + 906 * 8
    assert watched.monitor.twins.nbytes() == 2 * twin + gathered
