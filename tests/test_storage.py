"""Weights that live on a format's grid: the values, the scales, and what arrives of updates."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from altgrad import SamplingRule, StepObserver, UpdateMonitor, WeightStorage, get_format

ML = {"bf16": ml_dtypes.bfloat16, "e4m3fn": ml_dtypes.float8_e4m3fn, "fp16": np.float16}


class Given(torch.optim.Optimizer):
    """Applies the updates that the test says."""

    def __init__(self, parameters, update=None) -> None:
        super().__init__(parameters, {})
        self.update = update

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                update = self.update(parameter) if callable(self.update) else self.update
                parameter.add_(update)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16, generator=generator)).square().mean().backward()
        optimizer.step()


def rounded(x: np.ndarray, format: str, scale: float = 1.0) -> np.ndarray:
    return (x / np.float32(scale)).astype(ML[format]).astype(np.float32) * np.float32(scale)


def scale_for(amax: float, format: str) -> float:
    """The smallest power of two with which the format reaches amax."""
    scale = 2.0 ** math.floor(math.log2(amax / get_format(format).max) - 1)
    while scale * get_format(format).max < amax:
        scale *= 2
    return scale


# What is stored


@pytest.mark.parametrize("format", ML)
def test_each_step_is_rounded_as_ml_dtypes_does(format: str) -> None:
    weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD([weight], lr=0.125)
    expected = weight.detach().numpy().copy()
    scale = 1.0 if format != "e4m3fn" else scale_for(abs(expected).max(), format)
    WeightStorage(format).attach(optimizer)
    expected = rounded(expected, format, scale)
    assert np.array_equal(weight.detach().numpy(), expected)
    for step in range(20):
        weight.grad = torch.randn(64, generator=torch.Generator().manual_seed(step + 1)) / 8
        wanted = expected - np.float32(0.125) * weight.grad.numpy()
        optimizer.step()
        if format == "e4m3fn":
            scale = max(scale, scale_for(abs(wanted).max(), format))
        expected = rounded(wanted, format, scale)
        assert np.array_equal(weight.detach().numpy(), expected), step


def test_scales_grow_by_powers_of_two_and_never_shrink() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 0.25]))
    optimizer = Given([weight], torch.tensor([-0.5, 0.0]))
    storage = WeightStorage("e4m3fn").attach(optimizer)
    scales = [scale_of(storage)]
    optimizer.step()
    scales.append(scale_of(storage))
    optimizer.update = torch.tensor([6.0, 0.0])
    optimizer.step()
    scales.append(scale_of(storage))
    assert scales == [scale_for(1.0, "e4m3fn")] * 2 + [scale_for(6.5, "e4m3fn")]
    assert weight[0] == 6.5


def scale_of(storage: WeightStorage) -> float:
    ((_, layer),) = storage.state_dict()["layers"].items()
    return layer["scales"].item()


def test_a_layer_of_zeros_is_scaled_by_its_first_weights() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = Given([weight], torch.tensor([1e-3, 2e-3, 0.0]))
    storage = WeightStorage("e4m3fn").attach(optimizer)
    assert scale_of(storage) == 0
    optimizer.step()
    assert scale_of(storage) == scale_for(2e-3, "e4m3fn")
    assert weight.tolist() == pytest.approx([1e-3, 2e-3, 0.0], rel=0.07)


@pytest.mark.parametrize(
    ("format", "scaling"),
    [
        *(("bf16", "tensor"), ("e4m3fn", "tensor"), ("e5m2", "channel"), ("e2m1", ("block", 8))),
        *(("mxfp8_e4m3", "tensor"), ("mxfp4", "tensor"), ("e4m3fn", None)),
    ],
)
def test_what_stalls_is_what_the_monitor_predicts_from_the_fp32_step(format, scaling) -> None:
    """On the same grid, so that it is the same elements, not about as many."""
    fp32, stored = net(), net()
    generator = torch.Generator().manual_seed(1)
    # Towards 0, so that no scale has to grow.
    updates = [
        -1e-2 * p.sign() * torch.rand(p.shape, generator=generator) for p in net().parameters()
    ]
    optimizer = Given(fp32.parameters(), by_position(fp32, updates))
    settings = {"scaling": scaling, "max_elements": None, "strict": True}
    with UpdateMonitor(fp32, formats=format, **settings).attach(optimizer) as monitor:
        for p in fp32.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    optimizer = Given(stored.parameters(), by_position(stored, updates))
    WeightStorage(format, scaling).attach(optimizer)
    before = [p.detach().clone() for p in stored.parameters()]
    optimizer.step()
    for (name, p), old, update in zip(stored.named_parameters(), before, updates, strict=True):
        if update.any():
            stalled = (p.detach() == old)[update != 0].double().mean().item()
            predicted = monitor.latest.layers[name][f"stall_frac/{get_format_name(format)}"]
            assert predicted == pytest.approx(stalled, abs=1e-12), name


def by_position(model: nn.Module, updates: list[torch.Tensor]):
    position = {p: index for index, p in enumerate(model.parameters())}
    return lambda p: updates[position[p]]


def get_format_name(format: str) -> str:
    return format if format.startswith("mx") else get_format(format).name


# What arrives


def test_small_updates_are_lost_to_nearest_and_arrive_by_either_remedy() -> None:
    ends = {}
    for name, remedy in {
        "nearest": {},
        "stochastic": {"rounding": "stochastic"},
        "kahan": {"compensation": "kahan"},
    }.items():
        weight = nn.Parameter(torch.ones(20_000))
        optimizer = Given([weight], 1e-4)
        WeightStorage("bf16", **remedy).attach(optimizer)
        for _ in range(1000):
            optimizer.step()
        ends[name] = weight.detach()
    assert (ends["nearest"] == 1).all()
    assert ends["stochastic"].mean() == pytest.approx(1.1, abs=0.002)
    assert ends["stochastic"].unique().numel() > 5
    assert ends["kahan"].unique().tolist() == [pytest.approx(1.1, abs=2**-8)]


def test_kahan_keeps_what_was_lost_and_no_more_beyond_the_top() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 400.0]))
    optimizer = Given([weight], torch.tensor([0.01, 100.0]))
    storage = WeightStorage("e4m3fn", None, compensation="kahan").attach(optimizer)
    for _ in range(50):
        optimizer.step()
    (layer,) = storage.state_dict()["layers"].values()
    assert (weight + layer["lost"])[0].item() == pytest.approx(1.5, abs=2e-3)
    assert weight[1] == 448
    assert layer["lost"][1] == 32  # one step of the grid there
    optimizer.update = torch.tensor([0.0, -100.0])
    optimizer.step()
    assert weight[1] == 384


def test_kahan_keeps_what_the_first_rounding_lost() -> None:
    weight = nn.Parameter(torch.tensor([1.05]))
    storage = WeightStorage("e4m3fn", None, compensation="kahan").attach(Given([weight]))
    (layer,) = storage.state_dict()["layers"].values()
    assert weight.item() == 1.0
    assert (weight + layer["lost"]).item() == pytest.approx(1.05, abs=0.05 * 2**-8)


@pytest.mark.parametrize(("format", "digits"), [("bf16", 7), ("e4m3fn", 3), ("fp16", 10)])
def test_kahan_loses_in_turn_what_is_below_2_to_the_m_plus_10(format: str, digits: int) -> None:
    """As the docstring says: a remainder in bf16 has digits of its own."""
    ends = []
    for update in (0.75 * 2.0 ** -(digits + 10), 1.25 * 2.0 ** -(digits + 10)):
        weight = nn.Parameter(torch.ones(1))
        optimizer = Given([weight], update)
        WeightStorage(format, None, compensation="kahan").attach(optimizer)
        for _ in range(3000):
            optimizer.step()
        ends.append(weight.item())
    assert ends[0] == 1
    assert ends[1] > 1


def test_stochastic_rounding_depends_on_its_seed_alone_and_touches_no_other() -> None:
    def run(seed: int, noise: int) -> list[torch.Tensor]:
        model = net()
        torch.manual_seed(noise)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        state = torch.get_rng_state()
        WeightStorage("e4m3fn", rounding="stochastic", seed=seed).attach(optimizer)
        train(model, optimizer, 5)
        assert torch.equal(state, torch.get_rng_state())
        return [p.detach() for p in model.parameters()]

    first, same, other = run(0, 0), run(0, 1), run(1, 0)
    assert all(map(torch.equal, first, same))
    assert not all(map(torch.equal, first, other))


# Layers


def test_rules_say_what_each_layer_is_stored_in() -> None:
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


def test_an_optimizer_that_knows_names_needs_no_module() -> None:
    model = net()
    rules = [SamplingRule("0.*", enabled=False)]
    storage = WeightStorage("bf16", layers=rules)
    storage.attach(torch.optim.SGD([*model.named_parameters()], lr=0.1))
    assert [*storage.formats] == ["1.weight", "1.bias", "2.weight", "2.bias"]
    with pytest.raises(ValueError, match=r"attach\(optimizer, module=model\)"):
        WeightStorage("bf16", layers=rules).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    nameless = WeightStorage("bf16").attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert [*nameless.formats][:2] == ["parameter 0", "parameter 1"]


def test_odd_weights() -> None:
    odd = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(0.3),
        "nan": torch.tensor([math.nan, 1.0, math.inf]),
        "double": torch.rand(3, dtype=torch.float64),
        "tail": torch.rand(2, 5),
    }
    for format, scaling in [("bf16", "tensor"), ("e4m3fn", "channel"), ("mxfp4", "tensor")]:
        parameters = {name: nn.Parameter(each.clone()) for name, each in odd.items()}
        optimizer = Given([*parameters.items()], 0.125)
        WeightStorage(format, scaling, compensation="kahan").attach(optimizer)
        optimizer.step()
        assert parameters["nan"][0].isnan()
        assert parameters["nan"][1].isfinite()
        assert parameters["nan"][2].isinf()
        assert all(p.shape == odd[name].shape for name, p in parameters.items())
        assert all(p.dtype == odd[name].dtype for name, p in parameters.items())


@pytest.mark.parametrize("remedy", [{}, {"rounding": "stochastic"}, {"compensation": "kahan"}])
@pytest.mark.parametrize("format", ["bf16", "fp16", "e4m3fn", "mxfp4"])
def test_what_is_not_finite_stays_and_is_forgotten_once_it_is_mended(format: str, remedy) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 0.5, 0.25]))
    optimizer = Given([weight], torch.tensor([math.inf, math.nan, 0.0]))
    WeightStorage(format, **remedy).attach(optimizer)
    optimizer.step()
    assert weight[0].item() == math.inf
    assert weight[1].isnan()
    assert weight[2] == 0.25
    weight.data.copy_(torch.tensor([1.0, 0.5, 0.25]))
    optimizer.update = 0.0
    optimizer.step()
    assert weight.tolist() == [1.0, 0.5, 0.25]


def test_a_step_that_calls_its_super_is_stored_once() -> None:
    class Twice(Given):
        def step(self, closure=None) -> None:
            super().step()
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(-0.0015)

    Given([nn.Parameter(torch.ones(1))])  # from then on torch calls hooks in super().step(), too
    weight = nn.Parameter(torch.ones(1))
    optimizer = Twice([weight], -0.0015)
    WeightStorage("bf16").attach(optimizer)
    optimizer.step()
    assert weight.item() == torch.tensor(1 - 0.003).bfloat16().item() < 1


def test_a_parameter_that_is_added_later_is_told_of_once_and_left_alone() -> None:
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


def test_weights_that_cannot_be_stored_are_named() -> None:
    half = Given([("head", nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))])
    with pytest.raises(
        ValueError, match=r"head has dtype torch\.bfloat16, which is no finer than bf16"
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
        (("nvfp4",), {}, "no powers of two"),
        (("bf16", "row"), {}, "scaling='row'"),
        (("bf16",), {"rounding": "up"}, "rounding='up': expected 'nearest_even' or 'stochastic'"),
        (("bf16",), {"compensation": True}, "compensation=True: expected None or 'kahan'"),
        (
            ("bf16",),
            {"rounding": "stochastic", "compensation": "kahan"},
            "expected one of them; what is kept and rounded at random again would move weights",
        ),
        (("bf16",), {"layers": [SamplingRule("*", formats=["bf16", "e5m2"])]}, "expected one"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightStorage(*arguments, **settings)


def test_a_rule_that_matches_nothing_is_an_error_and_nothing_is_stored() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="matches none of 6 layers"):
        WeightStorage("bf16", layers=[SamplingRule("heads.*")]).attach(optimizer, module=model)
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer._optimizer_step_post_hooks


# With observers, and in time


def test_an_observer_sees_what_is_stored_and_must_come_later() -> None:
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


@pytest.mark.parametrize(
    ("stored", "hidden"),
    [
        ("bf16", {"fp16", "bf16"}),
        ("e4m3fn", {"fp16", "bf16", "e4m3fn", "mxfp8_e4m3"}),
        ("mxfp8_e5m2", {"fp16", "bf16", "e4m3fn", "mxfp8_e4m3", "e5m2"}),
    ],
)
def test_a_monitor_does_not_judge_what_is_stored_no_finer(stored: str, hidden: set[str]) -> None:
    """All that it sees then lies on that grid: it would call frozen layers fine."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    storage = WeightStorage(stored, layers=[SamplingRule("2.*", enabled=False)])
    storage.attach(optimizer, module=model)
    formats = ["fp16", "bf16", "e4m3fn", "mxfp8_e4m3", "e5m2", "mxfp4"]
    monitor = UpdateMonitor(model, formats=formats, strict=True)
    with pytest.warns(UserWarning, match=r"cannot judge .*bf16.*stores in e?[45bm].*unmoved_frac"):
        monitor.attach(optimizer)
    train(model, optimizer, 2)
    for name, figures in monitor.latest.layers.items():
        judged = {key.split("/")[1] for key in figures if key.startswith("stall_frac/")}
        assert judged == {*formats} - ({*hidden} if name[0] != "2" else set()), name
    assert monitor.layers["0.weight"].formats == tuple(f for f in formats if f not in hidden)
    assert monitor.latest.model["stall_frac/bf16"] > 0  # of the layer that is not stored
    monitor.detach()
    storage.detach()
    again = UpdateMonitor(model, formats=formats, strict=True).attach(optimizer)  # no warning
    train(model, optimizer, 1)
    assert "stall_frac/bf16" in again.latest.layers["0.weight"]


