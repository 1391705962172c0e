"""Times the rounding kernel beside whatever else does its work, all paired in one run.

    python benchmarks/rounding.py [--quick] [--compile] [--threads 1] [--sizes 1e4 1e6] [--json F]

Every round runs each variant once, in a new order, so that a machine that slows down or is shared
slows all of them alike. Compare the ratios; the nanoseconds belong to one machine on one day. An
untimed call precedes each timed one: the memory allocator is then in the state that this variant
leaves behind, not in that of its neighbour, which can otherwise make a fresh output cost thrice.

torch uses all cores unless --threads says otherwise, NumPy (ml_dtypes, gfloat) one. Where other
work keeps a core busy, torch's threads wait for one another in every operation, and even the ratios
mean little: then use --threads 1.
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
SLOW_CALL_SECONDS = 0.1  # from here on the untimed call is left away

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
    """One variant at one size; times in nanoseconds per element, over the rounds."""

    variant: str
    elements: int
    rounds: int
    minimum: float
    median: float
    ratio_to_clone: float  # the median of the ratios within a round
    ratio_to_quantize: float  # likewise


def example_data(elements: int) -> Tensor:
    """Float32 over all binades of e4m3fn, subnormals included, within ±max.

    Nothing overflows, because what a cast makes of overflow depends on the library and its version.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(elements, generator=generator)
    x *= torch.exp2(torch.empty(elements).uniform_(-10, 6, generator=generator))
    return x.clamp_(-FORMAT.max, FORMAT.max)


def naive_step(x: Tensor) -> Tensor:
    """The spacing by logarithm: twice too large just below powers of two."""
    exponent = torch.floor(torch.log2(torch.abs(x))).clamp(min=FORMAT.emin)
    return torch.exp2(exponent - FORMAT.mantissa_bits)


def naive_quantize(x: Tensor) -> Tensor:
    """What one writes first. Nearest rounding to few bits hides the wrong steps; others do not."""
    step = naive_step(x)
    return (torch.round(x / step) * step).clamp(-FORMAT.max, FORMAT.max)


def naive_quantize_with_masks(x: Tensor) -> Tensor:
    """The same, with zeros, subnormal and normal values picked by boolean masks, as often seen."""
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
    """All that is timed at this size, by name."""
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
    """Stop unless every variant but the naive ones gives the same values on the timed data."""
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
    """The oracle of `spacing`, for finite x."""
    exponent = np.frexp(x.numpy())[1] - 1
    exponent = np.where(x.numpy() == 0, FORMAT.emin, np.clip(exponent, FORMAT.emin, FORMAT.emax))
    return torch.from_numpy(np.ldexp(np.float32(1), exponent - FORMAT.mantissa_bits))


def seconds_of(run: Callable[[], object], calls: int) -> float:
    """Seconds per call of a batch; each result is freed before the next call."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def time_variants(variants: Variants, elements: int, rounds: int) -> list[Timing]:
    """Time all variants, interleaved round by round in shuffled order."""
    first = {name: seconds_of(run, 2) for name, run in variants.items()}
    calls = {name: max(1, round(MINIMUM_BATCH_SECONDS / first[name])) for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    shuffler = random.Random(0)
    for _ in range(rounds):
        for name in shuffler.sample(list(variants), len(variants)):
            if first[name] < SLOW_CALL_SECONDS:
                variants[name]()
            seconds[name].append(seconds_of(variants[name], calls[name]))
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
    """The median of the per-round ratios, from which a drift of the machine cancels."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def print_timings(timings: list[Timing]) -> None:
    """One size as an aligned table."""
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
    """How wrong the naive version is: on the data, and one float below each power of two."""
    wrong_values = int((naive_quantize(x) != quantize(x, "e4m3fn")).sum())
    powers = torch.exp2(torch.arange(FORMAT.emin + 1.0, FORMAT.emax + 1))
    below = torch.nextafter(powers, torch.zeros(()))
    wrong_steps = int((naive_step(below) != spacing(below, "e4m3fn")).sum())
    print(
        f"the naive version: {wrong_values} wrong values of {x.numel():,}; wrong step at "
        f"{wrong_steps} of the {len(below)} floats just below a power of two"
    )


def print_targets(timings: list[Timing]) -> None:
    """The three targets at a million elements, each with the ratio that was measured.

    The native cast is taken there and back, which does what quantize does; one way it leaves eight
    bits and writes a quarter of the bytes. The naive version is the one with masks, which are what
    makes it slow, not the logarithm. The other reading of each stands below, for comparison.
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
    """What the figures depend on."""
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
