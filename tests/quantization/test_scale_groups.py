"""Shared scales and their values, against loops over all elements."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from altgrad.quantization import FORMATS, BlockFormat, FloatFormat
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.scale_groups import (
    Amaxes,
    Sharing,
    compute_element_scales,
    compute_layer_amax,
    compute_layer_amaxes,
    compute_single_scales,
    update_tensor_amaxes,
)
from tests.oracles import floor_log2
from tests.strategies import thorough

SCALINGS = [None, "tensor", "channel", ("block", 3)]
every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=str)
NAN, INF = math.nan, math.inf
BLOCK_OF_4 = BlockFormat("mine", FORMATS["e4m3fn"], 4, "e8m0")


# --- the oracle -----------------------------------------------------------------------------------


def largest(values: list[float]) -> float:
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def exact_scale(amax: float, format: FloatFormat, *, up: bool = True) -> float:
    """Return the smallest power of two that does not clip, or OCP's scale; 1 for 0."""
    if amax == 0:
        return 1.0
    top = Fraction(format.max)
    if up:
        return 2.0 ** -floor_log2(top / Fraction(amax))
    return 2.0 ** (floor_log2(Fraction(amax)) - floor_log2(top))


def nvfp4_scale(amax: float, tensor_amax: float) -> float:
    """Return an E4M3 number, as ml_dtypes rounds it, times a float32."""
    if amax == 0:
        return 1.0
    tensor_scale = float(np.float32(tensor_amax / (448 * 6)))
    return max(float(ml_dtypes.float8_e4m3fn(amax / 6 / tensor_scale)), 2.0**-9) * tensor_scale


