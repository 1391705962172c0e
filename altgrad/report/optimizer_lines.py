"""Write the line of Python that makes an optimizer: that of the run, or the same of a library.

`applying` and `library_lines` come next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from altgrad.report.records.schema import RunDescription

_PUBLIC = {
    "torch": "torch.optim",
    "torchao": "torchao.optim",
    "optimi": "optimi",
    "bitsandbytes": "bitsandbytes.optim",
}
"""The public module of optimizers, by the name of the package."""
_FAMILIES = {"_AdamW": "AdamW"}
"""The optimizer of torch with the same arithmetic, by class name, if not found by name.

Names such as ``AdamW8bit`` need no entry: without the number of bits they are those of torch.
"""
_FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
_MOST = 4  # optimizers that each have a line
_AS_NOW = "  # as now"  # the arguments
_WIDTH = 80


class Maker(NamedTuple):
    """A class of optimizers, as code names it.

    Attributes:
        module: The module to import it from; empty for a class of the user's own.
        name: Name of the class.
        options: Arguments that its code has beside the user's own, such as ``"fused=True"``.
    """

    module: str
    name: str
    options: str = ""

    @property
    def family(self) -> str:
        """The optimizer of ``torch.optim`` with the same arithmetic, such as ``"AdamW"``.

        It is the name of the class for a class of the user's own.
        """
        return _FAMILIES.get(self.name) or re.sub(r"(4bit|8bit|32bit|Fp8)$", "", self.name)

    @property
    def can_be_fused(self) -> bool:
        """True if the class takes the argument ``fused=True``."""
        return self.module == "torch.optim" and self.name in _FUSED

    @property
    def heading(self) -> str:
        """The line that imports the class; empty for a class of the user's own."""
        if self.module == "torch.optim":
            return "import torch"
        return f"from {self.module} import {self.name}" if self.module else ""

    def call(self, parameters: str, arguments: str) -> str:
        """Return code that makes an optimizer.

        Args:
            parameters: Code of the parameters.
            arguments: Name of the dict with the user's own arguments, such as lr.

        Returns:
            The code, such as ``torch.optim.AdamW(model.parameters(), **arguments)``.
        """
        name = f"torch.optim.{self.name}" if self.module == "torch.optim" else self.name
        options = f", {self.options}" if self.options else ""
        return f"{name}({parameters}, **{arguments}{options})"


def list_makers(run: RunDescription) -> dict[Maker, int]:
    """Return the classes of a run's own optimizers, and how many it has of each.

    Args:
        run: The run. One that was read from a file of an older version has one class.

    Returns:
        The number of optimizers by class. A class without a known name is ``Optimizer``.
    """
    counts = dict(run.optimizers)
    if not counts and run.now is not None and run.now.optimizer is not None:
        counts = {run.now.optimizer: 1}
    found: dict[Maker, int] = {}
    for path, count in (counts or {"": 1}).items():
        maker = _find_maker(path)
        found[maker] = found.get(maker, 0) + count
    return found


def _find_maker(path: str) -> Maker:
    """Return the class with a module and name, such as ``torch.optim.adamw.AdamW``."""
    package, name = path.partition(".")[0], path.rpartition(".")[2]
    if not (name.isidentifier() and name.isascii()):
        return Maker("", "Optimizer")
    is_known = path.startswith(f"{_PUBLIC.get(package, '-')}.")
    return Maker(_PUBLIC[package] if is_known else "", name)


def replace_makers(
    makers: Mapping[Maker, int], find: Callable[[Maker], Maker | None]
) -> dict[Maker, int] | None:
    """Return the classes with which a library makes optimizers of the same kind.

    Args:
        makers: The classes of the run, and how many optimizers it has of each.
        find: Function that returns the library's class for a class, or None.

    Returns:
        The library's classes; None if it lacks one of them.
    """
    found: dict[Maker, int] = {}
    for maker, count in makers.items():
        other = find(maker)
        if other is None:
            return None
        found[other] = found.get(other, 0) + count
    return found


def write_imports(makers: Mapping[Maker, int], *others: str) -> list[str]:
    """Return the lines that import classes of optimizers, after other imports, and a blank line.

    Args:
        makers: The classes.
        others: Other lines of imports.
    """
    headings = (each.heading for each in makers if each.heading)
    return [*dict.fromkeys((*others, *headings)), ""]


def write_optimizers(makers: Mapping[Maker, int]) -> list[str]:
    """Return the lines that make the optimizers of a run, each with the user's own arguments.

    Several optimizers are numbered, as ``optimizer_1 = …(parameters_1, **arguments_1)``. More than
    four are lists, one for each class.

    Args:
        makers: The classes, and the number of optimizers of each.
    """
    total = sum(makers.values())
    if total == 1:
        ((maker, _),) = makers.items()
        lines = [f"optimizer = {maker.call('model.parameters()', 'arguments')}"]
    elif total <= _MOST:
        each = [maker for maker, count in makers.items() for _ in range(count)]
        lines = [
            f"optimizer_{k} = {maker.call(f'parameters_{k}', f'arguments_{k}')}"
            for k, maker in enumerate(each, 1)
        ]
    else:
        lines = [
            f"optimizers_{k} = [{maker.call('p', 'a')} for p, a in groups_{k}]"
            for k, maker in enumerate(makers, 1)
        ]
    return [f"{line}{_AS_NOW}" if len(line + _AS_NOW) <= _WIDTH else line for line in lines]


def name_optimizers(makers: Mapping[Maker, int]) -> str:
    """Return the names of the optimizers as arguments, such as ``optimizer_1, optimizer_2``.

    Args:
        makers: The classes, and the number of optimizers of each.
    """
    total = sum(makers.values())
    if total == 1:
        return "optimizer"
    if total <= _MOST:
        return ", ".join(f"optimizer_{k}" for k in range(1, total + 1))
    return ", ".join(f"*optimizers_{k}" for k in range(1, len(makers) + 1))
