"""Classes of tensors that lack an operation, as those of libraries of 8-bit weights may."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Private, because torch has no public name for what classes of tensors are made with:
from torch.utils import _pytree as pytree


class Wrapped(Tensor):
    """Weights in a class of their own, as libraries of 8-bit weights have."""

    lacks: tuple[str, ...] = ()

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        # torch has no public name for it: torch/testing/_internal/two_tensor.py.
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.__name__.split(".")[0]
        if name in cls.lacks:
            raise NotImplementedError(f"{cls.__name__} has no {name}")

        def unwrap(each: Any) -> Any:
            return each.inner if isinstance(each, Wrapped) else each

        result = operation(*pytree.tree_map(unwrap, args), **pytree.tree_map(unwrap, kwargs or {}))
        if name == "detach":
            return cls(result)
        return args[0] if name.endswith("_") and result is not None else result


class WithoutTake(Wrapped):
    lacks = ("take",)


class WithoutCopies(Wrapped):
    lacks = ("_foreach_copy_", "copy_")
