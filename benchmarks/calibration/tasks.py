"""The tasks of `runs`: three to calibrate on, and two that the calibration does not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from altgrad_lightning.demo_model import CharacterTransformer, Windows, standard_library_text
from examples.predict_and_confirm import Batch, Task, digits

STEPS = 300
SEED = 0


class Config(NamedTuple):
    """A way to train: a task and an optimizer, by name, and a learning rate."""

    task: str
    optimizer: str
    lr: float


def logistic() -> Task:
    return digits(SEED, STEPS)._replace(model=_seeded(lambda: nn.Linear(64, 10)))


def mlp() -> Task:
    return digits(SEED, STEPS)


def transformer() -> Task:
    return _characters(lambda: CharacterTransformer(width=64, heads=4, depth=2), length=128)


def conv() -> Task:
    return digits(SEED, STEPS)._replace(
        model=_seeded(
            lambda: nn.Sequential(
                nn.Unflatten(1, (1, 8, 8)),
                nn.Conv2d(1, 16, 3, padding=1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(512, 10),
            )
        )
    )


class Gru(nn.Module):
    """A recurrent net that reads characters, int64 (texts, length), and predicts each next one."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(128, 32)
        self.recurrent = nn.GRU(32, 64, batch_first=True)
        self.head = nn.Linear(64, 128)

    def forward(self, text: Tensor) -> Tensor:
        states, _ = self.recurrent(self.characters(text))
        return self.head(states)


def gru() -> Task:
    return _characters(Gru, length=48)


TASKS: dict[str, Callable[[], Task]] = {
    task.__name__: task for task in (logistic, mlp, transformer, conv, gru)
}
OPTIMIZERS: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "sgd": lambda net, lr: SGD(net.parameters(), lr),
    "momentum": lambda net, lr: SGD(net.parameters(), lr, momentum=0.9),
    "adam": lambda net, lr: Adam(net.parameters(), lr, betas=(0.9, 0.99)),
    "adamw": lambda net, lr: AdamW(net.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.1),
    "rmsprop": lambda net, lr: RMSprop(net.parameters(), lr),
}
_LRS = {
    "sgd": (0.03, 0.1, 0.3, 1.0),
    "momentum": (0.003, 0.01, 0.03, 0.1),
    "adam": (0.0003, 0.001, 0.003, 0.01),
    "adamw": (0.0003, 0.001, 0.003, 0.01),
    "rmsprop": (0.0001, 0.0003, 0.001, 0.003),
}


def _configs(tasks: tuple[str, ...], optimizers: tuple[str, ...]) -> list[Config]:
    return [Config(task, o, lr) for task in tasks for o in optimizers for lr in _LRS[o]]


CALIBRATION = _configs(("logistic", "mlp", "transformer"), ("sgd", "momentum", "adam"))
HELD_OUT = _configs(("conv", "gru"), ("adamw", "rmsprop"))


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        torch.manual_seed(SEED)
        return make()

    return model


def _characters(make: Callable[[], nn.Module], length: int, size: int = 8) -> Task:
    """Make the task to predict the next character in the source of Python's standard library.

    The last tenth of the source is held out.

    Args:
        make: Function that makes the net.
        length: Number of characters in a piece of text.
        size: Number of pieces in a batch.
    """
    text = standard_library_text()
    end = len(text) * 9 // 10

    def batches(text: bytes, seed: int, count: int, size: int) -> list[Batch]:
        torch.manual_seed(seed)
        windows = Windows(text, count * size)
        rows = torch.stack([windows[k][: length + 1] for k in range(count * size)])
        return [(each[:, :-1], each[:, 1:]) for each in rows.split(size)]

    (training,) = batches(text[:end], 1000, 1, 64)
    (held_out,) = batches(text[end:], 1001, 1, 64)
    return Task(_seeded(make), batches(text[:end], SEED, STEPS, size), training, held_out)
