"""Time attaching, steps and state for models of more and more layers, in µs per layer.

    python benchmarks/layers.py [--quick] [--threads N] [--layers 300 1000 3000]

Each layer is a matrix of 16 × 16 that AdamW steps, with twins of the default recipes. What is
linear takes as long per layer at 3,000 layers as at 300. Times are CPU time, the least of three.
`run_file.py` times the file and the report in the same way.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import torch
from paired import parse_with_threads, print_environment, print_table, script_arguments, write_json
from torch import nn

from altgrad import UpdateMonitor

LAYERS = (300, 1_000, 3_000)
OBSERVED = (0, 2)


def measure_cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def time_model(layers: int) -> dict[str, float]:
    """Return the CPU time of each part for a model of this many layers, in seconds."""
    model = nn.ModuleDict({f"l{k}": nn.Linear(16, 16, bias=False) for k in range(layers)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return measure_cpu_seconds(optimizer.step)

    plain = step()
    monitor = UpdateMonitor(model, every_n_steps=lambda index: index in OBSERVED)
    file = io.BytesIO()
    seconds = {
        "attach": measure_cpu_seconds(lambda: monitor.attach(optimizer)),
        "first step": step() - plain,
        "unobserved step": step() - plain,
        "observed step": step() - plain,
        "state": measure_cpu_seconds(lambda: torch.save(monitor.state_dict(), file)),
        "detach": measure_cpu_seconds(monitor.detach),
    }
    file.seek(0)
    again = UpdateMonitor(model)
    seconds["load"] = measure_cpu_seconds(lambda: again.load_state_dict(torch.load(file)))
    return seconds


def main() -> None:
    parser = script_arguments(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, metavar="N")
    arguments = parse_with_threads(parser)
    print_environment()
    found: dict[int, dict[str, float]] = {}
    for layers in arguments.layers:
        runs = [time_model(layers) for _ in range(1 if arguments.quick else 3)]
        found[layers] = {part: min(run[part] for run in runs) * 1e6 / layers for part in runs[0]}
    parts = [*next(iter(found.values()))]
    rows = [[f"{layers:,}", *(f"{found[layers][part]:,.0f}" for part in parts)] for layers in found]
    print_table(["layers", *parts], rows)
    write_json(arguments.json, {str(layers): each for layers, each in found.items()})


if __name__ == "__main__":
    main()
