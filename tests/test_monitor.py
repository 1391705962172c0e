"""`UpdateMonitor`: its records against the definitions, from optimizers that record themselves."""

import copy
import gc
import itertools
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from altgrad import SamplingRule, StepRecord, UpdateMonitor, measure
from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.measurement.columns import POPULATION
from altgrad.measurement.figures import model_figures, tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.monitor.elements import sample_elements
from altgrad.monitor.schedule import StepSchedule
from altgrad.quantization import (
    BLOCK_FORMATS,
    FloatFormat,
    compute_scale,
    effective_update,
    get_format,
)

FORMATS = ("bf16", "e4m3fn", "e2m1")
Step = dict[str, tuple[Tensor, Tensor, Tensor]]


class RecordingSGD(torch.optim.SGD):
    """The truth: before, after and gradient of each step, by name."""

    def __init__(self, named: Any, **options: Any) -> None:
        self.named = dict(named)
        self.steps: list[Step] = []
        super().__init__(self.named.values(), **options)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        taken = {
            name: (p.detach().clone(), p.grad.clone())
            for name, p in self.named.items()
            if p.grad is not None
        }
        result = super().step(closure)
        self.steps.append(
            {name: (b, self.named[name].detach().clone(), g) for name, (b, g) in taken.items()}
        )
        return result


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.Flatten(), nn.LayerNorm(720), nn.Linear(720, 32), nn.Linear(32, 10)
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, seed: int = 1
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        x = x.to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def watched(
    model: nn.Module, **options: Any
) -> tuple[RecordingSGD, UpdateMonitor, list[StepRecord]]:
    optimizer = RecordingSGD(model.named_parameters(), lr=0.05)
    records: list[StepRecord] = []
    settings = {"formats": FORMATS, "max_elements": None, "strict": True} | options
    return optimizer, UpdateMonitor(model, records.append, **settings).attach(optimizer), records


def sharing_out(elements: int) -> Any:
    """As if one call of the kernel measured only so many elements: small segments, large layers."""
    return mock.patch("altgrad.measurement.measurer.columns_that_fit", return_value=elements)


def assert_equal_figures(actual: Any, expected: Any, but: tuple[str, ...] = ()) -> None:
    for key, value in expected.items():
        if key.split("/")[0] in but:
            continue
        exact = key.split("/")[0].endswith(("_frac", "_max", "_min", "_log2"))
        exact &= not key.startswith("stochastic_move")
        tolerance = 0 if exact else 1e-11
        assert actual[key] == pytest.approx(
            value, rel=tolerance, abs=tolerance / 1e3, nan_ok=True
        ), key


# --- every element


