"""`MovedHistory`: flags of elements over all steps, and their restoration in another run."""

import copy
import gc

import pytest
import torch
from torch import nn

from altgrad import SamplingRule, UpdateMonitor
from altgrad.quantization import (
    effective_update,
    get_format,
)
from tests.monitor.watching import (
    FORMATS,
    net,
    sharing_out,
    train,
    watched,
)


def test_never_moved_frac_is_over_all_observed_steps() -> None:
    model = net()
    optimizer, _, records = watched(model, every_n_steps=2, scaling=None)
    train(model, optimizer, 8)
    assert [record.index for record in records] == [1, 3, 5, 7]
    had, kept = {}, {}
    for record, step in zip(records, optimizer.steps[1::2], strict=True):
        for name, (before, after, _) in step.items():
            d = after.double() - before.double()
            grid = get_format("e4m3fn")
            effective = effective_update(before.double(), d, grid)
            had[name] = had.get(name, False) | (d != 0)
            kept[name] = kept.get(name, False) | ((d != 0) & (effective != 0))
            expected = 1 - (kept[name].sum() / had[name].sum()).item()
            figure = record.layers[name]["never_moved_frac/e4m3fn"]
            assert figure == pytest.approx(expected, abs=1e-6), name
        total = 1 - sum(k.sum() for k in kept.values()) / sum(h.sum() for h in had.values())
        assert record.model["never_moved_frac/e4m3fn"] == pytest.approx(total.item(), abs=1e-6)
    first, last = (records[i].model["never_moved_frac/e4m3fn"] for i in (0, -1))
    assert 0 < last < first < 1


def test_one_parameter_of_two_optimizers_is_tracked_in_both() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr) for lr in (1e-9, 1.0)]
    with UpdateMonitor(model, formats="bf16", strict=True).attach(*optimizers) as monitor:
        model.weight.grad = torch.ones_like(model.weight)
        optimizers[1].step()
        optimizers[0].step()
        _, bits = monitor.state_dict()["ever_moved"]["weight"]
    assert bits.tolist() == [0b11111111] * 4  # each element had an update, and an effective one
    assert monitor.state_dict()["ever_moved"]["weight"][1].tolist() == bits.tolist()


@pytest.mark.parametrize("capacity", [640, 100_000])
def test_a_resumed_run_restores_flags(capacity: int) -> None:
    with sharing_out(capacity):
        whole, resumed = net(), net()
        optimizer, _, expected = watched(whole, max_elements=300)
        train(whole, optimizer, 6)
        optimizer, first, records = watched(resumed, max_elements=300)
        train(resumed, optimizer, 3)
        state = copy.deepcopy(first.state_dict())
        first.detach()
        second = UpdateMonitor(
            resumed, records.append, formats=FORMATS, max_elements=300, strict=True
        )
        second.load_state_dict(state)
        second.attach(optimizer)
        assert second.state_dict()["ever_moved"].keys() == state["ever_moved"].keys()
        generator = torch.Generator().manual_seed(1)
        for position in range(6):
            x = torch.randn(4, 3, 8, 8, generator=generator)
            if position < 3:
                continue
            optimizer.zero_grad()
            resumed(x).square().mean().backward()
            optimizer.step()
    for name in expected[-1].layers:
        for format in FORMATS:
            key = f"never_moved_frac/{format}"
            assert records[-1].layers[name][key] == pytest.approx(
                expected[-1].layers[name][key], nan_ok=True, abs=0
            )
    # One bit for each element and format, and one bit for an update other than 0.
    bits = sum(packed.numel() * 8 for _, packed in state["ever_moved"].values())
    elements = sum(figures.elements for figures in records[-1].layers.values())
    assert bits <= elements * (1 + len(FORMATS)) + 8 * len(records[-1].layers)


def test_flags_outlive_the_optimizer() -> None:
    model = net()
    optimizer, monitor, _ = watched(model)
    train(model, optimizer)
    expected = monitor.state_dict()["ever_moved"]
    monitor.detach()
    del optimizer
    gc.collect()
    kept = monitor.state_dict()["ever_moved"]
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[name][1], bits) for name, (_, bits) in expected.items())


def test_a_monitor_attached_again_keeps_flags() -> None:
    model, twin = net(), net()
    optimizer, monitor, records = watched(model)
    train(model, optimizer, 2)
    monitor.detach()
    monitor.attach(optimizer)
    train(model, optimizer, 2)
    other, _, expected = watched(twin)
    train(twin, other, 2)
    train(twin, other, 2)
    for name in expected[-1].layers:
        for format in FORMATS:
            key = f"never_moved_frac/{format}"
            assert records[-1].layers[name][key] == expected[-1].layers[name][key]


