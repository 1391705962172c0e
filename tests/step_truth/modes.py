"""A row of the table: a way to train, its number of steps, and the designs that fail it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.step_truth.designs import Design, GradientsAfterTheStep, LightningHooks
from tests.step_truth.recording import Journal

Run = Callable[[Design, Path], Journal]

POST = GradientsAfterTheStep
HOOKS = LightningHooks


@dataclass(frozen=True)
class Mode:
    name: str
    run: Run = field(repr=False)
    steps: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    wrong: tuple[type[Design], ...] = ()  # the designs that must fail

    def __str__(self) -> str:
        return self.name
