"""`WeightStorage`: weights on the grid of a format, their scales, and the effect of updates."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from altgrad import UpdateMonitor, WeightStorage, get_format
from tests.recipes.storing import Given, net, scale_for, scale_of, train

ML = {"bf16": ml_dtypes.bfloat16, "e4m3fn": ml_dtypes.float8_e4m3fn, "fp16": np.float16}


def rounded(x: np.ndarray, format: str, scale: float = 1.0) -> np.ndarray:
    return (x / np.float32(scale)).astype(ML[format]).astype(np.float32) * np.float32(scale)


# Stored weights


@pytest.mark.parametrize("format", ML)
def test_each_step_rounds_like_ml_dtypes(format: str) -> None:
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


def test_a_layer_of_zeros_gets_its_scale_when_weights_first_move() -> None:
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
def test_the_stalled_weights_are_those_the_monitor_predicts_from_the_fp32_step(
    format, scaling
) -> None:
    """The grid is the same, so that the same elements stall, not only as many."""
    fp32, stored = net(), net()
    generator = torch.Generator().manual_seed(1)
    # Toward 0, so that no scale grows.
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


# Effects of updates


def test_small_updates_are_lost_by_nearest_and_kept_by_stochastic_or_kahan() -> None:
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


def test_kahan_keeps_at_most_one_spacing_beyond_the_top() -> None:
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


def test_kahan_keeps_the_error_of_the_first_rounding() -> None:
    weight = nn.Parameter(torch.tensor([1.05]))
    storage = WeightStorage("e4m3fn", None, compensation="kahan").attach(Given([weight]))
    (layer,) = storage.state_dict()["layers"].values()
    assert weight.item() == 1.0
    assert (weight + layer["lost"]).item() == pytest.approx(1.05, abs=0.05 * 2**-8)


def train_with_kahan(*, has_gradient: bool, found_inf: float | None) -> list[torch.Tensor]:
    """Step once, store again without an update, and return weights and errors after each."""
    torch.manual_seed(0)
    weight = nn.Parameter(1 + torch.rand(20_000))
    optimizer = Given([weight], 1e-4)
    storage = WeightStorage("bf16", None, compensation="kahan").attach(optimizer)
    optimizer.step()
    optimizer.update = 0.0
    weight.grad = torch.zeros_like(weight) if has_gradient else None
    if found_inf is not None:
        optimizer.found_inf = torch.tensor([found_inf])
    found = []
    for _ in range(2):
        (layer,) = storage.state_dict()["layers"].values()
        found += [weight.detach().clone(), layer["lost"]]
        optimizer.step()
    return found


def test_kahan_leaves_a_layer_without_a_step_as_it_was() -> None:
    """An error of almost half a spacing is half a spacing in bf16, which rounds to a neighbour."""
    for has_gradient, found_inf in ((False, None), (True, 1.0)):
        found = train_with_kahan(has_gradient=has_gradient, found_inf=found_inf)
        weight, lost, weight_again, lost_again = found
        assert torch.equal(weight, weight_again)
        assert torch.equal(lost, lost_again)
    for found_inf in (None, 0.0):  # a step that was made stores, as it always did
        weight, _, weight_again, _ = train_with_kahan(has_gradient=True, found_inf=found_inf)
        assert not torch.equal(weight, weight_again)


@pytest.mark.parametrize(("format", "digits"), [("bf16", 7), ("e4m3fn", 3), ("fp16", 10)])
def test_kahan_loses_updates_below_2_to_the_minus_m_minus_10(format: str, digits: int) -> None:
    """The rounding error is kept in bf16, which rounds it again."""
    ends = []
    for update in (0.75 * 2.0 ** -(digits + 10), 1.25 * 2.0 ** -(digits + 10)):
        weight = nn.Parameter(torch.ones(1))
        optimizer = Given([weight], update)
        WeightStorage(format, None, compensation="kahan").attach(optimizer)
        for _ in range(600):  # 410 steps of the larger update add up to half a spacing
            optimizer.step()
        ends.append(weight.item())
    assert ends[0] == 1
    assert ends[1] > 1


def test_stochastic_rounding_depends_on_its_seed_only_and_uses_no_global_generator() -> None:
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


# Unusual weights and steps


def test_scalar_empty_nonfinite_and_float64_weights_keep_their_shape_and_dtype() -> None:
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
def test_nan_and_inf_stay_and_have_no_effect_after_they_are_repaired(format: str, remedy) -> None:
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


def test_a_step_that_calls_super_is_rounded_once() -> None:
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