@pytest.mark.parametrize("scaling", [None, "tensor", "channel", ("block", 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_figures_are_those_of_each_tensor_alone(dtype: torch.dtype, scaling: object) -> None:
    model = net().to(dtype)
    formats = ("e4m3fn", "e2m1")
    optimizer, _, records = watched(model, scaling=scaling, formats=formats)
    train(model, optimizer)
    (record,), (step,) = records, optimizer.steps
    assert list(record.layers) == list(step)
    for name, (before, after, gradient) in step.items():
        expected = measure(before, after, gradient, formats, scaling)
        assert_equal_figures(record.layers[name], expected)
        assert record.layers[name].elements == record.layers[name].population == before.numel()


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
@pytest.mark.parametrize("capacity", [64, 640, 10_000])
def test_it_does_not_matter_which_layers_are_measured_together(capacity: int, scaling: str) -> None:
    model = net()
    with sharing_out(capacity):
        optimizer, _, records = watched(model, scaling=scaling)
        train(model, optimizer, 2)
    twin = net()
    other, _, expected = watched(twin, scaling=scaling)
    train(twin, other, 2)
    for record, same in zip(records, expected, strict=True):
        assert set(record.layers) == set(same.layers)
        for name, figures in same.layers.items():
            assert_equal_figures(record.layers[name], dict(figures))
        assert_equal_figures(record.model, dict(same.model))


def test_the_model_is_all_its_elements_together() -> None:
    model = net()
    optimizer, _, records = watched(model, scaling=None)
    train(model, optimizer)
    record = records[0]
    together = [
        torch.cat([each.flatten() for each in part])
        for part in zip(*optimizer.steps[0].values(), strict=True)
    ]
    assert_equal_figures(record.model, measure(*together, FORMATS, None))
    assert record.model.elements == record.model.population == together[0].numel()
    assert_equal_figures(model_figures([*record.layers.values()]), dict(record.model))


def test_block_formats_are_judged_with_their_own_scales() -> None:
    model = net()
    optimizer, _, records = watched(model, formats=("bf16", *BLOCK_FORMATS))
    train(model, optimizer)
    for name, step in optimizer.steps[0].items():
        assert_equal_figures(records[0].layers[name], measure(*step, ("bf16", *BLOCK_FORMATS)))


def test_weights_of_several_dtypes_at_once() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.randn(50))
    model.b = nn.Parameter(torch.randn(50).bfloat16())
    model.c = nn.Parameter(torch.randn(50).double())
    optimizer, _, records = watched(model, tell=(said := []).append)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, step in optimizer.steps[0].items():
        assert_equal_figures(records[0].layers[name], measure(*step, FORMATS))
    assert math.isnan(records[0].layers["b"]["stall_frac/bf16"])
    assert records[0].model["stall_frac/bf16"] > 0  # of the two others
    assert len(said) == 1
    assert "cannot judge bf16 for weights already stored in torch.bfloat16" in said[0]


def test_parameters_without_a_gradient_take_no_part() -> None:
    model = net()
    optimizer, _, records = watched(model)
    train(model, optimizer)
    frozen = model[3].weight.requires_grad_(False)
    frozen.grad = None
    train(model, optimizer, 2, seed=2)
    assert "3.weight" in records[0].layers
    assert "3.weight" not in records[1].layers
    for record, step in zip(records, optimizer.steps, strict=True):
        assert set(record.layers) == set(step)
    assert (
        records[2].model.population == sum(p.numel() for p in model.parameters()) - frozen.numel()
    )


def test_empty_scalar_and_oddly_named_parameters() -> None:
    model = nn.Module()
    model.register_parameter("<script>/%", nn.Parameter(torch.tensor(1.0)))
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.alone = nn.Parameter(torch.tensor([1.5]))
    optimizer, _, records = watched(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    assert set(records[0].layers) == {"<script>/%", "empty", "alone"}
    for name, step in optimizer.steps[0].items():
        assert_equal_figures(records[0].layers[name], measure(*step, FORMATS))
    assert math.isnan(records[0].layers["empty"]["stall_frac/bf16"])
    assert records[0].model["stall_frac/bf16"] == 1


def test_two_optimizers_are_apart() -> None:
    model = net()
    one = RecordingSGD([(n, p) for n, p in model.named_parameters() if n < "3"], lr=0.05)
    two = RecordingSGD([(n, p) for n, p in model.named_parameters() if n >= "3"], lr=0.01)
    records: list[StepRecord] = []
    with UpdateMonitor(model, records.append, formats=FORMATS, strict=True).attach(one, two):
        train(model, one)
        two.step()
    assert [set(record.layers) for record in records] == [set(one.steps[0]), set(two.steps[0])]
    assert_equal_figures(records[1].layers["4.bias"], measure(*two.steps[0]["4.bias"], FORMATS))


def test_a_parameter_that_is_replaced_finds_a_new_place() -> None:
    model = net()
    optimizer, _, records = watched(model)
    train(model, optimizer)
    model[4] = nn.Linear(32, 7)
    optimizer.named = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [*model.parameters()]
    train(model, optimizer, 2)
    for record, step in zip(records, optimizer.steps, strict=True):
        assert set(record.layers) == set(step)
    assert records[2].layers["4.weight"].population == 7 * 32
    assert_equal_figures(
        records[1].layers["4.weight"],
        measure(*optimizer.steps[1]["4.weight"], FORMATS),
        ("never_moved_frac",),
    )


# --- samples


def test_sampled_figures_are_those_of_the_elements_that_the_seed_draws() -> None:
    model = net()
    optimizer, _, records = watched(model, max_elements=500, seed=3, scaling=None)
    train(model, optimizer, 2)
    indices = sample_elements("3.weight", (32, 720), 500, seed=3)
    for record, step in zip(records, optimizer.steps, strict=True):
        part = [each.flatten()[indices] for each in step["3.weight"]]
        assert_equal_figures(record.layers["3.weight"], measure(*part, FORMATS, None))
        assert record.layers["3.weight"].elements == 500
        assert record.layers["3.weight"].population == 32 * 720
        small = measure(*step["2.weight"], FORMATS, None)  # all 720
        assert_equal_figures(record.layers["2.weight"], small)


def test_the_scale_of_a_sampled_layer_is_that_of_the_whole() -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = 100.0
    optimizer, _, records = watched(model, max_elements=500)
    train(model, optimizer)
    whole = optimizer.steps[0]["3.weight"][0].abs().max().view(1)
    indices = sample_elements("3.weight", (32, 720), 500)
    part = [each.flatten()[indices] for each in optimizer.steps[0]["3.weight"]]
    expected = tensor_figures(FORMATS, Measurer(FORMATS).measure_tensor(*part, whole))
    assert_equal_figures(records[0].layers["3.weight"], dict(expected))
    assert expected["stiffness_max/e2m1"] >= 8


def test_block_formats_sample_whole_blocks() -> None:
    model = net()
    optimizer, _, records = watched(model, formats=("mxfp4", "nvfp4"), max_elements=512)
    train(model, optimizer)
    indices = sample_elements("3.weight", (32, 720), 512, block=32)
    step = optimizer.steps[0]["3.weight"]
    blocks = [each.flatten()[indices].view(1, -1) for each in step]  # whole ones, side by side
    expected = measure(*blocks, ("mxfp4",))
    assert_equal_figures(
        {k: v for k, v in records[0].layers["3.weight"].items() if not k.endswith("nvfp4")},
        expected,
    )


def test_the_model_figure_of_samples_is_near_that_of_all_elements() -> None:
    """Each layer counts with all its elements: without weights the small ones would dominate."""
    model = net()
    with torch.no_grad():  # what is large stalls, what is small does not
        model[3].weight.add_(0.5)
    optimizer, _, records = watched(model, max_elements=500, scaling=None)
    train(model, optimizer)
    together = [
        torch.cat([each.flatten() for each in part])
        for part in zip(*optimizer.steps[0].values(), strict=True)
    ]
    truth = measure(*together, FORMATS, None)
    for key in ("stall_frac/bf16", "stall_frac/e4m3fn", "visible_frac/e4m3fn", "on_grid_frac/bf16"):
        error = records[0].model.standard_error(key)
        assert 0 <= error < 0.03
        assert abs(records[0].model[key] - truth[key]) <= 4 * error + 1e-15, key
    unweighted = torch.tensor([f["stall_frac/bf16"] for f in records[0].layers.values()]).mean()
    assert abs(unweighted.item() - truth["stall_frac/bf16"]) > 0.1
    assert records[0].model["update_rms"] == pytest.approx(truth["update_rms"], rel=0.2)


@pytest.mark.parametrize(
    "key", ["stall_frac/e4m3fn", "kept_update_ratio/e4m3fn", "on_grid_frac/bf16"]
)
def test_standard_errors_are_those_that_two_hundred_draws_show(key: str) -> None:
    torch.manual_seed(0)
    before = torch.randn(20_000) * 0.05
    after = before + torch.randn(20_000) * 2e-3
    before[::3] = before[::3].bfloat16().float()
    measurer = Measurer(("e4m3fn", "bf16"), None)
    truth = tensor_figures(measurer.names, measurer.measure_tensor(before, after, after))
    values, errors = [], []
    for seed in range(200):
        indices = sample_elements("w", (20_000,), 1000, seed=seed)
        row = measurer.measure_tensor(before[indices], after[indices], after[indices])
        row[POPULATION] = 20_000
        figures = tensor_figures(measurer.names, row)
        values.append(figures[key])
        errors.append(figures.standard_error(key))
    observed = torch.tensor(values).std().item()
    assert observed == pytest.approx(sum(errors) / 200, rel=0.2)
    assert abs(sum(values) / 200 - truth[key]) < 4 * observed / math.sqrt(200)
    assert truth.standard_error(key) == 0


def test_a_standard_error_that_cannot_be_trusted_is_nan() -> None:
    torch.manual_seed(0)
    before = torch.randn(4000)
    heavy = torch.distributions.StudentT(1.0).sample((4000,)) * 1e-3
    row = Measurer("bf16", None).measure_tensor(before, before + heavy, heavy)
    row[POPULATION] = 1e6
    figures = tensor_figures(["bf16"], row)
    assert 4000 / figures["energy_concentration"] < 30
    assert math.isnan(figures.standard_error("kept_update_ratio/bf16"))
    assert 0 < figures.standard_error("stall_frac/bf16") < 0.01
    assert math.isnan(figures.standard_error("update_rms"))


def test_a_sample_may_be_larger_than_what_is_measured_at_once() -> None:
    """It is measured in pieces, none of which tears a block apart, and stands for the whole.

    Each sampled element stands for 8 or 32, a power of two, and rows hold whole blocks: then no
    share of the model is rounded, in whichever order its layers are added up.
    """

    def wide_net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(192, 480), nn.LayerNorm(480), nn.Linear(480, 48)
        )

    for formats, scaling in [(FORMATS, "channel"), (("mxfp4", "nvfp4", "e4m3fn"), ("block", 24))]:
        settings = {"formats": formats, "scaling": scaling, "max_elements": 2880}
        model, twin = wide_net(), wide_net()
        with sharing_out(500):
            optimizer, _, records = watched(model, **settings)
            train(model, optimizer, 2)
        other, _, expected = watched(twin, **settings)
        train(twin, other, 2)
        for record, same in zip(records, expected, strict=True):
            for name, population in (("1.weight", 92_160), ("3.weight", 23_040)):
                assert_equal_figures(record.layers[name], dict(same.layers[name]))
                assert record.layers[name].population == population
                assert record.layers[name].elements == 2880
            assert_equal_figures(record.model, dict(same.model))


# --- scales


@pytest.mark.parametrize("formats", [("mxfp8_e4m3",), ("nvfp4",), ("nvfp4", "e4m3fn")])
@pytest.mark.parametrize("capacity", [100, 100_000])
def test_blocks_have_the_scale_of_each_step(formats: tuple[str, ...], capacity: int) -> None:
    """Also those that begin at zero, in a layer where nothing else does, and those that grow."""
    model = net()
    with torch.no_grad():
        model[3].weight[:, :360] = 0
        model[4].bias.zero_()
    with sharing_out(capacity):
        optimizer, _, records = watched(model, formats=formats)
        for _ in range(3):
            with torch.no_grad():
                model[3].weight[:, 700:] *= 3
            train(model, optimizer)
    for record, step in zip(records, optimizer.steps, strict=True):
        for name in ("3.weight", "4.bias", "4.weight"):
            figures = dict(record.layers[name])
            first = optimizer.steps[0][name]  # of which the amax of the whole tensor is
            amax = (first[0] if first[0].any() else first[1]).abs().max().view(1)
            row = Measurer(formats).measure_tensor(*step[name], amax)
            expected = tensor_figures(formats, row)
            of_blocks = {k: v for k, v in expected.items() if not k.endswith("e4m3fn")}
            assert_equal_figures(figures, of_blocks, ("never_moved_frac",))
    assert records[0].layers["3.weight"][f"stall_frac/{formats[0]}"] < 0.9


def test_layers_that_stay_zero_are_looked_at_ever_less_often() -> None:
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.bias)
    optimizer, monitor, _ = watched(model, formats="e4m3fn")
    looked: list[int] = []
    take = monitor._scale_state._take
    monitor._scale_state._take = lambda layers, **how: (
        looked.append(len(optimizer.steps)) or take(layers, **how)
    )
    for _ in range(100):
        model.weight.grad, model.bias.grad = torch.full((4, 4), 1e-6), torch.zeros(4)
        optimizer.step()
    # Before the first step, and after it and as many more as a power of two says.
    assert [*dict.fromkeys(looked)] == [0, 1, *(1 + 2**k for k in range(7))]


def test_scales_of_another_scaling_are_taken_anew() -> None:
    model = net()
    optimizer, monitor, _ = watched(model, scaling="channel")
    train(model, optimizer)
    state = monitor.state_dict()
    monitor.detach()
    other = UpdateMonitor(model, formats=FORMATS, max_elements=None, scaling="tensor", strict=True)
    other.load_state_dict(state)
    other.attach(optimizer)
    train(model, optimizer)
    expected = measure(*optimizer.steps[-1]["3.weight"], FORMATS)
    assert_equal_figures(other.latest.layers["3.weight"], expected, ("never_moved_frac",))


@pytest.mark.parametrize("scaling", ["tensor", "channel", ("block", 8)])
def test_a_parameter_may_change_its_shape_and_dtype_again_and_again(scaling: Any) -> None:
    model = nn.Linear(8, 8, bias=False)
    optimizer, monitor, records = watched(model, scaling=scaling)
    optimizer.named = dict(model.named_parameters())
    for shape, dtype in [((8, 8), torch.float32), ((4, 24), torch.float64)] * 20:
        model.weight.data = torch.randn(shape, dtype=dtype)
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        expected = measure(*optimizer.steps[-1]["weight"], FORMATS, scaling)
        assert_equal_figures(records[-1].layers["weight"], expected, ("never_moved_frac",))
    (arena,) = monitor._measuring._arenas.values()
    assert sum(segment.rows for segment in arena.segments) == 3


# --- over time


def test_never_moved_is_what_never_moved_in_any_observed_step() -> None:
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


@pytest.mark.parametrize("capacity", [640, 100_000])
def test_a_resumed_run_knows_what_has_never_moved(capacity: int) -> None:
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
    # One bit for each element and format, and one for whether it was to move.
    bits = sum(packed.numel() * 8 for _, packed in state["ever_moved"].values())
    elements = sum(figures.elements for figures in records[-1].layers.values())
    assert bits <= elements * (1 + len(FORMATS)) + 8 * len(records[-1].layers)


def test_what_was_learnt_outlives_the_optimizer() -> None:
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


def test_a_state_of_other_formats_is_told_and_not_mixed_up() -> None:
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


def test_a_monitor_that_is_attached_again_goes_on() -> None:
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


def test_a_state_is_not_loaded_into_an_attached_monitor() -> None:
    model = net()
    _, monitor, _ = watched(model)
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) before attach\(\)"):
        monitor.load_state_dict(monitor.state_dict())


