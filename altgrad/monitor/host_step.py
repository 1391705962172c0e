"""`bring_to_host`: copy the tensors of a step from a device that does not measure to the host.

`engine` comes next: it measures steps, and calls this function before it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from altgrad.observation.dtensor import to_local_tensor
from altgrad.observation.snapshots import Copies
from altgrad.observation.step import OptimizerStep
from altgrad.quantization.devices import move_to_exact_device


def bring_to_host(step: OptimizerStep, memory: Mapping[str, Copies]) -> OptimizerStep:
    """Copy the tensors of a step to the host, by one transfer, if their device does not measure.

    Args:
        step: The step: weights before it and after it, gradients, and the flag of a GradScaler.
        memory: Memory on the host for the tensors of layers, by name. Others get new memory.

    Returns:
        The step itself if all its tensors are on devices that measure. Otherwise a step with each
        tensor where it is measured, all other values the same.
    """
    fields = (step.before, step.gradients, step.after)
    flag = () if step.found_inf is None else (to_local_tensor(step.found_inf),)
    tensors = [each for field in (*fields, flag) for each in field]
    moved = move_to_exact_device(tensors)
    if all(one is other for one, other in zip(moved, tensors, strict=True)):
        return step
    found_inf = moved.pop() if flag else None
    # Three fields of one length: (3 · layers) tensors -> 3 tuples of tensors -> a triple a layer.
    layers = len(step.names)
    triples = zip(moved[:layers], moved[layers : 2 * layers], moved[2 * layers :], strict=True)
    placed = [
        [*map(Tensor.copy_, memory[name], triple)] if name in memory else triple
        for name, triple in zip(step.names, triples, strict=True)
    ]
    before, gradients, after = zip(*placed, strict=True) if placed else ((), (), ())
    return replace(step, before=before, gradients=gradients, after=after, found_inf=found_inf)