@pytest.mark.parametrize("remedy", [{}, {"rounding": "stochastic"}, {"compensation": "kahan"}])
@pytest.mark.parametrize("format", ["bf16", "e4m3fn", "mxfp8_e4m3"])
def test_a_resumed_run_goes_on_exactly(format: str, remedy) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    storage = WeightStorage(format, **remedy).attach(optimizer)
    train(model, optimizer, 4)
    state, weights = storage.state_dict(), {n: p.clone() for n, p in model.state_dict().items()}
    state = {"layers": {n: clone(s) for n, s in state["layers"].items()}, **clone(state)}
    train(model, optimizer, 4, seed=2)

    resumed = net()
    resumed.load_state_dict(weights)
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.3)
    storage = WeightStorage(format, **remedy)
    storage.load_state_dict(state)
    storage.attach(optimizer)
    train(resumed, optimizer, 4, seed=2)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))
    with pytest.raises(RuntimeError, match="before attach"):
        storage.load_state_dict(state)


def test_attached_again_it_goes_on_with_its_scales_and_what_was_lost() -> None:
    weight = nn.Parameter(torch.tensor([64.0, 1.0]))
    optimizer = Given([weight], torch.tensor([-63.0, 0.01]))
    storage = WeightStorage("e4m3fn", compensation="kahan").attach(optimizer)
    with pytest.raises(RuntimeError, match=r"give all optimizers to one attach\(\)"):
        storage.attach(optimizer)
    optimizer.step()
    before = storage.state_dict()["layers"]["parameter 0"]
    storage.detach()
    storage.attach(optimizer)
    after = storage.state_dict()["layers"]["parameter 0"]
    assert after["scales"] == before["scales"] == scale_for(64.0, "e4m3fn")
    assert torch.equal(after["lost"], before["lost"])
    assert before["lost"][1] > 0
    optimizer.step()
    assert not torch.equal(storage.state_dict()["layers"]["parameter 0"]["lost"], after["lost"])
    assert torch.equal(after["lost"], before["lost"])  # they are copies
    loaded = WeightStorage("e4m3fn", compensation="kahan")
    loaded.load_state_dict(storage.state_dict())
    loaded.attach(optimizer)
    optimizer.step()
    now = loaded.state_dict()["layers"]["parameter 0"]
    loaded.detach()
    loaded.attach(optimizer)
    assert torch.equal(loaded.state_dict()["layers"]["parameter 0"]["lost"], now["lost"])


