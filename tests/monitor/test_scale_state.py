"""`ScaleState`: each amax is kept for some steps, and taken again when it is due."""

import copy
import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from altgrad import UpdateMonitor, measure
from altgrad.distributed.peers import Alone, Peers
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.monitor.elements import sample_elements
from altgrad.monitor.scale_state import ScaleState
from altgrad.quantization import (
    compute_scale,
)
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.scale_groups import Amaxes
from tests.monitor.watching import (
    FORMATS,
    assert_equal_figures,
    net,
    sharing_out,
    train,
    watched,
)

ALONE = Alone()


def make_state(formats: Any = "e4m3fn", scaling: Any = "tensor") -> ScaleState:
    return ScaleState(FormatSet(formats, scaling))


def take(state: ScaleState, peers: Peers = ALONE, /, **weights: Tensor) -> bool:
    """Take each amax that is due before a step of some layers; return True if one was."""
    return state.prepare(lambda: weights, peers)


def is_due(state: ScaleState) -> bool:
    """Return True if every amax is due before the next step, without changing the state."""
    return copy.deepcopy(state).prepare(dict, ALONE)


def settle(state: ScaleState, /, **weights: Tensor) -> bool:
    return state.settle(lambda: weights, ALONE)


def ensure_amax(state: ScaleState, peers: Peers = ALONE, /, **weights: Tensor) -> None:
    state.ensure_amax(weights, peers)


def zero(state: ScaleState) -> list[str]:
    return state.state_dict()["zero"]


def observed(state: ScaleState, steps: int = 1, **saturated: dict[str, float]) -> None:
    """Count a step in which a share of weights exceeded the scale, by layer and format."""
    layers = {
        name: {f"saturated_frac/{format}": share for format, share in each.items()}
        for name, each in saturated.items()
    }
    keys = {key for each in layers.values() for key in each}
    model = {key: max(each.get(key, 0.0) for each in layers.values()) for key in keys}
    for _ in range(steps):
        state.step_observed(SimpleNamespace(model=model, layers=layers))


def test_an_amax_is_kept_until_the_shape_changes() -> None:
    state, weight = make_state(), torch.tensor([1.0, -3.0, math.inf, math.nan])
    ensure_amax(state, w=weight)
    assert state.amaxes("w").groups.tolist() == [3.0]  # the largest finite magnitude
    weight *= 10
    ensure_amax(state, w=weight)
    assert state.amaxes("w").groups.tolist() == [3.0]
    ensure_amax(state, w=weight.view(2, 2))
    assert state.amaxes("w").groups.tolist() == [30.0]


def test_an_amax_moves_with_its_layer_to_another_device() -> None:
    state, weight = make_state(), torch.ones(2)
    ensure_amax(state, w=weight)
    ensure_amax(state, w=weight.to("meta"))  # a meta tensor has no values to take an amax from
    assert state.amaxes("w").groups.device.type == "meta"


def test_each_channel_has_an_amax() -> None:
    state = make_state(scaling="channel")
    ensure_amax(state, w=torch.tensor([[1.0, -3.0], [0.5, 0.25]]))
    assert state.amaxes("w").groups.tolist() == [3.0, 0.5]


@pytest.mark.parametrize(
    ("formats", "scaling", "is_needed"),
    [
        *(("bf16", "tensor", False), ("e4m3fn", None, False), ("e4m3fn", ("block", 8), False)),
        *(("mxfp4", "tensor", False), ([], "tensor", False), ("nvfp4", None, True)),
        *((("bf16", "e5m2"), "tensor", True), ("e4m3fn", "channel", True)),
    ],
)
def test_an_amax_is_taken_only_if_a_format_needs_it(
    formats: Any, scaling: Any, is_needed: bool
) -> None:
    state = make_state(formats, scaling)
    ensure_amax(state, w=torch.ones(4))
    assert list(state.state_dict()["amax"]) == ["w"] * is_needed
    assert is_due(state) is is_needed
    assert take(state, w=torch.ones(4)) is is_needed


def test_every_amax_is_due_at_first_and_after_a_hundred_observed_steps() -> None:
    state, weights = make_state(), {"a": torch.ones(2), "b": torch.ones(3)}
    for size in (2.0, 4.0, 8.0):
        assert is_due(state)
        weights = {name: torch.full_like(each, size) for name, each in weights.items()}
        take(state, **weights)
        assert [state.amaxes(name).groups.item() for name in weights] == [size, size]
        for _ in range(100):
            assert not is_due(state)
            observed(state)


