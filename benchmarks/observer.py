"""Time what a StepObserver adds to an optimizer step.

    python benchmarks/observer.py [--threads 1] [--rounds 30]

Each round steps every variant once, in a new order, on the same parameters. The script prints the
median difference to the plain step of the same round. `on_step` measures nothing, so that this is
the cost of observing alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad import StepObserver

MODELS = {
    "1 tensor of 1 element": [1],
    "1,024 tensors of 1,000 elements": [1_000] * 1_024,
    "26 tensors of 1 M elements": [1_000_000] * 26,
}
SAMPLE = 4_096
CALLS = 2_000  # timed together where a step takes microseconds


def make_optimizer(sizes: list[int]) -> tuple[Optimizer, list[tuple[str, Tensor]]]:
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    named = [(f"layer{number}", p) for number, p in enumerate(parameters)]
    return torch.optim.AdamW(parameters, fused=True), named


def sample(_name: str, parameter: Tensor) -> Tensor | None:
    if parameter.numel() <= SAMPLE:
        return None
    return torch.randperm(parameter.numel())[:SAMPLE].sort().values


def clone_all(named: list[tuple[str, Tensor]]) -> Callable[..., None]:
    """Return the hook that one would write first: clone weights and gradients before each step."""

    def hook(*_: object) -> None:
        clones = [(p.detach().clone(), p.grad.clone()) for _, p in named]
        del clones

    return hook


def make_variants(named: list[tuple[str, Tensor]]) -> dict[str, Callable[[Optimizer], object]]:
    """Return, for each variant, a function that attaches it and returns a handle for `release`."""

    def nothing(_: object) -> None:
        return None

    def never(_: int) -> bool:
        return False

    return {
        "plain step": nothing,
        "two empty hooks": lambda optimizer: (
            optimizer.register_step_pre_hook(lambda *_: None),
            optimizer.register_step_post_hook(lambda *_: None),
        ),
        "not observed": StepObserver(named, nothing, never).attach,
        "observed": StepObserver(named, nothing).attach,
        f"observed, {SAMPLE} elements": StepObserver(named, nothing, elements=sample).attach,
        "clone in a pre-hook": lambda optimizer: optimizer.register_step_pre_hook(clone_all(named)),
    }


def release(holder: object) -> None:
    if isinstance(holder, StepObserver):
        holder.detach()
    elif holder is not None:
        for handle in holder if isinstance(holder, tuple) else (holder,):
            handle.remove()


def seconds(optimizer: Optimizer, calls: int) -> float:
    optimizer.step()  # untimed, to fill buffers and caches as this variant leaves them
    start = time.perf_counter()
    for _ in range(calls):
        optimizer.step()
    return (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, AdamW(fused=True)")
    for model, sizes in MODELS.items():
        optimizer, named = make_optimizer(sizes)
        variants = make_variants(named)
        calls = CALLS if len(sizes) == 1 else 1
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(arguments.rounds):
            for name in random.sample(list(variants), len(variants)):
                holder = variants[name](optimizer)
                times[name].append(seconds(optimizer, calls))
                release(holder)
        plain = times["plain step"]
        print(f"\n{model}: a plain step takes {1e6 * statistics.median(plain):,.1f} µs")
        for name, values in times.items():
            if name != "plain step":
                added = [value - base for value, base in zip(values, plain, strict=True)]
                print(f"  {name:25} adds {1e6 * statistics.median(added):10,.2f} µs")


if __name__ == "__main__":
    main()
