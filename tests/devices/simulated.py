"""A device other than the CPU, made of torch's backend for Python alone; it needs no hardware.

Its tensors are tensors of torch with the device ``sim``. Their memory is the host's, so that each
operation runs on the CPU and gives the CPU's bits. As with an accelerator, tensors on two devices
do not mix; copies between them, and waits of the host, are counted.

The backend changes a process for good, and has to be there before the first backward pass starts
the threads of autograd: `test_on_a_device` runs each ``check_*.py`` in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import torch.utils._pytree as pytree  # torch has no public name for it
from torch import Tensor
from torch.utils import backend_registration
from torch.utils.dlpack import from_dlpack, to_dlpack

NAME = "sim"
# torch calls its backend for Python alone experimental. This file was tried with torch 2.13.
_SETUP = "_setup_privateuseone_for_python_backend"
IS_POSSIBLE = torch.__version__ >= (2, 13) and hasattr(backend_registration, _SETUP)

_HOST, _DEVICE = 1, 12  # kDLCPU and kDLExtDev of DLPack
_CODE_OFFSET = 8  # of the device's code in a DLManagedTensor, after the address of the memory
_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass
class Traffic:
    """What went between host and device.

    Attributes:
        to_device: Number of copies from the host to the device.
        to_host: Number of copies from the device to the host.
        waits: Operations, other than copies, whose result or its shape needs values of the device.
        operations: Operations on the device.
    """

    to_device: int = 0
    to_host: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Limits:
    """What the device lacks: dtypes, and operations by name, such as ``aten::take``."""

    dtypes: frozenset[torch.dtype] = frozenset()
    operations: frozenset[str] = frozenset()


_counters: list[Traffic] = []
_limits: list[Limits] = []
_libraries: list[torch.library.Library] = []  # what they register lasts as long as they do


def make_device() -> torch.device:
    """Add the device to torch in this process, unless it is there, and return it."""
    if not _libraries:
        getattr(backend_registration, _SETUP)(NAME, backend_module=_Module())
        everything, convolutions = (torch.library.Library(n, "IMPL") for n in ("_", "aten"))
        everything.fallback(_run, "PrivateUse1")
        # Without kernels of their own under these names, convolutions raise an error.
        convolutions.impl("convolution_overrideable", _convolve, "PrivateUse1")
        convolutions.impl("convolution_backward_overrideable", _convolve_backward, "PrivateUse1")
        Tensor.__deepcopy__ = _make_deepcopy(Tensor.__deepcopy__)
        _libraries.extend((everything, convolutions))
    return torch.device(NAME, 0)


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Count copies, waits and operations in a block of code."""
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)


@contextlib.contextmanager
def lacking(limits: Limits) -> Iterator[None]:
    """Refuse dtypes and operations in a block of code."""
    _limits.append(limits)
    try:
        yield
    finally:
        _limits.remove(limits)


@cache
def find_limits_like_mps() -> Limits:
    """Return what Apple's MPS lacks: float64, and operations without a kernel for it.

    The operations are in the table from which torch itself is generated.
    """
    import yaml

    path = files("torchgen") / "packaged" / "ATen" / "native" / "native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where there is one: faster
    entries = yaml.load(path.read_text(), Loader=loader)
    table = {each["func"].split("(")[0]: each for each in entries}
    lacks = set()
    for name, each in table.items():
        kernels = table.get(each.get("structured_delegate"), each).get("dispatch", {})
        keys = {key.strip() for some in kernels for key in some.split(",")}
        if "CPU" in keys and not any(k == "MPS" or k.startswith("Composite") for k in keys):
            lacks.add(f"aten::{name}")
    return Limits(frozenset({torch.float64, torch.complex128}), frozenset(lacks))


def is_on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


