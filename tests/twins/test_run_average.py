"""`RunAverage`: which modules are averages of the weights, and how they are updated."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from altgrad import UpdateMonitor
from altgrad.twins.run_average import RunAverage
from tests.twins.averaging import KINDS
from tests.twins.twinning import make_net


def name_parameters(net: nn.Module) -> dict[str, Tensor]:
    return dict(net.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_averaged_model(kind: str, dtype: torch.dtype) -> None:
    net = make_net(dtype)
    averaged = KINDS[kind](net)
    average = RunAverage("average", averaged, name_parameters(net))
    own = net[0].weight.detach().clone().flatten()
    for count in range(4):
        with torch.no_grad():
            for each in net.parameters():
                each.add_(torch.randn_like(each), alpha=0.1)
        averaged.update_parameters(net)
        average.step(own, net[0].weight.detach().flatten(), count)
        assert torch.equal(own, averaged.module[0].weight.detach().flatten())


@pytest.mark.parametrize("wrap", ["nothing", "a model", "compiled", "parallel", "a part"])
def test_the_layers_of_an_average_have_the_names_of_the_run(wrap: str) -> None:
    net = make_net()
    whole: nn.Module = net
    if wrap == "a part":
        whole = nn.ModuleDict({"body": net, "head": nn.Linear(10, 3)})
    averaged: nn.Module = {
        "nothing": lambda: copy.deepcopy(net),
        "a model": lambda: AveragedModel(net),
        "compiled": lambda: AveragedModel(torch.compile(net)),  # type: ignore[arg-type]
        "parallel": lambda: AveragedModel(nn.DataParallel(net)),
        "a part": lambda: AveragedModel(net),
    }[wrap]()
    found = RunAverage("average", averaged, name_parameters(whole)).find_tensors()
    prefix = "body." if wrap == "a part" else ""
    assert {*found} == {f"{prefix}{name}" for name in name_parameters(net)}
    assert {*found.values()} == {*averaged.parameters()}


def test_an_average_that_is_a_part_of_the_model_is_not_an_average_of_itself() -> None:
    model = nn.Module()
    model.net = make_net()
    model.ema = AveragedModel(model.net)
    found = RunAverage("average", model.ema, name_parameters(model)).find_tensors()
    assert {*found} == {f"net.{name}" for name in name_parameters(model.net)}


def keep_count(averaged: Tensor, weights: Tensor, _: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
    seen.append(1)
    return averaged.lerp(weights, 1 / len(seen))


class Callback:
    def average(self, averaged: Tensor, weights: Tensor, _: Tensor) -> Tensor:
        return averaged.lerp(weights, 0.1)


def make_wrong(kind: str) -> tuple[Any, dict[str, Any]]:
    net = make_net()
    arguments: dict[str, tuple[Any, dict[str, Any]]] = {
        "no module": ([*net.parameters()], {}),
        "other names": (nn.ModuleDict({"x": nn.Linear(65, 130)}), {}),
        "other shapes": (make_net(width=131), {}),
        "no parameters": (nn.ReLU(), {}),
        "a name": (copy.deepcopy(net), {"name": "ema/1"}),
        "a state": (copy.deepcopy(net), {"name": "exp_avg"}),
        "a state of BatchNorm": (copy.deepcopy(net), {"name": "running_var"}),
        "a metric": (copy.deepcopy(net), {"name": "kept_update"}),
        "a decay": (copy.deepcopy(net), {"decay": 1.1}),
        "bf16": (copy.deepcopy(net).bfloat16(), {}),
        "a function that counts": (AveragedModel(net, avg_fn=keep_count), {}),
        "a method": (AveragedModel(net, avg_fn=Callback().average), {}),
    }
    return arguments[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no module", "averaged: expected a torch.nn.Module .* got list"),
        ("other names", "averaged: expected .* names and shapes .* none fits x.weight"),
        ("other shapes", "averaged: expected .* names and shapes"),
        ("no parameters", "averaged: expected .* names and shapes"),
        ("a name", "name='ema/1': expected letters"),
        ("a state", "name='exp_avg': expected a name that no state"),
        ("a state of BatchNorm", "name='running_var': expected a"),
        ("a metric", "name='kept_update': expected a name that no state"),
        ("a decay", "decay=1.1: expected a number from 0 to 1"),
        ("bf16", "averaged=Sequential has numbers of dtype torch.bfloat16.*; pass decay="),
        ("a function that counts", "averaged=AveragedModel: .* a list through the function keep"),
        ("a method", "averaged=AveragedModel: .* a method; write a function"),
    ],
)
def test_an_argument_that_is_wrong_is_named_with_a_remedy(kind: str, message: str) -> None:
    averaged, arguments = make_wrong(kind)
    with pytest.raises((TypeError, ValueError), match=message):
        UpdateMonitor(make_net()).watch_average(averaged, **arguments)


def test_two_averages_need_two_names() -> None:
    net = make_net()
    monitor = UpdateMonitor(net).watch_average(AveragedModel(net))
    with pytest.raises(ValueError, match="name='average': expected another name"):
        monitor.watch_average(AveragedModel(net))
    monitor.watch_average(AveragedModel(net), "slow")


def test_the_functions_of_torch_keep_nothing_between_calls() -> None:
    net = make_net()
    for function in (get_ema_avg_fn(0.9), None):
        RunAverage("average", AveragedModel(net, avg_fn=function), name_parameters(net))
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    assert RunAverage("average", averaged, name_parameters(net)).counter is averaged.n_averaged


def test_a_function_that_draws_random_numbers_leaves_those_of_the_run_alone() -> None:
    def draw(averaged: Tensor, weights: Tensor, _: Tensor) -> Tensor:
        return averaged + torch.rand(averaged.shape) * (weights - averaged)

    net = make_net()
    average = RunAverage("average", AveragedModel(net, avg_fn=draw), name_parameters(net))
    before = torch.get_rng_state()
    average.step(torch.zeros(64), torch.ones(64), 1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_average_in_bf16_is_said_to_lag_behind(by_hand: bool) -> None:
    net = make_net(torch.bfloat16)
    averaged: Any = copy.deepcopy(net)
    if not by_hand:
        averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    notices: list[str] = []
    monitor = UpdateMonitor(net, formats="e4m3fn", recipes=(), warn=notices.append)
    monitor.watch_average(averaged, decay=0.999 if by_hand else None)
    [notice] = notices
    assert "lag behind: with a decay of 0.999 in 16 bits" in notice


def test_an_average_whose_notice_is_an_error_is_not_watched() -> None:
    net = make_net(torch.bfloat16)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999))

    def fail(notice: str) -> None:
        raise UserWarning(notice)

    monitor = UpdateMonitor(net, formats="e4m3fn", recipes="bf16", warn=fail)
    with pytest.raises(UserWarning, match="lag behind"):
        monitor.watch_average(averaged)
    with contextlib.suppress(UserWarning):
        monitor.watch_average(averaged)


def test_one_of_several_modules_of_the_same_shape_is_named_by_its_path() -> None:
    net = nn.ModuleDict({"first": make_net(), "second": make_net()})
    target = copy.deepcopy(net["second"])
    with pytest.raises(ValueError, match=r"first\., second\. fits .* its path as part="):
        RunAverage("ema", target, name_parameters(net))
    found = RunAverage("ema", target, name_parameters(net), part="second").find_tensors()
    assert found == {f"second.{name}": each for name, each in target.named_parameters()}
    with pytest.raises(ValueError, match="none fits"):
        RunAverage("ema", target, name_parameters(net), part="third")
    whole = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    for part, prefix in (("", ""), ("1", "1.")):
        own = copy.deepcopy(whole[1] if part else nn.Sequential(nn.Linear(4, 4)))
        tensors = RunAverage("ema", own, name_parameters(whole), part=part).find_tensors()
        assert {*tensors} == {f"{prefix}0.weight", f"{prefix}0.bias"}
    monitor = UpdateMonitor(net, formats="e4m3fn", recipes="bf16")
    monitor.watch_average(target, part="second")
