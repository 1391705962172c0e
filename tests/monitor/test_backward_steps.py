"""`BackwardSteps`: optimizers that step inside the backward pass have one record per training step.

The oracle is one optimizer that steps all layers after the backward pass. With SGD the weights are
equal bit for bit, since no gradient depends on a step of the same backward pass.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint

from altgrad import SamplingRule, StepRecord, UpdateMonitor
from tests.monitor.watching import assert_equal_figures

Loop = Callable[[nn.Module, Sequence[Optimizer], int], object]
STEPS = 6


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2))
    )


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(4, 3, generator=generator)).square().mean().backward()


# --- ways to step


def step_afterwards(model: nn.Module) -> list[Optimizer]:
    return [SGD(model.parameters(), lr=0.1, momentum=0.9)]


def step_each_parameter(model: nn.Module) -> list[Optimizer]:
    optimizers = {each: SGD([each], lr=0.1, momentum=0.9) for each in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return [*optimizers.values()]


class Released(SGD):
    """One optimizer of all parameters, of which hooks step one each, as optimi's does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1, momentum=0.9)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.step_one)

    def step_one(self, parameter: Tensor) -> None:
        self.step()  # the gradients of the other parameters are None by now
        parameter.grad = None


def step_parts_of_one(model: nn.Module) -> list[Optimizer]:
    return [Released(model)]


def train(model: nn.Module, optimizers: Sequence[Optimizer], step: int) -> None:
    backward(model, step)
    if len(optimizers) == 1:  # one that stepped in backward has nothing left to do
        optimizers[0].step()
        optimizers[0].zero_grad()


def watch(
    way: Callable[[nn.Module], list[Optimizer]], loop: Loop = train, **options: Any
) -> tuple[list[StepRecord], UpdateMonitor, nn.Module]:
    model = net()
    optimizers, records = way(model), []
    options = {"formats": ("bf16", "e4m3fn"), "strict": True} | options
    monitor = UpdateMonitor(model, records.append, **options)
    with monitor.attach(*optimizers):
        for step in range(STEPS):
            loop(model, optimizers, step)
    return records, monitor, model


IN_BACKWARD = [step_each_parameter, step_parts_of_one]


@pytest.mark.parametrize("recipe", ["bf16", "bf16-kahan"])  # which draw no random numbers
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("way", IN_BACKWARD)
def test_a_training_step_is_one_record_with_the_figures_of_one_optimizer(
    way: Any, every: int, recipe: str
) -> None:
    expected, _, trained = watch(step_afterwards, every_n_steps=every, recipes=recipe)
    records, monitor, model = watch(way, every_n_steps=every, recipes=recipe)
    assert all(map(torch.equal, model.parameters(), trained.parameters()))
    assert [each.index for each in records] == [each.index for each in expected]
    assert monitor.latest is records[-1]
    assert not monitor.skipped
    for record, truth in zip(records, expected, strict=True):
        assert [*record.layers] == [*truth.layers]
        for name, figures in truth.layers.items():
            assert_equal_figures(record.layers[name], figures)
        assert_equal_figures(record.model, truth.model)


def test_the_latest_record_has_all_layers_before_the_monitor_is_detached() -> None:
    model = net()
    optimizers = step_each_parameter(model)
    with UpdateMonitor(model, strict=True).attach(*optimizers) as monitor:
        backward(model, 0)
        assert monitor.latest is not None
        assert [*monitor.latest.layers] == [name for name, _ in model.named_parameters()]


