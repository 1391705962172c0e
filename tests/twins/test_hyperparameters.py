"""Changes of hyperparameters: those from outside are found, those of the step itself are not."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from altgrad.twins.hyperparameters import HyperparameterFollower, apply_changes
from altgrad.twins.optimizer_copy import copy_optimizer


def parameters(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)) for _ in range(count)]


def make(**options) -> Optimizer:
    first, second = parameters(2)
    return torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": [second]}], **options)


def step(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for each in group["params"]:
            each.grad = torch.ones_like(each)
    optimizer.step()


def test_without_a_change_nothing_is_found() -> None:
    optimizer = make(lr=torch.tensor(0.01))
    optimizer.param_groups[1]["nan"] = float("nan")
    follower = HyperparameterFollower(optimizer)
    for _ in range(3):
        step(optimizer)
        follower.remember()
        assert follower.find_changes() == {}


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_a_schedule_is_found_at_every_step(lr) -> None:
    optimizer = make(lr=lr)
    follower = HyperparameterFollower(optimizer)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert {*follower.find_changes()[1]} <= {"initial_lr", "lr"}  # tensors are filled anew
    for count in (1, 2):
        follower.remember()
        step(optimizer)
        schedule.step()
        found = follower.find_changes()
        assert found == {0: {"lr": 0.1 * 0.5**count}, 1: {"lr": pytest.approx(0.01 * 0.5**count)}}


CHANGES = {
    "a number": lambda group: group.update(lr=0.5),
    "a number instead of None": lambda group: group.update(foreach=1),
    "a tensor instead of a number": lambda group: group.update(lr=torch.tensor(0.1)),
    "another tensor of the same value": lambda group: group.update(tensor=torch.ones(())),
    "a tensor in place": lambda group: group["tensor"].mul_(1),
    "a tensor in a tuple": lambda group: group["pair"][0].add_(1),
    "another tensor in a tuple": lambda group: group.update(pair=(torch.ones(2), 2)),
    "a list in place": lambda group: group["list"].append(1),
    "a list in a dict": lambda group: group["dict"]["inside"].append(1),
    "a key in a dict": lambda group: group["dict"].update(more=1),
    "a new key": lambda group: group.update(more=1),
    "another object": lambda group: group.update(object=object()),
    "a tuple instead of a list": lambda group: group.update(list=(0,)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_found_in_its_group_and_key_alone(change) -> None:
    optimizer = make()
    group = optimizer.param_groups[1]
    group.update(tensor=torch.ones(()), pair=(torch.ones(2), 2), list=[0], dict={"inside": [0]})
    group["object"] = object()
    follower = HyperparameterFollower(optimizer)
    assert follower.find_changes() == {}
    before = {key: id(value) for key, value in group.items()}
    change(group)
    found = follower.find_changes()
    assert [*found] == [1]
    (key,) = found[1]
    changed = {name for name, value in group.items() if before.get(name) != id(value)}
    assert changed <= {key}
    follower.remember()
    assert follower.find_changes() == {}


def test_a_new_tensor_at_the_address_of_the_last_is_found() -> None:
    optimizer = make()
    follower = HyperparameterFollower(optimizer)
    for _ in range(20):
        optimizer.param_groups[0]["lr"] = None
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        assert [*follower.find_changes()] == [0]
        follower.remember()


def test_a_tensor_whose_writes_torch_does_not_count_is_always_copied() -> None:
    optimizer = make()
    with torch.inference_mode():
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    follower = HyperparameterFollower(optimizer)
    assert [*follower.find_changes()] == [0]


def test_what_the_step_itself_changes_is_not_found() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure=None) -> None:
            super().step(closure)
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                group.setdefault("d", torch.ones(())).mul_(2)

    optimizer = Counting(parameters(), lr=0.1)
    follower = HyperparameterFollower(optimizer)
    for _ in range(3):
        step(optimizer)
        follower.remember()
        assert follower.find_changes() == {}
    optimizer.param_groups[0]["k"] = 0
    assert follower.find_changes() == {0: {"k": 0}}


def test_a_change_holds_the_values_before_the_next_step() -> None:
    optimizer = make()
    follower = HyperparameterFollower(optimizer)
    group = optimizer.param_groups[0]
    group.update(d=torch.ones(2), list=[1])
    found = follower.find_changes()
    group["d"].mul_(5)
    group["list"].append(2)
    assert found[0]["d"].tolist() == [1, 1]
    assert found[0]["list"] == [1]


def test_a_group_that_is_added_later_has_all_its_keys() -> None:
    optimizer = make()
    follower = HyperparameterFollower(optimizer)
    optimizer.add_param_group({"params": parameters(), "lr": 7.0})
    ((number, keys),) = follower.find_changes().items()
    assert number == 2
    assert {**keys, "params": 0} == {**optimizer.param_groups[2], "params": 0}
    follower.remember()
    assert follower.find_changes() == {}


def test_a_twin_gets_the_changes_of_its_own_groups() -> None:
    optimizer = make()
    follower = HyperparameterFollower(optimizer)
    twin = copy_optimizer(optimizer, [(1, parameters()), (0, parameters())])
    optimizer.param_groups[0]["lr"] = 3.0
    optimizer.param_groups[1]["betas"] = [0.5, 0.6]
    apply_changes(follower.find_changes(), twin, [1, 0])
    assert [group["lr"] for group in twin.param_groups] == [0.001, 3.0]
    assert twin.param_groups[0]["betas"] == [0.5, 0.6]
    assert twin.param_groups[0]["betas"] is not optimizer.param_groups[1]["betas"]
    assert twin.param_groups[1]["betas"] == (0.9, 0.999)


def test_a_twin_with_fewer_groups_leaves_the_others() -> None:
    optimizer = make()
    follower = HyperparameterFollower(optimizer)
    twin = copy_optimizer(optimizer, [(1, parameters())])
    optimizer.param_groups[0]["lr"] = 3.0
    apply_changes(follower.find_changes(), twin, [1])
    assert twin.param_groups[0]["lr"] == 0.001


def test_a_learning_rate_tensor_is_filled_in_place() -> None:
    optimizer = make(lr=torch.tensor(0.01))
    twins = [copy_optimizer(optimizer, [(1, parameters())]) for _ in range(2)]
    rates = [twin.param_groups[0]["lr"] for twin in twins]
    follower = HyperparameterFollower(optimizer)
    optimizer.param_groups[1]["lr"].fill_(0.5)
    found = follower.find_changes()
    for twin, rate in zip(twins, rates, strict=True):
        apply_changes(found, twin, [1])
        assert twin.param_groups[0]["lr"] is rate
        assert rate.item() == 0.5


def test_two_twins_share_no_new_tensor() -> None:
    optimizer = make()
    follower = HyperparameterFollower(optimizer)
    twins = [copy_optimizer(optimizer, [(0, parameters())]) for _ in range(2)]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    found = follower.find_changes()
    for twin in twins:
        apply_changes(found, twin, [0])
    addresses = {twin.param_groups[0]["lr"].data_ptr() for twin in twins}
    assert len(addresses | {optimizer.param_groups[0]["lr"].data_ptr()}) == 3


def test_the_optimizer_is_not_kept_alive() -> None:
    optimizer = make()
    follower = HyperparameterFollower(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    del follower
