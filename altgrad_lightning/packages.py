"""`Callback` and `lightning`: import whichever Lightning packages are installed.

Lightning is published under two names, `pytorch_lightning` and `lightning`, with the same code. A
Trainer accepts only callbacks of its own package. `Callback` is therefore a subclass of the
Callback of each installed package.

Nothing needs to be read before this file; `callback` uses `Callback`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

_NAMES = ("pytorch_lightning", "lightning.pytorch")


def _import_installed() -> list[ModuleType]:
    is_one_imported = any(name in sys.modules for name in _NAMES)
    rank_zero = sys.modules.get("lightning_utilities.core.rank_zero")
    log = getattr(rank_zero, "log", None)
    packages = [_import_if_installed(name) for name in _NAMES]
    if is_one_imported and log is not None:
        # Importing a package sets the logger that both packages share (`rank_zero_module.log` in
        # lightning/pytorch/utilities/rank_zero.py). Keep the logger of the user's package.
        vars(rank_zero)["log"] = log
    found = [package for package in packages if package is not None]
    if not found:
        raise ModuleNotFoundError(
            "altgrad_lightning needs Lightning: pip install 'altgrad[lightning]', or the one that "
            "you use of lightning and pytorch-lightning"
        )
    return found


def _import_if_installed(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name is not None and name.startswith(missing.name):
            return None
        raise  # the package is installed, and one of its dependencies is missing


if TYPE_CHECKING:
    import pytorch_lightning as lightning
    from pytorch_lightning import Callback
else:
    *_, lightning = _found = _import_installed()
    Callback = type("Callback", tuple(package.Callback for package in _found), {})

__all__ = ["Callback", "lightning"]
