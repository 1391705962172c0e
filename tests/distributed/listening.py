"""`Listening` records every collective of a rank, and its bytes."""

from __future__ import annotations

from unittest import mock

import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVES = (
    *("allgather", "_allgather_base", "allgather_coalesced", "allreduce", "allreduce_coalesced"),
    *("alltoall", "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier", "recv"),
    *("reduce", "reduce_scatter", "_reduce_scatter_base", "scatter", "send"),
)
"""Names of the methods of a gloo group that are collectives."""

Said = list[tuple[str, int]]
"""The name of each collective, and the bytes that each rank gives to it."""


class Listening(TorchDispatchMode):
    """A context that records every collective by torch, for any function and group."""

    def __init__(self) -> None:
        super().__init__()
        self.said: Said = []
        self._patches = [
            mock.patch.object(dist.ProcessGroupGloo, name, self._noting(name))
            for name in COLLECTIVES
        ]

    def __enter__(self):
        for each in self._patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        for each in self._patches:
            each.stop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self._note(function.__name__, args)
        return function(*args, **(kwargs or {}))

    def _noting(self, name):
        """Return a recording version of a group's method, for calls past torch's functions."""
        method = getattr(dist.ProcessGroupGloo, name)

        def call(group, *args, **kwargs):
            # The arguments are (outputs, inputs): count the inputs.
            self._note(name, args[-1:] if name == "allgather" else args)
            return method(group, *args, **kwargs)

        return call

    def _note(self, name, args):
        # torch has no public name for it
        tensors = [x for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)]
        self.said.append((name, sum(x.nbytes for x in tensors)))
