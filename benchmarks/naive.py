"""The figures of a step, written as their formulas read, to time AltGrad's engine against.

    python benchmarks/naive.py [--size 1e6]

This is how one writes the figures first: one tensor and one format, float32, one operation for each
term, boolean masks where an element has no value, `.item()` for each figure. Nothing is slow on
purpose. The script compares its figures with those of `altgrad.measure`. They differ by rounding in
float32, and just below powers of two, where floor(log2) is one too large.
"""

from __future__ import annotations

import argparse
import math

import torch
from paired import print_table
from torch import Tensor

from altgrad import FloatFormat, get_format, measure, quantize

RELATIVE_TOLERANCE = 1e-3  # float32 sums, and a wrong spacing here and there
RELATIVE = (
    *("weight_rms", "update_rms", "gradient_rms", "update_weight_ratio", "update_error"),
    *("stiffness_mean", "stiffness_min", "stiffness_max"),
    *("grid_error_mean", "grid_error_max", "grid_error_std", "ulp_mean"),
    *("kept_update_ratio", "grad_stiff_ratio_mean"),
)
ABSOLUTE_TOLERANCE = 1e-3
ABSOLUTE = (
    *("stall_frac", "visible_frac", "on_grid_frac", "ulp_zero_frac"),
    *("grad_stiff_correlation", "grad_below_stiffness_frac"),
)


@torch.no_grad()
def naive_figures(
    before: Tensor, after: Tensor, gradient: Tensor, format: FloatFormat
) -> dict[str, object]:
    """Compute the figures of one step for one format, which is scaled if it has less than 16 bits.

    Args:
        before: Weights before the step, any dtype and shape.
        after: Weights after the step.
        gradient: The gradient.
        format: The format.

    Returns:
        The figures by name of the metric; ``steps`` is a list of 64 counts.
    """
    w0, w1, g = before.float(), after.float(), gradient.float()
    update = w1 - w0
    scale = 1.0  # formats of 16 bits are used without a scale
    if format.bits < 16:
        scale = 2.0 ** math.ceil(math.log2(w0.abs().max().item() / format.max))
    stiffness = naive_spacing(w0, format, scale)
    return {
        "update_rms": update.square().mean().sqrt().item(),
        "weight_rms": w0.square().mean().sqrt().item(),
        "gradient_rms": g.square().mean().sqrt().item(),
        "update_weight_ratio": (update.norm() / w0.norm()).item(),
        **_ulp_figures(before, after),
        **_grid_figures(w0, stiffness, format, scale),
        **_gradient_figures(w0, g, stiffness),
        **_update_figures(w0, w1, update, stiffness, format, scale),
    }


def naive_spacing(x: Tensor, format: FloatFormat, scale: float) -> Tensor:
    """Compute the spacing at each weight by a logarithm, twice too large just below powers of two.

    Args:
        x: The weights, float32.
        format: The format.
        scale: The scale of the format.
    """
    exponent = torch.floor(torch.log2(torch.abs(x) / scale)).clamp(format.emin, format.emax)
    return scale * torch.exp2(exponent - format.mantissa_bits)


def naive_quantize(x: Tensor, format: FloatFormat, scale: float) -> Tensor:
    step = naive_spacing(x, format, scale)
    return (torch.round(x / step) * step).clamp(-format.max * scale, format.max * scale)


def _ulp_figures(before: Tensor, after: Tensor) -> dict[str, object]:
    magnitude = torch.maximum(before.abs(), after.abs())
    gap = magnitude - torch.nextafter(magnitude, torch.zeros_like(magnitude))
    ulps = (after - before).abs().float() / gap.float()
    ulps[before == after] = 0
    return {
        "ulp_mean": ulps.mean().item(),
        "ulp_median": ulps.median().item(),
        "ulp_max": ulps.max().item(),
        "ulp_zero_frac": (ulps == 0).float().mean().item(),
    }


