"""`find_shared`: find an object that a deep copy would share with the original and could change.

`copy.deepcopy` does not copy functions. A copied optimizer that calls one would therefore write to
the list or the counter in the function's closure, which belongs to the training.

Read `self_check` first; `optimizer_copy` comes next, and refuses such optimizers.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import gc
import logging
import numbers
import re
import types
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAVES = (type, types.ModuleType, types.CodeType, logging.Logger)
"""Types whose objects are not searched for objects that a deep copy would share.

Classes, modules and code lead to everything in the program. Loggers may be shared: a copy writes to
the same log.
"""

_CONSTANTS = (
    *(type(None), type(...), type(NotImplemented), str, bytes, range, numbers.Number),
    *(enum.Enum, re.Pattern, torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(np.dtype, np.generic, np.ufunc, type(np.linalg.norm)),
    *(types.WrapperDescriptorType, types.MethodWrapperType, types.MethodDescriptorType),
    *(types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType),
)
"""Types whose objects cannot be changed, so that a copy may share them."""

_MACHINERY = ("torch._", "torch.autograd.")
"""Modules of torch whose objects a copy may share, as they hold no state of a training.

These are decorators, operations and the compiler.
"""


def find_shared(value: Any, known: object = None) -> str:
    """Describe a mutable object that a deep copy would share with the original, for an error.

    Args:
        value: The object that is to be copied.
        known: An object that is not searched, such as the optimizer that `value` belongs to.

    Returns:
        A description such as "a list through the function f"; empty if nothing is shared.
    """
    todo, seen = [value], {id(known)}
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, LEAVES):
            continue
        seen.add(id(each))
        if isinstance(each, (types.FunctionType, types.BuiltinFunctionType)):
            if found := _find_mutable(each):
                return found
        elif isinstance(each, Tensor):  # its graph and gradient are not copied
            todo.append(getattr(each, "__dict__", None))
        else:
            todo += gc.get_referents(each)
    return ""


def _find_mutable(function: object) -> str:
    """Return words for a mutable object that a function can reach; empty if there is none."""
    name = getattr(function, "__qualname__", repr(function))
    todo, seen = [function, *_list_globals(function)], set[int]()
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, (*LEAVES, *_CONSTANTS)):
            continue
        seen.add(id(each))
        if isinstance(each, types.FunctionType) and _writes_outside(each.__code__):
            return f"a variable of the function {name}, which the function assigns to"
        inner = _list_inner(each)
        if inner is None:
            return f"a {type(each).__name__} through the function {name}"
        todo += inner
    return ""


def _list_globals(function: object) -> list[Any]:
    """Return the globals that a function names in its module; none for functions of torch.

    Globals that are functions themselves are not followed to their own globals, since libraries
    keep caches there.
    """
    if not isinstance(function, types.FunctionType) or _is_library(function):
        return []
    known = function.__globals__
    names = set(_list_names(function.__code__, "LOAD_GLOBAL"))
    return [known[name] for name in sorted(names) if name in known]


def _is_library(function: types.FunctionType) -> bool:
    return str(function.__globals__.get("__name__", "")).startswith("torch.")


def _list_inner(value: Any) -> list[Any] | None:
    """Return the objects inside an immutable one; None for an object that can be changed."""
    if isinstance(value, types.FunctionType):
        return _list_behind_function(value)
    if isinstance(value, types.BuiltinFunctionType):
        # `__self__` is the list of a method `list.append`; for other functions the module or None.
        is_binding = type(value.__self__).__name__.startswith(("PyCapsule", "pybind11_"))
        return [] if is_binding else [value.__self__]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, type(functools.cache(len))):
        return [value.__wrapped__]
    if isinstance(value, (tuple, frozenset)):
        return [*value]
    settings = getattr(value, "__dataclass_params__", None)  # of any dataclass, frozen or not
    if settings is not None and settings.frozen:
        return [getattr(value, field.name) for field in fields(value)]
    is_machinery = type(value).__module__.startswith(_MACHINERY)
    return [] if is_machinery and not isinstance(value, torch.Generator) else None


def _list_behind_function(function: types.FunctionType) -> list[Any]:
    """Return the objects in the closure, the defaults and the attributes of a function."""
    cells = _read_cells(function)
    if _is_library(function):
        return [each for each in cells if callable(each)]  # caches, not state of the training
    defaults = (function.__defaults__ or (), (function.__kwdefaults__ or {}).values())
    return [*cells, *defaults[0], *defaults[1], *vars(function).values()]


def _read_cells(function: types.FunctionType) -> list[Any]:
    """Return the contents of a function's closure."""
    contents = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            contents.append(cell.cell_contents)
    return contents


@functools.cache
def _writes_outside(code: types.CodeType) -> bool:
    """Return True if code, or a function in it, assigns to a variable of its module or closure."""
    cells = set(_list_names(code, "STORE_DEREF", "DELETE_DEREF"))
    return not cells.isdisjoint(code.co_freevars) or any(
        _list_names(code, "STORE_GLOBAL", "DELETE_GLOBAL")
    )


def _list_names(code: types.CodeType, *operations: str) -> Iterator[str]:
    """Yield the variables that some bytecode operations of a function name, nested ones included.

    A closure variable of a nested function counts only if it comes from outside of that function.
    """
    for instruction in dis.get_instructions(code):
        if instruction.opname in operations:
            yield instruction.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            is_global = any(operation.endswith("_GLOBAL") for operation in operations)
            names = _list_names(inner, *operations)
            yield from (name for name in names if is_global or name in inner.co_freevars)
