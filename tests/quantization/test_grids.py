"""Rounding to many formats at once equals rounding to each alone, bit for bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from altgrad.quantization import FORMATS, FloatFormat
from altgrad.quantization.binary64 import LARGEST
from altgrad.quantization.grids import Grids, make_grids, round_to_grids
from altgrad.quantization.ops import quantize_unbounded

FTZ = FloatFormat("ftz", 3, 2, 3, has_subnormals=False)
FTZ_M0 = FloatFormat("ftz_m0", 4, 0, 7, has_subnormals=False)
EVERY = (*FORMATS.values(), FTZ, FTZ_M0)
PLAIN = tuple(f for f in EVERY if f.mantissa_bits and f.has_subnormals)


def values() -> Tensor:
    """Return all grid points and ties of narrow formats, with neighbours, and all binades."""
    points = torch.cat([f.values() for f in EVERY if f.bits <= 8])
    points = torch.cat([points, (points[1:] + points[:-1]) / 2]).unique()
    up, down = (points.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(20_000, generator=generator, dtype=torch.float64)
    wide *= 2.0 ** torch.randint(-160, 140, (20_000,), generator=generator).double()
    special = torch.tensor(
        [0.0, -0.0, 5e-324, 2.0**-1022, 1e200, -LARGEST / 2], dtype=torch.float64
    )
    return torch.cat([points, up, down, wide, special])


def rounded(x: Tensor, grids: Grids) -> tuple[Tensor, Tensor]:
    """Return values and spacings of (elements,) on each grid, (formats, elements)."""
    x = x.view(1, 1, -1)
    shape = 1, grids.eps.shape[1], x.shape[-1]
    a, b, c = (torch.empty(shape, dtype=torch.float64) for _ in range(3))
    inner = grids.divide_by_scale(x, a)
    spacing, value = round_to_grids(inner, grids, torch.empty_like(x), b, c)
    assert spacing is b
    assert value is c
    return grids.multiply_by_scale_(value)[0], grids.multiply_by_scale_(spacing)[0]


@pytest.mark.parametrize("formats", [PLAIN, EVERY], ids=["plain", "every"])
@pytest.mark.parametrize("scale", [None, 1.0, 2.0**-7, 2.0**20, 0.3])
def test_rounding_to_several_formats_equals_rounding_to_each(
    formats: tuple[FloatFormat, ...], scale: float | None
) -> None:
    x = values()
    factors = None
    if scale is not None:
        factors = torch.full((1, len(formats), 1), scale, dtype=torch.float64)
    grids = make_grids(formats, [True] * len(formats), factors, power_of_two=scale != 0.3)
    assert (grids.scale is None) is (formats is PLAIN and scale != 0.3) or scale is None
    value, spacing = rounded(x, grids)
    for position, format in enumerate(formats):
        number = torch.tensor(scale or 1.0, dtype=torch.float64)
        expected = quantize_unbounded(x, format, number)
        wrong = value[position] != expected
        assert not wrong.any(), (format, x[wrong][:3], value[position][wrong][:3])
        assert torch.equal(spacing[position], unbounded_spacing(x, format, number)), format


def unbounded_spacing(x: Tensor, format: FloatFormat, scale: Tensor) -> Tensor:
    """Return ``scale · 2**(max(floor(log2(abs(x) / scale)), emin) − M)``, also above the top."""
    y = (x / scale).abs().numpy()
    exponents = np.where(y == 0, format.emin, np.frexp(y)[1] - 1).clip(format.emin)
    spacing = np.ldexp(1.0, exponents - format.mantissa_bits)
    if not format.has_subnormals:  # the only neighbours below the first number are it and 0
        spacing = np.where(y < format.smallest_normal, format.smallest_normal, spacing)
    return torch.from_numpy(spacing) * scale


def test_a_row_may_have_a_scale_of_its_own() -> None:
    x = torch.randn(3, 1, 50, dtype=torch.float64)
    scale = torch.tensor([[1.0, 0.25], [8.0, 2.0], [0.5, 64.0]], dtype=torch.float64)[..., None]
    formats = PLAIN[:2]
    grids = make_grids(formats, [True, True], scale)
    out, tmp = torch.empty(3, 2, 50).double(), torch.empty(3, 1, 50).double()
    _, value = round_to_grids(x, grids, tmp, torch.empty_like(out), out)
    for position, format in enumerate(formats):
        expected = quantize_unbounded(x[:, 0], format, scale[:, position])
        assert torch.equal(value[:, position], expected)


def test_a_format_beyond_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds float64"):
        make_grids([FloatFormat("wide", 12, 3, 2047)], [False], None)
