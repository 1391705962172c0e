"""Draw the sample of each layer that twins step.

Only elements up to the last full chunk of 64 are drawn, since torch may round those of the rest in
another way (`layout` says why). `lane` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from altgrad.recipes.layout import CHUNK

Draw: TypeAlias = Callable[[str, Sequence[int], int, int], Tensor | None]
"""A function that takes the name and shape of a layer, the maximum number of elements, and how many
neighbours are drawn together. It returns ascending flat indices, int64 on the CPU; None for all."""


def draw_sample(draw: Draw, name: str, shape: Sequence[int], most: int, block: int) -> Tensor:
    """Draw the elements of a layer that twins step.

    Args:
        draw: Function that draws elements uniformly.
        name: Name of the layer.
        shape: Its shape.
        most: Maximum number of elements.
        block: Number of neighbours along the last dimension that are drawn together. Short blocks
            at the end of rows are left out, unless each row is one.

    Returns:
        Ascending indices into the flattened layer, int64 (elements) on the CPU.
    """
    numel = torch.Size(shape).numel()
    body = numel - numel % CHUNK or numel
    if block == 1:
        drawn = draw(name, (body,), most, 1)
        return torch.arange(body, device="cpu") if drawn is None else drawn
    row = shape[-1] if shape else 1
    full = row - row % block or row
    rows = numel // max(row, 1)
    drawn = draw(name, (rows, full), most, block)
    if drawn is None:
        drawn = torch.arange(rows * full, device="cpu")
    indices = drawn // max(full, 1) * row + drawn % max(full, 1)
    blocks = indices.view(-1, min(block, full)) if len(indices) else indices.view(0, 1)
    inside = blocks[blocks[:, -1] < body]
    return (inside if len(inside) else blocks).flatten()
