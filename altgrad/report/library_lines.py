"""Write lines of Python that train as a recipe says, with the libraries that people use.

A *recipe* says how weights and optimizer states are stored and stepped. The libraries are PyTorch
itself, Lightning, torchao, optimi and bitsandbytes. The optimizer is that of the run, or the same
one of a library. Layers may stay in float32, module by module.

Read `optimizer_lines` first; `next_lines` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from altgrad.report.applying import quote
from altgrad.report.optimizer_lines import (
    Maker,
    replace_makers,
    write_imports,
    write_optimizers,
)
from altgrad.report.records.schema import RecipeInfo

_TORCH = "import torch"
_LIGHTNING = "from lightning.pytorch import Trainer"
_PRECISIONS = {"bfloat16": "bf16-true", "float16": "16-true"}
_LIBRARIES = "altgrad.recipes.libraries.make_"
_LINE = 88  # characters of a list of patterns in one line


class Lines(NamedTuple):
    """Lines of Python with their title.

    Attributes:
        title: The library, or what the lines do.
        code: The lines. They expect the names ``model`` and ``arguments``, a dict with the
            arguments of the user's own optimizer, or those that a comment names.
    """

    title: str
    code: str


class _Library(NamedTuple):
    """The library with which a recipe is trained.

    Attributes:
        title: Name of the library.
        find: Function that returns the library's class for a class of the run, or None.
        has: A phrase on the optimizers that it has.
        arguments: A comment on the arguments of the optimizer; empty if they are as now.
        is_rounding: True if the recipe rounds weights in bf16, False if it packs states alone.
    """

    title: str
    find: Callable[[Maker], Maker | None]
    has: str
    arguments: str = ""
    is_rounding: bool = False


def find_library(recipe: RecipeInfo) -> str | None:
    """Return the short name by which this file finds the lines of code for a recipe.

    A recipe that no library can train has None.

    Args:
        recipe: The description of a recipe in the run file.

    Returns:
        ``"fp32"`` for weights and states in float32, ``"true"`` for all tensors in one dtype, and
        otherwise a name of `altgrad.recipes.get_recipes`: ``"bf16-sr"``, ``"bf16-kahan"``,
        ``"torchao-sr"``, ``"torchao-8bit"``, ``"torchao-fp8"``, ``"optimi-kahan"`` or
        ``"bnb-8bit"``.
    """
    if recipe.accumulate is not None:
        return None
    if recipe.optimizer is not None:
        is_library = recipe.optimizer.startswith(_LIBRARIES)
        name = recipe.optimizer.removeprefix(_LIBRARIES).replace("_", "-")
        return name if is_library and name in _BY_NAME else None
    if recipe.states:
        return None
    if recipe.weights is None:
        return "fp32" if recipe.dtype is None else "true" if recipe.dtype in _PRECISIONS else None
    if recipe.weights == "bf16" and recipe.dtype is None:
        ways = {("stochastic", None): "bf16-sr", ("nearest_even", "kahan"): "bf16-kahan"}
        return ways.get((recipe.rounding, recipe.compensation))
    return None


def write_library_lines(
    recipe: RecipeInfo,
    makers: Mapping[Maker, int],
    kept: Sequence[str] = (),
    *,
    is_fused: bool = False,
) -> list[Lines]:
    """Write the lines that train as a recipe says.

    Args:
        recipe: The description of the recipe.
        makers: The classes of the run's optimizers, and how many it has of each.
        kept: Patterns of the names of modules that stay in float32.
        is_fused: True if the run's optimizers have the argument ``fused=True``.

    Returns:
        The lines of each library; empty if no known library has the recipe for these optimizers.
    """
    name = find_library(recipe)
    if name == "true":
        return _write_true(recipe, makers, kept)
    if name is None or name == "fp32":
        return []
    library = _BY_NAME[name]
    found = replace_makers(makers, library.find)
    if found is None:
        return []
    comments = _list_comments(name, makers, is_fused=is_fused)
    if library.is_rounding:
        lines = _write_in_dtype("bfloat16", found, kept, comments)
    else:
        lines = [*write_imports(found), *comments, *write_optimizers(found)]
    return [Lines(library.title, "\n".join(lines))]


def _list_comments(name: str, makers: Mapping[Maker, int], *, is_fused: bool) -> list[str]:
    """Return comments on the arguments of a library's optimizer, and on its states."""
    comments = [*_list_left_out(makers, is_fused=is_fused)]
    has_betas = any(each.family != "SGD" for each in makers)
    if has_betas and (arguments := _BY_NAME[name].arguments):
        comments.append(arguments)
    if name in EXACT:
        judged = f': the recipe "{EXACT[name]}" judges that.'
        is_judged = all(each.family in ("Adam", "AdamW") for each in makers)
        comments.append(f"# States are in bf16, too{judged if is_judged else ', untested.'}")
    return comments


