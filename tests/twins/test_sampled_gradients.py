"""`SampledGradients`: the gradients at the sampled elements, and what a GradScaler says of them."""

from __future__ import annotations

import torch

from altgrad.twins.sampled_gradients import SampledGradients
from tests.twins.planned import KIND, Planned

EVERY_SECOND = torch.arange(0, 128.0, 2)


def test_gradients_are_gathered_at_the_places_of_their_layers() -> None:
    run, gradients = Planned(), SampledGradients(KIND)
    gradients.arrange(run.plan, run.arrange("a", "b"))
    gradients.gather(run.optimizer)
    places = run.plan.layout.places
    assert gradients.names == ["a", "b"]
    assert torch.equal(gradients.now.values[places["a"]], EVERY_SECOND)
    assert torch.equal(gradients.now.values[places["b"]], EVERY_SECOND + 100)
    assert all(gradients.now.present)
    run.net["a"].grad = -run.net["a"].grad  # another tensor, as after zero_grad()
    gradients.gather(run.optimizer)
    assert torch.equal(gradients.now.values[places["a"]], -EVERY_SECOND)


def test_layers_without_a_gradient_have_zeros() -> None:
    run, gradients = Planned(), SampledGradients(KIND)
    for names in (("a", "b"), ("b",)):
        gradients.arrange(run.plan, run.arrange(*names))
        gradients.gather(run.optimizer)
    assert gradients.names == ["b"]
    places = run.plan.layout.places
    assert not gradients.now.values[places["a"]].any()
    assert torch.equal(gradients.now.values[places["b"]], EVERY_SECOND + 100)
    assert sorted(gradients.now.present) == [False, True]


def test_a_fused_optimizer_has_the_scale_and_the_flag_of_a_grad_scaler() -> None:
    run, gradients = Planned(), SampledGradients(KIND)
    gradients.arrange(run.plan, run.arrange("a"))
    gradients.gather(run.optimizer)
    assert (gradients.now.scale, gradients.now.found_inf) == (None, None)
    run.optimizer.grad_scale, run.optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    gradients.gather(run.optimizer)
    assert (gradients.now.scale, gradients.now.found_inf) == (8.0, 1.0)


def test_sums_of_a_recipe_are_those_of_one_step() -> None:
    run, gradients = Planned(), SampledGradients(KIND)
    gradients.arrange(run.plan, run.arrange("a"))
    gradients.gather(run.optimizer)
    gradients.now = gradients.now._replace(sums={"low": torch.ones(1)})
    gradients.gather(run.optimizer)
    assert not gradients.now.sums
