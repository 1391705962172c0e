"""`WeightSample`: copies of a few weights of each parameter, to find out later which have changed.

Read `dtensor` first, which finds the local shard.

`bypass_reason` comes next: it finds the reason if weights have changed although no step was seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad.observation.dtensor import to_local_tensor
from altgrad.quantization.devices import copy_to_host, gather

# A step moves nearly all elements of most layers, so that few are enough. In an embedding it moves
# single rows, and may miss all of these few; more elements would help a little.
_MOST_ELEMENTS = 32


class WeightSample:
    """A copy, on the host, of up to 32 evenly spaced weights of each parameter.

    Args:
        parameters: Floating-point parameters by name. Those on the device ``meta`` have no weights
            and are left out.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._weights = _read(parameters)
        self._parameters = {name: weakref.ref(each) for name, each in parameters.items()}

    def find_changed(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Return the names of parameters whose sampled weights have changed.

        A parameter is compared only if it is the same object with the same shape as before.

        Args:
            parameters: The parameters now, by name.

        Returns:
            The names, in the order of `parameters`.
        """
        known = {
            name: each
            for name, each in parameters.items()
            if name in self._weights and self._parameters[name]() is each
        }
        return [
            name
            for name, (shape, weights) in _read(known).items()
            if self._weights[name][0] == shape
            # torch.equal would not do: for it, NaN differs from NaN.
            and not torch.allclose(self._weights[name][1], weights, 0, 0, equal_nan=True)
        ]


# The samples are ordinary tensors, also if the caller is in inference mode:
# https://docs.pytorch.org/docs/stable/notes/autograd.html#inference-mode
@torch.inference_mode(mode=False)
@torch.no_grad()
def _read(parameters: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, Tensor]]:
    """Return the shape of each local shard, and up to 32 of its weights, float64 on the host.

    All weights on a device are copied at once, so that the host waits once for each device.
    """
    local = {name: to_local_tensor(each.detach()) for name, each in parameters.items()}
    samples = {name: _take(each) for name, each in local.items() if each.device.type != "meta"}
    weights = zip(samples, copy_to_host([*samples.values()]), strict=True)
    return {name: (local[name].shape, each.double()) for name, each in weights}


def _take(weights: Tensor) -> Tensor:
    """Return up to 32 evenly spaced weights of one tensor, (elements) on its device."""
    count = min(weights.numel(), _MOST_ELEMENTS)
    indices = torch.arange(count, device=weights.device) * (weights.numel() // max(count, 1))
    return gather(weights, indices)
