"""Draw the sample of each layer: the elements that twins step.

A *twin* is a set of such samples that is stepped and stored as a recipe says, beside the training,
to show what its formats would do. Only elements up to the last full chunk of 64 are drawn, since
torch may round the rest in another way (`layout` says why). Layers of fewer than 64 elements are
taken whole. If elements share scales in blocks, whole blocks are drawn.

Read `shard_sample` first; `twin_tensors` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.dtensor import get_local_gradients, to_local_tensor
from altgrad.quantization.formats import Scaling
from altgrad.twins.layout import CHUNK
from altgrad.twins.shard_sample import ShardSample

Draw: TypeAlias = Callable[[str, Sequence[int], int, int], Tensor | None]
"""A function that draws elements of a layer uniformly.

It takes the name and shape of a layer, the maximum number of elements, and the number of neighbours
that are drawn together. It returns ascending indices into the flattened layer, int64 on the CPU;
None for all elements.
"""


class Sampled(NamedTuple):
    """A layer of the training with its sample: the few elements that are stepped on their own.

    Attributes:
        parameter: The parameter.
        shape: The shape of the parameter when the sample was drawn.
        indices: The sample, as ascending flat indices, int64 (elements) on the device where the
            sample is stepped: that of the parameter, or the CPU if that lacks float64.
        shard: The same elements in the local shard of this rank, if several ranks hold the layer;
            None if this process has the whole layer.
    """

    parameter: Tensor
    shape: torch.Size
    indices: Tensor
    shard: ShardSample | None = None

    @property
    def places(self) -> Tensor:
        """The indices of the sample in the flattened tensor that this rank holds of the layer."""
        return self.indices if self.shard is None else self.shard.local

    @property
    def size(self) -> int:
        """The number of sampled elements that figures count."""
        return len(self.indices) if self.shard is None else int(self.shard.is_counted.sum())

    @property
    def weights(self) -> Tensor:
        """The parameter, or the local shard that this rank holds of it."""
        return self.parameter if self.shard is None else to_local_tensor(self.parameter)

    @property
    def gradient(self) -> Tensor:
        """The gradient of `weights`, which must be there, as a dense tensor."""
        if self.shard is None:
            return self.parameter.grad  # type: ignore[return-value]
        return get_local_gradients([self.parameter])[0]

    def read_state(self, optimizer: Optimizer) -> Mapping[str, Any]:
        """Return the optimizer's state of the layer, by name; of tensors the local shard alone."""
        state: Mapping[str, Any] = optimizer.state.get(self.parameter, {})
        if self.shard is None:
            return state
        return {name: to_local_tensor(value) for name, value in state.items()}


def draw_sample(draw: Draw, name: str, shape: Sequence[int], most: int, block: int) -> Tensor:
    """Draw the sample of a layer: the elements that twins step.

    *Twins* are samples that are stepped as different recipes say. Elements at the end of a layer,
    which torch may round in another way, are left out if possible.

    Args:
        draw: Function that draws elements uniformly.
        name: Name of the layer.
        shape: Shape of the layer.
        most: Maximum number of elements, for a layer of 64 or more. Smaller layers are taken whole.
        block: Number of neighbours along the last dimension that are drawn together. The last block
            of a row may be shorter.

    Returns:
        Ascending indices into the flattened layer, int64 (elements) on the CPU.
    """
    numel = torch.Size(shape).numel()
    if numel < CHUNK:
        return torch.arange(numel, device="cpu")
    body = numel - numel % CHUNK
    if block == 1:
        drawn = draw(name, (body,), most, 1)
        return torch.arange(body, device="cpu") if drawn is None else drawn
    drawn = draw(name, shape, most, block)
    if drawn is None:
        drawn = torch.arange(numel, device="cpu")
    inside = drawn[drawn + measure_block_ends(drawn, shape, block) <= body]
    return inside if len(inside) else drawn


def measure_block_ends(indices: Tensor, shape: Sequence[int], block: int) -> Tensor:
    """Return for each element the distance to the end of its block: 1 for the last element.

    Args:
        indices: Indices into the flattened layer, int64 (elements).
        shape: Shape of the layer.
        block: Number of neighbours along the last dimension that are drawn together.

    Returns:
        int64 (elements).
    """
    row, size = get_row(shape), get_block_size(shape, block)
    within = indices % row
    return (within - within % size + size).clamp(max=row) - within


def get_row(shape: Sequence[int]) -> int:
    """Return the number of elements along the last dimension, at least 1."""
    return max(shape[-1], 1) if shape else 1


def get_block_size(shape: Sequence[int], block: int) -> int:
    """Return the number of elements of a full block of a layer: at most those of a row.

    Args:
        shape: Shape of the layer.
        block: Number of elements of a block in long rows.
    """
    return min(block, get_row(shape))


def number_groups(indices: Tensor, shape: Sequence[int], scaling: Scaling) -> Tensor:
    """Return for each sampled element the number of its group: the elements that share a scale.

    Args:
        indices: Ascending indices into the flattened layer, int64 (elements).
        shape: Shape of the layer.
        scaling: The elements that share a scale: ``"tensor"``, ``"channel"`` (along dimension 0) or
            ``("block", size)``, along the last dimension.

    Returns:
        Numbers, counted over the whole layer, int64 (elements), ascending.
    """
    if scaling == "tensor" or not shape:
        return torch.zeros_like(indices)
    if scaling == "channel":
        return indices // max(torch.Size(shape).numel() // max(shape[0], 1), 1)
    row, size = get_row(shape), get_block_size(shape, scaling[1])
    return indices // row * -(-row // size) + indices % row // size


def find_columns(indices: Tensor, shape: Sequence[int], block: int) -> Tensor:
    """Return the column of each sampled element, for a matrix with one row per layer.

    Each drawn block begins at a multiple of the block size, so that the row can be cut into blocks.

    Args:
        indices: The sample, as ascending flat indices, int64 (elements).
        shape: The shape along whose last dimension the blocks lie.
        block: Number of neighbours that were drawn together.

    Returns:
        Ascending columns, int64 (elements) on the CPU; there are gaps only after short blocks.
    """
    if block == 1:
        return torch.arange(len(indices), device="cpu")
    indices = indices.cpu()
    blocks = number_groups(indices, shape, ("block", block))
    _, ordinals = torch.unique_consecutive(blocks, return_inverse=True)
    size = get_block_size(shape, block)
    columns: Tensor = ordinals * size + indices % get_row(shape) % size
    return columns
