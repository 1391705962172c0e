"""Time AltGrad's rounding against torch's casts, ml_dtypes, gfloat and naive versions.

    python benchmarks/rounding.py [--quick] [--compile] [--threads 1] [--sizes 1e4 1e6] [--json F]

Each round runs every variant once, in a new order. A machine that slows down, or is shared, then
slows all variants alike. Compare the ratios; nanoseconds belong to one machine on one day. An
untimed call comes before each timed one. The memory allocator is then in the state in which this
variant leaves it; after another variant, a new output can take three times as long.

torch uses all cores unless --threads says otherwise, NumPy (ml_dtypes, gfloat) uses one. If other
work keeps a core busy, torch's threads wait for each other in every operation, and even the ratios
mean little. Use --threads 1 then.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from altgrad import get_format, quantize, spacing

FORMAT = get_format("e4m3fn")
SIZES = (10_000, 1_000_000, 30_000_000)
TARGET_SIZE = 1_000_000
GFLOAT_LIMIT = 1_000_000  # beyond, one call takes more than a second
MINIMUM_BATCH_SECONDS = 1e-3  # shorter calls are timed in batches of about this length
SLOW_CALL_SECONDS = 0.1  # longer calls have no untimed call before them

CLONE = "torch clone"
QUANTIZE = "altgrad quantize"
NATIVE = "torch native cast, one way"
NATIVE_AND_BACK = "torch native cast and back"
NAIVE = "naive log2"
NAIVE_MASKED = "naive log2 with masks"
GFLOAT = "gfloat round_ndarray"
COMPILED = "altgrad quantize, compiled"

Variants = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """The times of one variant at one size over all rounds, in nanoseconds per element."""

    variant: str
    elements: int
    rounds: int
    minimum: float
    median: float
    ratio_to_clone: float  # the median of the ratios within a round
    ratio_to_quantize: float  # the median of the ratios within a round


def example_data(elements: int) -> Tensor:
    """Draw float32 numbers in all octaves of e4m3fn, subnormals included, from -max to max.

    No number overflows, because libraries and their versions differ in what they make of overflow.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(elements, generator=generator)
    x *= torch.exp2(torch.empty(elements).uniform_(-10, 6, generator=generator))
    return x.clamp_(-FORMAT.max, FORMAT.max)


def naive_step(x: Tensor) -> Tensor:
    """Compute the spacing by a logarithm; it is twice too large just below powers of two."""
    exponent = torch.floor(torch.log2(torch.abs(x))).clamp(min=FORMAT.emin)
    return torch.exp2(exponent - FORMAT.mantissa_bits)


def naive_quantize(x: Tensor) -> Tensor:
    """Round as one would write it first.

    To round to nearest with few bits hides the wrong spacing; other uses of it do not.
    """
    step = naive_step(x)
    return (torch.round(x / step) * step).clamp(-FORMAT.max, FORMAT.max)


def naive_quantize_with_masks(x: Tensor) -> Tensor:
    """Round normal and subnormal numbers apart, selected by boolean masks, as often seen."""
    result = torch.zeros_like(x)
    magnitude = x.abs()
    normal = magnitude >= FORMAT.smallest_normal
    subnormal = (magnitude > 0) & ~normal
    step = 2.0 ** (torch.floor(torch.log2(magnitude[normal])) - FORMAT.mantissa_bits)
    result[normal] = torch.round(x[normal] / step) * step
    smallest = FORMAT.smallest_subnormal
    result[subnormal] = torch.round(x[subnormal] / smallest) * smallest
    return result.clamp_(-FORMAT.max, FORMAT.max)


