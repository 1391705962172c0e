"""What an operation costs on every machine alike: operations, host copies, memory."""

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

HOST_COPIES = ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__")


class Operations(TorchDispatchMode):
    """Counts all that reaches the dispatcher, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()


def operations(run: Callable[[], object]) -> collections.Counter[str]:
    with Operations() as counted:
        run()
    return counted.counts


@contextlib.contextmanager
def host_copies() -> Iterator[list[str]]:
    """Every call by which a tensor's values get to the host."""
    seen: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return original(self, *args, **kwargs)

        return method

    with contextlib.ExitStack() as stack:
        for name in HOST_COPIES:
            stack.enter_context(mock.patch.object(Tensor, name, counting(name)))
        yield seen


class Memory(TorchDispatchMode):
    """The most memory that is alive at once of what operations allocate, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), given=True)
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage, *, given: bool = False) -> None:
        key, size = storage._cdata, 0 if given else storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._alive += size
        self.peak = max(self.peak, self._alive)

        def freed() -> None:
            self._alive -= size
            self._known.discard(key)

        weakref.finalize(storage, freed)
