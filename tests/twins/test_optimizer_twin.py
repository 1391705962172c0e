"""`OptimizerTwin`: an optimizer on a sample, against the same steps on a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad import quantize
from altgrad.quantization.block_formats import get_formats
from altgrad.recipes.recipe import Recipe
from altgrad.twins.element_scales import ElementScales
from altgrad.twins.layout import Bucket, Layout
from altgrad.twins.optimizer_twin import Gradients, OptimizerTwin
from altgrad.twins.sample import Sampled
from altgrad.twins.twin import Arrangement, UpdateTwin
from tests.counting import host_copies

COUNT = 256


def make_scales() -> ElementScales:
    return ElementScales("tensor", lambda _name, _indices: (torch.ones(1), torch.ones(1)))


class Run:
    """A run of one layer, with a twin of it that sees every element."""

    def __init__(
        self, recipe: Recipe, optimizer: type[Optimizer] = torch.optim.AdamW, **options: Any
    ):
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(COUNT) * 0.02)
        self.optimizer = optimizer([self.weight], **options)
        self.layout = Layout((Bucket(0, {"w": COUNT}),))
        self.layers = {"w": Sampled(self.weight, self.weight.shape, torch.arange(COUNT))}
        scales = make_scales()
        scales.read(self.layout, {"w": torch.arange(COUNT)}, self.weight)
        self.twin = OptimizerTwin(recipe, torch.float32, scales, seed=0)
        self.twin.rearrange(self.arrangement())

    def arrangement(self) -> Arrangement:
        return Arrangement(self.optimizer, self.layout, self.weight.detach().clone(), self.layers)

    def step(self, gradient: Tensor, **facts: Any) -> None:
        self.weight.grad = gradient
        self.twin.step(Gradients(gradient, [True], **facts))
        self.optimizer.step()


def gradients(steps: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(COUNT, generator=random) * 1e-3 for _ in range(steps)]


def test_without_a_format_the_twin_equals_the_run() -> None:
    run = Run(Recipe("fp32"))
    for gradient in gradients(20):
        run.step(gradient)
    assert torch.equal(run.twin.tensors.weights, run.weight)
    state = run.optimizer.state[run.weight]["exp_avg_sq"]
    assert torch.equal(run.twin.states["exp_avg_sq"], state)


def test_stored_weights_equal_a_loop_that_rounds_after_each_step() -> None:
    run = Run(Recipe("bf16", weights="bf16"), lr=1e-4)
    low = nn.Parameter(quantize(run.weight.detach(), "bf16"))
    optimizer = torch.optim.AdamW([low], lr=1e-4)
    for gradient in gradients(20):
        run.step(gradient)
        low.grad = gradient.clone()
        optimizer.step()
        low.data.copy_(quantize(low.detach(), "bf16"))
    assert torch.equal(run.twin.tensors.weights, low)
    assert not torch.equal(run.twin.tensors.weights, run.weight)


def test_a_stored_state_equals_a_loop_that_rounds_it_after_each_step() -> None:
    run = Run(Recipe("v", states={"exp_avg_sq": "bf16"}), lr=1e-3)
    low = nn.Parameter(run.weight.detach().clone())
    optimizer = torch.optim.AdamW([low], lr=1e-3)
    for gradient in gradients(20):
        run.step(gradient)
        low.grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[low]["exp_avg_sq"]
        state.copy_(quantize(state, "bf16"))
    assert torch.equal(run.twin.tensors.weights, low)
    assert torch.equal(run.twin.states["exp_avg_sq"], optimizer.state[low]["exp_avg_sq"])


def test_a_dtype_runs_the_class_on_tensors_of_that_dtype() -> None:
    run = Run(Recipe("bf16-true", dtype=torch.bfloat16), lr=1e-3)
    low = nn.Parameter(run.weight.detach().bfloat16())
    optimizer = torch.optim.AdamW([low], lr=1e-3)
    for gradient in gradients(20):
        run.step(gradient)
        low.grad = gradient.bfloat16()
        optimizer.step()
    assert torch.equal(run.twin.tensors.weights, low)
    assert run.twin.states["exp_avg_sq"].dtype == torch.bfloat16


def test_weight_decay_in_bf16_does_nothing_and_the_twin_shows_it() -> None:
    # lr · weight_decay = 1e-5 is below 2**-9, so that the product rounds back.
    run = Run(Recipe("bf16-true", dtype=torch.bfloat16), lr=1e-3, weight_decay=1e-2)
    for _ in range(50):
        run.step(torch.zeros(COUNT))
    assert not run.twin.tensors.moved_in_window.any()
    assert (run.weight.detach().abs() < run.twin.tensors.weights.float().abs()).float().mean() > 0.4


def test_a_second_moment_in_bf16_never_falls() -> None:
    run = Run(Recipe("bf16-true", dtype=torch.bfloat16), lr=1e-3)
    for gradient in gradients(100):
        run.step(gradient)
    largest = run.twin.states["exp_avg_sq"].clone()
    for gradient in gradients(100):
        run.step(gradient * 1e-2)
    assert (run.twin.states["exp_avg_sq"] >= largest).all()  # 1 − β2 = 0.001 < 2**-9
    assert (run.optimizer.state[run.weight]["exp_avg_sq"] < largest.float()).all()


def test_a_factory_steps_another_class() -> None:
    recipe = Recipe(
        "sgd", optimizer=lambda parameters, group: torch.optim.SGD(parameters, group["lr"])
    )
    run = Run(recipe, lr=0.5)
    start = run.weight.detach().clone()
    gradient = gradients(1)[0]
    run.step(gradient)
    assert torch.equal(run.twin.tensors.weights, start.add(gradient, alpha=-0.5))


def test_a_factory_that_draws_leaves_the_random_numbers_of_the_training() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.param_groups[0]["params"][0].data.add_(torch.randn(COUNT))

    Noisy.__module__ = "elsewhere"
    run = Run(Recipe("noisy", optimizer=lambda parameters, group: Noisy(parameters, group["lr"])))
    before = torch.get_rng_state()
    first, second = gradients(2)
    run.step(first)
    moved = run.twin.tensors.weights.clone()
    run.step(second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(run.twin.tensors.weights, moved)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_undone_on_the_device(fused: bool) -> None:
    run = Run(Recipe("fp32"), lr=1e-3, fused=fused)
    for gradient in gradients(3):
        run.step(gradient)
    weights, state = run.twin.tensors.weights.clone(), run.twin.states["exp_avg"].clone()
    gradient = torch.full((COUNT,), torch.inf)
    facts = {"scale": torch.tensor(8.0), "found_inf": torch.tensor(1.0)}
    run.twin.step(Gradients(gradient, [True], **facts))
    assert torch.equal(run.twin.tensors.weights, weights)
    assert torch.equal(run.twin.states["exp_avg"], state)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_divided_by_the_loss_scale(fused: bool) -> None:
    run = Run(Recipe("fp32"), lr=1e-3, fused=fused)
    for gradient in gradients(3):
        facts = {"scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)}
        run.twin.step(Gradients(gradient * 8, [True], **facts))
        run.weight.grad = gradient
        run.optimizer.step()
    assert torch.equal(run.twin.tensors.weights, run.weight)


class Replacing(torch.optim.Optimizer):
    """An optimizer that puts other memory into its parameters, as much third-party code does."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data = (p.data.double() - group["lr"] * p.grad).float()


