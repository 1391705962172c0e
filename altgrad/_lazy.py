"""Import the names of a package on first use (PEP 562: https://peps.python.org/pep-0562/).

A package lists its names three times: as imports under TYPE_CHECKING, for editors and mypy; in
`__all__`; and in a call of `attach`, for Python. tests/test_imports.py checks that the lists agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attach(
    package: str, names: Mapping[str, str], submodules: str = ""
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the functions `__getattr__` and `__dir__` for a package that imports names on first use.

    Args:
        package: `__name__` of the package.
        names: For each module, relative to the package, the names that it provides, separated by
            spaces: ``{"quantization.ops": "quantize spacing"}``.
        submodules: Names of modules, separated by spaces, that become attributes of the package.

    Returns:
        `__getattr__` and `__dir__`, which the package assigns at module level.
    """
    modules = {name: module for module, provided in names.items() for name in provided.split()}
    modules |= dict.fromkeys(submodules.split(), "")

    def get_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not modules[name]:
            return import_module(f"{package}.{name}")  # the import binds the module to the package
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)  # Python then finds it without __getattr__
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get_name, list_names
