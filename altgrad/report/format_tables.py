"""`print_formats`: tables of the named formats, the block formats and the recipes.

A *recipe* says how weights and optimizer states are stored and stepped. This file does not load
torch, so that `altgrad formats` answers at once; the recipes themselves are in `altgrad.recipes`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from altgrad.quantization.block_formats import BLOCK_FORMATS, BlockFormat
from altgrad.quantization.formats import FORMATS
from altgrad.quantization.number_format import NumberFormat

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SCALE_RULES = {
    "e8m0": "2^n, rounded down, as OCP says",
    "e8m0_ceil": "2^n, rounded up, as torchao does",
    "e4m3": "e4m3fn, times one of the tensor",
}


class RecipeLine(NamedTuple):
    """A line of the table of recipes.

    Attributes:
        name: Name of the recipe. ``F`` stands for the name of any format.
        state_bytes: Bytes for each parameter beside those of the weight: Kahan's rounding error,
            and the two states of Adam.
        weight_bytes: Bytes of the weight; None for those of the format F.
        meaning: How weights and states are stored.
    """

    name: str
    state_bytes: float
    weight_bytes: float | None
    meaning: str

    @property
    def bytes(self) -> str:
        """Bytes for each parameter, as ``6`` or ``F + 8``."""
        if self.weight_bytes is None:
            return f"F + {self.state_bytes:g}"
        return f"{self.weight_bytes + self.state_bytes:.3g}"


RECIPES = (
    RecipeLine("fp32", 8, 4, "weights and states in float32"),
    RecipeLine("F", 8, None, "weights in F, rounded to nearest; states in float32"),
    RecipeLine("F-sr", 8, None, "the same with stochastic rounding"),
    RecipeLine("F-kahan", 10, None, "the same with Kahan summation"),
    RecipeLine("bf16-true", 4, 2, "all tensors in bf16; bf16-true-fused: fused step"),
    RecipeLine("fp16-true", 4, 2, "all tensors in fp16; fp16-true-fused: fused step"),
    RecipeLine("torchao-sr", 4, 2, "bf16-true, stochastic rounding: torchao _AdamW"),
    RecipeLine("optimi-kahan", 6, 2, "bf16-true, Kahan summation: optimi AdamW"),
    RecipeLine("torchao-8bit", 2.03125, 4, "states in 8 bits: torchao AdamW8bit"),
    RecipeLine("torchao-fp8", 2.03125, 4, "states in FP8: torchao AdamWFp8"),
    RecipeLine("bnb-8bit", 2.03125, 4, "states in 8 bits: bitsandbytes AdamW8bit"),
)
"""The recipes with a short name, as `altgrad.recipes.get_recipes` accepts them.

A *recipe* says how weights and optimizer states are stored.
"""


def count_bytes(format: NumberFormat) -> float:
    """Return the bytes of a number in a format, with its part of the scale of a block."""
    scale = 8 / format.block_size if isinstance(format, BlockFormat) else 0
    return (format.element.bits + scale) / 8


def print_formats(console: Console) -> None:
    """Print tables of formats, of block formats and of recipes, in at most 80 columns."""
    console.print(_make_format_table())
    console.print(_make_block_table())
    console.print(_make_recipe_table())


def _make_format_table() -> Table:
    table = _make_table(
        "Formats, for formats= and recipes=",
        "E, M: exponent and mantissa bits; eps: spacing above 1; 2^n: powers of two",
        ["bits", "E", "M", "bias", "max", "smallest\nnormal", "smallest", "eps"],
        ["has"],
    )
    for format in FORMATS.values():
        specials = {"inf": format.has_inf, "nan": format.has_nan}
        table.add_row(
            format.name,
            str(format.bits),
            str(format.exponent_bits),
            str(format.mantissa_bits),
            str(format.bias),
            f"{format.max:.5g}",
            # A format with E = 0 has subnormal numbers only.
            f"2^{format.emin}" if format.exponent_bits else "none",
            f"2^{format.emin - format.mantissa_bits}",
            f"2^{-format.mantissa_bits}",
            " ".join(name for name, has in specials.items() if has),
        )
    return table


def _make_block_table() -> Table:
    table = _make_table(
        "Block formats: neighbours share a scale",
        "bytes: of a number, with its part of the scale; mxfp8 stands for mxfp8_e4m3",
        ["bytes", "block"],
        ["element", "scale"],
    )
    for format in BLOCK_FORMATS.values():
        size, rule = str(format.block_size), _SCALE_RULES[format.scale]
        table.add_row(format.name, f"{count_bytes(format):.2f}", size, format.element.name, rule)
    return table


def _make_recipe_table() -> Table:
    table = _make_table(
        "Recipes, for recipes=: how weights and states are stored",
        "bytes: of a weight, its rounding error and two states of Adam;\n"
        "F: any format but nvfp4, and its bytes",
        ["bytes"],
        ["meaning"],
    )
    for line in RECIPES:
        table.add_row(line.name, line.bytes, line.meaning)
    return table


def _make_table(title: str, caption: str, numbers: list[str], texts: list[str]) -> Table:
    """Return a table with columns of names, then of numbers, then of texts."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("name", style="bold", no_wrap=True, vertical="bottom")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for heading in texts:
        table.add_column(heading, no_wrap=True, vertical="bottom")
    return table
