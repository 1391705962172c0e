"""The native kernel gives what the eager kernel does: counts, bins and extrema bit for bit."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from altgrad.measurement.kernel import EverMoved, Rows, row_sums
from altgrad.measurement.native_code import native_code
from altgrad.measurement.native_rows import can_measure, native_row_sums

# `_source` has the order of the kernel's sums, which nothing public tells.
from altgrad.measurement.totals import Layers, _source
from altgrad.measurement.workspace import Workspace
from altgrad.quantization import FloatFormat, get_format
from altgrad.quantization.binary64 import LARGEST
from altgrad.quantization.grids import Grids, make_grids
from tests.strategies import formats as any_formats, thorough

pytestmark = pytest.mark.usefixtures("native_kernel")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMED = [get_format(name) for name in ("e4m3fn", "e5m2", "fp16", "bf16", "e2m1")]
POWERS_OF_TWO = FloatFormat("m0", exponent_bits=5, mantissa_bits=0, bias=15)
NO_SUBNORMALS = FloatFormat("ns", exponent_bits=4, mantissa_bits=3, bias=7, has_subnormals=False)
SPECIAL = (0.0, -0.0, 1.0, -2.0, 448.0, 6.0, 2.0**-9, 1.5 * 2.0**-9, math.nan, math.inf, -math.inf)
REAL_SUMS = {  # all others are counts
    *("ulps", "paired_gradient_abs", "weight_sq", "update_sq", "update_4th", "gradient_sq"),
    *("paired_gradient_sq", "stiffness", "stiffness_gradient", "gradient_per_stiffness"),
    *("grid_error", "stochastic_move", "stochastic_variance", "stiffness_sq", "grid_error_sq"),
    *("kept_sq", "lost_sq"),
}
SIGNED_SUMS = {"kept", "kept_update_cubed"}
SMALLEST = 1e-310  # subnormal sums have few digits


class Case(NamedTuple):
    """What one call of a kernel measures."""

    rows: Rows
    formats: tuple[FloatFormat, ...]
    grids: Grids | None
    layers: Tensor
    ever: EverMoved | None


def draw_values(shape: tuple[int, ...], spread: float, generator: torch.Generator) -> Tensor:
    """Draw normal numbers over many octaves, of which a third are special numbers."""
    exponents = torch.randn(shape, dtype=torch.float64, generator=generator) * spread
    values = torch.randn(shape, dtype=torch.float64, generator=generator) * exponents.exp2()
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    kind = torch.randint(9, shape, generator=generator)
    values = torch.where(kind == 0, chosen, values)
    values = torch.where(kind == 1, values.frexp().exponent.double().exp2(), values)  # powers of 2
    return torch.where(kind == 2, values.to(torch.float8_e4m3fn).double(), values)


def draw_scale(kind: str, rows: int, formats: int, elements: int, generator: torch.Generator):
    """Draw scales: None, or float64 (rows, formats, 1 or elements)."""
    if kind == "none":
        return None
    shape = (rows, formats, elements if kind.startswith("element") else 1)
    scale = torch.randint(-9, 9, shape, generator=generator).double().exp2()
    any_number = 1 + torch.rand(shape, dtype=torch.float64, generator=generator)
    return scale * any_number if kind.endswith("any") else scale


SCALES = ("none", "row", "row any", "element", "element any")


def make_case(
    seed: int,
    shape: tuple[int, int],
    formats: tuple[FloatFormat, ...],
    *,
    dtype: torch.dtype = torch.float32,
    scale: str = "row",
    has_gradient: bool = True,
    has_flags: bool = True,
    spread: float = 4.0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    (rows, elements), count = shape, len(formats)
    whole = rows, 1, elements
    before = draw_values(whole, spread, generator)
    share = 2.0 ** torch.randint(-12, 2, whole, generator=generator).double()
    after = before * (1 + share * torch.randn(whole, dtype=torch.float64, generator=generator))
    still = torch.rand(whole, generator=generator) < 0.2
    after = torch.where(still, before, after)
    gradient = draw_values(whole, spread, generator).to(dtype) if has_gradient else None
    grids = None
    if formats:
        drawn = draw_scale(scale, rows, count, elements, generator)
        scaled = [bool(index % 2) for index in range(count)]
        power_of_two = not scale.endswith("any")
        grids = make_grids(formats, scaled, drawn, power_of_two=power_of_two)
    flags = (torch.rand((rows, 1 + count, elements), generator=generator) < 0.3).split(
        (1, count), dim=1
    )
    ever = EverMoved(*(each.contiguous() for each in flags)) if has_flags else None
    layers = torch.randint(1 + rows // 2, (rows,), generator=generator).sort().values
    return Case(Rows(before.to(dtype), after.to(dtype), gradient), formats, grids, layers, ever)


def measure(case: Case, *, native: bool) -> tuple[Tensor, Tensor, Tensor, EverMoved | None]:
    """Return sums, extrema, histograms and flags by one of the kernels."""
    count, (rows, _, elements) = len(case.formats), case.rows.before.shape
    layers = torch.ones(rows + 1, 3).double()
    histograms = Layers.create(case.layers, layers, [True] * count).histograms
    ever = None if case.ever is None else EverMoved(*(each.clone() for each in case.ever))
    info = torch.finfo(case.rows.before.dtype)
    arguments = case.rows, case.grids, (info.eps, info.tiny)
    if native:
        function = native_code.function
        assert function is not None
        found = native_row_sums(function, *arguments, histograms, ever)
    else:
        buffers = Workspace().buffers(rows, count, elements, CPU)
        found = row_sums(*arguments, buffers, histograms, ever)
    return *found, histograms.counts, ever


def assert_alike(case: Case) -> None:
    """Assert that both kernels agree on a case."""
    before = [None if each is None else each.clone() for each in case.rows[:3]]
    sums, extrema, counts, ever = measure(case, native=True)
    expected, expected_extrema, expected_counts, expected_ever = measure(case, native=False)
    for one, other in zip(case.rows[:3], before, strict=True):
        assert one is None or torch.equal(one.nan_to_num(-7), other.nan_to_num(-7))
    assert torch.equal(extrema, expected_extrema)
    assert torch.equal(counts, expected_counts)
    if ever is not None:
        assert all(map(torch.equal, ever, expected_ever))
    assert sums.shape == expected.shape
    columns = _source(len(case.formats))[1]
    place = {column: position for position, column in enumerate(columns)}
    elements = case.rows.before.shape[-1]
    for position, (name, format) in enumerate(columns):
        one, other = sums[:, position], expected[:, position]
        allowed = 2e-14 * other if name in REAL_SUMS else 0 * other
        if name in SIGNED_SUMS:
            # Terms may cancel. By Cauchy and Schwarz, the sum of their magnitudes is at most this:
            kept_sq = expected[:, place["kept_sq", format]]
            fourth = expected[:, place["update_4th", None]]
            allowed = 2e-14 * (kept_sq * (elements if name == "kept" else fourth)).sqrt()
        same = (one == other) | (one.isnan() & other.isnan())
        close = (one - other).abs() <= allowed + SMALLEST
        assert (same | close).all(), (name, one, other)


@thorough
@given(
    st.integers(0, 2**32),
    st.tuples(st.integers(1, 5), st.integers(1, 70) | st.sampled_from([64, 255, 256, 257, 600])),
    st.lists(st.sampled_from(NAMED) | any_formats(), max_size=12).map(tuple),
    st.sampled_from(DTYPES),
    st.sampled_from(SCALES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.5, 4.0, 40.0]),
)
def test_both_kernels_agree(seed, shape, formats, dtype, scale, gradient, flags, spread) -> None:
    assert_alike(
        make_case(
            seed,
            shape,
            formats,
            dtype=dtype,
            scale=scale,
            has_gradient=gradient,
            has_flags=flags,
            spread=spread,
        )
    )


@pytest.mark.parametrize(
    "formats",
    [
        (),
        (POWERS_OF_TWO,),
        (NO_SUBNORMALS,),
        (get_format("bf16"), NO_SUBNORMALS, POWERS_OF_TWO, *NAMED),
    ],
    ids=len,
)
@pytest.mark.parametrize("scale", SCALES)
def test_they_agree_on_formats_of_any_kind(formats: tuple[FloatFormat, ...], scale: str) -> None:
    assert_alike(make_case(1, (3, 300), formats, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
def test_weights_and_gradients_may_differ_in_dtype(
    dtype: torch.dtype, gradient_dtype: torch.dtype
) -> None:
    case = make_case(2, (4, 64), (*NAMED,), dtype=dtype)
    gradient = draw_values((4, 1, 64), 4.0, torch.Generator().manual_seed(3)).to(gradient_dtype)
    assert_alike(case._replace(rows=case.rows._replace(gradient=gradient)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_they_read_all_numbers_of_16_bits(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, device="cpu").short().view(dtype).view(256, 1, 256)
    case = make_case(3, (256, 256), (get_format("e4m3fn"),), dtype=dtype)
    after = every.roll(1, dims=-1)
    assert_alike(case._replace(rows=Rows(every, after, every.flip(-1).contiguous())))


def test_they_agree_on_twelve_thousand_rows() -> None:
    assert_alike(make_case(4, (12_000, 32), NAMED[:2]))


def test_they_agree_on_one_element() -> None:
    for seed in range(50):
        assert_alike(make_case(seed, (1, 1), (*NAMED,), has_flags=False))


def test_elements_need_not_lie_side_by_side() -> None:
    case = make_case(5, (6, 200), NAMED[:2], has_flags=False)
    assert_alike(case._replace(rows=Rows(*(each[:, :, ::2] for each in case.rows[:3]))))
    columns = Rows(*(each.permute(2, 1, 0) for each in case.rows[:3]))
    grids = make_grids(NAMED[:2], [False, True], None)
    assert_alike(Case(columns, case.formats, grids, torch.zeros(200).long(), None))


def test_they_agree_on_tiny_and_huge_scales() -> None:
    """Reciprocals of spacings by exponent bits hold from 2**-1022 on: below, scales are tiny."""
    case = make_case(6, (2, 100), NAMED[:1], dtype=torch.float64)
    for exponent in (-1022, -1000, 200):
        factor = torch.tensor(2.0**exponent, dtype=torch.float64).view(1, 1, 1)
        rows = Rows(*(each * factor for each in case.rows[:3]))
        grids = make_grids(case.formats, [True], factor)
        assert_alike(case._replace(rows=rows, grids=grids))


def test_numbers_too_large_to_compute_with_are_left_out() -> None:
    case = make_case(7, (2, 30), NAMED[:2], dtype=torch.float64)
    case.rows.before[0, 0, :3] = torch.tensor([LARGEST, -LARGEST, LARGEST / 2])
    assert_alike(case)


def test_layers_may_have_rows_apart() -> None:
    case = make_case(8, (6, 40), NAMED[:2])
    assert_alike(case._replace(layers=torch.tensor([2, 0, 1, 0, 2, 2])))


def test_the_comparison_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(9, (2, 40), NAMED[:2])

    def off(case: Case, *, native: bool) -> tuple[object, ...]:
        sums, *others = original(case, native=native)
        return sums * (1 + 1e-13 * native), *others

    original = measure
    monkeypatch.setitem(globals(), "measure", off)
    with pytest.raises(AssertionError):
        assert_alike(case)


def test_only_numbers_in_the_memory_of_the_host_are_read() -> None:
    class Wrapped(Tensor):
        pass

    plain = torch.zeros(3)
    assert can_measure(plain)
    assert can_measure(torch.nn.Parameter(plain))
    assert not can_measure(plain.as_subclass(Wrapped))
    assert not can_measure(plain.to("meta"))
