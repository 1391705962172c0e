"""Count costs that are equal on every machine: operations, host copies, memory."""

import collections
import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # torch has no public name for it
from torch.utils._python_dispatch import TorchDispatchMode

HOST_COPIES = ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__")


class Operations(TorchDispatchMode):
    """A counter of all operations that reach the dispatcher, views included.

    Tensors that `cpu` returned, and results of such tensors alone, count as on the host. On a
    machine with an accelerator they cost the device nothing; here every tensor is on the host.

    Attributes:
        counts: Operations on a device.
        on_host: Operations on the host.
        after_copy: Operations after the first `cpu`, on a device or on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.on_host: collections.Counter[str] = collections.Counter()
        self.after_copy: collections.Counter[str] = collections.Counter()
        self._host: dict[int, Tensor] = {}  # by storage; kept alive so that no identity recurs
        self._is_copying = False
        self._has_copied = False

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_on_host = bool(inputs) and all(map(self.is_on_host, inputs))
        result = function(*args, **(kwargs or {}))
        # Marks of a profiler compute nothing.
        if not self._is_copying and not str(function).startswith("profiler."):
            (self.on_host if is_on_host else self.counts)[str(function)] += 1
            if self._has_copied:
                self.after_copy[str(function)] += 1
        if is_on_host:
            outputs = (x for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
            # torch has no public name for the identity of a storage
            self._host |= {x.untyped_storage()._cdata: x for x in outputs}
        return result

    def is_on_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._host

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        self._is_copying = True
        try:
            yield
        finally:
            self._is_copying = False

    def copy(
        self, copy: Callable[..., Tensor], tensor: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Copy a tensor as `cpu` does for a tensor on a device."""
        self._has_copied = True
        with self.uncounted():
            copied = copy(tensor, *args, **kwargs).clone()
        self._host[copied.untyped_storage()._cdata] = copied
        return copied

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        original, view = Tensor.cpu, Tensor.numpy

        def cpu(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.copy(original, tensor, *args, **kwargs)

        def numpy(tensor: Tensor) -> Any:
            if not self.is_on_host(tensor):
                return view(tensor)
            with self.uncounted():  # torch detaches, and shares the memory: part of the copy
                return view(tensor)

        with (
            mock.patch.object(Tensor, "cpu", cpu),
            mock.patch.object(Tensor, "numpy", numpy),
            self,
        ):
            yield


def operations(run: Callable[[], object]) -> collections.Counter[str]:
    return operations_here_and_there(run)[0]


def operations_here_and_there(
    run: Callable[[], object],
) -> tuple[collections.Counter[str], collections.Counter[str]]:
    """Count the operations that an accelerator would make, and those that its host would make."""
    counted = Operations()
    with counted.counting():
        run()
    return counted.counts, counted.on_host


@contextlib.contextmanager
def host_copies() -> Iterator[list[str]]:
    """Yield the calls that copy a tensor's values to the host, except for tensors already there."""
    seen: list[str] = []
    operations = Operations()

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if operations.is_on_host(self):
                return original(self, *args, **kwargs)
            seen.append(name)
            if name == "cpu":
                return operations.copy(original, self, *args, **kwargs)
            return original(self, *args, **kwargs)

        return method

    with contextlib.ExitStack() as stack:
        for name in HOST_COPIES:
            stack.enter_context(mock.patch.object(Tensor, name, counting(name)))
        stack.enter_context(operations)
        yield seen


def instructions(run: Callable[[], object]) -> int:
    """Count the instructions of Python that altgrad executes: a time that no machine changes."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if f"{os.sep}altgrad{os.sep}" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


class Memory(TorchDispatchMode):
    """The peak of the memory that operations allocate, in bytes."""

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