def test_only_an_exceeded_amax_is_taken_again() -> None:
    state = make_state()
    take(state, a=torch.ones(2), b=torch.ones(3))
    observed(state, 10, a={"e4m3fn": 0.0}, b={"e4m3fn": 0.0})
    assert not is_due(state)
    observed(state, a={"e4m3fn": 0.5}, b={"e4m3fn": 0.0})
    assert is_due(state)
    take(state, a=torch.full((2,), 4.0), b=torch.full((3,), 4.0))
    assert [state.amaxes(name).groups.item() for name in "ab"] == [4.0, 1.0]
    observed(state, 88)
    assert not is_due(state)
    observed(state)  # the hundredth step
    assert is_due(state)


@pytest.mark.parametrize("format", ["bf16", "mxfp4"])
def test_saturation_of_a_format_without_an_amax_scale_changes_nothing(format: str) -> None:
    state = make_state(("e4m3fn", "bf16", "mxfp4"))
    take(state, w=torch.ones(2))
    observed(state, w={format: 1.0})
    assert not is_due(state)


def test_an_amax_of_0_is_taken_again_after_the_step() -> None:
    state = make_state(scaling="channel")
    before = {"w": torch.tensor([[0.0, 0.0], [1.0, 0.0]]), "b": torch.ones(1)}
    take(state, **before)
    assert zero(state) == ["w"]
    after = {"w": torch.tensor([[0.5, 0.0], [4.0, 0.0]]), "b": torch.full((1,), 4.0)}
    assert settle(state, **after)
    assert state.amaxes("w").groups.tolist() == [0.5, 1.0]  # the amax of the second channel is kept
    assert state.amaxes("b").groups.tolist() == [1.0]


def test_layers_with_an_amax_are_not_read_after_a_step() -> None:
    state = make_state()
    take(state, w=torch.zeros(3), empty=torch.zeros(0))
    assert settle(state, w=torch.ones(3), empty=torch.zeros(0))
    assert zero(state) == []
    assert not settle(state, w=torch.full((3,), 2.0), empty=torch.zeros(0))
    assert state.amaxes("w").groups.tolist() == [1.0]


def test_a_restored_state_keeps_scales_and_their_age() -> None:
    state, resumed = make_state(), make_state()
    weights = {"a": torch.ones(2, 2), "zero": torch.zeros(3)}
    take(state, **weights)
    observed(state, 60)
    resumed.load_state_dict(state.state_dict())
    ensure_amax(resumed, a=torch.full((2, 2), 9.0))
    assert resumed.amaxes("a").groups.tolist() == [1.0]
    assert zero(resumed) == ["zero"]
    observed(resumed, 39)
    assert not is_due(resumed)
    observed(resumed)
    assert is_due(resumed)
    observed(state, a={"e4m3fn": 1.0})
    resumed.load_state_dict(state.state_dict())
    assert is_due(resumed)
    assert resumed.description() == state.description()


def test_restoring_a_state_of_another_scaling_forgets_every_amax() -> None:
    state, other = make_state(), make_state(scaling="channel")
    for each in (state, other):
        take(each, w=torch.zeros(2, 2))
    other.load_state_dict(state.state_dict())
    assert is_due(other)
    assert zero(other) == []
    assert other.state_dict()["amax"] == {}


def test_after_a_run_without_scales_every_amax_is_due() -> None:
    """Formats of 16 bits have no scale; version 0.1.0 counted their steps below 0."""
    unscaled = make_state("bf16")
    observed(unscaled, steps=5)
    assert unscaled.state_dict()["steps_left"] == 0
    for steps_left in (0, -5):
        state, parameters = make_state(), {"w": torch.ones(2)}
        state.load_state_dict(unscaled.state_dict() | {"steps_left": steps_left})
        assert is_due(state)
        take(state, **parameters)
        assert not is_due(state)
        observed(state, steps=100)
        assert is_due(state)


def test_descriptions_are_equal_if_every_amax_is_equal() -> None:
    def description(*weights: float) -> dict[str, Any]:
        state = make_state(scaling="channel")
        take(state, w=torch.tensor(weights).view(2, 1))
        return state.description()

    assert description(1.0, 2.0) == description(-1.0, 2.0)
    assert description(1.0, 2.0) != description(2.0, 1.0)