class Experts(nn.Module):
    """A head and two experts, one of which is used at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.head = nn.Linear(3, 1)
        self.step = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.step += 1
        return self.head(self.experts[self.step % 2](inputs))


def test_layers_without_a_gradient_end_their_training_step_with_the_next() -> None:
    torch.manual_seed(0)
    model, records = Experts(), []
    monitor = UpdateMonitor(model, records.append, strict=True)
    monitor.attach(*step_each_parameter(model))
    for step in range(4):
        backward(model, step)
        assert len(records) == step
    monitor.detach()
    odd, even = ({f"experts.{i}.weight", f"experts.{i}.bias"} for i in (1, 0))
    used = [each.layers.keys() - {"head.weight", "head.bias"} for each in records]
    assert used == [odd, even, odd, even]
    assert all("head.weight" in each.layers for each in records)


def test_a_state_in_mid_run_has_the_steps_until_then() -> None:
    torch.manual_seed(0)
    model, records = Experts(), []
    monitor = UpdateMonitor(model, records.append, strict=True)
    with monitor.attach(*step_each_parameter(model)):
        backward(model, 0)
        assert monitor.state_dict()["last_seen"]["head.weight"] == 0
        assert len(records) == 1
    assert len(records) == 1


class Checkpointed(nn.Sequential):
    """A net that runs an inner backward pass for its second half."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self[0](inputs)
        return checkpoint(nn.Sequential(*[*self][1:]), hidden, use_reentrant=True)


@pytest.mark.parametrize("way", IN_BACKWARD)
def test_a_reentrant_checkpoint_is_a_part_of_the_training_step(way: Any) -> None:
    model, records = Checkpointed(*net()), []
    monitor = UpdateMonitor(model, records.append, strict=True)
    with monitor.attach(*way(model)):
        for step in range(3):
            backward(model, step)
    assert [each.index for each in records] == [0, 1, 2]
    assert {len(each.layers) for each in records} == {8}


def step_in_hooks_of_nodes(model: nn.Module) -> list[Optimizer]:
    optimizers = []
    for parameter in model.parameters():
        optimizer = SGD([parameter], lr=0.1)
        node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_, each=optimizer: each.step() or each.zero_grad())
        optimizer.node = node  # which autograd holds weakly
        optimizers.append(optimizer)
    return optimizers


def step_in_hooks_of_tensors(model: nn.Module) -> list[Optimizer]:
    optimizers = {each: SGD([each], lr=0.1) for each in model.parameters()}

    def step(parameter: Tensor, gradient: Tensor) -> None:
        parameter.grad = gradient.clone()
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_hook(functools.partial(step, parameter))
    return [*optimizers.values()]


@pytest.mark.parametrize("way", [step_in_hooks_of_nodes, step_in_hooks_of_tensors])
def test_hooks_of_other_kinds_make_one_record_per_training_step(way: Any) -> None:
    def loop(model: nn.Module, _: Sequence[Optimizer], step: int) -> None:
        backward(model, step)
        model.zero_grad()

    records, _, _ = watch(way, loop)
    assert [(each.index, len(each.layers)) for each in records] == [(k, 8) for k in range(STEPS)]


@pytest.mark.parametrize(
    "with_node", [["0.weight"], ["4.bias"], ["0.bias", "3.weight", "4.weight"]]
)
def test_hooks_of_several_kinds_make_one_record_per_training_step(with_node: list[str]) -> None:
    def mix(model: nn.Module) -> list[Optimizer]:
        node = step_in_hooks_of_nodes(nn.ParameterDict(pick(model, with_node)))
        return [*node, *step_each_parameter(nn.ParameterDict(pick(model, with_node, False)))]

    records, monitor, _ = watch(mix, lambda model, _, step: backward(model, step))
    assert [(each.index, len(each.layers)) for each in records] == [(k, 8) for k in range(STEPS)]
    assert monitor.latest is records[-1]


def pick(model: nn.Module, names: list[str], is_in: bool = True) -> dict[str, nn.Parameter]:
    found = {name: each for name, each in model.named_parameters() if (name in names) == is_in}
    return {name.replace(".", "_"): each for name, each in found.items()}


def test_layers_that_are_stepped_afterwards_end_the_training_step_in_backward() -> None:
    def split(model: nn.Module) -> list[Optimizer]:
        return [*step_each_parameter(model[4]), SGD(model[:4].parameters(), lr=0.1)]

    def loop(model: nn.Module, optimizers: Sequence[Optimizer], step: int) -> None:
        backward(model, step)
        optimizers[-1].step()
        model.zero_grad()

    records, _, _ = watch(split, loop)
    assert [(r.index, len(r.layers)) for r in records] == [
        (k, n) for k in range(STEPS) for n in (2, 6)
    ]


