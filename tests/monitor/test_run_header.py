"""`write_header`: the header of a run that is observed, as the report reads it."""

import torch
from torch import nn

from altgrad import SamplingRule, UpdateMonitor
from altgrad.report import Header
from tests.counting import instructions


def test_a_header_describes_the_recipes_of_the_twins() -> None:
    layer = [("w", nn.Parameter(torch.ones(3)))]
    header = Header.from_json(UpdateMonitor(layer, recipes=["fp32", "bf16-true"]).run_header())
    assert [*header.recipes] == ["fp32", "bf16-true"]
    fp32, true = header.recipes.values()
    assert (fp32.weights, fp32.states, fp32.dtype, fp32.optimizer) == (None, {}, None, None)
    assert (true.name, true.dtype, true.fused) == ("bf16-true", "bfloat16", False)
    assert Header.from_json(UpdateMonitor(layer, recipes=()).run_header()).recipes == {}


def test_the_header_describes_each_layer() -> None:
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
    assert large.elements == monitor.count_elements("large")
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


def test_a_header_has_layers_that_were_observed_and_are_frozen_now() -> None:
    """In an alternating GAN, a layer is frozen while the other network is trained."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with UpdateMonitor(model, strict=True).attach(optimizer) as monitor:
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        model.requires_grad_(False)
    assert [*monitor.run_header()["layers"]] == ["weight", "bias"]


def test_the_header_is_made_in_time_linear_in_the_number_of_layers() -> None:
    def describe(count: int) -> int:
        parameters = [(f"p{k}", nn.Parameter(torch.ones(4))) for k in range(count)]
        return instructions(UpdateMonitor(parameters).run_header)

    assert describe(200) < 4.1 * describe(50)