def variants_for(x: Tensor, *, with_compile: bool) -> Variants:
    """Return the functions to time, by name.

    Args:
        x: The numbers to round, float32.
        with_compile: If True, add the compiled `quantize`.
    """
    array = x.numpy()
    out = torch.empty_like(x)
    variants: Variants = {
        CLONE: x.clone,
        QUANTIZE: lambda: quantize(x, "e4m3fn"),
        "altgrad quantize, out=": lambda: quantize(x, "e4m3fn", out=out),
        "altgrad quantize to bf16": lambda: quantize(x, "bf16"),
        "altgrad spacing": lambda: spacing(x, "e4m3fn"),
        NATIVE: lambda: x.to(torch.float8_e4m3fn),
        NATIVE_AND_BACK: lambda: x.to(torch.float8_e4m3fn).to(torch.float32),
        "torch bf16 cast and back": lambda: x.to(torch.bfloat16).to(torch.float32),
        "ml_dtypes cast and back": lambda: ml_dtypes_round(array),
        NAIVE: lambda: naive_quantize(x),
        NAIVE_MASKED: lambda: naive_quantize_with_masks(x),
    }
    if x.numel() <= GFLOAT_LIMIT:
        variants[GFLOAT] = lambda: gfloat_round(array)
    if with_compile:
        compiled = torch.compile(quantize, fullgraph=True)
        variants[COMPILED] = lambda: compiled(x, "e4m3fn")
    return variants


