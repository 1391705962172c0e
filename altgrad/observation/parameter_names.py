"""Name parameters as the user's code does: without parts that wrappers add, each name unique.

`parameter_names` reads the names once. `ParameterRegistry` keeps them, and reads them again when an
optimizer steps an unknown parameter.

Read `readable` first; `snapshots` comes next.
"""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from altgrad.observation.dtensor import register_shards
from altgrad.observation.readable import find_unreadable

# Attributes in which wrappers keep the module that they wrap, and which are thus part of the names
# of its parameters. They are private names of torch, which no user gives to a module.
_WRAPPED = {
    "_orig_mod",  # torch.compile: torch/_dynamo/eval_frame.py, OptimizedModule
    "_fsdp_wrapped_module",  # FSDP1: torch/distributed/fsdp/_common_utils.py, FSDP_WRAPPED_MODULE
    "_fpw_module",  # FSDP1 of older versions of torch
    # Activation checkpointing: torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py
    "_checkpoint_wrapped_module",
    # Fabric: lightning/fabric/wrappers.py, _FabricModule
    "_forward_module",
    "_original_module",
}
# These wrappers keep the module in the attribute `module`. Users, too, call their modules so: the
# part `module` is removed from a name only directly below one of these wrappers.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_OTHER_WRAPPERS = {("deepspeed", "DeepSpeedEngine")}  # by package and class, not imported here
# torch.nn.utils.parametrize keeps the weight of a module as `parametrizations.weight.original`, or
# as `original0`, `original1`, …: torch/nn/utils/parametrize.py, ParametrizationList
_PARAMETRIZATIONS = "parametrizations"


class ParameterRegistry:
    """The parameters of a module by name, read again if an optimizer steps an unknown parameter.

    Args:
        source: A module, or pairs of name and parameter as `named_parameters` returns them.

    Attributes:
        module: The module; None if `source` is pairs.
        unreadable: The names of parameters that are left out, because their class lacks an
            operation that observing needs; with the reason.

    Raises:
        TypeError: `source` is neither a module nor pairs.
        ValueError: `source` has no parameter.
    """

    def __init__(self, source: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        self.module = source if isinstance(source, nn.Module) else None
        if self.module is not None:
            register_shards(self.module)
        self.unreadable: dict[str, str] = {}
        self._names = self._leave_out_unreadable(parameter_names(source))
        if not self._names:
            whole = "that can be read" if self.unreadable else "to observe"
            raise ValueError(f"there is no parameter {whole}, neither in a module nor as pairs")
        # For each optimizer, the parameters that it steps and the module does not have. Without
        # this record, each step would read all names again to look for these parameters.
        self._nameless: WeakKeyDictionary[Optimizer, set[Tensor]] = WeakKeyDictionary()

    @property
    def names(self) -> dict[Tensor, str]:
        """The name of each parameter, in the order of `named_parameters`."""
        return self._names

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, in the order of `named_parameters`."""
        return {name: parameter for parameter, name in self._names.items()}

    def read(self) -> None:
        """Read the names of the module again, since its parameters may have changed."""
        if self.module is not None:
            register_shards(self.module)
            self._names = self._leave_out_unreadable(parameter_names(self.module))

    def _leave_out_unreadable(self, names: dict[Tensor, str]) -> dict[Tensor, str]:
        errors = find_unreadable(names)
        self.unreadable |= {names[each]: error for each, error in errors.items()}
        return {each: name for each, name in names.items() if each not in errors}

    def find_stepped(self, optimizer: Optimizer) -> list[tuple[str, Tensor, bool]]:
        """Return the parameters that an optimizer steps, in the order of its groups.

        Parameters that the module does not have are left out. If there are new ones among the
        optimizer's parameters, the names of the module are read again first.

        Args:
            optimizer: A torch optimizer.

        Returns:
            For each parameter its name, the parameter itself, and True if its learning rate is 0.
        """
        # The rate is compared once for each group: if it is a tensor on a device, the host waits.
        stepped = [
            (parameter, rests)
            for group, rests in [(g, bool(g.get("lr") == 0)) for g in optimizer.param_groups]
            for parameter in group["params"]
        ]
        nameless = self._nameless.get(optimizer, ())
        if any(p not in self._names and p not in nameless for p, _ in stepped):
            self.read()
            self._nameless[optimizer] = {p for p, _ in stepped} - self._names.keys()
        return [(self._names[p], p, rests) for p, rests in stepped if p in self._names]

    def forget_optimizers(self) -> None:
        """Forget which parameters of optimizers are unknown: their names are looked for again."""
        self._nameless.clear()


def parameter_names(source: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """Return a unique name for each parameter, without parts that wrappers add.

    Such parts are ``_orig_mod.`` of `torch.compile`, ``module.`` of DistributedDataParallel and
    DeepSpeed, and ``_forward_module.`` of Fabric. A weight under a parametrization has its own name
    again: ``parametrizations.weight.original`` is ``weight``, and one of several parts, such as
    ``original0``, is ``weight.original0``. The prefix ``base_model.model.`` of peft stays, as in
    its checkpoints; patterns of rules match without it, too.

    A parameter with several names, as tied weights have, gets the first of them. If two parameters
    would have the same name, the name of the later one ends in ``-2``.

    Args:
        source: A module, or pairs of name and parameter as `named_parameters` returns them.

    Returns:
        The name of each parameter, in the order of `named_parameters`.

    Raises:
        TypeError: `source` is neither a module nor pairs.
    """
    if isinstance(source, nn.Module):
        named: Iterable[tuple[str, Tensor]] = source.named_parameters()
        added = _find_added_paths(source)
    else:
        named, added = source, set()
    names: dict[Tensor, str] = {}
    taken: set[str] = set()
    for entry in named:
        if not _is_pair(entry):
            raise TypeError(
                "module: expected a torch.nn.Module or pairs of name and parameter, as "
                f"named_parameters() returns them, got {type(entry).__name__}"
            )
        name, parameter = entry
        if parameter not in names:
            names[parameter] = _make_unique(_strip_wrappers(name, added), taken)
            taken.add(names[parameter])
    return names


def _is_pair(entry: object) -> bool:
    return (
        isinstance(entry, tuple)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], Tensor)
    )


def _find_added_paths(module: nn.Module) -> set[str]:
    """Return the paths that wrappers add: ``a.module`` of DDP, ``a.parametrizations`` of torch."""
    paths = set()
    for path, each in module.named_modules():
        start = f"{path}." if path else ""
        if isinstance(each, _WRAPPERS) or _OTHER_WRAPPERS & _list_classes(each):
            paths.add(f"{start}module")
        if is_parametrized(each):
            paths.add(f"{start}{_PARAMETRIZATIONS}")
            paths.update(f"{start}{_PARAMETRIZATIONS}.{w}.original" for w in each.parametrizations)
    return paths


def _list_classes(module: nn.Module) -> set[tuple[str, str]]:
    """Return the package and the name of the class of a module, and of each of its base classes."""
    return {(each.__module__.split(".")[0], each.__name__) for each in type(module).__mro__}


def _strip_wrappers(name: str, added: set[str]) -> str:
    parts = name.split(".")
    return ".".join(
        part
        for position, part in enumerate(parts)
        if part not in _WRAPPED and ".".join(parts[: position + 1]) not in added
    )


def _make_unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}-{count}"
    return candidate
