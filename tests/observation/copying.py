"""Helpers that make parameters with gradients, and copy them with `Snapshots`."""

import torch
from torch import Tensor

from altgrad.observation.snapshots import Snapshot, Snapshots, read_weights_after


def with_gradient(tensor: Tensor, gradient: Tensor | None = None) -> Tensor:
    parameter = tensor.requires_grad_()
    parameter.grad = torch.randn_like(tensor).detach() if gradient is None else gradient
    return parameter


def take(snapshots: Snapshots, *parameters: Tensor, grad_scale=None, left_out=()) -> list[Snapshot]:
    named = [(f"p{number}", p, True) for number, p in enumerate(parameters)]
    return snapshots.take(named, grad_scale, left_out)


def reshape(parameter: Tensor, new: Tensor) -> None:
    parameter.grad = None
    parameter.data = new


@torch.no_grad()
def read_after(taken: Snapshot) -> Tensor:
    return read_weights_after([taken])[0]


def pointers(*taken: Snapshot) -> list[int]:
    return [tensor.data_ptr() for each in taken for tensor in (each.before, each.gradient)]


def fixed(indices: Tensor | None):
    return lambda name, parameter: indices


def changed(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter.mul_(2).add_(1)
        parameter.grad.mul_(3)