class Sharing(Alone):
    """Peers whose every amax is 8, with a record of requests."""

    size = 2

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def amax(self, parameters: dict[str, Tensor], scaling: Any) -> tuple[list[Tensor], list[bool]]:
        self.asked.append([*parameters])
        return [torch.tensor([8.0])] * len(parameters), [False] * len(parameters)


def test_ranks_take_the_amax_of_shared_layers_together() -> None:
    state, peers, weights = make_state(), Sharing(), {"a": torch.ones(2), "b": torch.ones(2)}
    take(state, peers, **weights)
    assert state.amaxes("b").groups.tolist() == [8.0]
    assert not state.prepare(lambda: weights, peers)
    weights |= {"a": torch.ones(3), "new": torch.ones(1)}
    with pytest.raises(RuntimeError, match="a, new changed their shape during the step"):
        ensure_amax(state, peers, **weights)
    assert peers.asked == [["a", "b"]]  # other ranks do not know yet
    assert state.prepare(lambda: weights, peers, are_new=True)
    assert peers.asked == [["a", "b"], ["a", "new"]]
    ensure_amax(state, peers, **weights)
    assert state.prepare(lambda: weights, peers, are_new=True)
    assert peers.asked[2:] == []  # every amax is known


def test_a_single_rank_takes_the_amax_of_a_new_layer_on_demand() -> None:
    state = make_state()
    take(state, a=torch.ones(2))
    assert not state.prepare(pytest.fail, ALONE)  # parameters are listed only if needed
    ensure_amax(state, a=torch.full((2,), 4.0), new=torch.full((3,), 2.0))
    assert [state.amaxes(name).groups.item() for name in ("a", "new")] == [1.0, 2.0]


# --- in a monitor


def test_a_sampled_layer_has_the_scale_of_the_whole_layer() -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = 100.0
    optimizer, _, records = watched(model, max_elements=500)
    train(model, optimizer)
    whole = optimizer.steps[0]["3.weight"][0].abs().max().view(1)
    indices = sample_elements("3.weight", (32, 720), 500)
    part = [each.flatten()[indices] for each in optimizer.steps[0]["3.weight"]]
    expected = tensor_figures(
        FORMATS, Measurer(FormatSet(FORMATS)).measure_tensor(*part, Amaxes.from_groups(whole))
    )
    assert_equal_figures(records[0].layers["3.weight"], dict(expected))
    assert expected["stiffness_max/e2m1"] >= 8


@pytest.mark.parametrize("formats", [("mxfp8_e4m3",), ("nvfp4",), ("nvfp4", "e4m3fn")])
@pytest.mark.parametrize("capacity", [100, 100_000])
def test_block_scales_are_computed_at_each_step(formats: tuple[str, ...], capacity: int) -> None:
    """Blocks that begin at 0 and blocks that grow are included."""
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
            first = optimizer.steps[0][name]  # sets the amax of the whole tensor
            amax = (first[0] if first[0].any() else first[1]).abs().max().view(1)
            row = Measurer(FormatSet(formats)).measure_tensor(*step[name], Amaxes.from_groups(amax))
            expected = tensor_figures(formats, row)
            block_figures = {k: v for k, v in expected.items() if not k.endswith("e4m3fn")}
            assert_equal_figures(figures, block_figures, ("never_moved_frac",))
    assert records[0].layers["3.weight"][f"stall_frac/{formats[0]}"] < 0.9


FOUR_BITS = ("nvfp4", "mxfp4")


@pytest.mark.parametrize("capacity", [100, 100_000])
def test_block_formats_have_the_same_figures_whatever_the_scaling_of_a_run(capacity: int) -> None:
    """The amax of a whole tensor does not count weights after the step in channels of zeros."""
    found = {}
    for scaling in ("tensor", "channel"):
        torch.manual_seed(0)
        model = net()
        with torch.no_grad():
            model[3].weight[3:9] = 0
        with sharing_out(capacity):
            optimizer, monitor, records = watched(model, formats=FOUR_BITS, scaling=scaling)
            optimizer.param_groups[0]["lr"] = 50.0  # weights of 0 exceed the others at once
            train(model, optimizer)
            optimizer.param_groups[0]["lr"] = 0.05
            train(model, optimizer)
        monitor.detach()
        found[scaling] = records
    for one, other in zip(*found.values(), strict=True):
        assert_equal_figures(other.layers["3.weight"], dict(one.layers["3.weight"]))


