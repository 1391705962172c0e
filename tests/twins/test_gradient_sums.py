"""`GradientSums` against sums of torch in 16 bits, and `follow_changes` against real changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from altgrad import Recipe
from altgrad.recipes.rounding_generators import RoundingGenerators
from altgrad.twins.gradient_sums import GradientSums, follow_changes
from altgrad.twins.layer_plan import LaneKind
from altgrad.twins.layout import Bucket, Layout
from altgrad.twins.run_weights import RunWeights
from altgrad.twins.sample import Sampled

CPU = torch.device("cpu")
LENGTH = 256


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw numbers of many magnitudes."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random) * 2.0 ** torch.randint(
        -8, 8, shape, generator=random
    )


def make_sums(*recipes: Recipe, dtype: torch.dtype = torch.float32) -> GradientSums:
    generators = {each.name: RoundingGenerators(5) for each in recipes}
    return GradientSums(recipes, generators, [100, LENGTH - 100], dtype, CPU)


def add(sums: GradientSums, micro: Tensor, before: Tensor | None) -> None:
    sums.micro[:LENGTH] = micro
    if before is not None:
        sums.before[:LENGTH] = before
    sums.add()


def read(sums: GradientSums, name: str = "low") -> Tensor:
    assert sums.sums[name][LENGTH] == sums.total[LENGTH] == 0
    return sums.sums[name][:LENGTH]


def add_all(sums: GradientSums, micros: Tensor) -> Tensor:
    """Add micro-gradients as backward passes do; return what a parameter's `grad` is then."""
    parameter = torch.zeros(LENGTH, dtype=micros.dtype, requires_grad=True)
    for micro in micros:
        add(sums, micro, parameter.grad)
        parameter.backward(micro)
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize(
    "run", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_those_of_a_buffer_in_16_bits(low: torch.dtype, run: torch.dtype) -> None:
    sums = make_sums(Recipe("low", accumulate=low), dtype=run)
    micros = draw(40, LENGTH).to(run)
    grad, buffer = add_all(sums, micros), torch.zeros(LENGTH, dtype=low)
    for micro in micros:
        # torch adds 16 bits in float32, but takes float64 to float32 first.
        buffer = (
            (buffer.to(micro.dtype) + micro).to(low) if run == torch.float64 else buffer.add_(micro)
        )
    assert torch.equal(read(sums).double(), buffer.double())
    assert torch.equal(sums.total[:LENGTH], grad)


@pytest.mark.parametrize("run", [torch.float64, torch.bfloat16], ids=str)
def test_sums_in_fp32_are_those_of_a_buffer_in_float32(run: torch.dtype) -> None:
    sums = make_sums(Recipe("fine", accumulate="fp32"), dtype=run)
    micros = draw(40, LENGTH).to(run)
    add_all(sums, micros)
    buffer = torch.zeros(LENGTH)
    for micro in micros:
        buffer = (buffer.to(torch.promote_types(run, torch.float32)) + micro).float()
    assert torch.equal(read(sums, "fine").double(), buffer.double())


def test_stochastic_rounding_has_the_right_mean_and_stays_on_the_grid() -> None:
    micros = torch.full((300, LENGTH), 2.0**-10)
    micros[0] = 1.0
    recipes = [
        Recipe(way, accumulate="bf16", rounding=way) for way in ("nearest_even", "stochastic")
    ]
    sums = make_sums(*recipes)
    add_all(sums, micros)
    nearest, random = (read(sums, each.name) for each in recipes)
    assert torch.equal(nearest, torch.ones(LENGTH))  # half a spacing at 1 is 2**-8
    assert torch.equal(random, random.bfloat16().float())
    # A sum has a variance of about 299 · 2**-10 · 2**-7, so that the mean of 256 is off by 0.003.
    assert random.mean().item() == pytest.approx(1 + 299 / 1024, abs=0.012)


def test_a_sum_begins_anew_where_the_gradients_were_zeroed() -> None:
    sums = make_sums(Recipe("low", accumulate="bf16"))
    add_all(sums, draw(7, LENGTH))
    micros = draw(7, LENGTH, seed=1)
    again = make_sums(Recipe("low", accumulate="bf16"))
    add(sums, micros[0], torch.zeros(LENGTH))
    add(again, micros[0], None)
    assert torch.equal(read(sums), read(again))
    assert torch.equal(sums.total[:LENGTH], micros[0])


def test_a_sum_goes_on_from_what_something_else_has_written() -> None:
    sums = make_sums(Recipe("low", accumulate="bf16"))
    grad = add_all(sums, draw(7, LENGTH))
    expected = read(sums).clone()
    grad[:100] = 0.5 * draw(100, seed=3).bfloat16().float()
    expected[:100] = grad[:100]
    micro = draw(LENGTH, seed=4)
    add(sums, micro, grad)
    assert torch.equal(read(sums), expected.bfloat16().add_(micro).float())


# --- changes before a step


def make_places(*counts: int) -> RunWeights:
    """Return the places of layers with these numbers of sampled elements."""
    names = [f"layer {number}" for number, _ in enumerate(counts)]
    run = RunWeights(LaneKind(torch.float32, torch.float32, CPU, 1))
    layers = {
        name: Sampled(torch.zeros(n), torch.Size([n]), torch.arange(n))
        for name, n in zip(names, counts, strict=True)
    }
    run.rearrange(layers, Layout((Bucket(0, dict(zip(names, counts, strict=True))),)))
    return run


COUNTS = (200, 70, 10)
TOTAL = torch.cat([draw(280, seed=7), torch.zeros(40)])  # a bucket is padded to 64
LOW = TOTAL.bfloat16().float()


def follow(applied: Tensor, low: Tensor = LOW, total: Tensor = TOTAL) -> Tensor:
    return follow_changes({"low": low}, total, applied, make_places(*COUNTS))["low"]


def test_without_a_change_sums_stay_as_they_are() -> None:
    assert torch.equal(follow(TOTAL), LOW)


@pytest.mark.parametrize("power", [-16, -1, 3])
def test_a_loss_scale_divides_other_sums_just_as_the_run_s(power: int) -> None:
    assert torch.equal(follow(TOTAL * 2.0**power), LOW * 2.0**power)


def test_clipping_multiplies_other_sums_by_the_very_factor_of_the_run() -> None:
    exact = 0
    for factor in torch.rand(200, generator=torch.Generator().manual_seed(0)):
        followed, expected = follow(TOTAL * factor), LOW * factor
        exact += torch.equal(followed, expected)
        torch.testing.assert_close(followed, expected, rtol=2.0**-22, atol=0)
    assert exact >= 150  # in small layers the factor may be off by its last bit


def test_each_layer_has_a_factor_of_its_own() -> None:
    factors = torch.tensor([0.5] * 200 + [2.0] * 70 + [0.0] * 10 + [1.0] * 40)
    assert torch.equal(follow(TOTAL * factors), LOW * factors)


def test_noise_on_the_gradients_of_the_run_is_added_to_other_sums() -> None:
    applied = TOTAL + torch.cat([0.1 * draw(280, seed=9), torch.zeros(40)])
    error = LOW - TOTAL
    torch.testing.assert_close(follow(applied) - applied, error, rtol=0.1, atol=1e-4)


def test_gradients_of_a_layer_without_a_sum_are_taken_as_they_are() -> None:
    applied = draw(320, seed=8)
    assert torch.equal(follow(applied, torch.zeros(320), torch.zeros(320)), applied)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_infinite_gradient_stays_where_it_is(value: float) -> None:
    applied, total = TOTAL.clone(), TOTAL.clone()
    applied[[3, 250]] = total[[3, 250]] = value
    followed = follow(applied, total=total)
    torch.testing.assert_close(followed[[3, 250]], applied[[3, 250]], equal_nan=True)
    finite = applied.isfinite()
    assert torch.equal(followed[finite], LOW[finite])


def test_the_rounding_of_16_bits_by_clipping_is_no_part_of_a_finer_sum() -> None:
    total, fine = TOTAL.bfloat16(), TOTAL
    applied = total * torch.tensor(0.3, dtype=torch.bfloat16)
    followed = follow(applied, fine, total)
    for ratios in (followed / fine)[:280].split(COUNTS):
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-6, atol=0)
        assert ratios[0].item() == pytest.approx(0.3008, rel=2.0**-8)
