"""Names of parameters as their user wrote them: without wrappers, each one unique."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

# Attributes under which wrappers keep the module that they wrap.
_WRAPPED = {
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # FullyShardedDataParallel
    "_fpw_module",  # FullyShardedDataParallel of older versions
    "_checkpoint_wrapped_module",  # activation checkpointing
}
# These keep it under `module`, which is also a name that users give.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def parameter_names(source: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """The name of each parameter: clean, unique, in the order of `named_parameters`.

    The names that wrappers add are removed (``_orig_mod.`` of `torch.compile`, ``module.`` of
    DistributedDataParallel, …). A parameter that occurs several times, as tied weights do, has the
    first of its names. Where two parameters would share a name, the later one ends in ``-2``.

    Args:
        source: A module, or names and parameters as `named_parameters` gives them.

    Raises:
        TypeError: Something else.
    """
    if isinstance(source, nn.Module):
        named: Iterable[tuple[str, Tensor]] = source.named_parameters()
        added = _names_added_by_wrappers(source)
    else:
        named, added = source, set()
    names: dict[Tensor, str] = {}
    taken: set[str] = set()
    for entry in named:
        if not _is_pair(entry):
            raise TypeError(
                "expected a module or pairs of name and parameter, as named_parameters() gives "
                f"them, not {type(entry).__name__}"
            )
        name, parameter = entry
        if parameter not in names:
            names[parameter] = _unique(_without_wrappers(name, added), taken)
            taken.add(names[parameter])
    return names


def _is_pair(entry: object) -> bool:
    return (
        isinstance(entry, tuple)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], Tensor)
    )


def _names_added_by_wrappers(module: nn.Module) -> set[str]:
    """Full paths whose last part is not the user's."""
    return {
        f"{path}.module" if path else "module"
        for path, wrapper in module.named_modules()
        if isinstance(wrapper, _WRAPPERS)
    }


def _without_wrappers(name: str, added: set[str]) -> str:
    parts = name.split(".")
    return ".".join(
        part
        for position, part in enumerate(parts)
        if part not in _WRAPPED and ".".join(parts[: position + 1]) not in added
    )


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}-{count}"
    return candidate