def test_a_state_with_other_formats_warns_and_is_not_restored() -> None:
    model = net()
    optimizer, monitor, _ = watched(model)
    train(model, optimizer)
    state = monitor.state_dict()
    other = UpdateMonitor(model, formats="e5m2")
    with pytest.warns(UserWarning, match="never_moved_frac begins anew"):
        other.load_state_dict(state)
    other.attach(optimizer)
    train(model, optimizer)
    assert other.latest is not None


def test_a_state_with_another_number_of_elements_gives_a_notice_and_is_not_restored() -> None:
    model = net()
    optimizer, monitor, _ = watched(model)
    train(model, optimizer)
    state = monitor.state_dict()
    monitor.detach()
    said: list[str] = []
    other = UpdateMonitor(model, formats=FORMATS, max_elements=100, warn=said.append, strict=True)
    other.load_state_dict(state)
    other.attach(optimizer)
    train(model, optimizer)
    assert said == [
        "has never_moved_frac of 3.weight begin anew: it has 100 measured elements, and had 23040"
    ]


def test_loading_a_state_replaces_flags() -> None:
    model = net()
    optimizer, monitor, _ = watched(model)
    state = copy.deepcopy(monitor.state_dict())
    train(model, optimizer, 3)
    monitor.detach()
    assert monitor.state_dict()["ever_moved"]
    monitor.load_state_dict(state)
    assert not monitor.state_dict()["ever_moved"]
    monitor.attach(optimizer)
    train(model, optimizer)
    one = monitor.latest.layers["3.weight"]
    assert one["never_moved_frac/e4m3fn"] == pytest.approx(one["stall_frac/e4m3fn"])


@pytest.mark.parametrize("packed", [None, ((2, 8), torch.zeros(1, dtype=torch.uint8)), ((2, 8),)])
def test_damaged_flags_are_an_error_that_names_their_layer(packed: object) -> None:
    state = UpdateMonitor(net(), formats=FORMATS).state_dict() | {"ever_moved": {"0.bias": packed}}
    with pytest.raises(
        ValueError, match=r"ever_moved of 0\.bias is .*: expected a shape and its bit"
    ):
        UpdateMonitor(net(), formats=FORMATS).load_state_dict(state)


# --- other samples


def resume(state: dict, **settings: object) -> tuple[list[str], list[str]]:
    """Restore a state in a run with other settings: the layers with flags, and the notices."""
    notices: list[str] = []
    settings = {"formats": ("e4m3fn", "mxfp8"), "max_elements": 320} | settings
    monitor = UpdateMonitor(net(), strict=True, warn=notices.append, **settings)
    monitor.load_state_dict(state)
    return sorted(monitor.state_dict()["ever_moved"]), notices


@pytest.fixture
def sampled_state() -> dict:
    model = net()
    optimizer, monitor, _ = watched(model, formats=("e4m3fn", "mxfp8"), max_elements=320)
    train(model, optimizer)
    return copy.deepcopy(monitor.state_dict())


SAMPLED = "3.weight"  # the one layer of `net` with more than 2,048 elements


def test_a_run_that_draws_the_same_elements_restores_all_flags(sampled_state) -> None:
    assert SAMPLED in sampled_state["ever_moved"]
    names, notices = resume(sampled_state)
    assert (names, notices) == (sorted(sampled_state["ever_moved"]), [])
    del sampled_state["samples"]  # as version 0.1.0 wrote it
    assert resume(sampled_state)[0] == names


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},
        {"sampling": [SamplingRule("3.*", formats=["e4m3fn"])]},  # needs no blocks
        {"scaling": ("block", 64)},
    ],
    ids=["seed", "formats of a rule", "block size"],
)
def test_flags_of_other_elements_begin_anew_with_a_notice(sampled_state, settings) -> None:
    names, notices = resume(sampled_state, **settings)
    assert names == sorted({*sampled_state["ever_moved"]} - {SAMPLED})
    (notice,) = notices
    assert "never_moved_frac of 3.weight begin anew: the run before drew other elements" in notice


def test_flags_of_another_version_of_sampling_begin_anew(sampled_state) -> None:
    sampled_state["samples"]["version"] = 0
    names, notices = resume(sampled_state)
    assert SAMPLED not in names
    assert len(names) == len(sampled_state["ever_moved"]) - 1
    assert len(notices) == 1