def test_a_loaded_state_replaces_what_was_learnt_before() -> None:
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


def test_a_state_of_another_number_of_elements_is_told() -> None:
    model = net()
    optimizer, monitor, _ = watched(model)
    train(model, optimizer)
    state = monitor.state_dict()
    monitor.detach()
    said: list[str] = []
    other = UpdateMonitor(model, formats=FORMATS, max_elements=100, tell=said.append, strict=True)
    other.load_state_dict(state)
    other.attach(optimizer)
    train(model, optimizer)
    assert said == [
        "has never_moved_frac of 3.weight begin anew: it has 100 watched elements, and had 23040"
    ]


def test_one_parameter_of_two_optimizers_is_tracked_in_both() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr) for lr in (1e-9, 1.0)]
    with UpdateMonitor(model, formats="bf16", strict=True).attach(*optimizers) as monitor:
        model.weight.grad = torch.ones_like(model.weight)
        optimizers[1].step()
        optimizers[0].step()
        _, bits = monitor.state_dict()["ever_moved"]["weight"]
    assert bits.tolist() == [0b11111111] * 4  # all had an update, and all an effective one
    assert monitor.state_dict()["ever_moved"]["weight"][1].tolist() == bits.tolist()


def test_names_that_change_places_take_their_figures_along() -> None:
    model = nn.ParameterDict({"a": torch.randn(70), "b": torch.randn(70)})
    optimizer, _, records = watched(model)
    for gradient in (0.0, 1.0):
        if gradient:
            model["a"], model["b"] = model["b"], model["a"]
            model["c"] = nn.Parameter(torch.randn(3))  # which makes the observer look again
            optimizer.param_groups[0]["params"] = [*model.parameters()]
            optimizer.named = dict(model.named_parameters())
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        model["a"].grad = torch.zeros(70)
        optimizer.step()
        assert records[-1].layers["a"]["gradient_rms"] == 0
        assert records[-1].layers["b"]["gradient_rms"] > 0


