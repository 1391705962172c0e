"""Copies of an optimizer: equal steps on other parameters, nothing shared, nothing drawn."""

import copy
import functools
import random
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from altgrad.twins.optimizer_copy import (
    CannotCopyError,
    copy_hyperparameters,
    copy_optimizer,
)
from tests.recipes.storing import Given

ALL_CLASSES = [
    each
    for each in vars(torch.optim).values()
    if isinstance(each, type) and issubclass(each, Optimizer) and each is not Optimizer
]
UNCOPYABLE = {torch.optim.LBFGS}
SPARSE = torch.optim.SparseAdam  # it takes sparse gradients alone


def parameters(count: int = 2, shape: tuple[int, ...] = (4, 3)) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 2, 12).reshape(shape) + i) for i in range(count)]


def make(kind: type[Optimizer], held: list[nn.Parameter], **options) -> Optimizer:
    return kind(held, **{"lr": 0.01, **options})


def step_both(real: Optimizer, twin: Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    groups = zip(real.param_groups, twin.param_groups, strict=True)
    pairs = [pair for a, b in groups for pair in zip(a["params"], b["params"], strict=True)]
    for _ in range(steps):
        for mine, other in pairs:
            mine.grad = torch.randn(mine.shape, generator=generator)
            if kind_is_sparse(real):
                mine.grad = mine.grad.to_sparse()
            other.grad = mine.grad.clone()
        real.step()
        twin.step()
        for mine, other in pairs:
            assert torch.equal(mine, other)


def kind_is_sparse(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, SPARSE)


def remember(optimizer: Optimizer) -> dict:
    """Return a deep copy of all that an optimizer holds, for a comparison."""
    return copy.deepcopy({**vars(optimizer), "state": [*optimizer.state.values()]})


def assert_same(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert [*one] == [*other]
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


# --- the instance


@pytest.mark.parametrize("kind", [k for k in ALL_CLASSES if k not in UNCOPYABLE])
def test_a_copy_steps_like_the_original(kind: type[Optimizer]) -> None:
    real = make(kind, parameters())
    twin = copy_optimizer(real, [(0, parameters())])
    assert type(twin) is kind
    assert not twin.state
    for mine, other in zip(real.state, twin.param_groups[0]["params"], strict=False):
        twin.state[other] = copy.deepcopy(real.state[mine])  # Adagrad has states from the start
    step_both(real, twin)


@pytest.mark.parametrize("kind", [k for k in ALL_CLASSES if k not in UNCOPYABLE])
def test_the_original_stays_as_it_is(kind: type[Optimizer]) -> None:
    real = make(kind, parameters())
    step_both(real, make(kind, parameters()), 1)
    torch.optim.lr_scheduler.StepLR(real, 1)
    hook = real.register_step_pre_hook(lambda *_: None)
    before, patched = remember(real), real.step
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    twin = copy_optimizer(real, [(0, parameters())])
    for group in twin.param_groups:
        group["lr"] = 5.0
    assert_same(remember(real), before)
    assert real.step is patched
    assert [*real._optimizer_step_pre_hooks] == [hook.id]  # torch has no public list of hooks
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert_same(np.random.get_state()[1].tolist(), states[2][1].tolist())  # noqa: NPY002


def test_groups_are_chosen_by_index_and_may_repeat() -> None:
    first, second = parameters()
    real = torch.optim.AdamW(
        [{"params": [("a", first)], "lr": 0.1}, {"params": [("b", second)], "betas": (0.5, 0.6)}]
    )
    held = [parameters(1) for _ in range(3)]
    twin = copy_optimizer(real, [*zip((1, 0, 1), held, strict=True)])
    for group, index, expected in zip(twin.param_groups, (1, 0, 1), held, strict=True):
        assert group["params"][0] is expected[0]
        original = {**real.param_groups[index]}
        assert original.pop("param_names")
        assert {**group, "params": 0} == {**original, "params": 0}
    assert twin.param_groups[0] is not twin.param_groups[2]


def test_tensors_among_the_hyperparameters_are_cloned() -> None:
    rate = torch.tensor(0.1)
    beta = torch.tensor(0.9)
    real = torch.optim.Adam(parameters(), lr=rate, foreach=False)
    real.param_groups[0]["betas"] = (beta, 0.999)
    twin = copy_optimizer(real, [(0, parameters())])
    (group,) = twin.param_groups
    assert torch.equal(group["lr"], rate)
    assert group["lr"].data_ptr() != rate.data_ptr()
    assert torch.equal(group["betas"][0], beta)
    assert group["betas"][0].data_ptr() != beta.data_ptr()
    step_both(real, twin)


def test_a_learning_rate_in_a_graph_is_copied_without_the_graph() -> None:
    raw = torch.tensor(0.1, requires_grad=True)
    real = torch.optim.SGD(parameters(), lr=0.1)
    real.param_groups[0]["lr"] = raw.exp()
    (group,) = copy_optimizer(real, [(0, parameters())]).param_groups
    assert torch.equal(group["lr"], raw.exp())
    assert not group["lr"].requires_grad


def test_hooks_and_the_step_of_a_scheduler_are_left_behind() -> None:
    real = torch.optim.SGD(parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(real, 1)
    calls = []
    real.register_step_pre_hook(lambda *_: calls.append(1))
    real.register_step_post_hook(lambda *_: calls.append(2))
    real.register_state_dict_post_hook(lambda *_: calls.append(3))
    twin = copy_optimizer(real, [(0, parameters())])
    assert "step" in vars(real)
    assert "step" not in vars(twin)
    twin.step()
    twin.state_dict()
    assert calls == []
    twin.register_step_pre_hook(lambda *_: calls.append(4))
    twin.step()
    assert calls == [4]
    real.step()
    assert calls == [4, 1, 2]


def test_what_a_scaler_sets_for_one_step_is_left_behind() -> None:
    real = torch.optim.SGD(parameters(), lr=0.1)
    real.grad_scale, real.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    twin = copy_optimizer(real, [(0, parameters())])
    assert not {"grad_scale", "found_inf"} & {*vars(twin)}


class Rounding(torch.optim.SGD):
    """An optimizer whose flag is in the instance and in no group, and whose signature differs."""

    def __init__(self, held, *, speed, halve) -> None:
        super().__init__(held, lr=speed)
        self.halve = halve
        self.history = [1]

    def step(self, closure=None) -> None:
        super().step(closure)
        self.history.append(2)
        for group in self.param_groups:
            for each in group["params"]:
                each.data.mul_(0.5 if self.halve else 1)


@pytest.mark.parametrize("halve", [True, False])
def test_flags_of_the_instance_are_kept_and_not_shared(halve: bool) -> None:
    real = Rounding(parameters(), speed=0.1, halve=halve)
    twin = copy_optimizer(real, [(0, parameters())])
    step_both(real, twin)
    twin.history.append(5)
    assert real.history == [1, 2, 2, 2]


def test_the_state_of_the_whole_optimizer_is_copied() -> None:
    real = Given(parameters())
    real.state["count"] = {"calls": [7]}
    twin = copy_optimizer(real, [(0, parameters())])
    assert twin.state == {"count": {"calls": [7]}}
    assert twin.state["count"]["calls"] is not real.state["count"]["calls"]


def test_private_generators_are_copied() -> None:
    real = Given(parameters())
    real.random = torch.Generator().manual_seed(3)
    twin = copy_optimizer(real, [(0, parameters())])
    drawn = torch.rand(2, generator=twin.random)
    assert torch.equal(drawn, torch.rand(2, generator=real.random))


def test_a_reference_to_the_optimizer_itself_becomes_one_to_the_copy() -> None:
    real = Given(parameters())
    real.me = {"inside": real}
    real.call = real.zero_grad
    twin = copy_optimizer(real, [(0, parameters())])
    assert twin.me["inside"] is twin
    assert twin.call.__self__ is twin


def test_groups_without_later_keys_are_copied_as_they_are() -> None:
    real = torch.optim.Adam(parameters(), lr=0.1)
    for key in ("fused", "decoupled_weight_decay", "maximize"):
        real.param_groups[0].pop(key, None)  # torch 2.6 has only some of them
    twin = copy_optimizer(real, [(0, parameters())])
    assert "fused" not in twin.param_groups[0]
    assert copy_optimizer(real, [(0, parameters())], fused=True).param_groups[0]["fused"]


# --- what cannot be copied


def hold(value) -> Optimizer:
    optimizer = Given(parameters())
    optimizer.thing = value(optimizer)
    return optimizer


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner) -> None:
        self.inner = inner


def close_over(value):
    return lambda: value


LEADS_TO_WEIGHTS = {
    "a list": lambda o: [o.param_groups[0]["params"][0]],
    "the groups": lambda o: o.param_groups,
    "a model": lambda o: nn.Linear(2, 2),
    "a model without the weights": lambda o: {"teacher": [nn.Linear(2, 2)]},
    "an optimizer": lambda o: torch.optim.SGD(parameters(), lr=1.0),
    "a function": lambda o: close_over(o.param_groups[0]["params"][0]),
    "a function with the optimizer": close_over,
    "a default argument": lambda o: lambda x=o.param_groups: x,
    "a partial": lambda o: functools.partial(print, o.param_groups[0]["params"][1]),
    "a method": lambda o: nn.Linear(2, 2).forward,
    "a weak reference": lambda o: weakref.ref(o.param_groups[0]["params"][0]),
    "a weak reference to the optimizer": weakref.ref,
    "slots": lambda o: Slotted(o.param_groups[0]["params"][0]),
}


@pytest.mark.parametrize("value", LEADS_TO_WEIGHTS.values(), ids=LEADS_TO_WEIGHTS)
def test_attributes_that_lead_to_a_weight_are_refused(value) -> None:
    with pytest.raises(CannotCopyError, match=r"Given\.thing leads to .*factory"):
        copy_optimizer(hold(value), [(0, parameters())])


def test_a_hyperparameter_that_leads_to_a_weight_is_refused() -> None:
    real = Given(parameters())
    real.param_groups[0]["anchor"] = real.param_groups[0]["params"][0]
    with pytest.raises(CannotCopyError, match=r"Given\.param_groups\[0\]\['anchor'\] leads to"):
        copy_optimizer(real, [(0, parameters())])


def test_a_parameter_that_is_a_plain_tensor_is_recognised() -> None:
    weight = torch.ones(3, requires_grad=True)
    real = torch.optim.SGD([weight], lr=1.0)
    real.thing = (weight,)
    with pytest.raises(CannotCopyError, match="leads to a parameter"):
        copy_optimizer(real, [(0, parameters())])


def test_lbfgs_cannot_be_copied() -> None:
    real = torch.optim.LBFGS(parameters())
    with pytest.raises(CannotCopyError, match=r"LBFGS\._params leads to a parameter"):
        copy_optimizer(real, [(0, parameters())])


def test_an_attribute_without_a_deep_copy_is_named() -> None:
    with pytest.raises(CannotCopyError, match=r"Given\.thing cannot be copied \(TypeError"):
        copy_optimizer(hold(lambda _: (i for i in "ab")), [(0, parameters())])


# --- what a copy would share


def count_in(things: list[int]):
    return lambda: things.append(1)


def count_by_itself():
    count = 0

    def count_up() -> None:
        nonlocal count
        count += 1

    return count_up


SHARES = {
    "a closure": lambda o: count_in([]),
    "a closure in a list": lambda o: [count_in([])],
    "a variable of a closure": lambda o: count_by_itself(),
    "a method of a list": lambda o: [].append,
    "a default argument": lambda o: lambda things=[]: things,
    "a tensor in a closure": lambda o: close_over(torch.ones(1)),
}


@pytest.mark.parametrize("value", SHARES.values(), ids=SHARES)
def test_a_function_that_changes_an_object_of_the_training_is_refused(value) -> None:
    with pytest.raises(CannotCopyError, match=r"Given\.thing leads to a .*keep the object in an"):
        copy_optimizer(hold(value), [(0, parameters())])


def test_hooks_of_the_optimizer_that_a_part_refers_to_do_not_matter() -> None:
    real = hold(lambda o: o.zero_grad)
    real.register_step_pre_hook(lambda *_, calls=[]: calls.append(1))
    assert copy_optimizer(real, [(0, parameters())]).thing.__self__ is not real


def schedule(optimizer: Optimizer) -> None:
    torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, rates=[1.0]: rates[0]),
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=0.1, total_steps=9, cycle_momentum=False
            ),
        ],
        milestones=[3],
    )


