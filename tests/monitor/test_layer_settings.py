"""`LayerSettings`: rules and arguments of a monitor give the settings of each layer."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from altgrad import SamplingRule, UpdateMonitor, measure
from altgrad.monitor.elements import sample_elements
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.format_set import FormatSet
from tests.monitor.watching import (
    FORMATS,
    net,
    train,
    watched,
)


def settings(
    *rules: SamplingRule, names: Any = ("a.weight", "a.bias"), **own: Any
) -> LayerSettings:
    formats = get_formats(own.pop("formats", ("bf16", "e4m3fn")))
    rule_settings = [format for rule in rules for format in get_formats(rule.formats or ())]
    options = {"every_n_steps": 1, "max_elements": 100, "seed": 0} | own
    return LayerSettings(names, rules, FormatSet([*formats, *rule_settings]), formats, **options)


def test_spellings_of_formats_become_canonical_names() -> None:
    rule = SamplingRule("*.bias", formats=["half", "mxfp8", "e4m3fn"])
    found = settings(rule, formats=["bfloat16", torch.float8_e4m3fn]).by_name
    assert found["a.weight"].formats == ("bf16", "e4m3fn")
    assert found["a.bias"].formats == ("fp16", "mxfp8_e4m3", "e4m3fn")


def test_layers_added_later_get_the_first_matching_rule() -> None:
    first, second = SamplingRule("*.bias", every_n_steps=3), SamplingRule("*", max_elements="all")
    found = settings(first, second)
    assert found.get("late.bias").every_n_steps == 3
    assert found.get("late.weight").max_elements is None
    assert [*found.by_name] == ["a.weight", "a.bias", "late.bias", "late.weight"]
    assert settings().get("late").rule is None


def test_a_layer_left_out_is_no_longer_measured() -> None:
    found, weight = settings(), torch.ones(3)
    assert found.is_measured("a.bias", weight)
    found.leave_out(["a.bias"])
    assert not found.is_measured("a.bias", weight)
    assert not found.is_due("a.bias", 1, 1)
    assert found.is_measured("a.weight", weight)
    assert found.get("a.bias").formats == ("bf16", "e4m3fn")  # nothing else has changed


def test_formats_left_out_of_one_layer_stay_in_others() -> None:
    found = settings(formats=("bf16", "e4m3fn", "e5m2"))
    found.leave_out_formats("a.weight", ["e4m3fn", "fp16"])
    found.leave_out_formats("late", ["bf16", "e4m3fn", "e5m2"])
    assert found.get("a.weight").formats == ("bf16", "e5m2")
    assert found.get("a.bias").formats == ("bf16", "e4m3fn", "e5m2")
    assert found.get("late").formats == ()
    assert found.get("late").enabled


def test_enabled_layers_with_a_measured_dtype_are_measured() -> None:
    parameters = {
        "weight": nn.Parameter(torch.ones(3)),
        "half": nn.Parameter(torch.ones(3).half()),
        "off": nn.Parameter(torch.ones(3)),
        "frozen": nn.Parameter(torch.ones(3), requires_grad=False),
        "complex": nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        "int": nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False),
        "lazy": nn.UninitializedParameter(),
    }
    found = settings(SamplingRule("off", enabled=False), names=[*parameters])
    # Some optimizers step parameters that require no gradient.
    measured = [name for name, each in parameters.items() if found.is_measured(name, each)]
    assert measured == ["weight", "half", "frozen"]


def test_a_layer_is_due_an_interval_after_it_was_last_observed() -> None:
    rules = [SamplingRule("rare", every_n_steps=3), SamplingRule("off", enabled=False)]
    found = settings(*rules, names=["rare", "off", "usual"], every_n_steps=2)

    def due(name: str, last: int) -> list[int]:
        return [index for index in range(10) if found.is_due(name, index, last)]

    assert due("rare", 4) == [0, 1, 2, 3, 4, 7, 8, 9]  # below 4, steps were counted from 0 again
    assert due("usual", 4) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert due("off", 4) == []


def test_samples_depend_on_the_name_and_the_seed() -> None:
    shape = torch.Size((100, 40))
    rule = SamplingRule("all", max_elements="all")
    found = settings(rule, names=["all", "w"], formats=("bf16", "mxfp4"), seed=7)
    expected = sample_elements("w", shape, 100, seed=7, block=32)
    assert torch.equal(found.indices("w", shape), expected)
    assert torch.equal(found.measured_indices("w", shape), expected)
    assert found.indices("all", shape) is None
    assert found.seed == 7


def test_blocks_are_drawn_in_layers_that_a_block_format_judges() -> None:
    rule = SamplingRule("*.bias", formats=["bf16"])
    found = settings(rule, names=["a.bias", "w"], formats=("bf16", "mxfp4"))
    shape = torch.Size((100, 40))
    assert (found.block("a.bias"), found.block("w"), found.block("late.bias")) == (1, 32, 1)
    assert torch.equal(found.indices("a.bias", shape), sample_elements("a.bias", shape, 100))
    found.leave_out_formats("w", found.get("w").formats)  # as is found when the monitor is attached
    assert found.block("w") == 32
    assert found.describe_samples() == {"version": 1, "seed": 0, "blocks": {"w": 32}}


def test_layers_with_other_samples_are_found() -> None:
    names = ["w", "v"]
    rule = SamplingRule("v", formats=["bf16"])
    one = settings(names=names, formats=("bf16", "mxfp4"))
    other = settings(rule, names=names, formats=("bf16", "mxfp4"))
    assert one.find_other_samples(names, one.describe_samples()) == []
    assert one.find_other_samples(names, other.describe_samples()) == ["v"]
    assert one.find_other_samples(["w"], other.describe_samples()) == []
    assert one.find_other_samples(names, one.describe_samples() | {"seed": 1}) == names
    assert one.find_other_samples(names, one.describe_samples() | {"version": 2}) == names
    assert one.find_other_samples(names, {"version": 1}) == names
    # Version 0.1.0 drew blocks in all layers, and stated nothing.
    assert one.find_other_samples(names, None) == []
    assert other.find_other_samples(names, None) == ["v"]


def test_small_layers_are_measured_whole() -> None:
    found = settings()
    assert found.measured_indices("w", torch.Size((2048,))) is None
    assert len(found.indices("w", torch.Size((2048,)))) == 100
    assert len(found.measured_indices("w", torch.Size((2049,)))) == 100


def test_a_rule_that_matches_no_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layers='b\.\*' matches none of 2 layers"):
        settings(SamplingRule("b.*"))


# --- in a monitor


def test_rules_set_formats_and_intervals_and_disable_layers() -> None:
    model = net()
    rules = [
        SamplingRule("0.*", enabled=False),
        SamplingRule("*.bias", every_n_steps=3, formats=("e5m2",)),
        SamplingRule("3.weight", max_elements=100),
    ]
    optimizer, monitor, records = watched(model, sampling=rules, scaling=None)
    train(model, optimizer, 7)
    biases = [{name for name in record.layers if name.endswith("bias")} for record in records]
    assert [bool(each) for each in biases] == [True, False, False, True, False, False, True]
    assert all(not name.startswith("0.") for record in records for name in record.layers)
    layers = records[0].layers
    assert layers["3.weight"].elements == 100
    assert layers["2.bias"].formats == ("e5m2",)
    assert layers["2.weight"].formats == FORMATS
    assert "stall_frac/bf16" not in set(layers["2.bias"])
    with pytest.raises(KeyError, match=r"stall_frac/bf16.*expected .*e5m2"):
        layers["2.bias"]["stall_frac/bf16"]
    # The model's figures of a format are over the layers judged for the format.
    step = optimizer.steps[0]
    bias_rows = [
        torch.cat([each.flatten() for each in part])
        for part in zip(*(step[f"{n}.bias"] for n in (2, 3, 4)), strict=True)
    ]
    expected = measure(*bias_rows, "e5m2", None)
    for metric in ("stall_frac", "kept_update_ratio", "grid_error_mean", "sqnr_db"):
        key = f"{metric}/e5m2"
        assert records[0].model[key] == pytest.approx(expected[key], rel=1e-12), key
    assert math.isnan(records[1].model.get("stall_frac/e5m2", math.nan))
    assert "(default)" in monitor.describe()
    assert "*.bias" in monitor.describe()


def test_a_rule_that_matches_nothing_is_an_error_with_near_matches() -> None:
    with pytest.raises(ValueError, match=r"'3\.wieght' matches none.*3\.weight"):
        UpdateMonitor(net(), sampling=[SamplingRule("3.wieght")])


def test_layers_added_to_the_module_are_observed() -> None:
    model = net()
    rules = [SamplingRule("*.bias", enabled=False), SamplingRule("5.*", formats="e5m2")]
    model.append(nn.Linear(10, 2))
    optimizer, monitor, records = watched(model, sampling=rules)
    train(model, optimizer)
    model.append(nn.Linear(2, 3000))
    optimizer.add_param_group({"params": [*model[6].parameters()]})
    optimizer.named = dict(model.named_parameters())
    train(model, optimizer, 2)
    assert "6.weight" in records[2].layers
    assert "6.bias" not in records[2].layers
    assert records[2].layers["6.weight"].formats == FORMATS
    assert monitor.layers["6.bias"].enabled is False