@pytest.mark.parametrize("is_own", [False, True])
def test_an_optimizer_that_replaces_the_data_of_its_parameters_moves_its_twin(is_own: bool) -> None:
    factory = None if is_own else lambda held, group: Replacing(held, lr=group["lr"])
    run = Run(Recipe("mine", optimizer=factory), Replacing, lr=0.1)
    for gradient in gradients(5):
        run.step(gradient)
        assert torch.equal(run.twin.tensors.weights, run.weight)
    assert run.twin.tensors.moved_in_window.any()


def make_foreach(held: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    return torch.optim.AdamW(held, lr=group["lr"], foreach=True)


def make_sgd(held: list[nn.Parameter], lr: float) -> Optimizer:
    return torch.optim.SGD(held, lr=lr, momentum=0.9)


class CountingOnHost(torch.optim.SGD):
    """An optimizer that counts its steps in a number of Python."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                p.add_(p, alpha=group["k"] * 1e-3)


@pytest.mark.parametrize("skipped", [0, 2])
@pytest.mark.parametrize("make", [make_foreach, lambda p, g: CountingOnHost(p, lr=g["lr"])])
def test_a_factory_of_a_fused_run_does_nothing_in_a_skipped_step(make: Any, skipped: int) -> None:
    run = Run(Recipe("factory", optimizer=make), lr=1e-3, fused=True)
    alone = nn.Parameter(run.weight.detach().clone())
    optimizer = make([alone], {"lr": 1e-3})
    with torch.no_grad():
        for index, gradient in enumerate(gradients(5)):
            is_skipped = index == skipped
            facts = {"scale": torch.tensor(8.0), "found_inf": torch.tensor(float(is_skipped))}
            run.twin.step(Gradients(gradient * (torch.inf if is_skipped else 8), [True], **facts))
            if not is_skipped:
                alone.grad = gradient.clone()
                optimizer.step()
    assert torch.equal(run.twin.tensors.weights, alone)


@pytest.mark.parametrize(("make", "looks"), [(make_sgd, 0), (CountingOnHost, 1)])
def test_the_host_reads_the_flag_of_a_scaler_if_the_optimizer_counts_in_python(
    make: Any, looks: int
) -> None:
    factory = Recipe("factory", optimizer=lambda held, group: make(held, lr=group["lr"]))
    run = Run(factory, lr=1e-3, fused=True)
    facts = {"scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)}
    with torch.no_grad():
        for index, gradient in enumerate(gradients(4)):
            with host_copies() as copies:
                run.twin.step(Gradients(gradient * 8, [True], **facts))
            assert len(copies) == (1 if index == 0 else looks)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_unscaled_before_they_are_cast(fused: bool) -> None:
    # 4 · 65536 is beyond float16, whose largest number is 65504.
    run = Run(Recipe("fp16-true", dtype=torch.float16), lr=1e-3, fused=fused, eps=1e-4)
    low = nn.Parameter(run.weight.detach().half())
    optimizer = torch.optim.AdamW([low], lr=1e-3, fused=fused, eps=1e-4)
    for gradient in gradients(5):
        large = gradient * 4000
        facts = {"scale": torch.tensor(2.0**16), "found_inf": torch.tensor(0.0)}
        run.twin.step(Gradients(large * 2.0**16, [True], **facts))
        low.grad = large.half()
        optimizer.step()
    assert torch.equal(run.twin.tensors.weights, low)
    assert run.twin.tensors.weights.isfinite().all()


def test_a_fused_optimizer_of_the_dtype_of_the_run_divides_by_the_loss_scale_itself() -> None:
    weight = nn.Parameter(torch.ones(COUNT, dtype=torch.float16))
    optimizer = torch.optim.AdamW([weight], lr=1e-2, eps=1e-4, fused=True)
    layout = Layout((Bucket(0, {"w": COUNT}),))
    layers = {"w": Sampled(weight, weight.shape, torch.arange(COUNT))}
    twin = OptimizerTwin(Recipe("run", dtype=torch.float16), torch.float16, make_scales(), seed=0)
    twin.rearrange(Arrangement(optimizer, layout, weight.detach().clone(), layers))
    facts = {"scale": torch.tensor(3.0 * 2**10), "found_inf": torch.tensor(0.0)}
    for gradient in gradients(5):
        weight.grad = (gradient * 3.0).half()  # less than 2**-24 without the scale
        twin.step(Gradients(weight.grad.clone(), [True], **facts))
        vars(optimizer).update(grad_scale=facts["scale"], found_inf=facts["found_inf"])
        optimizer.step()
    assert torch.equal(twin.tensors.weights, weight)


def test_a_group_that_is_added_to_a_fused_recipe_stays_fused() -> None:
    run = Run(Recipe("fused", dtype=torch.float16, fused=True), lr=1e-3)
    run.twin.follow({0: {"fused": None, "foreach": None, "lr": 0.5}})
    low = nn.Parameter(run.weight.detach().half())
    optimizer = torch.optim.AdamW([low], lr=0.5, fused=True)
    for gradient in gradients(5):
        run.twin.step(Gradients(gradient, [True]))
        low.grad = gradient.half()
        optimizer.step()
    assert torch.equal(run.twin.tensors.weights, low)


def test_a_state_is_a_copy() -> None:
    run = Run(Recipe("bf16-sr", weights="bf16", rounding="stochastic"), lr=torch.tensor(1e-3))
    for gradient in gradients(3):
        run.step(gradient)
    state = run.twin.state_dict()
    [kept] = state["states"]
    before = {name: value.clone() for name, value in kept.items()}
    for gradient in gradients(3):
        run.step(gradient)
    assert before.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(kept[name], value) for name, value in before.items())


def test_a_state_that_was_loaded_is_not_changed() -> None:
    run = Run(Recipe("fp32"), lr=1e-3)
    run.step(gradients(1)[0])
    state = run.twin.state_dict()
    before = state["tensors"]["weights"].clone()
    other = OptimizerTwin(Recipe("fp32"), torch.float32, make_scales(), seed=0)
    other.load_state_dict(run.layout, state, torch.device("cpu"))
    other.tensors.weights.zero_()
    other.tensors.begin_step()
    assert torch.equal(state["tensors"]["weights"], before)


def test_layers_without_a_gradient_stay() -> None:
    run = Run(Recipe("fp32"), lr=1e-3)
    run.step(gradients(1)[0])
    weights = run.twin.tensors.weights.clone()
    run.twin.step(Gradients(torch.ones(COUNT), [False]))
    assert torch.equal(run.twin.tensors.weights, weights)


def test_a_resumed_twin_goes_on_bit_for_bit() -> None:
    [bf16] = get_formats("bf16")
    recipe = Recipe("bf16-sr", weights=bf16, rounding="stochastic")
    run = Run(recipe, lr=1e-4)
    steps = gradients(20)
    for gradient in steps[:10]:
        run.step(gradient)
    scales = make_scales()
    scales.read(run.layout, {"w": torch.arange(COUNT)}, run.weight)
    other = OptimizerTwin(recipe, torch.float32, scales, seed=0)
    other.load_state_dict(run.layout, run.twin.state_dict(), torch.device("cpu"))
    other.rearrange(run.arrangement())
    assert torch.equal(other.tensors.weights, run.twin.tensors.weights)
    for gradient in steps[10:]:
        other.step(Gradients(gradient, [True]))
        run.step(gradient)
    assert torch.equal(other.tensors.weights, run.twin.tensors.weights)
    assert torch.equal(other.tensors.moved_in_window, run.twin.tensors.moved_in_window)


def test_a_twin_that_begins_in_mid_run_takes_the_state_of_the_run() -> None:
    run = Run(Recipe("fp32"), lr=1e-3)
    for gradient in gradients(5):
        run.weight.grad = gradient
        run.optimizer.step()
    scales = make_scales()
    late = OptimizerTwin(Recipe("fp32"), torch.float32, scales, seed=0)
    scales.read(run.layout, {"w": torch.arange(COUNT)}, run.weight)
    late.rearrange(run.arrangement())
    for gradient in gradients(5):
        late.step(Gradients(gradient, [True]))
        run.weight.grad = gradient
        run.optimizer.step()
    assert torch.equal(late.tensors.weights, run.weight)


def test_memory_counts_weights_gradients_and_states() -> None:
    run = Run(Recipe("fp32"), lr=1e-3)
    run.step(gradients(1)[0])
    # weights at four times, gradients and two moments in float32; two flags; a counter
    assert run.twin.nbytes() == COUNT * (7 * 4 + 2) + 4


def test_an_update_twin_follows_the_run_and_rounds() -> None:
    scales = make_scales()
    run = Run(Recipe("fp32"), lr=1e-3)
    scales.read(run.layout, {"w": torch.arange(COUNT)}, run.weight)
    twin = UpdateTwin(Recipe("bf16", weights="bf16"), torch.float32, scales, seed=0)
    twin.rearrange(run.arrangement())
    expected = quantize(run.weight.detach(), "bf16")
    assert torch.equal(twin.tensors.weights, expected)
    update = gradients(1)[0]
    twin.take_update(update)
    assert torch.equal(twin.tensors.weights, quantize(expected + update, "bf16"))
