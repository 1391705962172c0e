"""`count_writes`: how often a tensor was written to, as torch counts it.

With it, twins find out whether something other than an optimizer's step has written to
hyperparameters, weights or states of the training.

Read `optimizer_copy` first; `hyperparameters` comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor

UNCOUNTED = -1
"""The result of `count_writes` for a tensor whose writes torch does not count."""


def count_writes(tensor: Tensor) -> int:
    """Return the number of in-place writes to a tensor, without those through `.data`.

    Args:
        tensor: The tensor. Its views have the same number, but not its `.data`.

    Returns:
        The number; steps of some fused optimizers are not counted. `UNCOUNTED` for a tensor that
        was made under `torch.inference_mode`.
    """
    # Autograd counts in-place writes in `_version`, which has no public name:
    # https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks
    return UNCOUNTED if tensor.is_inference() else tensor._version  # noqa: SLF001


def count_writes_to_each(tensors: Sequence[Tensor]) -> list[int]:
    """Return the number of in-place writes to each tensor, as `count_writes`; faster than calls.

    Args:
        tensors: The tensors.

    Returns:
        The numbers, in their order.
    """
    try:
        return [*map(_read_version, tensors)]
    except RuntimeError:  # a tensor that was made under `torch.inference_mode`
        return [*map(count_writes, tensors)]


_read_version = attrgetter("_version")
