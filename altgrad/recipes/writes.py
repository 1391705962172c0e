"""`count_writes`: how often a tensor was written to, as torch counts it.

The file stands alone; `run_weights` and `run_states` ask whether something else than an optimizer
has written to weights and states.
"""

from __future__ import annotations

from torch import Tensor

UNCOUNTED = -1
"""The number of writes to a tensor whose writes nobody counts."""


def count_writes(tensor: Tensor) -> int:
    """Return the number of in-place writes to a tensor, without those through `.data`.

    Args:
        tensor: The tensor; those that share its memory have the same number, unless they came from
            `.data`.

    Returns:
        The number, which the steps of some fused optimizers leave as it is. `UNCOUNTED` for a
        tensor that was made under `torch.inference_mode`.
    """
    # Autograd counts in-place writes in `_version`, which has no public name:
    # https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks
    return UNCOUNTED if tensor.is_inference() else tensor._version  # noqa: SLF001