def ml_dtypes_round(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def gfloat_round(array: np.ndarray) -> np.ndarray:
    return np.asarray(gfloat.round_ndarray(gfloat.formats.format_info_ocp_e4m3, array))


def check_agreement(x: Tensor, variants: Variants) -> None:
    """End the script if a variant, other than the naive ones, rounds the timed data differently.

    Args:
        x: The timed data.
        variants: The functions that are timed.
    """
    rounded = quantize(x, "e4m3fn")
    agreeing = (
        "altgrad quantize, out=",
        NATIVE_AND_BACK,
        "ml_dtypes cast and back",
        GFLOAT,
        COMPILED,
    )
    pairs = [(rounded, variants[name](), name) for name in agreeing if name in variants]
    pairs += [
        (rounded, x.to(torch.float8_e4m3fn).float(), NATIVE),
        (quantize(x, "bf16"), x.to(torch.bfloat16).float(), "torch bf16 cast and back"),
        (spacing(x, "e4m3fn"), spacing_by_frexp(x), "numpy frexp"),
    ]
    for ours, theirs, name in pairs:
        if not torch.equal(ours, torch.as_tensor(theirs, dtype=torch.float32)):
            raise SystemExit(f"AltGrad and {name} disagree at {x.numel()} elements")


def spacing_by_frexp(x: Tensor) -> Tensor:
    """Compute the spacing by NumPy's frexp, to check `altgrad.spacing`; x must be finite."""
    exponent = np.frexp(x.numpy())[1] - 1
    exponent = np.where(x.numpy() == 0, FORMAT.emin, np.clip(exponent, FORMAT.emin, FORMAT.emax))
    return torch.from_numpy(np.ldexp(np.float32(1), exponent - FORMAT.mantissa_bits))


def time_calls(run: Callable[[], object], calls: int) -> float:
    """Return the time of calls in a row, in seconds per call; each result is freed at once."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def time_variants(variants: Variants, elements: int, rounds: int) -> list[Timing]:
    """Time all variants in rounds, each round in another order.

    Args:
        variants: The functions to time.
        elements: Number of elements that each call rounds.
        rounds: Number of rounds.
    """
    first = {name: time_calls(run, 2) for name, run in variants.items()}
    calls = {name: max(1, round(MINIMUM_BATCH_SECONDS / first[name])) for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    shuffler = random.Random(0)
    for _ in range(rounds):
        for name in shuffler.sample(list(variants), len(variants)):
            if first[name] < SLOW_CALL_SECONDS:
                variants[name]()
            seconds[name].append(time_calls(variants[name], calls[name]))
    return [
        Timing(
            variant=name,
            elements=elements,
            rounds=rounds,
            minimum=min(taken) * 1e9 / elements,
            median=statistics.median(taken) * 1e9 / elements,
            ratio_to_clone=median_ratio(taken, seconds[CLONE]),
            ratio_to_quantize=median_ratio(taken, seconds[QUANTIZE]),
        )
        for name, taken in seconds.items()
    ]


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios within rounds, from which a drift of the machine cancels.

    Args:
        numerators: Times of one variant, one for each round.
        denominators: Times of the other variant.
    """
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def print_timings(timings: list[Timing]) -> None:
    """Print the timings of one size as an aligned table."""
    first = timings[0]
    print(f"\n{first.elements:,} elements, {first.rounds} rounds; nanoseconds per element")
    print(f"{'':<28}{'min':>10}{'median':>10}{'x clone':>10}{'x quantize':>12}")
    for t in timings:
        print(
            f"{t.variant:<28}{t.minimum:>10.3f}{t.median:>10.3f}{t.ratio_to_clone:>10.2f}"
            f"{t.ratio_to_quantize:>12.2f}"
        )
    if first.elements > GFLOAT_LIMIT:
        print(f"{GFLOAT:<28}{'skipped: over a second a call':>42}")


def print_naive_errors(x: Tensor) -> None:
    """Print how often the naive version is wrong: on the data, and just below powers of two."""
    wrong_values = int((naive_quantize(x) != quantize(x, "e4m3fn")).sum())
    powers = torch.exp2(torch.arange(FORMAT.emin + 1.0, FORMAT.emax + 1))
    below = torch.nextafter(powers, torch.zeros(()))
    wrong_steps = int((naive_step(below) != spacing(below, "e4m3fn")).sum())
    print(
        f"the naive version: {wrong_values} wrong values of {x.numel():,}; wrong step at "
        f"{wrong_steps} of the {len(below)} floats just below a power of two"
    )


def print_targets(timings: list[Timing]) -> None:
    """Print the three targets at a million elements, each with the measured ratio.

    - The native cast goes to e4m3fn and back, as `quantize` does. One way, it writes a quarter of
      the bytes.
    - The naive version is the one with masks; these make it slow, not the logarithm.

    Ratios to the cast one way, and to the naive version without masks, follow for comparison.
    """
    at = {t.variant: t for t in timings if t.elements == TARGET_SIZE}
    print(f"\nTargets for quantize at {TARGET_SIZE:,} elements (median of the ratios per round)")
    if not at:
        print("not measured: that size was not among --sizes")
        return
    speedup = {variant: timing.ratio_to_quantize for variant, timing in at.items()}
    print_target("at least 4 times faster than", NATIVE_AND_BACK, speedup[NATIVE_AND_BACK], 4)
    ratio = at[QUANTIZE].ratio_to_clone
    verdict = "met" if ratio <= 10 else "NOT MET"
    print(f"{'within 10 times of torch clone':<58}{ratio:>8.2f}  {verdict}")
    print_target("at least 40 times faster than", NAIVE_MASKED, speedup[NAIVE_MASKED], 40)
    print("for comparison, times faster than")
    for variant in (NATIVE, NAIVE):
        print(f"  {variant:<56}{speedup[variant]:>8.2f}")


def print_target(demand: str, variant: str, speedup: float, at_least: float) -> None:
    verdict = "met" if speedup >= at_least else "NOT MET"
    print(f"{demand + ' ' + variant:<58}{speedup:>8.2f}  {verdict}")


def environment() -> dict[str, str]:
    """Return what the figures depend on: versions, threads and the machine."""
    return {
        "torch": torch.__version__,
        "torch_threads": str(torch.get_num_threads()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "numpy": np.__version__,
        "ml_dtypes": ml_dtypes.__version__,
        "gfloat": importlib.metadata.version("gfloat"),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time AltGrad's rounding kernel, paired.")
    parser.add_argument(
        "--sizes", nargs="+", type=float, default=SIZES, metavar="N", help="numbers of elements"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="a fifth of the rounds, no 3e7")
    parser.add_argument("--threads", type=int, metavar="N", help="cores for torch; default: all")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    facts = environment()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    timings: list[Timing] = []
    for size in arguments.sizes:
        elements = int(size)
        if arguments.quick and elements > TARGET_SIZE:
            continue
        x = example_data(elements)
        variants = variants_for(x, with_compile=arguments.compile)
        check_agreement(x, variants)
        rounds = math.ceil((5 if elements > TARGET_SIZE else 50) / (5 if arguments.quick else 1))
        timed = time_variants(variants, elements, rounds)
        print_timings(timed)
        print_naive_errors(x)
        timings += timed
    print_targets(timings)
    if arguments.json:
        figures = {"environment": facts, "timings": [asdict(t) for t in timings]}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