def _list_left_out(makers: Mapping[Maker, int], *, is_fused: bool) -> list[str]:
    """Return a comment on arguments that a library's class lacks, or gets already; or none."""
    own = (_OWN_ARGUMENTS.get(each.module) for each in makers)
    names = dict.fromkeys(filter(None, ["fused" if is_fused else None, *own]))
    return [f"# Leave out of the arguments: {', '.join(names)}."] if names else []


def explain_no_library(recipe: RecipeInfo, makers: Mapping[Maker, int]) -> str:
    """Write why no library has the lines of a recipe, in one sentence.

    Args:
        recipe: The description of the recipe.
        makers: The classes of the run's optimizers.

    Returns:
        The sentence.
    """
    library = _BY_NAME.get(find_library(recipe) or "")
    if library is not None:
        lacking = dict.fromkeys(each.name for each in makers if library.find(each) is None)
        return f"{library.has} alone, and this run has {' and '.join(lacking)}."
    if recipe.weights == "bf16" and not recipe.states and recipe.optimizer is None:
        return "No known optimizer keeps states in float32 beside weights in bf16."
    return "No known library stores weights and states so."


def write_master_lines(makers: Mapping[Maker, int], *, is_low: bool) -> list[Lines]:
    """Write the lines that keep weights and states in float32, and compute in bf16.

    Args:
        makers: The classes of the run's optimizers, and how many it has of each.
        is_low: True if the run itself stores weights below float32.

    Returns:
        The lines of PyTorch, Lightning and FSDP2.
    """
    float32 = ["model.float()"] if is_low else []
    fsdp = [
        *write_imports(
            makers,
            _TORCH,
            "from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard",
        ),
        "policy = MixedPrecisionPolicy(",
        "    param_dtype=torch.bfloat16, reduce_dtype=torch.float32",
        ")",
        *float32,
        "fully_shard(model, mp_policy=policy)  # each block first, then the model",
        *write_optimizers(makers),
    ]
    plain = [*write_imports(makers, _TORCH), *float32, *write_optimizers(makers), _AUTOCAST]
    return [
        Lines("PyTorch", "\n".join(plain)),
        Lines("Lightning", f'{_LIGHTNING}\n\ntrainer = Trainer(precision="bf16-mixed")'),
        Lines("FSDP2", "\n".join(fsdp)),
    ]


_AUTOCAST = "# Compute the loss under torch.autocast(device_type, torch.bfloat16)."


def write_small_states(makers: Mapping[Maker, int], *, is_fused: bool = False) -> list[Lines]:
    """Write the lines of torchao for weights in bf16, rounded stochastically, and states in 8 bits.

    Args:
        makers: The classes of the run's optimizers, and how many it has of each.
        is_fused: True if the run's optimizers have the argument ``fused=True``.

    Returns:
        The lines; empty if torchao has no such optimizer.
    """
    found = replace_makers(makers, _find_8bit_stochastic)
    if found is None:
        return []
    left_out = _list_left_out(makers, is_fused=is_fused)
    comments = [*left_out, "# Not tried together: each of the two was judged alone."]
    return [Lines("torchao, both", "\n".join(_write_in_dtype("bfloat16", found, (), comments)))]


# --- all tensors in one dtype


def _write_true(
    recipe: RecipeInfo, makers: Mapping[Maker, int], kept: Sequence[str]
) -> list[Lines]:
    assert recipe.dtype is not None
    dtype = recipe.dtype
    if recipe.fused:
        fused = replace_makers(
            makers, lambda each: each._replace(options="fused=True") if each.can_be_fused else None
        )
        if fused is None:
            return []
        makers = fused
    plain = _write_in_dtype(dtype, makers, kept)
    trainer = f'trainer = Trainer(precision="{_PRECISIONS[dtype]}")'
    if kept:
        imports, loop = _write_conversion(dtype, kept)
        trainer = f"trainer = Trainer(precision={quote(_MIXED[dtype])})"
        lightning = [*imports, _LIGHTNING, "", "# Before fit(); model is the LightningModule."]
        lightning += [*loop, trainer]
    else:
        lightning = [_LIGHTNING, "", trainer]
    if recipe.fused:
        lightning.append("# configure_optimizers makes the optimizer with fused=True.")
    return [Lines("PyTorch", "\n".join(plain)), Lines("Lightning", "\n".join(lightning))]


