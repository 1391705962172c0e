"""Compiled equals eager: counts, bins and extrema exactly, sums to 1e-12."""

import shutil

import pytest
import torch

from altgrad import measure
from altgrad.measurement.columns import FORMAT_SUMS, SUMS
from altgrad.measurement.measurer import Measurer
from altgrad.quantization import FloatFormat
from tests.test_statistics import WHOLE_NUMBERS, a_step

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="inductor needs a C++ compiler (c++, g++ or clang++) on the path",
)
FTZ = FloatFormat("ftz", 3, 2, 3, has_subnormals=False)
FORMATS = ("bf16", "e4m3fn", "e5m2", "e2m1")


@pytest.fixture(autouse=True, scope="module")
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(compiled: Measurer, eager: Measurer, step: tuple[torch.Tensor, ...]) -> None:
    actual, expected = (each.statistics_of(*step) for each in (compiled, eager))
    assert torch.equal(actual.maxima, expected.maxima)
    names = (*SUMS, *FORMAT_SUMS * len(eager.formats))
    error = (actual.sums - expected.sums).abs()
    allowed = torch.tensor([name not in WHOLE_NUMBERS for name in names]) * 1e-12 * expected.sums
    wrong = (~(error <= allowed)).nonzero().flatten().tolist()
    assert not wrong, [(names[i], actual.sums[i], expected.sums[i]) for i in wrong[:5]]


@needs_a_compiler
def test_compiled_equals_eager_for_every_size_without_compiling_again() -> None:
    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    compiled, eager = Measurer(FORMATS, compile=True), Measurer(FORMATS)
    at_first = graphs()
    before, after, gradient = a_step(300_000)
    before *= 2.0 ** torch.randint(-30, 6, (300_000,))
    before[::50], after[::50] = 0.0, before[::50]
    before[7], after[8], gradient[9] = torch.nan, torch.inf, -torch.inf
    step = before, after, gradient
    for count in (300_000, 262_144 + 5, 4096, 1000):
        assert_same(compiled, eager, tuple(each[:count] for each in step))
    made = graphs()
    for count in (200_000, 70_001, 5000, 8192, 129, 3):
        assert_same(compiled, eager, tuple(each[:count] for each in step))
    assert graphs() == made <= at_first + 4
    figures = measure(*step, FORMATS)
    assert 0 < figures["stall_frac/e4m3fn"] < 1


@pytest.mark.parametrize(
    ("dtype", "scaling"),
    [
        (torch.float32, None),
        (torch.bfloat16, "tensor"),
        (torch.float64, "channel"),
        (torch.float32, ("block", 32)),
    ],
    ids=str,
)
def test_the_traced_graph_equals_eager(
    dtype: torch.dtype, scaling: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch.compile makes of the source, without a C++ compiler; formats of every kind."""
    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, *, options, **how: real(f, backend="aot_eager", **how)
    )
    formats = ("bf16", "e4m3fn", "e7m0", FTZ, "nvfp4")
    compiled = Measurer(formats, scaling, compile=True)
    before, after, gradient = (each.view(20, 250).double() for each in a_step(5000))
    before += 2.0**-28  # which float32 does not hold
    step = before.to(dtype), after.to(dtype), gradient.to(dtype)
    assert_same(compiled, Measurer(formats, scaling), step)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    assert_same(compiled, Measurer(formats, scaling), (*step[:2], gradient.to(other)))


def test_nothing_compiles_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    measure(*a_step(), FORMATS)
