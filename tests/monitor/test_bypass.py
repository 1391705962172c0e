"""`BypassDetector`: layers that move although no step of an attached optimizer is seen."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from altgrad import UpdateMonitor
from tests.monitor.watching import net, train


class Sam(Optimizer):
    """The usual form of SAM: two methods of its own, and an optimizer inside."""

    def __init__(self, parameters: Any, radius: float = 0.05) -> None:
        super().__init__(parameters, {})
        self.base_optimizer = SGD(self.param_groups, lr=0.1)
        self.radius = radius
        self.away: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.away = [(p, p.clone()) for p in parameters if p.grad is not None]
        for p, _ in self.away:
            p.add_(p.grad, alpha=self.radius)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, before in self.away:
            p.copy_(before)
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        raise AssertionError("this form is not called")


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()


def step_as_sam(model: nn.Module, optimizer: Sam) -> None:
    backward(model)
    optimizer.first_step()
    backward(model)
    optimizer.second_step()


def step_by_another(model: nn.Module, _: Optimizer) -> None:
    other = SGD(model.parameters(), lr=0.1)
    train(model, other)
    model.other = other  # kept, as a training loop keeps its optimizer


def step_in_backward(model: nn.Module, _: Optimizer) -> None:
    if not hasattr(model, "steppers"):
        model.steppers = {p: SGD([p], lr=0.1) for p in model.parameters()}

        def step(parameter: Tensor) -> None:
            model.steppers[parameter].step()
            parameter.grad = None

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
    backward(model)


def step_as_replaced(model: nn.Module, optimizer: Optimizer) -> None:
    @torch.no_grad()
    def own_step() -> None:
        for p in model.parameters():
            p.sub_(p.grad, alpha=0.1)

    optimizer.step = own_step
    backward(model)
    optimizer.step()


BYPASSES: dict[str, tuple[Callable[..., None], str]] = {
    "SAM": (step_as_sam, r"steps by first_step\(\) and second_step\(\).*attach the optimizer that"),
    "another": (step_by_another, "SGD has these layers, too, and is not attached; attach it"),
    "in backward": (step_in_backward, "hooks inside the backward pass.*attach each optimizer"),
    "replaced": (step_as_replaced, r"the step\(\) of this SGD object was replaced"),
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("steps_before", [0, 4])
@pytest.mark.parametrize("way", BYPASSES)
def test_steps_that_pass_no_hook_give_one_warning_with_the_reason(
    way: str, steps_before: int, every: int
) -> None:
    bypass, reason = BYPASSES[way]
    model, told = net(), []
    optimizer = Sam(model.parameters()) if way == "SAM" else SGD(model.parameters(), lr=0.1)
    monitor = UpdateMonitor(model, formats="bf16", every_n_steps=every, warn=told.append)
    with monitor.attach(optimizer):
        for _ in range(steps_before if way != "SAM" else 0):
            train(model, optimizer)
        monitor.warn_about_bypasses()
        assert told == []
        for _ in range(3):
            bypass(model, optimizer)
            monitor.warn_about_bypasses()
    assert len(told) == 1, told
    assert told[0].startswith("cannot see what moves 0.weight, 0.bias, 2.weight and 5 more: ")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(told[0])


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_an_optimizer_made_anew_in_a_loop_is_missed_at_the_end(kind: type[Optimizer]) -> None:
    model, told = net(), []
    optimizer = kind(model.parameters(), lr=0.1)
    with UpdateMonitor(model, formats="bf16", warn=told.append).attach(optimizer) as monitor:
        train(model, optimizer, 2)
        assert monitor.is_observing
        optimizer = kind(model.parameters(), lr=0.1)
        assert not monitor.is_observing  # the attached one exists no longer
        train(model, optimizer, 2)
        assert monitor.latest.index == 1
    assert len(told) == 1
    assert f"the {kind.__name__} that was attached no longer exists, and {kind.__name__}" in told[0]


@pytest.mark.parametrize("is_trained", [True, False])
def test_layers_of_an_optimizer_that_was_forgotten_give_one_warning(is_trained: bool) -> None:
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("d", "g", "averaged")})
    d, g = (SGD(model[name].parameters(), lr=0.1) for name in ("d", "g"))
    told: list[str] = []
    with UpdateMonitor(model, formats="bf16", warn=told.append).attach(d):
        step_part(model["d"], d)
        if is_trained:
            step_part(model["g"], g)
        with torch.no_grad():  # such as a target network, which no optimizer has
            model["averaged"].weight.lerp_(model["d"].weight, 0.5)
    expected = "cannot see what moves g.weight, g.bias: SGD has these layers and is not attached"
    assert told == ([f"{expected}; attach it"] if is_trained else [])


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_layers_that_are_sharded_after_attach_give_one_warning() -> None:
    model, told = nn.Linear(3, 2), []
    monitor = UpdateMonitor(model, formats="bf16", warn=told.append)
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor.attach(optimizer)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    step_part(model, SGD(model.parameters(), lr=0.1))
    monitor.detach()
    (notice,) = told
    assert notice.startswith("cannot see what moves weight, bias: they were sharded after attach()")


# --- no bypass: neither of these is a step that was missed


def swap_for_an_evaluation(model: nn.Module, _: Optimizer) -> None:
    averaged, kept = copy.deepcopy(model).half().float(), copy.deepcopy(model.state_dict())
    model.load_state_dict(averaged.state_dict())
    model.load_state_dict(kept)


def swap_for_good(model: nn.Module, _: Optimizer) -> None:
    model.load_state_dict(copy.deepcopy(model).half().float().state_dict())


@torch.no_grad()
def clamp(model: nn.Module, _: Optimizer) -> None:
    for p in model.parameters():
        p.clamp_(-0.05, 0.05)


@torch.no_grad()
def project(model: nn.Module, _: Optimizer) -> None:
    for p in model.parameters():
        p.div_(2 * p.norm())


def unfreeze(model: nn.Module, optimizer: Optimizer) -> None:
    if len(optimizer.param_groups) == 1:
        swap_for_good(model[4], optimizer)
        optimizer.add_param_group({"params": model[4].requires_grad_(True).parameters()})


def edit_nothing(*_: Any) -> None:
    """Only train, with a scheduler."""


EDITS = (swap_for_an_evaluation, swap_for_good, clamp, project, unfreeze, edit_nothing)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_between_steps_are_no_bypass(edit: Callable[..., None], every: int) -> None:
    model = net()
    model[4].requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = StepLR(optimizer, 1)  # which puts a step() of its own on the object
    monitor = UpdateMonitor(model, formats="bf16", every_n_steps=every, strict=True)
    with monitor.attach(optimizer):  # a warning would be an error
        edit(model, optimizer)  # such as weights that are loaded before the first step
        monitor.warn_about_bypasses()
        for _ in range(3):
            train(model, optimizer)
            scheduler.step()
            edit(model, optimizer)
            monitor.warn_about_bypasses()
        edit(model, optimizer)
    assert monitor.latest is not None


def test_weights_that_are_loaded_beside_an_idle_optimizer_are_no_bypass() -> None:
    model = net()
    idle, optimizer = (AdamW(model.parameters()) for _ in range(2))
    with UpdateMonitor(model, formats="bf16", strict=True).attach(optimizer) as monitor:
        for steps in (0, 2, 0):  # a warning would be an error
            train(model, optimizer, steps)
            monitor.warn_about_bypasses()
            swap_for_good(model, optimizer)
            monitor.warn_about_bypasses()
    assert not idle.state


def hook_all(model: nn.Module, _: Optimizer) -> None:
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: None)
        p.register_hook(lambda gradient: gradient.clamp(-1, 1))


def keep_an_idle_optimizer(model: nn.Module, _: Optimizer) -> None:
    model.idle = SGD(model.parameters(), lr=0.1)


def keep_an_earlier_optimizer(model: nn.Module, _: Optimizer) -> None:
    model.earlier = AdamW(model.parameters())
    train(model, model.earlier)


@pytest.mark.parametrize("recipes", [(), "bf16"])
@pytest.mark.parametrize("steps", [(0, 0), (0, 2, 0), (2, 0), (1, 1, 1)])
@pytest.mark.parametrize("prepare", [hook_all, keep_an_idle_optimizer, keep_an_earlier_optimizer])
def test_weights_that_are_swapped_without_a_step_are_no_bypass(
    prepare: Callable[..., None], steps: tuple[int, ...], recipes: Any
) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    prepare(model, optimizer)
    with UpdateMonitor(model, formats="bf16", recipes=recipes, strict=True) as monitor:
        monitor.attach(optimizer)
        for each in steps:  # a warning would be an error
            train(model, optimizer, each)
            monitor.warn_about_bypasses()
            project(model, optimizer)
            monitor.warn_about_bypasses()


def test_updates_that_all_round_away_are_no_bypass() -> None:
    model = net().bfloat16()
    first, second = (SGD(model.parameters(), lr=1e-12) for _ in range(2))
    third = SGD(model[0].parameters(), lr=0.1)
    with UpdateMonitor(model, formats="e4m3fn", recipes=(), strict=True) as monitor:
        monitor.attach(first, second, third)
        for _ in range(4):
            model.zero_grad()
            model(torch.randn(4, 3, 8, 8).bfloat16()).square().mean().backward()
            for optimizer in (first, second, third):
                optimizer.step()
            monitor.warn_about_bypasses()


def test_a_layer_that_two_attached_optimizers_step_is_no_bypass() -> None:
    model = net()
    first, second = SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)
    with UpdateMonitor(model, formats="bf16", strict=True).attach(first, second) as monitor:
        for optimizer in (first, first, second, second, second):
            train(model, optimizer)
            monitor.warn_about_bypasses()
        assert monitor.describe_unseen() == []


def test_layers_that_another_monitor_observes_are_no_bypass() -> None:
    model = net()
    first, second = SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)
    with (
        UpdateMonitor(model, formats="bf16", strict=True).attach(first) as one,
        UpdateMonitor(model, formats="bf16", strict=True).attach(second) as other,
    ):
        for _ in range(2):
            train(model, first)
            train(model, second)
            one.warn_about_bypasses()
            other.warn_about_bypasses()


def test_steps_between_detach_and_attach_are_no_bypass() -> None:
    model = net()
    optimizer = SGD(model[0].parameters(), lr=0.1)
    monitor = UpdateMonitor(model, formats="bf16", strict=True)
    warmup = SGD(model[2].parameters(), lr=0.1)
    for _ in range(2):
        with monitor.attach(optimizer):
            train(model, optimizer)
        train(model, warmup)
    told: list[str] = []
    monitor = UpdateMonitor(model, formats="bf16", warn=told.append)
    with monitor.attach(optimizer):
        train(model, warmup)  # while the monitor is attached
    assert [each.partition(":")[0] for each in told] == ["cannot see what moves 2.weight, 2.bias"]


def test_tied_weights_are_no_bypass() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = SGD(model.parameters(), lr=0.1)
    with UpdateMonitor(model, formats="bf16", strict=True).attach(optimizer) as monitor:
        for _ in range(2):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            monitor.warn_about_bypasses()


def test_steps_that_a_scaler_skips_or_that_repeat_a_closure_are_no_bypass() -> None:
    model = nn.Linear(3, 2)
    scaler, optimizer = GradScaler("cpu"), SGD(model.parameters(), lr=0.1)
    with UpdateMonitor(model, formats="bf16", strict=True) as monitor:
        monitor.attach(optimizer, scaler=scaler)
        scaler.scale(model(torch.full((1, 3), torch.inf)).sum()).backward()
        scaler.step(optimizer)
        monitor.warn_about_bypasses()
    lbfgs = LBFGS(model.parameters(), max_iter=3)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    with UpdateMonitor(model, formats="bf16", strict=True).attach(lbfgs) as monitor:
        for _ in range(2):
            lbfgs.step(closure)
            monitor.warn_about_bypasses()


# --- layers that were never observed


@pytest.fixture
def pair() -> tuple[nn.ModuleDict, dict[str, Optimizer]]:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in ("d", "g")})
    return model, {name: SGD(each.parameters(), lr=0.1) for name, each in model.items()}


def step_part(part: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    part(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_layers_of_an_optimizer_whose_steps_were_not_observed_are_named(pair: Any) -> None:
    model, optimizers = pair
    monitor = UpdateMonitor(model, formats="bf16", every_n_steps=3, strict=True)
    with monitor.attach(*optimizers.values()):
        for _ in range(2):
            step_part(model["g"], optimizers["g"])
        for _ in range(3):
            step_part(model["d"], optimizers["d"])
        assert monitor.describe_unseen() == [
            "never observed g.weight, g.bias: no step of SGD was observed; observe more steps"
        ]
        step_part(model["g"], optimizers["g"])
        assert monitor.describe_unseen() == []


def test_layers_without_a_gradient_in_the_observed_steps_are_named(pair: Any) -> None:
    model, _ = pair
    optimizer = SGD(model.parameters(), lr=0.1)
    with UpdateMonitor(model, formats="bf16", every_n_steps=2).attach(optimizer) as monitor:
        for part in (model["g"], model["d"], model["g"], model["d"]):
            step_part(part, optimizer)
        (notice,) = monitor.describe_unseen()
    assert notice.startswith("never observed g.weight, g.bias: they had no gradient in the obs")


def test_layers_that_never_move_are_not_named(pair: Any) -> None:
    """Unused layers, and those that wait for their turn, have nothing to observe."""
    model, optimizers = pair
    with UpdateMonitor(model, formats="bf16").attach(*optimizers.values()) as monitor:
        step_part(model["d"], optimizers["d"])
        assert monitor.describe_unseen() == []


def test_weights_that_move_without_any_step_are_named_with_likely_reasons(pair: Any) -> None:
    model, optimizers = pair
    with UpdateMonitor(model, formats="bf16").attach(*optimizers.values()) as monitor:
        with torch.no_grad():
            model["g"].weight.add_(1)
        (notice,) = monitor.describe_unseen()
    assert notice.startswith("never observed g.weight: step() of SGD was never called; other code")


def test_a_comparison_that_fails_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = net(), []
    optimizer = SGD(model.parameters(), lr=0.1)
    with UpdateMonitor(model, formats="bf16", warn=told.append).attach(optimizer) as monitor:
        train(model, optimizer)

        def fails(*_: Any) -> None:
            raise RuntimeError("CUDA error")

        monkeypatch.setattr("altgrad.observation.weight_sample._read", fails)
    assert told == []
    assert not monitor.is_observing


def test_a_warning_that_is_an_error_leaves_no_hook() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor = UpdateMonitor(model, formats="bf16").attach(optimizer)
    step_by_another(model, optimizer)
    with pytest.raises(UserWarning, match="cannot see what moves"):  # as in this suite
        monitor.detach()
    assert not optimizer._optimizer_step_pre_hooks  # torch has no public name for its hooks
