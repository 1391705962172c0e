"""Count and time what observing adds to a step of a sharded model (FSDP2 with gloo, on CPU).

    python benchmarks/distributed.py [--quick]

1. The number of collectives in an observed step, and their bytes, which are equal on any machine.
2. The time of observed and unobserved steps in turn. All processes share the cores of one machine:
   with more processes than cores, these times say little.
3. An estimate for 70 B parameters on 1,024 ranks, from the counts and printed assumptions.
"""

from __future__ import annotations

import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpt import Gpt
from paired import (
    Quartiles,
    print_environment,
    print_table,
    quartiles,
    script_arguments,
    write_json,
)
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from altgrad import UpdateMonitor
from altgrad.measurement.columns import max_count, sum_count

SIZES = (1, 2, 4)
FORMATS = ["fp16", "bf16", "e4m3fn", "e5m2"]
FLOAT64 = 8  # bytes

# Assumptions of the estimate.
RANKS, PARAMETERS, TOKENS = 1_024, 70e9, 4e6
# 80 blocks with 4 projections, 3 matrices of the MLP and 2 norms; 2 embeddings and a last norm.
TENSORS = 80 * 9 + 3
LATENCY, BANDWIDTH = 30e-6, 1.25e9  # s for a message between hosts over TCP; bytes/s at 10 Gb/s
FLOPS = 400e12  # in a second, as reached on a GPU: 40 % of an H100's peak in bf16
PER_TENSOR = 200e-6  # s to measure 1,024 elements: "the rest" in model_size.py


class Listening:
    """A context that records each all-reduce within it, and the bytes that this rank sends."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self._allreduce = distributed.ProcessGroupGloo.allreduce

    def __enter__(self):
        def noting(group, tensors, *options):
            self.said.append(("allreduce", sum(each.nbytes for each in tensors)))
            return self._allreduce(group, tensors, *options)

        distributed.ProcessGroupGloo.allreduce = noting
        return self

    def __exit__(self, *_):
        distributed.ProcessGroupGloo.allreduce = self._allreduce


class Measured(NamedTuple):
    tensors: int
    said: list[tuple[str, int]]
    plain: Quartiles
    added: Quartiles
    talking: Quartiles
    """Time of collectives of the same sizes alone, in seconds."""


def measure(rank: int, size: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    torch.manual_seed(0)
    whole = Gpt()
    for parameter in whole.parameters():
        # Far from the top of the scales: to compute an amax again would be one more MAX.
        torch.nn.init.normal_(parameter, std=0.02)
    net = fully_shard(whole, mesh=init_device_mesh("cpu", (size,)))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, foreach=True)
    # Every other step is observed; twins would be stepped at each.
    monitor = UpdateMonitor(
        net, formats=FORMATS, max_elements=1024, every_n_steps=lambda i: i % 2 == 0, recipes=()
    ).attach(optimizer)

    def seconds(run) -> float:
        distributed.barrier()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    for _ in range(4):
        optimizer.step()  # the first steps also set up scales and buffers
    with Listening() as listening:
        optimizer.step()
    optimizer.step()
    buffers = [torch.zeros(bytes_ // FLOAT64, dtype=torch.float64) for _, bytes_ in listening.said]
    observed, plain, talking = [], [], []
    for _ in range(rounds):
        observed.append(seconds(optimizer.step))
        plain.append(seconds(optimizer.step))
        talking.append(seconds(lambda: [distributed.all_reduce(each) for each in buffers]))
    added = [a - b for a, b in zip(observed, plain, strict=True)]
    tensors = len(monitor.latest.layers)
    result = Measured(tensors, listening.said, *map(quartiles, (plain, added, talking)))
    if rank == 0:
        torch.save(tuple(result), Path(folder) / "result.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def measured(size: int, rounds: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (size, folder, rounds), nprocs=size)
        return Measured(*torch.load(Path(folder) / "result.pt", weights_only=False))


def count_bytes(tensors: int, formats: int) -> tuple[int, int]:
    """Return the bytes that each rank sends in the SUM and in the MAX of an observed step.

    Args:
        tensors: Number of layers.
        formats: Number of formats.
    """
    sums = tensors * sum_count(formats) * FLOAT64
    return sums, (tensors * (max_count(formats) + 1) + 7) * FLOAT64


def estimate() -> dict[str, float]:
    """Estimate the parts of an observed step of a large model: bytes, and times in seconds.

    gloo reduces in a ring of n ranks: 2 (n - 1) messages, each of which waits for the one before.
    """
    said = count_bytes(TENSORS, len(FORMATS))
    messages = len(said) * 2 * (RANKS - 1)
    sampled = TENSORS * 1024
    return {
        "bytes each rank gives": sum(said),
        "latency": messages * LATENCY,
        "transfer": 2 * sum(said) * (RANKS - 1) / RANKS / BANDWIDTH,
        "measuring, if spread evenly": sampled / RANKS / 1024 * PER_TENSOR,
        "measuring, at worst": TENSORS * PER_TENSOR,
        "a training step": 6 * PARAMETERS * TOKENS / (RANKS * FLOPS),
    }


def print_estimate() -> dict[str, float]:
    parts = estimate()
    print(
        f"\nOn paper: {PARAMETERS / 1e9:.0f} B parameters in {TENSORS} tensors on {RANKS:,} ranks, "
        f"{len(FORMATS)} formats, {LATENCY * 1e6:.0f} µs for a message and {BANDWIDTH / 1e9:.2f} "
        f"GB/s between hosts, steps of {TOKENS / 1e6:.0f} M tokens at {FLOPS / 1e12:.0f} TFLOP/s a "
        "GPU"
    )
    rows = [
        (name, f"{value / 1e6:.2f} MB" if "bytes" in name else f"{1e3 * value:,.1f} ms")
        for name, value in parts.items()
    ]
    print_table(("of an observed step", ""), rows)
    own = parts["latency"] + parts["transfer"] + parts["measuring, at worst"]
    step = parts["a training step"]
    print(f"In all at most {1e3 * own:.0f} ms: {own / step:.1%} of a step that is observed,")
    print(f"and {own / step / 50:.3%} of the time where each 50th step is.")
    return parts


def main() -> None:
    arguments = script_arguments(__doc__.split("\n", 1)[0]).parse_args()
    print_environment()
    rounds = 5 if arguments.quick else 40
    figures: dict[str, Any] = {}
    rows = []
    for size in SIZES[:2] if arguments.quick else SIZES:
        each = measured(size, rounds)
        figures[str(size)] = each._asdict()
        assert [b for _, b in each.said] == [*count_bytes(each.tensors, len(FORMATS))]
        said = " + ".join(f"{count / 1e3:,.0f} kB" for _, count in each.said)
        milliseconds = [
            f"{1e3 * low:.1f} · {1e3 * middle:.1f} · {1e3 * high:.1f}"
            for low, middle, high in (each.plain, each.added, each.talking)
        ]
        rows.append((str(size), str(len(each.said)), said, *milliseconds))
    print(
        f"\nGPT of 10.1 M parameters in {each.tensors} tensors, 1,024 elements of each, 4 formats"
    )
    print_table(
        (
            "ranks",
            "collectives",
            "bytes",
            "plain step, ms",
            "observed adds",
            "same collectives alone",
        ),
        rows,
    )
    figures["estimate"] = print_estimate()
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
