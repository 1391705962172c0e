"""The simulated device holds real values, refuses what accelerators refuse, and counts."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.devices.simulated import (
    Limits,
    counting,
    find_limits_like_mps,
    is_on_device,
    lacking,
    make_device,
)
from tests.devices.training import make_slow_but

DEVICE = make_device()
OPTIMIZERS = torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adafactor
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8),
    *(torch.int32, torch.int64, torch.float8_e4m3fn, torch.float8_e8m0fnu),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_strides_survive_the_way_there_and_back(dtype: torch.dtype) -> None:
    values = torch.arange(12).view(3, 4).to(torch.float32).to(dtype).t()
    there = values.to(DEVICE)
    assert (there.device, there.dtype, there.stride()) == (DEVICE, dtype, values.stride())
    assert type(there) is Tensor
    assert torch.equal(there.cpu().float(), values.float())


def test_views_share_memory_and_count_writes() -> None:
    whole = torch.zeros(4, 3, device=DEVICE)
    version = whole._version  # what step hooks read: torch has no public name for it
    whole[1:3].t()[0].add_(1)
    assert whole.cpu().sum(1).tolist() == [0, 1, 1, 0]
    assert whole._version == version + 1


def test_operations_that_make_a_tensor_give_values_of_the_cpu() -> None:
    made = (
        torch.arange(5, device=DEVICE),
        torch.tensor([0.5, 2.0], device=DEVICE),
        torch.full((2,), 3.0, device=DEVICE),
        torch.arange(5, device=DEVICE) % 2 / 3,
        torch.linspace(0, 1, 4, device=DEVICE).double() * 0.1,
    )
    assert all(map(is_on_device, made))
    expected = (
        torch.arange(5),
        torch.tensor([0.5, 2.0]),
        torch.full((2,), 3.0),
        torch.arange(5) % 2 / 3,
        torch.linspace(0, 1, 4).double() * 0.1,
    )
    for one, other in zip(made, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize(
    "mix",
    [
        lambda there, here: there + here,
        lambda there, here: torch.maximum(here, there),
        lambda there, here: there[here.long()],
        lambda there, here: torch.cat([there, here]),
        lambda there, here: there.index_fill_(0, here.long(), 1.0),
        lambda there, here: torch.add(here, here, out=there),
    ],
)
def test_tensors_of_two_devices_do_not_mix(mix: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="device"):
        mix(torch.ones(3, device=DEVICE), torch.ones(3))


def test_a_number_of_the_host_mixes() -> None:
    there = torch.ones(3, device=DEVICE)
    with counting() as traffic:
        total = there * torch.tensor(2.0) + 1
    assert total.cpu().tolist() == [3, 3, 3]
    assert (traffic.to_device, traffic.to_host) == (0, 0)


def test_it_draws_from_a_generator_of_its_own() -> None:
    module, host = torch.get_device_module(DEVICE), torch.get_rng_state()
    before = module.get_rng_state(DEVICE)
    one, other = torch.randn(3, device=DEVICE), torch.empty(3, device=DEVICE).uniform_()
    assert not torch.equal(one, other)
    assert not torch.equal(module.get_rng_state(DEVICE), before)
    assert torch.equal(torch.get_rng_state(), host)
    torch.ones(3, device=DEVICE).add_(1)
    module.manual_seed_all(4)
    assert torch.equal(torch.randn(3, device=DEVICE).cpu(), _draw(4))


def _draw(seed: int) -> Tensor:
    return torch.randn(3, generator=torch.Generator("cpu").manual_seed(seed))


def test_numpy_cannot_read_it() -> None:
    with pytest.raises(TypeError, match=r"Tensor\.cpu"):
        torch.ones(3, device=DEVICE).numpy()


@pytest.mark.parametrize(
    ("move", "to_device", "to_host", "waits"),
    [
        (lambda there, _: there.cpu(), 0, 1, 0),
        (lambda there, _: there.tolist(), 0, 1, 0),
        (lambda there, here: here.copy_(there), 0, 1, 0),
        (lambda there, here: there.copy_(here), 1, 0, 0),
        (lambda _, here: here.to(DEVICE), 1, 0, 0),
        (lambda *_: torch.tensor([1.0, 2.0], device=DEVICE), 1, 0, 0),
        # torch has no public name for it, which its own optimizers call
        (lambda there, _: torch._foreach_copy_([there], [torch.ones(4)]), 1, 0, 0),
        (lambda there, _: there.sum().item(), 0, 0, 1),
        (lambda there, _: bool((there == 1).all()), 0, 0, 1),
        (lambda there, _: there.nonzero(), 0, 0, 1),
        (lambda there, _: there[there > 0], 0, 0, 1),
        (lambda there, _: there[torch.zeros(2, dtype=torch.int64, device=DEVICE)], 0, 0, 0),
        (lambda there, _: torch.equal(there, there.clone()), 0, 0, 1),
        (lambda there, _: there.mul(2).exp_().sum(), 0, 0, 0),
    ],
)
def test_copies_and_waits_are_counted(
    move: Callable[[Tensor, Tensor], object], to_device: int, to_host: int, waits: int
) -> None:
    there, here = torch.ones(4, device=DEVICE), torch.ones(4)
    with counting() as traffic:
        move(there, here)
    counted = traffic.to_device, traffic.to_host, traffic.waits.total()
    assert counted == (to_device, to_host, waits)


def test_dtypes_and_operations_can_be_forbidden() -> None:
    there, place = torch.ones(3, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with lacking(find_limits_like_mps()):
        for convert in (
            there.double,
            lambda: there.mul(torch.ones((), dtype=torch.float64).to(DEVICE)),
            lambda: torch.zeros(3, dtype=torch.float64, device=DEVICE),
            lambda: torch.ones(3, dtype=torch.float64).to(DEVICE),
        ):
            with pytest.raises(TypeError, match="float64"):
                convert()
        with pytest.raises(NotImplementedError, match="take"):
            torch.take(there, place)
        with pytest.raises(NotImplementedError, match="frexp"):
            torch.frexp(there)
        assert there.sum().item() == 3
    assert torch.take(there, place).double().item() == 1
    with (
        lacking(Limits(operations=frozenset({"aten::exp.out"}))),
        pytest.raises(NotImplementedError),
    ):
        there.exp_()


@pytest.mark.parametrize("optimizer", make_slow_but([torch.optim.AdamW], OPTIMIZERS))
def test_a_model_trains_on_it_and_can_be_copied(optimizer: type) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )
    net.to(DEVICE)
    inputs, classes = torch.randn(32, 3, 8, 8).to(DEVICE), torch.arange(32).to(DEVICE) % 5
    stepping, losses = optimizer(net.parameters(), lr=1e-2), []
    for _ in range(5):
        stepping.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs), classes)
        loss.backward()
        stepping.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(net)
    nn.init.zeros_(twin[0].weight)
    assert net[0].weight.abs().sum().item() > 0
    twin.load_state_dict({name: each.cpu() for name, each in net.state_dict().items()})
    assert torch.equal(twin[0].weight, net[0].weight)
    optimizer(twin.parameters(), lr=1e-2).load_state_dict(copy.deepcopy(stepping.state_dict()))