def test_a_module_may_grow() -> None:
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


def test_scales_hold_for_a_hundred_steps_unless_a_weight_exceeds_them() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer, monitor, records = watched(model, formats="e4m3fn")
    with torch.no_grad():
        model.weight.fill_(1.0)

    def step(value: float) -> float:
        model.weight.grad = torch.zeros_like(model.weight)
        with torch.no_grad():
            model.weight.fill_(value)
        model.weight.grad.fill_(0.1)
        optimizer.step()
        return compute_scale(monitor._scale_state.amax("weight"), "e4m3fn").item()

    assert step(1.0) == 2.0**-8
    assert step(0.25) == 2.0**-8  # a smaller one changes nothing …
    assert step(1.74) == 2.0**-8
    assert step(1.76) == 2.0**-8  # … nor does a larger one at once: it is clipped and seen
    assert records[-1].model["saturated_frac/e4m3fn"] == 1
    assert step(1.76) == 2.0**-7
    assert records[-1].model["saturated_frac/e4m3fn"] == 0
    for _ in range(94):
        assert step(0.2) == 2.0**-7
    assert len(records) == 99
    assert step(0.2) == 2.0**-7
    assert step(0.2) == 2.0**-11  # the hundred-and-first


def test_weights_that_begin_at_zero_have_the_scale_of_what_their_first_step_makes_of_them() -> None:
    """A bias of zeros sets no scale; under that of 1 it would seem frozen."""
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.bias)
    optimizer, _, records = watched(model, formats="e2m1")
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.02)
        optimizer.step()
    stalls = [record.layers["bias"]["stall_frac/e2m1"] for record in records]
    assert stalls == [0, 0, 0]


