"""`find_factors` says what a real step of each optimizer of torch leaves as it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from altgrad import WeightStorage
from altgrad.monitor.optimizer_factors import Factor, can_move_weights, find_factors

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
DTYPES = [*MANTISSA_BITS]
WAYS = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]
"""Options of an optimizer. The first is the default, which on a CPU is a for-loop."""
MULTIPLES = (0.5, 0.99, 1.01, 1.5, 1.95, 2.05, 4.0)
"""Changes at a step, as multiples of the lower bound 2**-(mantissa bits + 2)."""

DECAYING = ["AdamW", "Adafactor", "Muon"]
SWITCHED = ["Adam", "NAdam", "RAdam"]
BY_GRADIENT = ["Adam", "NAdam", "RAdam", "SGD", "Adamax", "Adagrad", "RMSprop", "Adadelta"]
AVERAGES = [
    *((kind, "exp_avg", "beta1") for kind in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax")),
    *((kind, "exp_avg_sq", "beta2") for kind in ("Adam", "AdamW", "NAdam", "RAdam")),
    ("Adamax", "exp_inf", "beta2"),
    ("Adadelta", "square_avg", "rho"),
    ("Adadelta", "acc_delta", "rho"),
    ("RMSprop", "square_avg", "alpha"),
    ("RMSprop", "momentum_buffer", "momentum"),
    ("SGD", "momentum_buffer", "momentum"),
    ("Muon", "momentum_buffer", "momentum"),
]


def all_mantissas(dtype: torch.dtype) -> Tensor:
    """Return every number of a dtype from 1 up to, and without, 2, as a matrix."""
    bits = MANTISSA_BITS[dtype]
    return (1 + torch.arange(2**bits) / 2**bits).to(dtype).view(8, -1)


def make(kind: str, weight: nn.Parameter, **options: object) -> Optimizer:
    """Return an optimizer of a class of torch, or skip if it has none of the ways to step."""
    made = getattr(torch.optim, kind, None)
    if made is None:
        pytest.skip(f"this torch has no {kind}")
    known = inspect.signature(made).parameters
    if missing := [name for name in options if name not in known]:
        pytest.skip(f"{kind} has no {missing}")
    if "eps" in known and kind not in ("Adafactor", "Muon"):
        options["eps"] = 1e-3  # the default is 0 in float16
    return made([weight], **options)


def find(optimizer: Optimizer, state: str | None = None) -> list[Factor]:
    names = {p: "layer" for group in optimizer.param_groups for p in group["params"]}
    return [factor for factor in find_factors(optimizer, names) if factor.state == state]


def step_without_gradients(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def describe_moved(before: Tensor, after: Tensor) -> str | None:
    """Return how many numbers stayed: ``"all"``, ``"some"``, or None."""
    moved = float((before != after).double().mean())
    return {0.0: "all", 1.0: None}.get(moved, "some")


def decay_once(optimizer: Optimizer) -> str | None:
    (weight,) = optimizer.param_groups[0]["params"]
    before = weight.detach().clone()
    step_without_gradients(optimizer)
    return describe_moved(before, weight.detach())


def list_decays(dtype: torch.dtype) -> list[float]:
    return [multiple * 2.0 ** -(MANTISSA_BITS[dtype] + 2) for multiple in MULTIPLES]


@pytest.mark.parametrize("way", WAYS[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*DECAYING, *SWITCHED])
def test_a_decay_leaves_the_weights_that_it_is_said_to(
    kind: str, dtype: torch.dtype, way: dict[str, bool]
) -> None:
    switch = {"decoupled_weight_decay": True} if kind in SWITCHED else {}
    for decay in list_decays(dtype):
        weight = nn.Parameter(all_mantissas(dtype))
        optimizer = make(kind, weight, lr=1.0, weight_decay=decay, **switch, **way)
        [factor] = find(optimizer)
        assert factor.change == decay
        assert factor.unchanged == decay_once(optimizer), decay


@pytest.mark.parametrize("kind", BY_GRADIENT)
def test_a_decay_that_is_added_to_the_gradient_has_no_factor(kind: str) -> None:
    weight = nn.Parameter(all_mantissas(torch.bfloat16))
    assert find(make(kind, weight, lr=1.0, weight_decay=1e-5)) == []


def test_a_fused_decay_is_rounded_with_the_update_and_has_no_factor() -> None:
    weight = nn.Parameter(all_mantissas(torch.bfloat16))
    assert find(make("AdamW", weight, lr=1e-2, weight_decay=0.1, fused=True)) == []


@pytest.mark.parametrize("rate", [1.0, torch.tensor(1.0)], ids=["number", "tensor"])
def test_a_learning_rate_may_be_a_tensor(rate: float | Tensor) -> None:
    weight = nn.Parameter(all_mantissas(torch.bfloat16))
    optimizer = make("AdamW", weight, lr=rate, weight_decay=1.5 * 2.0**-9)
    assert [factor.unchanged for factor in find(optimizer)] == [decay_once(optimizer)] == ["some"]


def warm_up(optimizer: Optimizer) -> None:
    lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=9)


def cycle(optimizer: Optimizer) -> None:
    lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=9)


def cool_down(optimizer: Optimizer) -> None:
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    schedule.step()


@pytest.mark.parametrize("schedule", [warm_up, cycle, cool_down])
def test_the_learning_rate_is_the_highest_that_a_schedule_has_kept(schedule) -> None:
    weight = nn.Parameter(all_mantissas(torch.bfloat16))
    optimizer = make("AdamW", weight, lr=1e-2, weight_decay=0.1)
    schedule(optimizer)
    assert optimizer.param_groups[0]["lr"] < 1e-2
    [factor] = find(optimizer)
    assert factor.change == pytest.approx(1e-3)
    assert factor.setting == "lr=0.01 and weight_decay=0.1"


def list_betas(dtype: torch.dtype) -> Iterator[float]:
    for decay in list_decays(dtype):
        yield 1 - decay


def choose_beta(option: str, beta: float) -> dict[str, object]:
    if option in ("beta1", "beta2"):
        return {"betas": (beta, 0.9) if option == "beta1" else (0.9, beta)}
    return {option: beta}


def list_steps() -> Iterator[tuple[str, str, str, dict[str, bool]]]:
    """Yield each average with each way in which its optimizer steps it."""
    for kind, state, option in AVERAGES:
        ways = WAYS[:1] if kind == "Muon" else WAYS if kind in ("Adam", "AdamW") else WAYS[:3]
        yield from ((kind, state, option, way) for way in ways)


def fall_once(optimizer: Optimizer, state: str, numbers: Tensor) -> str | None:
    """Step twice, with a state of given numbers before the second step, without gradients."""
    step_without_gradients(optimizer)
    [states] = optimizer.state.values()
    states[state].copy_(numbers)
    step_without_gradients(optimizer)
    return describe_moved(numbers, states[state])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "state", "option", "way"), [*list_steps()])
def test_a_state_falls_or_not_as_it_is_said_to(
    kind: str, state: str, option: str, way: dict[str, bool], dtype: torch.dtype
) -> None:
    for beta in list_betas(dtype):
        weight = nn.Parameter(torch.ones_like(all_mantissas(dtype)))
        optimizer = make(kind, weight, lr=0.0, **choose_beta(option, beta), **way)
        [factor] = find(optimizer, state)
        assert factor.unchanged == fall_once(optimizer, state, all_mantissas(dtype)), beta


def test_a_fused_sgd_has_no_factor() -> None:
    weight = nn.Parameter(all_mantissas(torch.bfloat16))
    optimizer = make("SGD", weight, lr=0.1, momentum=0.999, fused=True)
    assert find(optimizer, "momentum_buffer") == []


@pytest.mark.parametrize(
    ("format", "beta"),
    [("bf16", 0.999), ("bf16", 0.997), ("bf16", 0.99), ("fp16", 0.9999), ("e4m3fn", 0.95)],
)
@pytest.mark.parametrize("states", ["exp_avg_sq", "*"])
def test_a_stored_state_falls_or_not_as_it_is_said_to(
    format: str, beta: float, states: str
) -> None:
    weight = nn.Parameter(torch.ones(1024))
    optimizer = make("Adam", weight, lr=0.0, betas=(0.5, beta))
    storage = WeightStorage(None, scaling=None, states={states: format})
    with storage.attach(optimizer):
        [factor] = find(optimizer, "exp_avg_sq")
        assert factor.format.name == format
        bits = factor.format.mantissa_bits
        numbers = (1 + torch.arange(1024) % 2**bits / 2**bits).float()
        assert factor.unchanged == fall_once(optimizer, "exp_avg_sq", numbers)
    assert find(optimizer, "exp_avg_sq") == []


def test_a_state_that_is_stored_at_random_has_no_factor() -> None:
    optimizer = make("Adam", nn.Parameter(torch.ones(8)))
    with WeightStorage(None, rounding="stochastic", states={"*": "bf16"}).attach(optimizer):
        assert find(optimizer, "exp_avg_sq") == []


def test_a_state_has_the_coarser_of_its_dtype_and_its_storage() -> None:
    optimizer = make("Adam", nn.Parameter(torch.ones(8, dtype=torch.bfloat16)))
    with WeightStorage(None, states={"exp_avg_sq": "e5m2"}).attach(optimizer):
        assert [f.format.name for f in find(optimizer, "exp_avg_sq")] == ["e5m2"]
        assert [f.format.name for f in find(optimizer, "exp_avg")] == ["bf16"]


def test_states_in_float32_beside_weights_in_16_bits_have_no_factor() -> None:
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = make("Adam", weight)
    assert len(find(optimizer, "exp_avg_sq")) == 1
    optimizer.state[weight] = {"exp_avg_sq": torch.ones(8)}
    assert find(optimizer, "exp_avg_sq") == []


class Renamed(torch.optim.AdamW):
    """A class with the step of AdamW."""


class Other(torch.optim.AdamW):
    """A class with a step of its own."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_class_with_the_step_of_torch_has_the_factors_of_torch() -> None:
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    assert [factor.optimizer for factor in find(Renamed([weight]))] == ["AdamW"]
    assert find(Other([weight])) == []


def test_parameters_in_float32_or_without_a_name_have_no_factor() -> None:
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    assert [*find_factors(torch.optim.AdamW([weight]), {})] == []
    assert find(torch.optim.AdamW([nn.Parameter(torch.ones(8))])) == []


@pytest.mark.parametrize("rate", [0, 0.0, torch.tensor(0.0)], ids=repr)
def test_a_group_whose_learning_rates_are_all_0_moves_no_weights(rate: float | Tensor) -> None:
    assert not can_move_weights({"lr": rate, "initial_lr": 0.0})
    assert can_move_weights({"lr": rate, "initial_lr": 0.1})
    assert can_move_weights({"lr": rate, "max_lr": 0.1})


@pytest.mark.parametrize(
    "group", [{}, {"lr": None}, {"lr": "auto"}, {"lr": torch.zeros((), device="meta")}], ids=repr
)
def test_a_group_whose_learning_rate_is_not_known_on_the_host_may_move_weights(group) -> None:
    assert can_move_weights(group)