def _grid_figures(
    w0: Tensor, stiffness: Tensor, format: FloatFormat, scale: float
) -> dict[str, object]:
    of_nonzero = stiffness[w0 != 0]
    error = (w0 - naive_quantize(w0, format, scale)).abs()
    return {
        "stiffness_mean": of_nonzero.mean().item(),
        "stiffness_min": of_nonzero.min().item(),
        "stiffness_max": of_nonzero.max().item(),
        "grid_error_mean": error.mean().item(),
        "grid_error_max": error.max().item(),
        "grid_error_std": error.std().item(),
        "on_grid_frac": (error == 0).float().mean().item(),
    }


def _gradient_figures(w0: Tensor, gradient: Tensor, stiffness: Tensor) -> dict[str, object]:
    valid = w0 != 0
    s, g = stiffness[valid], gradient[valid].abs()
    s_deviation, g_deviation = s - s.mean(), g - g.mean()
    norms = s_deviation.norm() * g_deviation.norm()
    return {
        "grad_stiff_correlation": ((s_deviation * g_deviation).sum() / norms).item(),
        "grad_stiff_ratio_mean": (g / s).mean().item(),
        "grad_below_stiffness_frac": (g < s).float().mean().item(),
    }


def _update_figures(
    w0: Tensor, w1: Tensor, update: Tensor, stiffness: Tensor, format: FloatFormat, scale: float
) -> dict[str, object]:
    stored = naive_quantize(w0, format, scale)
    effective = naive_quantize(stored + update, format, scale) - stored
    visible = stored != naive_quantize(w1, format, scale)
    moved = update != 0
    steps = torch.log2(update[moved].abs() / stiffness[moved])
    return {
        "kept_update_ratio": ((effective * update).sum() / update.square().sum()).item(),
        "stall_frac": (effective[moved] == 0).float().mean().item(),
        "visible_frac": visible[moved].float().mean().item(),
        "update_error": ((effective - update).norm() / update.norm()).item(),
        "steps": torch.histc(steps, bins=64, min=-32, max=32).tolist(),
    }


def ordinary_data(
    elements: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw weights before and after a step, and gradients, like those of a linear layer with AdamW.

    An eighth of the weights lies on the grid of e4m3fn. One weight in a hundred does not move.

    Args:
        elements: Number of weights.
        dtype: The dtype of all three tensors.

    Returns:
        Weights before, weights after, and gradients, (elements) each.
    """
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(elements, generator=generator).mul_(0.02)
    gradient = torch.randn(elements, generator=generator).mul_(1e-3)
    learning_rate = torch.rand(elements, generator=generator).mul_(2e-3)
    eighth, hundredth = elements // 8, elements // 100
    if eighth:
        before[:eighth] = quantize(before[:eighth], "e4m3fn", 2.0**-12)
    after = before.addcmul(gradient.sign(), learning_rate, value=-1)
    after[elements - hundredth :] = before[elements - hundredth :]
    return before.to(dtype), after.to(dtype), gradient.to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the naive figures with altgrad.measure.")
    parser.add_argument("--size", type=float, default=1e6, metavar="N")
    parser.add_argument("--format", default="e4m3fn")
    arguments = parser.parse_args()
    format = get_format(arguments.format)
    data = ordinary_data(int(arguments.size))
    naive, ours = naive_figures(*data, format), measure(*data, format)
    rows, wrong = [], []
    for name in (*RELATIVE, *ABSOLUTE):
        expected = ours.get(f"{name}/{format.name}", ours.get(name, math.nan))
        found = float(str(naive[name]))
        within = RELATIVE_TOLERANCE * abs(expected) if name in RELATIVE else ABSOLUTE_TOLERANCE
        if not abs(found - expected) <= within:
            wrong.append(name)
        rows.append((name, f"{found:.6g}", f"{expected:.6g}", f"{abs(found - expected):.1e}"))
    print_table((f"{format.name}, {int(arguments.size):,} elements", "naive", "altgrad", "Δ"), rows)
    if wrong:
        raise SystemExit(f"the naive figures are off: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