def test_the_overhead_budget_holds_back_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    indices: list[int] = []

    def on_record(record: StepRecord) -> None:
        indices.append(record.index)

    monitor = UpdateMonitor(model, on_record, overhead_budget=0.2, strict=True)
    kernel = monitor._measurer.measure_batch

    def slow(batch: Any) -> Tensor:
        now[0] += 1.0  # a second for each observation
        return kernel(batch)

    monkeypatch.setattr(monitor._measurer, "measure_batch", slow)
    monitor.attach(optimizer)
    for _ in range(500):
        now[0] += 0.125  # an eighth for each step
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    gaps = [b - a for a, b in itertools.pairwise(indices)]
    assert gaps[:2] == [1, 1]  # the cost of the first is not taken for that of all
    assert set(gaps[3:]) == {32}  # 1 s in 1 + 32 / 8 s
    assert monitor.state_dict()["budgets"][0]["interval"] == 32
    assert monitor.latest.own_seconds == pytest.approx(1.0)
    assert monitor.latest.training_seconds == pytest.approx(0.125)


def test_the_overhead_budget_holds_for_two_optimizers_of_different_paces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    one, two = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    spent = {one: 0, two: 0}
    monitor = UpdateMonitor(model, overhead_budget=0.2, strict=True)
    kernel = monitor._measurer.measure_batch

    def slow(batch: Any) -> Tensor:
        now[0] += 1.0
        spent[monitor._observer.asking] += 1
        return kernel(batch)

    monkeypatch.setattr(monitor._measurer, "measure_batch", slow)
    monitor.attach(one, two)
    for step in range(2000):
        now[0] += 0.1
        model(torch.ones(1, 4)).sum().backward()
        one.step()
        if step % 5 == 4:
            two.step()
    share = sum(spent.values()) / now[0]
    assert 0.1 < share < 0.22
    assert min(spent.values()) > 5
    states = monitor.state_dict()["budgets"]
    assert [state["interval"] > 1 for state in states] == [True, True]


