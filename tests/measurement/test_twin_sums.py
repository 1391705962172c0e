"""`measure_twins`: each column against a loop over elements in exact fractions."""

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from altgrad.measurement import twin_sums
from altgrad.measurement.twin_sums import (
    RATIOS,
    TwinColumns,
    TwinStack,
    measure_alone,
    measure_twins,
)

STATES = ("exp_avg", "exp_avg_sq")
WEIGHTS = ("start", "window", "before", "now")


def make_stack(
    layers: int, width: int, seed: int, dtype: torch.dtype = torch.float32, states: object = STATES
) -> TwinStack:
    """Make a sample of random numbers, some of which did not move, and some states of 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = layers, width
    start, *steps = (torch.randn(shape, generator=generator) for _ in range(4))
    moved, in_window, *zeros = (torch.rand(shape, generator=generator) < 0.5 for _ in range(4))
    moved |= in_window
    now = start + torch.where(moved, steps[0], 0)
    return TwinStack(
        start.to(dtype),
        (start + steps[1]).to(dtype),
        (start + steps[2]).to(dtype),
        now.to(dtype),
        in_window,
        moved,
        {
            name: torch.where(zero, 0, torch.randn(shape, generator=generator)).to(dtype)
            for name, zero in zip(states, zeros, strict=False)
        },
    )


def exact(numbers: Tensor, layer: int, place: int) -> Fraction:
    return Fraction(numbers[layer, place].item())


def is_finite(stack: TwinStack, layer: int, place: int) -> bool:
    return all(math.isfinite(getattr(stack, name)[layer, place]) for name in WEIGHTS)


Pair = tuple[Fraction, Fraction]
Define = Callable[[TwinStack, TwinStack, int, int], Pair]


def share_of_unmoved(flag: str) -> Define:
    def define(low: TwinStack, high: TwinStack, layer: int, place: int) -> Pair:
        if not getattr(high, flag)[layer, place]:
            return Fraction(0), Fraction(0)
        return Fraction(0 if getattr(low, flag)[layer, place] else 1), Fraction(1)

    return define


def projection_since(first: str) -> Define:
    def define(low: TwinStack, high: TwinStack, layer: int, place: int) -> Pair:
        way, way32 = (
            exact(stack.now, layer, place) - exact(getattr(stack, first), layer, place)
            for stack in (low, high)
        )
        return way * way32, way32 * way32

    return define


def define_drift(low: TwinStack, high: TwinStack, layer: int, place: int) -> Pair:
    apart = exact(low.now, layer, place) - exact(high.now, layer, place)
    way32 = exact(high.now, layer, place) - exact(high.start, layer, place)
    return apart * apart, way32 * way32


def define_moved_rms(low: TwinStack, high: TwinStack, layer: int, place: int) -> Pair:
    way32 = exact(high.now, layer, place) - exact(high.start, layer, place)
    return way32 * way32, Fraction(1)


def define_decay(low: TwinStack, high: TwinStack, layer: int, place: int) -> Pair:
    weight32 = exact(high.now, layer, place)
    return (exact(low.now, layer, place) - weight32) * weight32, weight32 * weight32


def define_moved(low: TwinStack, high: TwinStack, layer: int, place: int) -> Pair:
    moved = exact(low.now, layer, place) != exact(low.start, layer, place)
    return Fraction(moved), Fraction(1)


DEFINITIONS: dict[str, Define] = {
    "progress_kept": projection_since("start"),
    "window_progress_kept": projection_since("window"),
    "drift": define_drift,
    "moved_rms": define_moved_rms,
    "frozen_frac": share_of_unmoved("moved"),
    "still_frac": share_of_unmoved("moved_in_window"),
    "step_projection": projection_since("before"),
    "decay_projection": define_decay,
    "moved_since_start_frac": define_moved,
}


def define_row(
    mask: Sequence[bool], high: TwinStack, low: TwinStack, layer: int, block: int
) -> dict[str, object]:
    """Return the five sums of each ratio, the median of each state, and the moved elements."""
    places = [place for place, inside in enumerate(mask) if inside]
    finite = [k for k in places if is_finite(low, layer, k) and is_finite(high, layer, k)]
    pairs = {
        name: {k: define(low, high, layer, k) for k in finite}
        for name, define in DEFINITIONS.items()
    }
    pairs["twin_nonfinite_frac"] = {k: (Fraction(k not in finite), Fraction(1)) for k in places}
    row: dict[str, object] = {}
    for name in STATES:
        pairs[f"{name}_error"], pairs[f"{name}_zero_frac"], quotients = {}, {}, []
        for k in finite if name in low.states and name in high.states else []:
            state, state32 = (each.states[name][layer, k].item() for each in (low, high))
            if math.isfinite(state) and math.isfinite(state32):
                apart = Fraction(state) - Fraction(state32)
                pairs[f"{name}_error"][k] = apart * apart, Fraction(state32) ** 2
            if math.isfinite(state) and math.isfinite(state32) and state32 != 0:
                pairs[f"{name}_zero_frac"][k] = Fraction(state == 0), Fraction(1)
                quotients.append(state / state32)
        quotients.sort()
        row[f"{name}_ratio"] = quotients[(len(quotients) - 1) // 2] if quotients else math.nan
    for name, by_place in pairs.items():
        units: dict[int, Pair] = {}
        for k, (a, b) in by_place.items():
            old = units.get(k // block, (Fraction(0), Fraction(0)))
            units[k // block] = old[0] + a, old[1] + b
        each = units.values()
        row[name] = (
            sum(a for a, _ in each),
            sum(b for _, b in each),
            sum(a * a for a, _ in each),
            sum(a * b for a, b in each),
            sum(b * b for _, b in each),
        )
    row["moved"] = sum(bool(high.moved[layer, k]) for k in places if is_finite(high, layer, k))
    return row


def assert_as_defined(
    mask: Tensor, high: TwinStack, twins: Sequence[TwinStack], *blocks: int
) -> Tensor:
    """Compare with the definition; `blocks` has the size in all layers, or in each."""
    columns, blocks = TwinColumns(STATES), blocks or (1,)
    sizes = blocks if len(blocks) > 1 else blocks * len(mask)
    found = measure_twins(mask, high, twins, STATES, blocks=sizes)
    assert found.shape == (len(mask), len(twins), len(columns))
    assert found.dtype == torch.float64
    for layer, recipe in itertools.product(range(len(mask)), range(len(twins))):
        row = found[layer, recipe].tolist()
        expected = define_row(mask[layer].tolist(), high, twins[recipe], layer, sizes[layer])
        for k, name in enumerate(columns.ratios):
            numbers = [float(number) for number in expected[name]]  # type: ignore[attr-defined]
            assert row[5 * k : 5 * k + 5] == pytest.approx(numbers, rel=1e-11, abs=1e-13), name
        middle = 5 * len(columns.ratios)
        for k, name in enumerate(columns.medians):
            assert row[middle + k] == pytest.approx(expected[name], rel=1e-15, nan_ok=True), name
        assert row[-1] == expected["moved"]
    return found


def test_columns_are_five_sums_of_each_ratio_then_medians_then_a_count() -> None:
    columns = TwinColumns(STATES)
    own = (f"{state}_{end}" for state in STATES for end in ("error", "zero_frac"))
    assert columns.ratios == (*RATIOS, *own)
    assert columns.roots == ("drift", "moved_rms", "exp_avg_error", "exp_avg_sq_error")
    assert columns.medians == ("exp_avg_ratio", "exp_avg_sq_ratio")
    assert len(columns) == 14 * 5 + 2 + 1
    assert len(TwinColumns()) == 10 * 5 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("block", [1, 4])
def test_each_column_equals_its_definition(dtype: torch.dtype, block: int) -> None:
    mask = torch.arange(12) < torch.tensor([[12], [5], [1], [0]])
    twins = [make_stack(4, 12, seed, dtype) for seed in (1, 2, 3)]
    assert_as_defined(mask, make_stack(4, 12, 0), twins, block)


def test_each_layer_has_blocks_of_its_own_size() -> None:
    mask = torch.arange(12) < torch.tensor([[12], [9], [4], [0], [1]])
    mask[1, 7] = False  # a short block at the end of a row
    twins = [make_stack(5, 12, seed) for seed in (1, 2)]
    assert_as_defined(mask, make_stack(5, 12, 0), twins, 4, 5, 1, 4, 8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", WEIGHTS)
@pytest.mark.parametrize("is_low", [True, False], ids=["twin", "fp32"])
def test_elements_that_are_not_finite_count_as_such_alone(
    bad: float, place: str, is_low: bool
) -> None:
    mask = torch.ones(2, 8, dtype=torch.bool)
    high, low, other = (make_stack(2, 8, seed) for seed in (0, 1, 2))
    getattr(low if is_low else high, place)[0, 3] = bad
    found = assert_as_defined(mask, high, [low, other], 2)
    start = 5 * RATIOS.index("twin_nonfinite_frac")
    assert found[0, :, start].tolist() == ([1, 0] if is_low else [1, 1])
    assert found[1, :, start].tolist() == [0, 0]
    moved = int(high.moved[0].sum()) - (not is_low and bool(high.moved[0, 3]))
    assert found[0, :, -1].tolist() == [moved] * 2  # of fp32, whatever became of a twin


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("is_low", [True, False], ids=["twin", "fp32"])
def test_states_that_are_not_finite_are_left_out(bad: float, is_low: bool) -> None:
    mask = torch.ones(1, 9, dtype=torch.bool)
    high, low = make_stack(1, 9, 0), make_stack(1, 9, 1)
    (low if is_low else high).states["exp_avg"][0, :4] = bad
    assert_as_defined(mask, high, [low])


def test_a_state_of_an_element_that_is_not_finite_is_left_out() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    high, low = (make_stack(1, 3, 0, states=("exp_avg",)) for _ in range(2))
    high.states["exp_avg"].fill_(1.0)
    low.states["exp_avg"].copy_(torch.tensor([[0.0, 2.0, 3.0]]))
    low.now[0, 0] = math.nan
    found = measure_twins(mask, high, [low], ("exp_avg",))[0, 0].tolist()
    assert found[5 * len(RATIOS) : 5 * len(RATIOS) + 2] == [5, 2]
    assert found[5 * len(RATIOS) + 5 : 5 * len(RATIOS) + 7] == [0, 2]
    assert found[-2:-1] == [2.0]


def test_a_twin_without_a_state_has_no_median_and_sums_of_0() -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    high, low = make_stack(2, 6, 0), make_stack(2, 6, 1, states=("exp_avg",))
    found = assert_as_defined(mask, high, [low, make_stack(2, 6, 2)])
    middle = 5 * (len(RATIOS) + 2)
    assert found[:, 0, middle : middle + 10].tolist() == [[0.0] * 10] * 2
    assert found[:, 0, -2].isnan().all()
    assert not found[:, 1, -2].isnan().any()
    assert_as_defined(mask, low, [high])  # nor has one beside fp32 without it


def test_a_layer_that_never_moved_has_sums_of_0() -> None:
    mask = torch.ones(1, 4, dtype=torch.bool)
    still = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    no = torch.zeros(1, 4, dtype=torch.bool)
    stack = TwinStack(still, still, still, still, no, no, {})
    found = measure_twins(mask, stack, [stack], ())[0, 0]
    for name in ("progress_kept", "drift", "frozen_frac", "still_frac", "step_projection"):
        place = 5 * RATIOS.index(name)
        assert found[place : place + 5].tolist() == [0.0] * 5
    assert found[-1] == 0


@pytest.mark.parametrize(("layers", "width"), [(0, 4), (3, 0), (0, 0), (1, 1)])
def test_few_or_no_elements_are_measured(layers: int, width: int) -> None:
    mask = torch.ones(layers, width, dtype=torch.bool)
    twins = [make_stack(layers, width, seed) for seed in (1, 2)]
    found = assert_as_defined(mask, make_stack(layers, width, 0), twins)
    sums = found[..., : 5 * (len(RATIOS) + 2)]
    assert not sums.isnan().any()  # the sums of a model have them as terms


def test_no_twins_and_no_states_are_measured() -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    high = make_stack(3, 4, 0)
    assert measure_twins(mask, high, [], STATES).shape == (3, 0, len(TwinColumns(STATES)))
    alone = measure_twins(mask, high, [make_stack(3, 4, 1)], ())
    assert alone.shape == (3, 1, len(TwinColumns()))
    assert torch.equal(alone[..., -1], high.moved.sum(1, keepdim=True).double())


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("bad", [None, *WEIGHTS])
def test_a_run_alone_has_the_figures_that_need_no_fp32(block: int, bad: str | None) -> None:
    mask = torch.arange(9) < torch.tensor([[9], [5], [0]])
    run = make_stack(3, 9, 0, torch.bfloat16, ())
    if bad is not None:
        getattr(run, bad)[0, 2] = math.nan
    has_gradient = torch.arange(27).view(3, 9) % 4 != 0
    found = measure_alone(mask, run, has_gradient, blocks=[block] * 3)
    # Fed as fp32, a twin whose moves in the window are the gradients gives the same sums.
    high = run._replace(moved_in_window=has_gradient)
    as_twin = measure_twins(mask, high, [run], (), blocks=[block] * 3)
    for k, name in enumerate(RATIOS):
        sums = found[:, 0, 5 * k : 5 * k + 5]
        if name in {"still_frac", "moved_since_start_frac", "twin_nonfinite_frac"}:
            torch.testing.assert_close(sums, as_twin[:, 0, 5 * k : 5 * k + 5])
        else:
            assert not sums.any()
    assert not found[..., -1].any()


def test_twins_are_measured_alike_alone_and_together() -> None:
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    high, twins = make_stack(2, 8, 0), [make_stack(2, 8, seed) for seed in range(1, 5)]
    together = measure_twins(mask, high, twins, STATES, blocks=[2, 2])
    for k, twin in enumerate(twins):
        alone = measure_twins(mask, high, [twin], STATES, blocks=[2, 2])
        torch.testing.assert_close(together[:, k], alone[:, 0], rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("blocks", [(), (4, 4, 1, 4, 1)])
def test_many_layers_are_measured_in_parts(
    blocks: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,000 layers at once would need gigabytes; each part has the sums of its layers."""
    mask = torch.arange(12) < torch.tensor([[12], [9], [4], [0], [1]])
    fp32, twins = make_stack(5, 12, 0), [make_stack(5, 12, seed) for seed in (1, 2)]
    whole = measure_twins(mask, fp32, twins, STATES, blocks=blocks)
    parts: list[int] = []
    joined = twin_sums._join  # no public function says how many layers a part has

    def join(stacks: Sequence[TwinStack], states: Sequence[str]) -> object:
        parts.append(len(stacks[0].now))
        return joined(stacks, states)

    monkeypatch.setattr(twin_sums, "_join", join)
    bytes_of_a_layer = 8 * len(twins) * len(TwinColumns(STATES).ratios) * mask.shape[1]
    # Too large for a test: a part has 64 MiB.
    monkeypatch.setattr(twin_sums, "_MOST_BYTES", 2 * bytes_of_a_layer)
    found = measure_twins(mask, fp32, twins, STATES, blocks=blocks)
    assert parts == [2, 2, 2, 2, 1, 1]
    torch.testing.assert_close(found, whole, rtol=1e-14, atol=0, equal_nan=True)


def test_what_lies_beyond_a_sample_does_not_matter() -> None:
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    high, low = make_stack(2, 8, 0), make_stack(2, 8, 1)
    before = measure_twins(mask, high, [low], STATES)
    for stack in (high, low):
        for numbers in (*(getattr(stack, name) for name in WEIGHTS), *stack.states.values()):
            numbers[1, 3:] = math.nan
    after = measure_twins(mask, high, [low], STATES)
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