_MIXED = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}


def _write_in_dtype(
    dtype: str, makers: Mapping[Maker, int], kept: Sequence[str], comments: Sequence[str] = ()
) -> list[str]:
    """Return the lines that convert a model, and then make its optimizers.

    Args:
        dtype: Name of the dtype.
        makers: The classes of the optimizers, and how many there are of each.
        kept: Patterns of the names of modules that stay in float32.
        comments: Comments before the optimizers.
    """
    imports, conversion = _write_conversion(dtype, kept)
    autocast = [_AUTOCAST.replace("bfloat16", dtype)] if kept else []
    return [
        *write_imports(makers, *imports),
        *conversion,
        *comments,
        *write_optimizers(makers),
        *autocast,
    ]


def _write_conversion(dtype: str, kept: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the imports, and the lines that convert a model to a dtype, but for some modules."""
    if not kept:
        return [_TORCH], [f"model.to(torch.{dtype})"]
    quoted = [*map(quote, kept)]
    lines = [f"kept = [{', '.join(quoted)}]"]
    if len(lines[0]) > _LINE:
        lines = ["kept = [", *(f"    {each}," for each in quoted), "]"]
    lines += [
        "for name, weight in model.named_parameters():",
        '    is_kept = any(fnmatchcase(name.rpartition(".")[0], each) for each in kept)',
        f"    weight.data = weight.data.to(torch.float32 if is_kept else torch.{dtype})",
    ]
    return ["from fnmatch import fnmatchcase", _TORCH], lines


# --- the optimizers of libraries


def _find_stochastic(maker: Maker) -> Maker | None:
    """Return the class of torchao that rounds weights in bf16 stochastically."""
    options = {"AdamW": "", "Adam": "weight_decay=0.0, "}.get(maker.family)
    if options is None:
        return None
    return Maker("torchao.optim", "_AdamW", f"{options}bf16_stochastic_round=True")


def _find_kahan(maker: Maker) -> Maker | None:
    """Return the class of optimi that keeps the rounding errors of weights in bf16."""
    has_it = maker.family in ("Adam", "AdamW", "SGD")
    return Maker("optimi", maker.family, "kahan_sum=True") if has_it else None


def _find_packed(module: str, end: str, options: str = "") -> Callable[[Maker], Maker | None]:
    """Return a function that finds the Adam or AdamW of a library with states in 8 bits."""

    def find(maker: Maker) -> Maker | None:
        has_it = maker.family in ("Adam", "AdamW")
        return Maker(module, f"{maker.family}{end}", options) if has_it else None

    return find


_find_8bit_stochastic = _find_packed("torchao.optim", "8bit", "bf16_stochastic_round=True")

_STOCHASTIC = _Library(
    "torchao",
    _find_stochastic,
    "torchao rounds stochastically in Adam and AdamW",
    is_rounding=True,
)
_KAHAN = _Library(
    "optimi",
    _find_kahan,
    "optimi has Kahan summation in Adam, AdamW and SGD",
    "# Pass betas and eps, too: the defaults of optimi differ.",
    is_rounding=True,
)
_BY_NAME: Mapping[str, _Library] = {
    "bf16-sr": _STOCHASTIC,
    "torchao-sr": _STOCHASTIC,
    "bf16-kahan": _KAHAN,
    "optimi-kahan": _KAHAN,
    "torchao-8bit": _Library(
        "torchao",
        _find_packed("torchao.optim", "8bit"),
        "torchao has states in 8 bits for Adam and AdamW",
    ),
    "torchao-fp8": _Library(
        "torchao",
        _find_packed("torchao.optim", "Fp8"),
        "torchao has states in FP8 for Adam and AdamW",
    ),
    "bnb-8bit": _Library(
        "bitsandbytes",
        _find_packed("bitsandbytes.optim", "8bit"),
        "this recipe of bitsandbytes is for Adam and AdamW",
    ),
}
"""The libraries, by short name of the recipe."""
_OWN_ARGUMENTS = {"torchao.optim": "bf16_stochastic_round", "optimi": "kahan_sum"}
"""By module of optimizers, the argument that no other library has."""
EXACT = {"bf16-sr": "torchao-sr", "bf16-kahan": "optimi-kahan"}
"""The recipe that a library's optimizer follows exactly, by name of the similar general recipe.

For ``bf16-sr``, lines for torchao are proposed. Its optimizer keeps the states in bf16, too, while
``bf16-sr`` keeps them in float32: what it does exactly is the recipe ``torchao-sr``.
"""
