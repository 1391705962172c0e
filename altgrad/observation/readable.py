"""Find parameters whose class lacks an operation that observing needs.

Some libraries keep weights in a subclass of Tensor that knows few operations, such as one of 8-bit
weights with scales. Each operation that it lacks is an error.

Read `dtensor` first; `parameter_names` comes next.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from altgrad.observation.dtensor import is_sharded, to_local_tensor
from altgrad.quantization.devices import gather

# Larger parameters are sampled by default, and their copy would take time and memory.
_MOST_COPIED = 2048


def find_unreadable(parameters: Iterable[Tensor]) -> dict[Tensor, str]:
    """Find parameters of a class that lacks an operation with which weights are read.

    Args:
        parameters: The parameters. Those that are not trained, or not floating-point, are left out.

    Returns:
        What the class lacks, as the text of its error, for each parameter that cannot be read.
    """
    unusual = [each for each in parameters if _is_unusual(each)]
    errors = {each: _find_error(each) for each in unusual}
    return {each: error for each, error in errors.items() if error is not None}


def _is_unusual(parameter: Tensor) -> bool:
    """Return True for a trained parameter of a class that torch's optimizers do not make."""
    is_plain = type(parameter) in {Tensor, nn.Parameter} or is_sharded(parameter)
    is_trained = parameter.requires_grad and parameter.is_floating_point()
    return is_trained and not is_plain and not nn.parameter.is_lazy(parameter)


@torch.no_grad()
def _find_error(parameter: Tensor) -> str | None:
    """Return the text of the error if weights cannot be read as in an observed step, or None."""
    try:
        local = to_local_tensor(parameter.detach())
        first = torch.arange(min(local.numel(), 1), device=local.device)
        gather(local, first)
        if local.numel() <= _MOST_COPIED:
            copy = torch.empty(local.shape, dtype=local.dtype, device=local.device)
            # The private operation is that with which `snapshots` copies.
            torch._foreach_copy_([copy], [local])
    except Exception as error:  # noqa: BLE001 - a class may raise anything
        return f"{type(parameter.data).__name__} cannot be read: {error}"
    return None
