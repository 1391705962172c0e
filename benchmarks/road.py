"""Trace one observed step of a net with three layers: how much of AltGrad's code does it enter?

    python benchmarks/road.py [--list] [--twins]

The script counts functions, files, changes of file from one call to the next, and containers. A
container is a class of AltGrad of which the step makes an instance. The step is the third, when
arena, scales and settings have been made. The counts do not depend on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

import altgrad
from altgrad import UpdateMonitor

PACKAGE = Path(altgrad.__file__).parent
AIMS = {"functions": 60, "files": 12, "changes of file": 40, "containers": 6}


class Road(NamedTuple):
    """The calls of a step in their order, and the number of instances that it makes, by class."""

    calls: list[tuple[str, str]]  # file and function
    containers: Counter[str]

    def counts(self) -> dict[str, int]:
        files = [file for file, _ in self.calls]
        return {
            "functions": len({*self.calls}),
            "files": len({*files}),
            "changes of file": sum(a != b for a, b in itertools.pairwise(files)),
            "containers": len(self.containers),
        }


@contextmanager
def traced() -> Iterator[Road]:
    road = Road([], Counter())

    def enter(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code, values = frame.f_code, frame.f_locals
        if code.co_name == "__init__" and "self" in values:
            note_container(type(values["self"]))
        elif code.co_filename == "<string>" and "_cls" in values:  # a NamedTuple's __new__
            note_container(values["_cls"])
        if code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<"):
            name = getattr(code, "co_qualname", code.co_name)
            road.calls.append((str(Path(code.co_filename).relative_to(PACKAGE)), name))

    def note_container(kind: type) -> None:
        if kind.__module__.startswith("altgrad."):
            road.containers[kind.__name__] += 1

    sys.setprofile(enter)
    try:
        yield road
    finally:
        sys.setprofile(None)


def trace_step(*, with_twins: bool = False) -> Road:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = UpdateMonitor(
        model,
        formats=["bf16", "e4m3fn"],
        max_elements=256,
        recipes=None if with_twins else (),
        strict=True,
    )
    with monitor.attach(optimizer):
        for step in range(3):
            optimizer.zero_grad()
            model(torch.randn(16, 64)).square().mean().backward()
            if step < 2:
                optimizer.step()
        with traced() as road:
            optimizer.step()
    assert monitor.latest is not None
    assert monitor.latest.index == 2
    return road


def main() -> None:
    parser = argparse.ArgumentParser(description="Trace an observed step of a net of three layers.")
    parser.add_argument("--list", action="store_true", help="also print every call in its order")
    parser.add_argument("--twins", action="store_true", help="with the twins of the two formats")
    arguments = parser.parse_args()
    road = trace_step(with_twins=arguments.twins)
    if arguments.list:
        for file, function in road.calls:
            print(f"{file:36} {function}")
    for name, count in road.counts().items():
        print(f"{name:16} {count:4}   aim {AIMS[name]}")
    print("containers:", ", ".join(f"{name} {count}" for name, count in road.containers.items()))


if __name__ == "__main__":
    main()