def places(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the scale of each element in row-major order."""
    return [*np.ndindex(shape)]


def block_of(place: tuple[int, ...], size: int) -> tuple[int, ...]:
    return (*place[:-1], place[-1] // size) if place else ()


def channel_of(place: tuple[int, ...], scaling: object) -> int:
    return place[0] if scaling == "channel" and place else 0


def weights(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-9, 9, shape, generator=generator)
    return torch.randn(shape, generator=generator) * 2.0**exponents


@st.composite
def samples(draw: st.DrawFn) -> tuple[tuple[int, ...], list[int], int, object]:
    """Draw a shape, ascending indices into it, a block size and a scaling."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
    count = math.prod(shape)
    chosen = sorted(draw(st.sets(st.integers(0, count - 1))))
    return shape, chosen, draw(st.integers(1, 7)), draw(st.sampled_from(SCALINGS))


# --- the amax of layers --------------------------------------------------------------------------


def layers() -> dict[str, Tensor]:
    special = weights(3, 4)
    special[0], special[1, 2], special[2, 0] = NAN, INF, 1e4
    return {
        "float32": weights(3, 4),
        "0-dim": torch.tensor(-2.0),
        "zeros": torch.zeros(2, 2),
        "bfloat16": weights(5, 2).bfloat16(),
        "float64": weights(2, 3, 4).double() * 1e200,
        "not finite": special,
        "zeros and a NaN": torch.tensor([NAN, 0.0, 0.0]),
        "zeros and inf in float64": torch.tensor([[0.0, INF], [0.0, 0.0]]).double(),
        "a channel of zeros": torch.tensor([[0.0, 0.0], [1.0, -3.0]]),
        "float16": torch.tensor([-65504.0, 1.0]).half(),
        "negative alone": -weights(7).abs(),
        "float64 again": -weights(4).double(),
        "empty": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
def test_amaxes_of_many_layers_equal_those_of_each_and_zeros_are_reported(scaling: str) -> None:
    each, has_zero = compute_layer_amaxes([*layers().values()], scaling)
    for (name, x), amax, is_zero in zip(layers().items(), each, has_zero, strict=True):
        parts = [*x] if scaling == "channel" and x.dim() else [x]
        expected = [largest(part.double().flatten().tolist()) for part in parts]
        assert amax.tolist() == compute_layer_amax(x, scaling).tolist() == expected, name
        assert amax.dtype is (torch.float64 if x.dtype == torch.float64 else torch.float32)
        assert is_zero is (0.0 in expected), name
    assert {*has_zero} == {True, False}


@every_scaling
def test_layers_have_one_amax_unless_channels_have_scales(scaling: object) -> None:
    count = 3 if scaling == "channel" else 1
    assert compute_layer_amax(weights(3, 2, 4), scaling).shape == (count,)


def test_the_amax_of_a_tensor_grows_with_its_measured_elements() -> None:
    x = torch.tensor([0.5, -3.0, NAN, INF])
    assert update_tensor_amaxes(x, torch.tensor([2.0])).tolist() == [3.0]
    assert update_tensor_amaxes(x, torch.tensor([7.0])).tolist() == [7.0]


@pytest.mark.parametrize("kept", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_kept_amax_may_have_another_dtype_than_the_weights(
    kept: torch.dtype, dtype: torch.dtype
) -> None:
    """A model may be cast in mid-run."""
    x, amax = torch.tensor([0.5, -3.0], dtype=dtype), torch.tensor([2.0], dtype=kept)
    sharing = Sharing.from_indices(x.shape, torch.arange(2), (), "tensor")
    for found in (update_tensor_amaxes(x, amax), update_tensor_amaxes(x, amax, sharing)):
        assert found.tolist() == [3.0]
        assert found.dtype is (torch.float64 if torch.float64 in (kept, dtype) else torch.float32)
    assert amax.tolist() == [2.0]


def test_the_amax_of_a_layer_is_that_before_the_step_unless_all_of_it_is_0() -> None:
    before, after = torch.tensor([[0.0, 0.0], [0.5, 1.0]]), torch.tensor([[64.0, 3.0], [0.5, 1.0]])

    def take(x: Tensor) -> Amaxes:
        return Amaxes.from_groups(compute_layer_amax(x, "channel"))

    filled = take(before).fill_zeros(take(after))
    assert (filled.groups.tolist(), filled.layers.tolist()) == ([64.0, 1.0], [1.0])
    filled = take(before * 0).fill_zeros(take(after))
    assert (filled.groups.tolist(), filled.layers.tolist()) == ([64.0, 1.0], [64.0])
    nothing = take(torch.zeros(0, 3))
    assert (nothing.groups.tolist(), nothing.layers.tolist()) == ([], [0.0])


def test_the_amax_of_each_of_several_tensors_depends_on_its_elements_only() -> None:
    parts = [
        Sharing.from_indices(torch.Size(shape), torch.arange(math.prod(shape)), (), "channel")
        for shape in ((2, 2), (1, 3), (3,))
    ]
    x = torch.tensor([1.0, -2, 3, NAN, 0.5, INF, 0.25, 5.0, -9.0, 6.0])
    amax = torch.tensor([8.0, 0.125, 7.0])
    assert update_tensor_amaxes(x, amax, Sharing.join(parts)).tolist() == [8.0, 0.5, 9.0]


@every_scaling
def test_single_scales_are_the_smallest_powers_of_two_that_do_not_clip(scaling: object) -> None:
    formats = FormatSet(["bf16", "e4m3fn", "mxfp4", "e2m1", "e0m7"], scaling)
    amax = torch.tensor([0.0, 1.0, 448.0, 448.5, 6.0, 1e-20, 3e20])
    scales = compute_single_scales(amax, formats)
    assert (scales.dtype, scales.shape) == (torch.float64, (7, 5))
    for column, format in zip(scales.t().tolist(), formats, strict=True):
        is_scaled = isinstance(scaling, str) and format.name not in ("bf16", "mxfp4")
        assert column == [exact_scale(a, format) if is_scaled else 1.0 for a in amax.tolist()]
    assert compute_single_scales(amax, FormatSet([], scaling)).shape == (7, 0)


# --- shared scales ------------------------------------------------------------------------------


@thorough
@given(samples())
def test_elements_share_a_block_or_channel_as_in_a_loop_over_all(
    sample: tuple[tuple[int, ...], list[int], int, object],
) -> None:
    shape, chosen, size, scaling = sample
    indices = torch.tensor(chosen, dtype=torch.int64)
    sharing = Sharing.from_indices(torch.Size(shape), indices, (size,), scaling)
    of_chosen = [places(shape)[index] for index in chosen]
    assert sharing.group.tolist() == [channel_of(place, scaling) for place in of_chosen]
    channels = shape[0] if scaling == "channel" and shape else 1
    assert sharing.group_layer.tolist() == [0] * channels
    blocks = [block_of(place, size) for place in of_chosen]
    numbers = {block: number for number, block in enumerate(dict.fromkeys(blocks))}
    assert sharing.blocks[size].element_block.tolist() == [numbers[block] for block in blocks]
    assert sharing.blocks[size].layer.tolist() == [0] * len(numbers)


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
def test_an_empty_layer_has_groups_without_elements(shape: tuple[int, ...], scaling: str) -> None:
    sharing = Sharing.from_indices(
        torch.Size(shape), torch.zeros(0, dtype=torch.int64), (4,), scaling
    )
    assert not len(sharing.group)
    assert len(sharing.group_layer) == (shape[0] if scaling == "channel" else 1)
    assert sharing.trim_groups() == (sharing, slice(None))


@thorough
@given(samples())
def test_dropping_groups_without_elements_keeps_the_amax_of_each_element(
    sample: tuple[tuple[int, ...], list[int], int, object],
) -> None:
    shape, chosen, size, _ = sample
    indices = torch.tensor(chosen, dtype=torch.int64)
    sharing = Sharing.from_indices(torch.Size(shape), indices, (size,), "channel")
    amax = torch.arange(100, 100 + len(sharing.group_layer))
    alone, groups = sharing.trim_groups()
    assert amax[groups][alone.group].tolist() == amax[sharing.group].tolist()
    assert alone.blocks is sharing.blocks
    if chosen:
        assert {0, len(alone.group_layer) - 1} <= {*alone.group.tolist()}


@thorough
@given(st.lists(samples(), min_size=1, max_size=4))
def test_joining_keeps_groups_and_blocks_of_layers_separate(
    several: list[tuple[tuple[int, ...], list[int], int, object]],
) -> None:
    parts = [
        Sharing.from_indices(
            torch.Size(shape), torch.tensor(chosen, dtype=torch.int64), (2, 3), "channel"
        )
        for shape, chosen, _, _ in several
    ]
    joined = Sharing.join(parts)
    layer = [k for k, part in enumerate(parts) for _ in part.group]
    assert joined.layers == len(parts)
    tables = [torch.arange(len(part.group_layer)) + 1000 * k for k, part in enumerate(parts)]
    of_each = [table[part.group] for table, part in zip(tables, parts, strict=True)]
    assert torch.equal(torch.cat(tables)[joined.group], torch.cat(of_each))
    assert joined.group_layer[joined.group].tolist() == layer
    for size in (2, 3):
        own = [part.blocks[size].element_block.tolist() for part in parts]
        pairs = [(k, block) for k, blocks in enumerate(own) for block in blocks]
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
        blocks = joined.blocks[size]
        assert blocks.element_block.tolist() == [numbers[pair] for pair in pairs]
        assert blocks.layer[blocks.element_block].tolist() == layer


def test_padding_appends_elements_and_does_not_change_others() -> None:
    sharing = Sharing.from_indices(torch.Size((3, 4)), torch.tensor([5, 6, 11]), (2,), "channel")
    padded = sharing.pad(5)
    assert padded.group[:3].tolist() == sharing.group.tolist() == [1, 1, 2]
    assert padded.blocks[2].element_block[:3].tolist() == [0, 1, 2]
    assert padded.blocks[2].layer is sharing.blocks[2].layer
    assert len(padded.group) == len(padded.blocks[2].element_block) == 5
    assert padded.group.max() < len(padded.group_layer)
    assert padded.blocks[2].element_block.max() < len(padded.blocks[2].layer)


# --- the scale of each element -------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["all", "sample"])
@every_scaling
def test_each_element_has_the_scale_of_its_group_or_block(scaling: object, chosen: str) -> None:
    formats = FormatSet(["bf16", "e4m3fn", "e2m1", "mxfp4", "nvfp4", BLOCK_OF_4], scaling)
    before, after = weights(5, 40), weights(5, 40, seed=1)
    before[1], before[3, 8:12] = 0.0, 0.0  # these set no scale: the weights after do
    before[2, 5], before[2, 9], after[1, 3] = NAN, -INF, INF
    indices = torch.arange(200)
    if chosen == "sample":
        indices = torch.cat([torch.arange(3, 50), torch.arange(60, 200, 3)])
    sharing = Sharing.from_indices(before.shape, indices, formats.block_sizes, scaling)
    w, v = before.flatten()[indices], after.flatten()[indices]
    amax = compute_layer_amax(before, scaling)
    amax = torch.where(amax == 0, compute_layer_amax(after, scaling), amax)
    kept = Amaxes.from_groups(amax)
    amaxes = kept._replace(layers=update_tensor_amaxes(w, kept.layers))
    scales = compute_element_scales(w, v, amaxes, sharing, formats)
    assert scales.dtype is torch.float64

    of_chosen = [places((5, 40))[index] for index in indices.tolist()]
    tensor_amaxes = largest(before.flatten().tolist())

    def compute_amax(members: list[int]) -> float:
        return largest(w[members].tolist()) or largest(v[members].tolist())

    def amax_of_blocks(size: int) -> list[float]:
        blocks = [block_of(place, size) for place in of_chosen]
        return [compute_amax([k for k, b in enumerate(blocks) if b == own]) for own in blocks]

    def amax_of_groups() -> list[float]:
        if scaling == "tensor":
            return [tensor_amaxes] * len(of_chosen)
        rows = zip(before.tolist(), after.tolist(), strict=True)
        of_channels = [largest(row) or largest(other) for row, other in rows]
        return [of_channels[channel_of(place, scaling)] for place in of_chosen]

    found = dict(zip([format.name for format in formats], scales.tolist(), strict=True))
    assert found["bf16"] == [1.0] * len(of_chosen)
    for name in ("e4m3fn", "e2m1"):
        if scaling is None:
            assert found[name] == [1.0] * len(of_chosen)
            continue
        own = amax_of_groups() if isinstance(scaling, str) else amax_of_blocks(scaling[1])
        assert found[name] == [exact_scale(each, FORMATS[name]) for each in own]
    for name, size in (("mxfp4", 32), ("mine", 4)):
        element = FORMATS["e2m1" if name == "mxfp4" else "e4m3fn"]
        expected = [exact_scale(each, element, up=False) for each in amax_of_blocks(size)]
        assert found[name] == expected
    assert found["nvfp4"] == [nvfp4_scale(each, tensor_amaxes) for each in amax_of_blocks(16)]


def test_joined_layers_have_the_same_scales_as_single_layers() -> None:
    formats, scaling = FormatSet(["e4m3fn", "nvfp4", "mxfp4"], "channel"), "channel"
    several = [(weights(3, 20, seed=k) * 10.0**k, weights(3, 20, seed=9)) for k in range(3)]
    parts = [
        Sharing.from_indices(w.shape, torch.arange(60), formats.block_sizes, scaling)
        for w, _ in several
    ]
    amaxes = [Amaxes.from_groups(compute_layer_amax(w, scaling)) for w, _ in several]
    alone = [
        compute_element_scales(w.flatten(), v.flatten(), own, part, formats)
        for (w, v), own, part in zip(several, amaxes, parts, strict=True)
    ]
    joined = Sharing.join(parts)
    before, after = (torch.cat([each[k].flatten() for each in several]) for k in (0, 1))
    together = Amaxes(*map(torch.cat, zip(*amaxes, strict=True)))
    found = compute_element_scales(before, after, together, joined, formats)
    assert torch.equal(found, torch.cat(alone, dim=1))
