"""The tasks of `runs`: what is trained, on which data.

Three tasks set the thresholds of verdicts: logistic regression, a perceptron and a transformer. A
convolutional and a recurrent net are held out, but their results were seen before. Two tasks were
never seen: a residual net on measurements of tumours, and a transformer that reads brackets.

Each task has two sets of data. The second resembles the first: pictures are shifted by a pixel,
texts have upper for lower case, measurements another unit, brackets other shapes. A net that was
trained on the first set is fine-tuned on the second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from altgrad_lightning.demo_model import Block, CharacterTransformer, standard_library_text
from examples.predict_and_confirm import Batch, digits, loss_and_accuracy

_PRETRAINING_STEPS, _PRETRAINING_RATE = 300, 1e-3


class Data(NamedTuple):
    """The batches to train on, one for each step, and fixed examples for the loss afterwards."""

    batches: list[Batch]
    training: Batch


class Task(NamedTuple):
    """A function that makes the net, and one that draws data.

    Attributes:
        make_net: Function that makes the net.
        draw: Function of a seed, a number of steps, and True for the second set of data.
    """

    make_net: Callable[[], nn.Module]
    draw: Callable[[int, int, bool], Data]

    def make_start(self, seed: int, *, is_tuned: bool) -> nn.Module:
        """Make the net at the start of a run: fresh, or trained on the first set of data.

        Args:
            seed: Seed of the weights and of the batches.
            is_tuned: True for the trained net.
        """
        torch.manual_seed(seed)
        net = self.make_net()
        if is_tuned:
            optimizer = AdamW(net.parameters(), _PRETRAINING_RATE)
            for batch in self.draw(seed + 1000, _PRETRAINING_STEPS, False).batches:
                optimizer.zero_grad()
                loss_and_accuracy(net, batch)[0].backward()
                optimizer.step()
        return net


# --- data


def draw_digits(seed: int, steps: int, is_second: bool) -> Data:
    task = digits(seed, steps)

    def change(batch: Batch) -> Batch:
        inputs, labels = batch
        moved = inputs.unflatten(1, (8, 8)).roll((1, 1), dims=(1, 2)).flatten(1)
        return (moved if is_second else inputs), labels

    return Data([change(batch) for batch in task.batches], change(task.training))


def draw_texts(seed: int, steps: int, is_second: bool, *, length: int, size: int = 8) -> Data:
    """Draw pieces of the source of Python's standard library; the next character is to be told.

    Args:
        seed: Seed of the places.
        steps: Number of batches.
        is_second: True to swap upper and lower case.
        length: Number of characters in a piece.
        size: Number of pieces in a batch.
    """
    source = standard_library_text()
    text = torch.frombuffer(
        bytearray(source.swapcase() if is_second else source), dtype=torch.uint8
    )

    def draw(seed: int, count: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - length, (count, 1), generator=generator)
        pieces = text[starts + torch.arange(length + 1)].long()
        return pieces[:, :-1], pieces[:, 1:]

    inputs, following = draw(seed, steps * size)
    batches = [*zip(inputs.split(size), following.split(size), strict=True)]
    return Data(batches, draw(12345, 64))


@functools.cache
def _load_tumours() -> Batch:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    inputs = torch.tensor(data.data, dtype=torch.float32)
    return (inputs - inputs.mean(0)) / inputs.std(0), torch.tensor(data.target)


def draw_tumours(seed: int, steps: int, is_second: bool) -> Data:
    """Draw measurements of 569 tumours, of which each is benign or malignant.

    Args:
        seed: Seed of the batches.
        steps: Number of batches, of 64 tumours each.
        is_second: True to double and shift the measurements.
    """
    inputs, classes = _load_tumours()
    inputs = 2 * inputs + 1 if is_second else inputs
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(classes), (steps, 64), generator=generator)
    return Data([(inputs[each], classes[each]) for each in rows], (inputs, classes))


_SHAPES, _SYMBOLS, _DEEPEST = 6, 16, 8


def draw_brackets(seed: int, steps: int, is_second: bool) -> Data:
    """Draw texts of nested brackets, of which each closing one has the shape of its opening one.

    Symbols 0 to 5 open, 6 to 11 close. Early shapes are more frequent.

    Args:
        seed: Seed of the texts.
        steps: Number of batches, of 16 texts each.
        is_second: True to reverse the order of the shapes.
    """
    chances = (0.6 ** torch.arange(_SHAPES, dtype=torch.float64)).flip(0 if is_second else ())

    def draw(seed: int, texts: int, length: int = 32) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        shapes = torch.multinomial(
            chances.expand(texts, -1), length + 1, replacement=True, generator=generator
        )
        opens = torch.rand(texts, length + 1, generator=generator) < 0.5
        depth = torch.zeros(texts, dtype=torch.long)
        stack = torch.zeros(texts, _DEEPEST, dtype=torch.long)
        rows, symbols = torch.arange(texts), []
        for place in range(length + 1):
            is_open = (opens[:, place] | (depth == 0)) & (depth < _DEEPEST)
            top = stack[rows, (depth - 1).clamp(min=0)]
            symbols.append(torch.where(is_open, shapes[:, place], top + _SHAPES))
            pushed = torch.where(is_open, shapes[:, place], stack[rows, depth % _DEEPEST])
            stack[rows, depth % _DEEPEST] = pushed
            depth = torch.where(is_open, depth + 1, depth - 1)
        text = torch.stack(symbols, dim=1)
        return text[:, :-1], text[:, 1:]

    inputs, following = draw(seed, 16 * steps)
    batches = [*zip(inputs.split(16), following.split(16), strict=True)]
    return Data(batches, draw(12345, 64))


# --- nets


def make_perceptron() -> nn.Module:
    return digits(0, 1).model()


def make_convolution() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)),
        *(nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 10)),
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


class Residual(nn.Module):
    """A layer that adds to its input, float32 (examples, width), behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def make_residual() -> nn.Module:
    width = 48
    return nn.Sequential(
        *(nn.Linear(30, width), Residual(width), Residual(width), Residual(width)),
        *(nn.RMSNorm(width), nn.Linear(width, 2)),
    )


class BracketReader(nn.Module):
    """A transformer that reads symbols, int64 (texts, length), and predicts each next one."""

    def __init__(self, width: int = 48, length: int = 32) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(_SYMBOLS, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, _SYMBOLS)

    def forward(self, text: Tensor) -> Tensor:
        x = self.symbols(text) + self.places.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


TASKS = {
    "logistic": Task(lambda: nn.Linear(64, 10), draw_digits),
    "mlp": Task(make_perceptron, draw_digits),
    "transformer": Task(
        lambda: CharacterTransformer(width=64, heads=4, depth=2),
        functools.partial(draw_texts, length=128),
    ),
    "conv": Task(make_convolution, draw_digits),
    "gru": Task(Gru, functools.partial(draw_texts, length=48)),
    "residual": Task(make_residual, draw_tumours),
    "brackets": Task(BracketReader, draw_brackets),
}
SEEN_BEFORE = ("conv", "gru")
"""The held-out tasks whose results under earlier rules were printed before."""
NEVER_SEEN = ("residual", "brackets")
