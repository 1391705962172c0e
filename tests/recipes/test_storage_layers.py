"""`WeightStorage`: the format of each layer, and refused arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from altgrad import SamplingRule, StepObserver, WeightStorage
from tests.recipes.storing import Given, net, train


def test_rules_select_the_format_of_each_layer() -> None:
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rules = [
        SamplingRule("1.*", enabled=False),
        SamplingRule("2.weight", formats="mxfp4"),
        SamplingRule("2.bias", formats=()),
        SamplingRule("0.bias", every_n_steps=7),
    ]
    storage = WeightStorage("bf16", layers=rules)
    storage.attach(torch.optim.SGD(model.parameters(), lr=0.1), module=model)
    assert storage.formats == {"0.weight": "bf16", "0.bias": "bf16", "2.weight": "mxfp4"}
    after = dict(model.named_parameters())
    assert torch.equal(after["1.weight"], before["1.weight"])
    assert torch.equal(after["2.bias"], before["2.bias"])
    assert torch.equal(after["0.weight"], before["0.weight"].bfloat16().float())
    assert after["2.weight"].unique().numel() <= 15 * 8


def test_an_optimizer_with_names_needs_no_module() -> None:
    model = net()
    rules = [SamplingRule("0.*", enabled=False)]
    storage = WeightStorage("bf16", layers=rules)
    storage.attach(torch.optim.SGD([*model.named_parameters()], lr=0.1))
    assert [*storage.formats] == ["1.weight", "1.bias", "2.weight", "2.bias"]
    with pytest.raises(ValueError, match=r"attach\(optimizer, module=model\)"):
        WeightStorage("bf16", layers=rules).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    nameless = WeightStorage("bf16").attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert [*nameless.formats][:2] == ["parameter 0", "parameter 1"]


def test_a_parameter_added_after_attach_is_warned_about_once_and_not_rounded() -> None:
    first, later = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 1.001))
    optimizer = Given([first], update=1e-3)
    storage = WeightStorage("bf16").attach(optimizer)
    optimizer.add_param_group({"params": [later]})
    with pytest.warns(UserWarning, match=r"a parameter of shape \(2,\) was added .* not stored"):
        optimizer.step()
    optimizer.step()  # a second warning would be an error
    assert torch.equal(first, torch.ones(2))
    assert (later > 1.0025).all()
    assert len(storage.formats) == 1


def test_the_error_names_weights_that_cannot_be_stored() -> None:
    half = Given([("head", nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))])
    with pytest.raises(
        ValueError, match=r"head has dtype torch\.bfloat16, which is not finer than bf16"
    ):
        WeightStorage("bf16").attach(half)
    first = nn.Parameter(torch.full((2,), 1.001))
    both = Given([("first", first), ("head", nn.Parameter(torch.ones(2).bfloat16()))])
    with pytest.raises(ValueError, match="head has dtype"):
        WeightStorage("bf16").attach(both)
    assert (first == torch.tensor(1.001)).all()  # it was not stored either
    assert WeightStorage("e4m3fn").attach(half).formats == {"head": "e4m3fn"}
    waves = Given([("waves", nn.Parameter(torch.ones(2, dtype=torch.complex64)))])
    with pytest.raises(ValueError, match=r"waves has dtype torch\.complex64"):
        WeightStorage("bf16").attach(waves)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("bf17",), {}, "bf17"),
        (("nvfp4",), {}, "not powers of two"),
        (("bf16", "row"), {}, "scaling='row'"),
        (("bf16",), {"rounding": "up"}, "rounding='up': expected 'nearest_even' or 'stochastic'"),
        (("bf16",), {"compensation": True}, "compensation=True: expected None or 'kahan'"),
        (
            ("bf16",),
            {"rounding": "stochastic", "compensation": "kahan"},
            "expected only one of them",
        ),
        (
            ("bf16",),
            {"layers": [SamplingRule("*", formats=["bf16", "e5m2"])]},
            "expected exactly one format",
        ),
    ],
)
def test_invalid_arguments_are_refused(arguments, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightStorage(*arguments, **settings)


def test_a_rule_without_a_matching_layer_is_refused_and_no_weight_is_rounded() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="matches none of 6 layers"):
        WeightStorage("bf16", layers=[SamplingRule("heads.*")]).attach(optimizer, module=model)
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer._optimizer_step_post_hooks  # torch has no public name for them


def test_an_observer_sees_stored_weights_and_must_be_attached_later() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []

    def on_step(step) -> None:
        seen.extend(torch.equal(x, x.bfloat16().float()) for x in (*step.before, *step.after))

    with WeightStorage("bf16").attach(optimizer), StepObserver(model, on_step).attach(optimizer):
        train(model, optimizer, 2)
        with pytest.raises(RuntimeError, match="attach the storage first"):
            WeightStorage("bf16").attach(optimizer)
    assert len(seen) == 2 * 2 * 6
    assert all(seen)
    WeightStorage("bf16").attach(optimizer)  # nobody observes any more