# --- rules


def test_rules_say_which_layers_are_observed_when_and_for_what() -> None:
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
    # The model's figures of a format are those of the layers that are judged for it.
    step = optimizer.steps[0]
    of_biases = [
        torch.cat([each.flatten() for each in part])
        for part in zip(*(step[f"{n}.bias"] for n in (2, 3, 4)), strict=True)
    ]
    expected = measure(*of_biases, "e5m2", None)
    for metric in ("stall_frac", "kept_update_ratio", "grid_error_mean", "sqnr_db"):
        key = f"{metric}/e5m2"
        assert records[0].model[key] == pytest.approx(expected[key], rel=1e-12), key
    assert math.isnan(records[1].model.get("stall_frac/e5m2", math.nan))
    assert "(default)" in monitor.describe()
    assert "*.bias" in monitor.describe()


def test_a_rule_that_matches_nothing_is_an_error_with_near_matches() -> None:
    with pytest.raises(ValueError, match=r"'3\.wieght' matches none.*3\.weight"):
        UpdateMonitor(net(), sampling=[SamplingRule("3.wieght")])


def test_a_schedule_says_which_steps() -> None:
    model = net()
    optimizer, _, records = watched(model, every_n_steps=StepSchedule(2, from_step=3, until_step=8))
    train(model, optimizer, 10)
    assert [record.index for record in records] == [3, 5, 7]


# --- what must not happen