def test_states_of_other_storages_are_refused_or_told_of() -> None:
    def stored(scaling="tensor", shape=(2, 3), name: str = "weight") -> tuple:
        optimizer = Given([(name, nn.Parameter(torch.ones(shape)))], 0.01)
        return WeightStorage("e4m3fn", scaling, compensation="kahan"), optimizer

    def state_of(*arguments, **settings):
        storage, optimizer = stored(*arguments, **settings)
        return storage.attach(optimizer).state_dict()

    storage, optimizer = stored()
    with pytest.raises(ValueError, match=r"keys \['weights'\]: expected what WeightStorage"):
        storage.load_state_dict({"weights": {}})
    storage.load_state_dict({"layers": {"weight": {"format": "bf16"}}, "generators": {}})
    with pytest.raises(ValueError, match=r"weight has the keys \['format'\]: expected what"):
        storage.attach(optimizer)
    storage.load_state_dict(state_of(shape=(3, 3)))
    with pytest.raises(ValueError, match=r"weight has what was lost of shape \(3, 3\): expected"):
        storage.attach(optimizer)
    storage.load_state_dict(state_of(name="head.weight"))
    with pytest.warns(UserWarning, match=r"1 layers .* not stored now, among them head.weight:"):
        storage.attach(optimizer)
    storage, optimizer = stored()
    storage.load_state_dict(state_of("channel"))  # scales that are shared otherwise begin anew
    storage.attach(optimizer)
    assert scale_of(storage) == scale_for(1.0, "e4m3fn")
    storage, optimizer = stored("channel")
    storage.load_state_dict(state_of("channel", shape=(3, 3)) | {})
    with pytest.raises(ValueError, match=r"has scales of shape \(3, 1\): expected \(2, 1\)"):
        storage.attach(optimizer)


def clone(state):
    if isinstance(state, dict):
        return {key: clone(value) for key, value in state.items()}
    return state.clone() if isinstance(state, torch.Tensor) else state


def test_after_detach_weights_are_free() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = Given([weight], 1e-4)
    with WeightStorage("bf16").attach(optimizer):
        optimizer.step()
    optimizer.step()
    assert weight.item() == pytest.approx(1.0001, rel=1e-6)
