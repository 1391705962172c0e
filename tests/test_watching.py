"""What a run file's header says of a monitor, and where weights lie by magnitude."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from altgrad import SamplingRule, UpdateMonitor
from altgrad.monitor.weight_octaves import weight_octaves
from altgrad.report import Header


def test_the_header_says_what_is_measured_of_each_layer() -> None:
    parameters = {
        "large": nn.Parameter(torch.ones(100, 50)),
        "whole": nn.Parameter(torch.ones(7, dtype=torch.bfloat16)),
        "rare": nn.Parameter(torch.ones(())),
        "left.out": nn.Parameter(torch.ones(3)),
        "frozen": nn.Parameter(torch.ones(3), requires_grad=False),
    }
    rules = [
        SamplingRule("left.*", enabled=False),
        SamplingRule("rare", every_n_steps=5, formats=["fp16"]),
    ]
    monitor = UpdateMonitor(
        [*parameters.items()],
        formats=["bf16", "mxfp4"],
        scaling="channel",
        max_elements=100,
        sampling=rules,
    )
    header = Header.from_json(monitor.run_header())
    assert {name: each.scaled for name, each in header.formats.items()} == {
        "bf16": False,
        "mxfp4": True,
        "fp16": False,
    }
    assert header.scaling == "channel"
    assert [*header.layers] == ["large", "whole", "rare"]
    large, whole, rare = header.layers.values()
    assert (large.shape, large.dtype, large.formats) == ((100, 50), "float32", ("bf16", "mxfp4"))
    assert 64 <= large.elements <= 100  # whole blocks
    assert large.elements == monitor.elements_of("large")
    assert (whole.shape, whole.dtype, whole.elements) == ((7,), "bfloat16", 7)
    assert (rare.shape, rare.elements, rare.every_n_steps, rare.formats) == ((), 1, 5, ("fp16",))


def test_a_header_counts_what_a_step_measures() -> None:
    parameter = nn.Parameter(torch.randn(5000))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with UpdateMonitor([("w", parameter)], max_elements=300).attach(optimizer) as monitor:
        parameter.grad = torch.ones(5000)
        optimizer.step()
    layer = monitor.run_header()["layers"]["w"]
    assert layer["elements"] == monitor.latest.layers["w"].elements == 300


def test_octaves_of_weights_are_those_of_numpy() -> None:
    torch.manual_seed(0)
    weights = torch.randn(900) * 2.0 ** torch.randint(-8, 4, (900,))
    weights[:5] = torch.tensor([0.0, torch.nan, torch.inf, 1.0, -0.5])
    histogram = weight_octaves({"a": weights, "b": torch.tensor([2.0, 3.0]).half()})
    finite = [abs(x) for x in weights.tolist() if math.isfinite(x) and x] + [2.0, 3.0]
    edges = 2.0 ** (histogram.first + np.arange(len(histogram.counts) + 1))
    assert histogram.counts == np.histogram(finite, edges)[0].tolist()
    assert sum(histogram.counts) == 899


def test_octaves_of_a_sample_stand_for_all() -> None:
    torch.manual_seed(0)
    large = torch.full((30, 1000), 0.75)
    large[:10] = 3.0
    counts = weight_octaves({"large": large, "none": torch.ones(0)}).counts
    assert sum(counts) == pytest.approx(30_000)
    assert counts[64 + 1] == pytest.approx(10_000, rel=0.2)  # 2 to 4


def test_octaves_beyond_the_ends_are_in_the_last_bins() -> None:
    tiny = torch.tensor([2.0**-149, 2.0**127])
    histogram = weight_octaves({"w": tiny})
    assert histogram.counts[0] == histogram.counts[-1] == 1
    assert sum(weight_octaves({}).counts) == 0
