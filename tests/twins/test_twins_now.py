"""The figures named ``now``: a run in low precision, compared with the fp32 twin of its gradients.

The oracle records the run itself, element by element, and steps a copy of the whole net in float32
with the gradients of the run. Layers have at most 256 elements, so that a sample is the layer.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch

from altgrad import Recipe, UpdateMonitor, WeightStorage
from altgrad.twins.self_check import Check
from tests.combining import combine
from tests.twins.low_runs import (
    EVERY,
    OPTIMIZERS,
    SHAPES,
    NormalisedSGD,
    Run,
    assert_now_is,
    make_adamw,
    watch,
)
from tests.twins.twinning import one_thread

on_one_thread = one_thread()


@pytest.mark.parametrize(("name", "dtype"), combine(OPTIMIZERS, [torch.bfloat16, torch.float16]))
def test_a_run_in_16_bits_has_figures_of_itself(name: str, dtype: torch.dtype) -> None:
    run = Run(dtype, OPTIMIZERS[name])
    watched = watch(run, recipes=["e4m3fn"], formats=["e4m3fn"])
    run.train(4 * EVERY)
    assert_now_is(run, watched)
    assert watched.notices == []


def test_a_run_in_bf16_loses_what_the_recipe_bf16_true_loses() -> None:
    run = Run()
    watched = watch(run, recipes=["bf16-true"])
    run.train(2 * EVERY)
    figures = watched.records[-1].layers["wide"]
    assert figures["frozen_frac/now"] == figures["frozen_frac/bf16-true"] > 0
    assert figures["progress_kept/now"] == figures["progress_kept/bf16-true"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_in_fp32_has_no_figures_of_itself(dtype: torch.dtype) -> None:
    run = Run(dtype)
    watched = watch(run, recipes=["bf16"])
    run.train(EVERY)
    assert watched.records[-1].model.recipes == ("bf16",)


def test_a_run_has_one_row_of_figures_whatever_blocks_recipes_have() -> None:
    run = Run()
    watched = watch(run, recipes=["mxfp8_e4m3", "mxfp4"])
    run.train(EVERY)
    assert_now_is(run, watched)
    assert sorted(watched.records[-1].model.recipes) == ["mxfp4", "mxfp8_e4m3", "now"]


def test_no_recipe_may_be_called_now() -> None:
    with pytest.raises(ValueError, match="name='now'"):
        Recipe("now", weights="bf16")


STORAGES = {
    "nearest": {"format": "bf16"},
    "scaled": {"format": "e4m3fn"},
    "channels": {"format": "e4m3fn", "scaling": "channel"},
    "stochastic": {"format": "bf16", "rounding": "stochastic"},
    "kahan": {"format": "e5m2", "compensation": "kahan"},
    "states": {"format": None, "states": {"exp_avg_sq": "e5m2"}},
    "all": {"format": "bf16", "rounding": "stochastic", "states": {"*": "bf16"}},
}


@pytest.mark.parametrize("name", STORAGES)
def test_a_stored_run_has_figures_of_itself(name: str) -> None:
    run = Run(torch.float32)
    storage = WeightStorage(**STORAGES[name]).attach(run.optimizer, module=run.net)
    watched = watch(run, recipes=["e4m3fn"])
    run.train(4 * EVERY)
    assert_now_is(run, watched)
    assert {*watched.monitor.twins.checks.values()} <= {Check.EQUAL, Check.NOT_CHECKABLE}
    assert watched.monitor.twins.resynchronised == {}
    storage.detach()


@pytest.mark.parametrize("low", [True, False], ids=["bf16", "stored"])
def test_a_run_that_no_twin_can_follow_says_what_moved(low: bool) -> None:
    run = Run(torch.bfloat16 if low else torch.float32, lambda each: NormalisedSGD(each, 0.05))
    if not low:
        WeightStorage("bf16").attach(run.optimizer, module=run.net)
    watched = watch(run, recipes=["bf16", "bf16-true"])
    run.train(3 * EVERY)
    assert any(notice.startswith("ends the twins of bf16, bf16-true") for notice in watched.notices)
    for name in SHAPES:
        figures = watched.records[-1].layers[name]
        now, tried = run.net[name].detach().double(), run.tried[name]
        moved = float((now != run.start[name]).double().mean())
        still = float((tried & ~run.flags[name][2]).sum() / tried.sum())
        assert figures["moved_since_start_frac/now"] == pytest.approx(moved)
        assert figures["still_frac/now"] == pytest.approx(still)
        assert 0 < still < 1
        assert math.isnan(figures["progress_kept/now"])
        assert math.isnan(figures["frozen_frac/now"])
        assert math.isnan(figures["moved_rms/now"])
        assert figures.recipes == ("now",)


KINDS = [*OPTIMIZERS, "none", *(f"store-{name}" for name in STORAGES)]


class Saved(NamedTuple):
    """What a checkpoint has of a run, its storage, and its monitor."""

    net: dict[str, Any]
    optimizer: dict[str, Any]
    index: int
    storage: dict[str, Any] | None
    monitor: dict[str, Any]


def train_part(kind: str, steps: int, saved: Saved | None) -> tuple[UpdateMonitor, Saved]:
    """Train for some steps from a checkpoint, or from the start; return the next checkpoint."""
    settings = STORAGES.get(kind.removeprefix("store-"))
    make = OPTIMIZERS | {"none": lambda each: NormalisedSGD(each, 0.05)}
    run = Run(torch.float32 if settings else torch.bfloat16, make.get(kind, make_adamw))
    if saved is not None:
        run.net.load_state_dict(saved.net)
        run.optimizer.load_state_dict(saved.optimizer)
        run.index = saved.index
    storage = None
    if settings is not None:
        storage = WeightStorage(**settings)
        if saved is not None and saved.storage is not None:
            storage.load_state_dict(saved.storage)
        storage.attach(run.optimizer, module=run.net)
    notices: list[str] = []
    monitor = UpdateMonitor(
        run.net,
        formats=["bf16"],
        recipes=["bf16"],
        every_n_steps=lambda index, first=run.index: (index + first) % EVERY == 4,
        warn=notices.append,
        strict=True,
    )
    if saved is not None:
        monitor.load_state_dict(saved.monitor)
    monitor.attach(run.optimizer)
    run.begin()
    run.train(steps)
    assert not any("begin anew" in notice for notice in notices)
    kept = None if storage is None else storage.state_dict()
    states = copy.deepcopy((run.net.state_dict(), run.optimizer.state_dict()))
    return monitor, Saved(*states, run.index, kept, monitor.state_dict())


@pytest.mark.parametrize(("kind", "stop"), combine(KINDS, [EVERY, EVERY + 3]))
def test_a_resumed_run_goes_on_exactly(kind: str, stop: int) -> None:
    torch.manual_seed(0)
    whole, _ = train_part(kind, 20, None)
    torch.manual_seed(0)
    _, saved = train_part(kind, stop, None)
    resumed, _ = train_part(kind, 20 - stop, saved)
    assert whole.latest is not None
    assert resumed.latest is not None
    for name in SHAPES:
        figures = whole.latest.layers[name]
        keys = [key for key in figures if key.endswith("/now")]
        assert keys
        for key in keys:
            assert resumed.latest.layers[name][key] == pytest.approx(figures[key], nan_ok=True), key
