"""The figures named ``now`` in runs whose rounding or optimizer hides what a twin does wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altgrad import WeightStorage
from altgrad.twins.self_check import Check
from tests.twins.low_runs import EVERY, SHAPES, NormalisedSGD, Run, assert_now_is, make_adamw, watch
from tests.twins.twinning import Watched, one_thread

on_one_thread = one_thread()


class DrawingSGD(torch.optim.SGD):
    """SGD in float32 that rounds weights in bfloat16 by numbers from a generator of its own."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, lr)
        self.generator = torch.Generator().manual_seed(7)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                wide = p.float() - group["lr"] * p.grad.float()
                if p.dtype == torch.bfloat16:
                    noise = torch.randint(
                        0, 1 << 16, wide.shape, dtype=torch.int32, generator=self.generator
                    )
                    wide = ((wide.view(torch.int32) + noise) & -65536).view(torch.float32)
                p.copy_(wide)


def test_a_generator_of_its_own_makes_a_run_recorded() -> None:
    torch.manual_seed(0)
    net = nn.Linear(64, 130).to(torch.bfloat16)  # larger than its sample: draws are others
    optimizer = DrawingSGD([*net.parameters()], 1e-2)
    watched = Watched(net, optimizer, recipes=["e4m3fn"], formats=["e4m3fn"])
    for _ in range(14):
        optimizer.zero_grad()
        net(torch.randn(8, 64).bfloat16()).float().square().mean().backward()
        optimizer.step()
    assert watched.notices == []
    assert 0.5 < watched.records[-1].layers["weight"]["progress_kept/now"] < 1.5
    assert {*watched.monitor.twins.checks.values()} == {Check.NOT_CHECKABLE}


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_rounding_does_not_hide_an_optimizer_of_whole_tensors(rounding: Any) -> None:
    # Layers are larger than their samples, and each update is less than a spacing of bf16.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
    optimizer = NormalisedSGD(net.parameters(), 3e-3)
    with WeightStorage("bf16", rounding=rounding).attach(optimizer, module=net):
        watched = Watched(net, optimizer, recipes=["bf16"], formats=["e4m3fn"])
        for _ in range(7):
            optimizer.zero_grad()
            net(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
    [notice] = watched.notices
    assert notice.startswith("ends the twins of bf16, fp32: an element steps otherwise")
    assert math.isnan(watched.records[-1].layers["0.weight"]["progress_kept/now"])


def test_a_warm_up_from_0_does_not_hide_an_optimizer_of_whole_tensors() -> None:
    run = Run(torch.bfloat16, lambda each: NormalisedSGD(each, 0.0))
    watched = watch(run, recipes=["bf16"], formats=["e4m3fn"])
    run.train(2)
    assert watched.notices == []
    for optimizer in (run.optimizer, run.optimizer32):
        optimizer.param_groups[0]["lr"] = 0.05
    run.train(1)
    assert [notice.startswith("ends the twins of bf16, fp32") for notice in watched.notices] == [
        True
    ]
    run.train(2 * EVERY - 3)
    for name in SHAPES:
        moved = float((run.net[name].detach().double() != run.start[name]).double().mean())
        figures = watched.records[-1].layers[name]
        assert figures["moved_since_start_frac/now"] == pytest.approx(moved)


def test_twins_of_blocks_end_beside_the_run_that_goes_on() -> None:
    run = Run(torch.bfloat16, lambda each: NormalisedSGD(each, 0.05))
    watched = watch(run, recipes=["bf16", "mxfp4"], formats=["e4m3fn"])
    run.train(2 * EVERY)
    assert len(watched.notices) == 2
    assert all(record.model.recipes == ("now",) for record in watched.records)


def test_an_optimizer_that_changes_late_has_no_wrong_figures() -> None:
    class LateSGD(NormalisedSGD):
        """SGD up to a step, and then by the norm of the gradient."""

        steps = 0

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.steps += 1
            if self.steps > 7:
                super().step(closure)
                return
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad * self.param_groups[0]["lr"])

    run = Run(torch.bfloat16, lambda each: LateSGD(each, 0.05))
    watched = watch(run, recipes=["bf16"], formats=["e4m3fn"])
    run.train(3 * EVERY)
    assert [record.model.recipes for record in watched.records] == [("now", "bf16"), (), ("now",)]
    for name in SHAPES:
        tried, lately = run.tried[name], run.flags[name][2]
        still = float((tried & ~lately).sum() / tried.sum())
        assert watched.records[-1].layers[name]["still_frac/now"] == pytest.approx(still)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("step", [EVERY + 1, 2 * EVERY - 1])
def test_a_write_through_data_is_no_step_of_a_stored_run(rounding: Any, step: int) -> None:
    run = Run(torch.float32)
    storage = WeightStorage("bf16", rounding=rounding).attach(run.optimizer, module=run.net)
    watched = watch(run, recipes=["bf16"], formats=["e4m3fn"])
    run.train(step)
    for each in run.net.values():
        each.data.clamp_(-0.5, 0.5)
    run.train(2 * EVERY - step)
    assert watched.monitor.twins.resynchronised["wide"] == 1
    figures = watched.records[-1].layers["wide"]
    # The write moved most weights by more than all steps, and is no movement.
    assert figures["drift/now"] < 1
    assert 0.2 < figures["progress_kept/now"] < 1.5
    storage.detach()


def test_states_have_the_precision_of_the_run() -> None:
    class Wide(DrawingSGD):
        """Keeps a tiny state in float32, which is 0 in fp16."""

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            torch.rand(1)  # rounds by the global generator, as far as anyone can see
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["tiny"] = torch.zeros(p.shape)
                    state["tiny"].add_(p.grad.float().square(), alpha=1e-12)

    run = Run(torch.float16, lambda each: Wide(each, 3e-3))
    watched = watch(run, recipes=["e4m3fn"], formats=["e4m3fn"])
    run.train(EVERY)
    figures = watched.records[-1].layers["wide"]
    assert figures["tiny_ratio/now"] == pytest.approx(1, rel=1e-6)
    assert figures["tiny_zero_frac/now"] == 0


@pytest.mark.parametrize("weights_first", [True, False])
def test_two_storages_share_a_layer(weights_first: bool) -> None:
    run = Run(torch.float32, make_adamw)
    storages = [WeightStorage("e4m3fn"), WeightStorage(None, states={"exp_avg_sq": "e5m2"})]
    for storage in storages if weights_first else reversed(storages):
        storage.attach(run.optimizer, module=run.net)
    watched = watch(run, recipes=["e5m2"], formats=["e5m2"])
    run.train(2 * EVERY)
    assert_now_is(run, watched)
    assert watched.notices == []
    for storage in storages:
        storage.detach()


def test_a_run_without_sampled_layers_is_not_told_of_now() -> None:
    run = Run(torch.bfloat16)
    watched = watch(run, recipes=["bf16"], formats=["bf16"], twin_elements=0)
    run.train(EVERY)
    assert any(notice.endswith("read unmoved_frac") for notice in watched.notices)
