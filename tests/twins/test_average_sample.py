"""`AverageSample`: the sampled elements of an average, and the writes to it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from altgrad.twins.average_sample import AverageSample
from altgrad.twins.layer_plan import LaneKind
from altgrad.twins.layout import Bucket, Layout
from altgrad.twins.run_average import RunAverage
from altgrad.twins.sample import Sampled

KIND = LaneKind(torch.float32, torch.float32, torch.device("cpu"), 1)


def make_sample() -> tuple[AverageSample, nn.Module]:
    net = nn.ModuleDict({"a": nn.Linear(20, 10), "b": nn.Linear(3, 2)})
    averaged = copy.deepcopy(net)
    with torch.no_grad():
        for each in averaged.parameters():
            each.copy_(torch.randn(each.shape))
    sample = AverageSample(RunAverage("average", averaged, dict(net.named_parameters())), KIND)
    layers = {
        "a.weight": Sampled(net["a"].weight, net["a"].weight.shape, torch.tensor([3, 50, 199])),
        "c": Sampled(torch.zeros(4), torch.Size([4]), torch.arange(4)),
        "b.bias": Sampled(net["b"].bias, net["b"].bias.shape, torch.arange(2)),
    }
    sample.rearrange(layers, Layout((Bucket(0, {"a.weight": 3, "c": 4, "b.bias": 2}),)))
    return sample, averaged


def test_the_average_is_gathered_at_the_samples_and_nan_elsewhere() -> None:
    sample, averaged = make_sample()
    values = sample.gather()
    assert len(values) == 64
    assert torch.equal(values[:3], averaged["a"].weight.detach().flatten()[[3, 50, 199]])
    assert torch.equal(values[7:9], averaged["b"].bias.detach())
    assert values[3:7].isnan().all()
    assert values[9:].isnan().all()
    assert [*sample.tensors] == ["a.weight", "b.bias"]


@pytest.mark.parametrize("act", ["add", "replace", "read"])
def test_writes_are_counted_once(act: str) -> None:
    sample, averaged = make_sample()
    assert not sample.take_writes()
    with torch.no_grad():
        if act == "add":
            averaged["b"].bias.add_(1)
        elif act == "replace":
            averaged["b"].bias.data = torch.zeros(2)
        else:
            averaged["b"].bias.add(1)
    assert sample.take_writes() is (act != "read")
    assert not sample.take_writes()
