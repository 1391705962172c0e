"""Four small tasks for `twins`, one for each architecture, with data that a formula draws.

A world is a source of batches. Each task has two similar worlds: a net is trained in the first and
fine-tuned in the second. A batch depends on its number alone, so that all runs see the same data in
the same order.

- **Images**: ten patterns under noise. The convolutional net sees them shifted at random.
- **Symbols**: the three symbols before it decide how likely the next one is, by a table for each
    distance. Some symbols are rare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]
"""Images, and the class of each; or texts of symbols, and the symbol that follows each symbol."""
World = Callable[[int], Batch]
"""Function that returns the batch with a number."""

SIDE, CLASSES, IMAGES = 12, 10, 64
SYMBOLS, LENGTH, TEXTS, SHARPNESS = 64, 32, 16, 2.0
CHANGE = 1.0  # the part of the second world that is new, in units of the part it keeps


class Task(NamedTuple):
    make_net: Callable[[], nn.Module]
    pretraining: World
    tuning: World


# --- worlds


def image_worlds(noise: float, *, shifted: bool) -> list[World]:
    def world(patterns: Tensor) -> World:
        def draw(number: int) -> Batch:
            random = torch.Generator().manual_seed(number)
            classes = torch.randint(CLASSES, (IMAGES,), generator=random)
            images = patterns[classes]
            if shifted:
                shifts = torch.randint(SIDE, (2, IMAGES, 1), generator=random)
                rows, columns = (torch.arange(SIDE) + shifts) % SIDE
                each = torch.arange(IMAGES)[:, None, None]
                images = images[each, rows[:, :, None], columns[:, None, :]]
            images = images + noise * torch.randn(images.shape, generator=random)
            return images[:, None], classes

        return draw

    return [world(patterns) for patterns in _draw_twice(CLASSES, SIDE, SIDE)]


def symbol_worlds() -> list[World]:
    frequencies = 1 / torch.arange(1, SYMBOLS + 1)  # as those of words in a text

    def world(tables: Tensor) -> World:
        factors = (SHARPNESS * tables).exp()

        def draw(number: int) -> Batch:
            random = torch.Generator().manual_seed(number)
            text = [*torch.randint(SYMBOLS, (len(factors), TEXTS), generator=random)]
            for _ in range(LENGTH):
                each = [table[symbol] for table, symbol in zip(factors, text[-3:], strict=True)]
                chances = frequencies * torch.stack(each).prod(dim=0)
                text.append(torch.multinomial(chances, 1, generator=random)[:, 0])
            texts = torch.stack(text[-LENGTH - 1 :], dim=1)
            return texts[:, :-1], texts[:, 1:]

        return draw

    return [world(tables) for tables in _draw_twice(3, SYMBOLS, SYMBOLS)]


def _draw_twice(*shape: int) -> list[Tensor]:
    """Draw the numbers of the first world, and similar ones of the same size for the second."""
    first, new = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    return [first, (first + CHANGE * new) / (1 + CHANGE**2) ** 0.5]


# --- nets


class Recurrent(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.recurrent(self.symbols(text))[0])


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, self.heads, -1)
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS, bias=False)
        for table in (self.symbols, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.symbols(text) + self.places.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def make_perceptron() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(SIDE * SIDE, 128), nn.LayerNorm(128), nn.ReLU()),
        *(nn.Linear(128, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )


def make_convolution() -> nn.Module:
    return nn.Sequential(
        *(_make_convolution(1, 16), nn.BatchNorm2d(16), nn.ReLU()),
        *(_make_convolution(16, 32), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(_make_convolution(32, 32), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, CLASSES)),
    )


def _make_convolution(ins: int, outs: int) -> nn.Module:
    # No bias: the norm behind it subtracts it again, so that its gradient is rounding noise.
    return nn.Conv2d(ins, outs, 3, padding=1, bias=False)


TASKS = {
    "perceptron": Task(make_perceptron, *image_worlds(5.0, shifted=False)),
    "convolution": Task(make_convolution, *image_worlds(0.5, shifted=True)),
    "recurrent": Task(Recurrent, *symbol_worlds()),
    "transformer": Task(Transformer, *symbol_worlds()),
}
