"""The Lightning packages that are installed: `pytorch_lightning`, `lightning`, or both.

They hold the same code under two names, and each Trainer knows only the classes of its own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

_NAMES = ("pytorch_lightning", "lightning.pytorch")


def _installed() -> list[ModuleType]:
    already = any(name in sys.modules for name in _NAMES)
    rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
    log = getattr(rank_zero, "log", None)
    packages = [_imported(name) for name in _NAMES]
    if already and log is not None:
        # The package that is imported last takes over the messages of the other.
        vars(rank_zero)["log"] = log
    found = [package for package in packages if package is not None]
    if not found:
        raise ModuleNotFoundError(
            "altgrad_lightning needs Lightning: pip install 'altgrad[lightning]', or the one that "
            "you use of lightning and pytorch-lightning"
        )
    return found


def _imported(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name is not None and name.startswith(missing.name):
            return None
        raise  # it is installed, and something that it needs is not


if TYPE_CHECKING:
    import pytorch_lightning as lightning
    from pytorch_lightning import Callback
else:
    *_, lightning = _found = _installed()
    # A callback for every Trainer: a subclass of the Callback of each package.
    Callback = type("Callback", tuple(package.Callback for package in _found), {})

__all__ = ["Callback", "lightning"]