def test_intervals_of_single_layers_count_training_steps() -> None:
    rules = [SamplingRule("4.*", every_n_steps=3)]
    records, _, _ = watch(step_each_parameter, sampling=rules)
    expected, _, _ = watch(step_afterwards, sampling=rules)
    assert [[*each.layers] for each in records] == [[*each.layers] for each in expected]
    assert len({len(each.layers) for each in records}) == 2


def test_a_function_that_chooses_steps_is_asked_once_for_each_training_step() -> None:
    asked: list[int] = []

    def choose(index: int) -> bool:
        asked.append(index)
        return index % 2 == 1

    records, _, _ = watch(step_each_parameter, every_n_steps=choose)
    assert asked == [*range(STEPS)]
    assert [each.index for each in records] == [1, 3, 5]


def test_a_step_that_the_user_makes_between_is_a_record_of_its_own() -> None:
    def loop(model: nn.Module, optimizers: Sequence[Optimizer], step: int) -> None:
        backward(model, step)
        if step == 2:
            head = optimizers[-1].param_groups[0]["params"][0]
            head.grad = torch.ones_like(head)
            optimizers[-1].step()
            head.grad = None

    records, _, _ = watch(step_each_parameter, loop)
    assert [len(each.layers) for each in records] == [8, 8, 8, 1, 8, 8, 8]


def test_the_time_of_a_training_step_is_that_of_all_its_parts() -> None:
    records, _, _ = watch(step_each_parameter, overhead_budget=0.999)
    assert all(each.own_seconds > 0 and each.training_seconds >= 0 for each in records[2:])


def test_a_monitor_that_is_attached_again_counts_anew() -> None:
    model, records = net(), []
    optimizers = step_each_parameter(model)
    monitor = UpdateMonitor(model, records.append, strict=True)
    for _ in range(2):
        with monitor.attach(*optimizers):
            for step in range(2):
                backward(model, step)
    assert [each.index for each in records] == [0, 1, 0, 1]


def test_gradient_release_has_one_record_per_training_step() -> None:
    optimi = pytest.importorskip("optimi")

    def release(model: nn.Module) -> list[Optimizer]:
        optimizer = optimi.AdamW(model.parameters(), lr=0.01, gradient_release=True)
        optimi.prepare_for_gradient_release(model, optimizer)
        return [optimizer]

    def plain(model: nn.Module) -> list[Optimizer]:
        return [optimi.AdamW(model.parameters(), lr=0.01)]

    records, monitor, _ = watch(release, recipes=())
    expected, _, _ = watch(plain, recipes=())
    assert not monitor.skipped
    for record, truth in zip(records, expected, strict=True):
        assert record.model["update_rms"] == pytest.approx(truth.model["update_rms"], rel=1e-5)
        assert [*record.layers] == [*truth.layers]


@pytest.mark.parametrize("every", [1, 2])
def test_micro_batches_of_gradient_release_are_no_training_steps(every: int) -> None:
    optimi = pytest.importorskip("optimi")
    moves, records, model = [], [], net()
    optimizer = optimi.AdamW(model.parameters(), lr=0.01, gradient_release=True)
    optimi.prepare_for_gradient_release(model, optimizer)
    options = {"recipes": (), "every_n_steps": every, "max_elements": None, "strict": True}
    monitor = UpdateMonitor(model, records.append, **options)
    with monitor.attach(optimizer):
        for step in range(9):
            before = torch.cat([each.detach().flatten() for each in model.parameters()])
            optimizer.optimizer_accumulation = step % 3 < 2
            backward(model, step)
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
                after = torch.cat([each.detach().flatten() for each in model.parameters()])
                moves.append((after - before).double().square().mean().sqrt().item())
    assert [each.index for each in records] == [*range(3)][every - 1 :: every]
    sizes = [each.model["update_rms"] for each in records]
    assert sizes == pytest.approx(moves[every - 1 :: every], rel=1e-6)
    assert not monitor.skipped