def scale(optimizer: Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu")
    loss = sum(p.sum() for group in optimizer.param_groups for p in group["params"])
    scaler.scale(loss).backward()
    scaler.step(optimizer)


def compile_step(optimizer: Optimizer) -> None:
    optimizer.step = torch.compile(optimizer.step)


def decorate(optimizer: Optimizer) -> None:
    optimizer.thing = torch.no_grad()(torch.nn.functional.relu)


def compile_function(optimizer: Optimizer) -> None:
    optimizer.thing = torch.compile(lambda x: x + 1)


USED = (schedule, scale, compile_step, decorate, compile_function)


@pytest.mark.parametrize("use", USED, ids=lambda use: use.__name__)
@pytest.mark.parametrize("kind", [k for k in ALL_CLASSES if k not in {*UNCOPYABLE, SPARSE}])
def test_what_torch_adds_to_an_optimizer_can_be_copied(kind: type[Optimizer], use) -> None:
    real = make(kind, parameters())
    use(real)
    assert type(copy_optimizer(real, [(0, parameters())])) is kind


# --- fused


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_a_fused_copy_runs_the_fused_implementation(kind: type[Optimizer], foreach) -> None:
    real = make(kind, parameters(), foreach=foreach)
    twin = copy_optimizer(real, [(0, parameters())], fused=True)
    step_both(make(kind, parameters(), fused=True), twin)
    assert real.param_groups[0]["fused"] is not True


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.Rprop])
def test_a_class_without_a_fused_implementation_is_refused(kind: type[Optimizer]) -> None:
    with pytest.raises(CannotCopyError, match=f"fused=True: expected .* {kind.__name__}"):
        copy_optimizer(make(kind, parameters()), [(0, parameters())], fused=True)


def test_hooks_of_a_copy_are_ordered_dicts_as_torch_makes_them() -> None:
    plain = torch.optim.SGD(parameters(), lr=0.1)
    made = vars(copy_optimizer(plain, [(0, parameters())]))
    assert {name: type(value) for name, value in made.items()} == {
        name: type(value) for name, value in vars(plain).items()
    }
    assert OrderedDict in map(type, made.values())


def test_hyperparameters_are_copied_without_the_parameters() -> None:
    rate = torch.tensor(0.1)
    first, second = parameters()
    real = torch.optim.AdamW([{"params": [first], "lr": rate}, {"params": [second], "eps": 1e-3}])
    copied = copy_hyperparameters(real, 0)
    assert copied["lr"] is not rate
    assert torch.equal(copied["lr"], rate)
    assert {**copied, "lr": 0, "params": 0} == {**real.param_groups[0], "lr": 0, "params": 0}
    assert copy_hyperparameters(real, 1)["eps"] == 1e-3
