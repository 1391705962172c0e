"""Models that several ranks shard, and the whole tensors of each of their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from altgrad import StepRecord, UpdateMonitor

WholeStep = dict[str, tuple[Tensor, Tensor, Tensor]]
"""The weights before and after the step, and the gradient, of each layer."""


class Net(nn.Module):
    """A model with odd layers.

    It has large and small layers, a bias with 5 elements and one with a single element, NaN and inf
    in a row that is never used, and a layer that is never used.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(12, 64)
        with torch.no_grad():
            self.rows.weight[7, 3:9] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1, 0, 2])
        self.up = nn.Linear(64, width)
        self.down = nn.Linear(width, 64)
        self.norm = nn.LayerNorm(64)
        self.five = nn.Linear(64, 5)
        self.head = nn.Linear(5, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.down(torch.relu(self.up(self.rows(rows))))
        return self.head(self.five(self.norm(hidden))).square().mean()


def fsdp(size: int) -> nn.Module:
    net = Net()
    mesh = init_device_mesh("cpu", (size,))
    for layer in (net.up, net.five):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def fsdp_by_columns(size: int) -> nn.Module:
    net = Net()
    by_columns = {net.up.weight, net.down.weight}
    return fully_shard(
        net,
        mesh=init_device_mesh("cpu", (size,)),
        shard_placement_fn=lambda p: Shard(1) if p in by_columns else None,
    )


def hsdp(size: int) -> nn.Module:
    net, mesh = Net(), init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "shards"))
    fully_shard(net.down, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def tensor_parallel(size: int) -> nn.Module:
    """Return a model with two sharded layers; every rank holds replicas of the others."""
    return parallelize_module(Net(), init_device_mesh("cpu", (size,)), _PLAN)


def fsdp_and_tensor_parallel(size: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
    net = parallelize_module(Net(), mesh["tensor"], _PLAN)
    return fully_shard(net, mesh=mesh["data"])


_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def strategies(size: int) -> list[Callable[[int], nn.Module]]:
    """Return the strategies that this number of ranks allows."""
    each = [fsdp]
    if size in (2, 4):
        each += [fsdp_by_columns, hsdp, tensor_parallel]
    if size == 3:
        each += [tensor_parallel]
    if size == 4:
        each += [fsdp_and_tensor_parallel]
    return each


def whole(tensor: Any) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


class WholeSteps:
    """A recorder of the whole tensors in each step of an optimizer.

    If a step calls ``super().step()``, torch may call the hooks twice: it counts as one step.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.steps: list[WholeStep] = []
        self._module = module
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._depth = 0
        if optimizer is not None:
            optimizer.register_step_pre_hook(self.before)
            optimizer.register_step_post_hook(self.after)

    def before(self, *_: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._before = {
            name: (whole(p), whole(p.grad))
            for name, p in self._module.named_parameters()
            if p.grad is not None
        }

    def after(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        after = {n: whole(p) for n, p in self._module.named_parameters() if n in self._before}
        self.steps.append({n: (b, after[n], g) for n, (b, g) in self._before.items()})


class Replay(torch.optim.Optimizer):
    """An optimizer that repeats recorded steps."""

    def __init__(self, parameters: dict[str, nn.Parameter], steps: list[WholeStep]) -> None:
        super().__init__(parameters.values(), {})
        self._parameters, self._steps = parameters, iter(steps)

    def set_gradients(self) -> None:
        self.current = next(self._steps)
        for name, parameter in self._parameters.items():
            parameter.grad = None
            if name in self.current:
                before, _, gradient = self.current[name]
                parameter.data.copy_(before)
                parameter.grad = gradient.clone()

    def step(self, closure: Any = None) -> None:
        for name, (_, after, _) in self.current.items():
            self._parameters[name].data.copy_(after)


def replayed(
    steps: list[WholeStep],
    state: Any = None,
    parameters: dict[str, nn.Parameter] | None = None,
    **settings: Any,
) -> UpdateMonitor:
    """Return a monitor that has observed the recorded steps in one process."""
    records: list[StepRecord] = []
    parameters = parameters or dict(Net().named_parameters())
    optimizer = Replay(parameters, steps)
    monitor = UpdateMonitor([*parameters.items()], records.append, strict=True, **settings)
    if state is not None:
        monitor.load_state_dict(state)
    with monitor.attach(optimizer):
        for _ in steps:
            optimizer.set_gradients()
            optimizer.step()
        monitor.final_state = monitor.state_dict()
    monitor.records = records
    return monitor