@pytest.mark.parametrize("capacity", [100, 100_000])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("scaling", ["tensor", "channel"])
def test_a_model_may_be_cast_in_mid_run(
    scaling: Any, dtypes: tuple[torch.dtype, torch.dtype], capacity: int
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 12).to(dtypes[0])
    with sharing_out(capacity):
        formats = (*FOUR_BITS, "e4m3fn")
        optimizer, monitor, records = watched(model, formats=formats, scaling=scaling)
        for dtype in dtypes:
            model.to(dtype)
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1)
            optimizer.step()
    assert len(records) == 2
    monitor.detach()
    for format in formats:
        assert all(0 < record.model[f"update_error/{format}"] < math.inf for record in records)


def test_the_amax_of_a_whole_tensor_is_kept_beside_those_of_its_channels() -> None:
    state = make_state("nvfp4", "channel")
    take(state, w=torch.tensor([[0.0, 0.0], [0.5, 1.0]]))
    observed(state)
    settle(state, w=torch.tensor([[64.0, 3.0], [0.5, 2.0]]))
    kept = state.amaxes("w")
    assert (kept.groups.tolist(), kept.layers.tolist()) == ([64.0, 1.0], [1.0])
    resumed = make_state("nvfp4", "channel")
    resumed.load_state_dict(state.state_dict())
    assert resumed.amaxes("w").layers.tolist() == [1.0]
    earlier = state.state_dict()
    del earlier["tensor_amax"]  # a state that an earlier version saved
    resumed.load_state_dict(earlier)
    assert resumed.amaxes("w").layers.tolist() == [64.0]


def test_scales_are_kept_for_a_hundred_steps_unless_exceeded() -> None:
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
        return compute_scale(monitor.state_dict()["scales"]["amax"]["weight"][1], "e4m3fn").item()

    assert step(1.0) == 2.0**-8
    assert step(0.25) == 2.0**-8  # a smaller weight changes nothing …
    assert step(1.76) == 2.0**-8  # … nor does one that rounds to the top, 1.75 …
    assert records[-1].model["saturated_frac/e4m3fn"] == 0
    assert step(1.82) == 2.0**-8  # … nor a larger one at once: it is clipped and noted
    assert records[-1].model["saturated_frac/e4m3fn"] == 1
    assert step(1.82) == 2.0**-7
    assert records[-1].model["saturated_frac/e4m3fn"] == 0
    for _ in range(94):
        assert step(0.2) == 2.0**-7
    assert len(records) == 99
    assert step(0.2) == 2.0**-7
    assert step(0.2) == 2.0**-11  # step 101


def test_zero_weights_are_scaled_by_their_values_after_the_first_step() -> None:
    """A bias of zeros sets no scale; under a scale of 1, its updates would all stall."""
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.bias)
    optimizer, _, records = watched(model, formats="e2m1")
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.02)
        optimizer.step()
    stalls = [record.layers["bias"]["stall_frac/e2m1"] for record in records]
    assert stalls == [0, 0, 0]


def test_zero_weights_beside_a_nan_are_scaled_by_their_values_after_the_first_step() -> None:
    """Figures equal those of `measure`; nonfinite_frac alone counts the NaN."""
    weight = nn.Parameter(torch.tensor([math.nan, 0.0, 0.0, 0.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    before = weight.detach().clone()
    with UpdateMonitor([("w", weight)], formats="e2m1", strict=True).attach(optimizer) as monitor:
        weight.grad = torch.full((4,), 1e-3)
        optimizer.step()
    figures = monitor.latest.layers["w"]
    expected = measure(before, weight.detach(), weight.grad, "e2m1")
    assert figures["stall_frac/e2m1"] == expected["stall_frac/e2m1"] == 0.0
    assert figures["nonfinite_frac"] == 0.25


def test_layers_that_stay_zero_are_read_less_and_less_often() -> None:
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.bias)
    optimizer, _monitor, _ = watched(model, formats="e4m3fn")
    looked: list[int] = []
    amax = Alone.amax

    def looking(peers: Peers, layers: Any, scaling: Any) -> Any:
        looked.append(len(optimizer.steps))
        return amax(peers, layers, scaling)

    with mock.patch.object(Alone, "amax", looking):
        for _ in range(100):
            model.weight.grad, model.bias.grad = torch.full((4, 4), 1e-6), torch.zeros(4)
            optimizer.step()
    # Before the first step, and after 1, 2, 4, 8, … steps.
    assert [*dict.fromkeys(looked)] == [0, 1, *(1 + 2**k for k in range(7))]


def test_scales_of_a_state_with_another_scaling_are_taken_again() -> None:
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