@pytest.mark.parametrize("options", [{}, {"max_elements": 100}, {"overhead_budget": 0.5}])
def test_training_is_untouched(options: dict[str, Any]) -> None:
    def run(observe: bool) -> tuple[list[Tensor], Tensor]:
        model = net()
        model.insert(2, nn.Dropout(0.1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        monitor = UpdateMonitor(model, strict=True, **options)
        if observe:
            monitor.attach(optimizer)
        train(model, optimizer, 5)
        assert (monitor.latest is not None) is observe
        return [p.detach() for p in model.parameters()], torch.get_rng_state()

    (weights, state), (expected, expected_state) = run(True), run(False)
    assert all(map(torch.equal, weights, expected))
    assert torch.equal(state, expected_state)


def test_a_fault_warns_once_and_training_goes_on() -> None:
    model = net()
    optimizer, monitor, records = watched(model, strict=False)
    with (
        mock.patch.object(Measurer, "measure_batch", side_effect=RuntimeError("broken")),
        pytest.warns(UserWarning, match="stops observing after a fault.*broken") as warned,
    ):
        train(model, optimizer, 3)
    assert len(warned) == 1
    assert (records, len(optimizer.steps), monitor.is_observing) == ([], 3, False)


@pytest.mark.parametrize(("inf", "gradient", "shown"), [(0, 1, True), (0, 0, True), (1, 1, False)])
def test_a_step_that_a_scaler_skipped_is_counted_and_not_shown(
    inf: float, gradient: float, shown: bool
) -> None:
    model = net()
    records: list[StepRecord] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    monitor = UpdateMonitor(model, records.append, strict=True).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(inf)), None
    optimizer.step()
    assert (len(records), monitor.skipped["inf"]) == (int(shown), int(not shown))


def test_without_formats_there_are_the_figures_of_the_update() -> None:
    model = net()
    optimizer, _, records = watched(model, formats=[])
    train(model, optimizer)
    assert set(records[0].model) == {*LAYER_METRICS}
    assert_equal_figures(
        records[0].layers["3.weight"], measure(*optimizer.steps[0]["3.weight"], [])
    )


@pytest.mark.parametrize("capacity", [64, 100_000])
def test_the_first_observed_step_may_be_in_inference_mode(capacity: int) -> None:
    model = nn.Linear(20, 20, bias=False)
    with sharing_out(capacity):
        optimizer, _monitor, records = watched(model)
        for _ in range(3):
            model.weight.grad = torch.ones_like(model.weight)
            with torch.inference_mode(mode=len(records) < 2):
                optimizer.step()
    assert [record.index for record in records] == [0, 1, 2]


def test_two_threads_may_step_two_optimizers() -> None:
    models = [nn.Linear(300, 300) for _ in range(2)]
    optimizers = [RecordingSGD(m.named_parameters(), lr=0.05) for m in models]
    records: list[StepRecord] = []
    both = nn.ModuleList(models)
    for number, optimizer in enumerate(optimizers):
        optimizer.named = {f"{number}.{n}": p for n, p in models[number].named_parameters()}

    def run(number: int) -> None:
        for _ in range(20):
            for parameter in models[number].parameters():
                parameter.grad = torch.full_like(parameter, 1e-3 * (1 + number))
            optimizers[number].step()

    with UpdateMonitor(both, records.append, scaling=None, max_elements=None, strict=True).attach(
        *optimizers
    ):
        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(records) == 40
    for record in records:
        (number,) = {int(name[0]) for name in record.layers}
        step = optimizers[number].steps[record.index]
        name = f"{number}.weight"
        assert_equal_figures(
            record.layers[name], measure(*step[name], scaling=None), ("never_moved_frac",)
        )


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_monitor_is_not_copied(copied: Callable[[Any], Any]) -> None:
    _, monitor, _ = watched(net())
    with pytest.raises(TypeError, match="make another one for the copy"):
        copied(monitor)


def test_two_thousand_layers() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2000)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with UpdateMonitor(model, formats="bf16", strict=True).attach(optimizer) as monitor:
        for parameter in model:
            parameter.grad = torch.ones(3)
        optimizer.step()
    assert len(monitor.latest.layers) == 2000
    assert monitor.latest.model.population == 6000


def test_formats_of_ones_own_and_all_keys() -> None:
    mine = FloatFormat("mine", 4, 1, 7)
    model = net()
    optimizer, _, records = watched(model, formats=[mine, "bf16"])
    train(model, optimizer)
    keys = set(records[0].model)
    assert keys == {*LAYER_METRICS} | {f"{m}/{f}" for m in FORMAT_METRICS for f in ("mine", "bf16")}
    with pytest.raises(KeyError, match="unknown metric 'stal_frac'; nearest: stall_frac"):
        records[0].model["stal_frac/bf16"]