class _Module:
    """The functions of ``torch.sim``; torch itself asks for all but the last two."""

    def __init__(self) -> None:
        self.random_state = torch.Generator("cpu").manual_seed(0).get_state()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        self.random_state = torch.Generator("cpu").manual_seed(seed).get_state()

    def get_rng_state(self, _device: torch.device) -> Tensor:
        return self.random_state.clone()

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from the device's own generator, and leave that of the CPU as it was."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(before)


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of the device on the CPU: torch calls it for each one without a kernel."""
    if any(operation.name() in limits.operations for limits in _limits):
        raise NotImplementedError(f"{operation.name()} is not implemented for the device {NAME}")
    inputs = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if operation.name() == "aten::_copy_from":
        return _copy(inputs[0], inputs[1])
    _check_devices(operation, inputs)
    _count(operation)
    named = _name_arguments(operation, args, kwargs)
    resizable = [each for argument, each in named if argument.is_out and _is_empty(each)]
    views = {id(each): _view_on_host(each) for each in inputs if is_on_device(each)}
    views |= {id(each): views[id(each)].clone() for each in resizable}
    dtypes = [each.dtype for each in inputs]
    lowered = {argument.name: _lower(argument, each, views, dtypes) for argument, each in named}
    draws = torch.Tag.nondeterministic_seeded in operation.tags
    with torch.get_device_module(NAME).drawing() if draws else contextlib.nullcontext():
        results = operation(**lowered)
    for each in resizable:
        if views[id(each)].shape != each.shape:
            each.data = _lift(views[id(each)], {})
    known = {id(views[id(each)]): each for each in inputs if id(each) in views}
    return pytree.tree_map(lambda each: _lift(each, known), results)


def _make_deepcopy(usual: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that clones tensors of the device, as torch does for MPS and others."""

    def deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if not is_on_device(tensor) or id(tensor) in memo:
            return usual(tensor, memo)
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    return deepcopy


def _convolve(*args: Any) -> Any:
    return _run(torch.ops.aten.convolution.default, *args)


def _convolve_backward(gradient: Tensor, inputs: Tensor, weight: Tensor, *options: Any) -> Any:
    operation = torch.ops.aten.convolution_backward.default
    return _run(operation, gradient, inputs, weight, [gradient.shape[1]], *options)


def _copy(source: Tensor, target: Tensor) -> Tensor:
    """Copy a tensor into another one; one of them at least is on the device."""
    for traffic in _counters:
        traffic.to_device += not is_on_device(source)
        traffic.to_host += not is_on_device(target)
        traffic.operations["aten::_copy_from"] += 1
    host = [_view_on_host(each) if is_on_device(each) else each for each in (source, target)]
    host[1].copy_(host[0])
    return target


def _check_devices(operation: Any, inputs: list[Tensor]) -> None:
    """Refuse tensors of the host beside those of the device, as accelerators do.

    A tensor of the host without dimensions is a number, which travels with the call.
    """
    mixed = [each for each in inputs if not is_on_device(each) and each.dim()]
    if mixed and operation.name() != "aten::_foreach_copy_":
        raise RuntimeError(
            f"{operation.name()}: expected all tensors to be on the same device, but found at "
            f"least two devices, {NAME} and {mixed[0].device}"
        )


def _count(operation: Any) -> None:
    reads = any(tag in operation.tags for tag in _READS)
    for traffic in _counters:
        traffic.operations[operation.name()] += 1
        if reads:
            traffic.waits[operation.name()] += 1


def _name_arguments(operation: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """Return each argument of an operation that has a value, as its schema describes it."""
    schema = operation._schema.arguments  # torch has no public name for it
    named = {**dict(zip((each.name for each in schema), args, strict=False)), **kwargs}
    return [(each, named[each.name]) for each in schema if each.name in named]


def _is_empty(value: object) -> bool:
    return isinstance(value, Tensor) and not value.numel()


def _lower(argument: Any, value: Any, views: dict[int, Tensor], dtypes: list[torch.dtype]) -> Any:
    """Return an argument of an operation as the CPU takes it."""
    if isinstance(value, bool | int | float) and str(argument.type) == "Tensor":
        # torch gives tensors that were numbers as numbers. They decide no dtype.
        if isinstance(value, float) and any(each.is_floating_point for each in dtypes):
            return torch.tensor(value, dtype=torch.float64)
        return torch.tensor(value)

    def lower(each: Any) -> Any:
        if isinstance(each, torch.device):
            return torch.device("cpu")
        return views.get(id(each), each) if isinstance(each, Tensor) else each

    return pytree.tree_map(lower, value)


def _lift(value: Any, known: dict[int, Tensor]) -> Any:
    """Return a tensor on the device for one that the CPU computed; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if any(value.dtype in limits.dtypes for limits in _limits):
        raise TypeError(f"the device {NAME} has no {value.dtype}; use another dtype")
    return known[id(value)] if id(value) in known else _relabel(value, _DEVICE)


def _view_on_host(tensor: Tensor) -> Tensor:
    return _relabel(tensor.detach(), _HOST)


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _relabel(tensor: Tensor, code: int) -> Tensor:
    """Return a tensor with the same memory, shape and strides that lies on another device."""
    capsule = to_dlpack(tensor)
    address = _get_pointer(capsule, b"dltensor")
    ctypes.c_int32.from_address(address + _CODE_OFFSET).value = code
    return from_dlpack(capsule)
