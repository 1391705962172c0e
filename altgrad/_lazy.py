"""Names of a package that are imported when they are first used (PEP 562).

A package lists them as ordinary imports under TYPE_CHECKING, for editors and mypy, in `__all__`,
and in a call of `attach`, for Python. A test holds the three together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attach(
    package: str, names: Mapping[str, str], submodules: str = ""
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package that imports its names on first use.

    Args:
        package: Its `__name__`.
        names: By module, relative to the package, the names that it provides, with spaces between.
        submodules: Modules of the package that are attributes without an import statement.
    """
    modules = {name: module for module, provided in names.items() for name in provided.split()}
    modules |= dict.fromkeys(submodules.split(), "")

    def get_name(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not modules[name]:
            return import_module(f"{package}.{name}")  # which binds it to the package
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)  # so that this is called once for each name
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get_name, list_names
