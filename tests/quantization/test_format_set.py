"""`FormatSet` against loops over elements: what formats and a scaling need of a measurement."""

import math
from collections.abc import Sequence
from itertools import chain, combinations
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from altgrad.quantization import BLOCK_FORMATS, E4M3, FP16, BlockFormat, FloatFormat
from altgrad.quantization.format_set import FormatSet

NAMES = ("bf16", "e4m3fn", "e2m1", "mxfp4", "nvfp4")
SCALINGS: tuple[Any, ...] = (None, "tensor", "channel", ("block", 8), ["block", 24])
CHANNELS, LENGTH = 4, 96
SETS = [*chain.from_iterable(combinations(NAMES, count) for count in range(len(NAMES) + 1))]
every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=str)

BLOCKS_OF = {"mxfp4": 32, "nvfp4": 16}
"""Block formats and their block sizes (OCP MX 1.0, table 1; arXiv 2509.25149)."""


def sharing(name: str, scaling: Any) -> list[int] | None:
    """Number the scale of each element of a (CHANNELS, LENGTH) matrix; None without scales."""
    if name in BLOCKS_OF:
        kind, size = "block", BLOCKS_OF[name]
    elif scaling is None or name == "bf16":
        return None
    else:
        kind, size = (scaling, 0) if isinstance(scaling, str) else scaling
    number = {"tensor": lambda *_: 0, "channel": lambda r, _: r}.get(
        kind, lambda r, c: r * LENGTH + c // size
    )
    return [number(row, column) for row in range(CHANNELS) for column in range(LENGTH)]


def runs(groups: Sequence[int]) -> set[int]:
    """Return the lengths of runs of equal numbers along the last dimension."""
    found = set()
    for row in range(CHANNELS):
        part = groups[row * LENGTH : (row + 1) * LENGTH]
        ends = [i for i in range(1, LENGTH) if part[i] != part[i - 1]]
        found |= {b - a for a, b in zip([0, *ends], [*ends, LENGTH], strict=True)}
    return found


@every_scaling
@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_a_set_needs_what_any_of_its_formats_needs(names: Any, scaling: Any) -> None:
    found = FormatSet(names, scaling)
    groups = [each for name in names if (each := sharing(name, scaling)) is not None]
    in_blocks = [each for each in groups if runs(each) != {LENGTH}]
    assert found.block_sizes == tuple(sorted({size for each in in_blocks for size in runs(each)}))
    assert found.is_single is all(len({*each}) == 1 for each in groups)
    # Neighbours can be cut apart at c if no scale is shared across it.
    cuts = [c for c in range(1, LENGTH) if all(each[c - 1] != each[c] for each in in_blocks)] or [
        LENGTH
    ]
    assert found.block == (cuts[0] if in_blocks else 1)
    fitted = [
        name
        for name in names
        if name not in BLOCKS_OF
        and (each := sharing(name, scaling)) is not None
        and runs(each) == {LENGTH}
    ]
    assert found.fitted == tuple(fitted)
    assert found.needs_tensor_amax is ("nvfp4" in names)
    assert found.needs_amax is (bool(fitted) or "nvfp4" in names)


@every_scaling
def test_a_set_is_a_sequence_of_its_formats(scaling: Any) -> None:
    own = BlockFormat("mine", E4M3, 4, "e8m0")
    found = FormatSet(["half", own, "fp16", "NVFP4"], scaling)
    assert found.formats == (FP16, own, BLOCK_FORMATS["nvfp4"])
    assert (*found,) == found.formats
    assert len(found) == 3
    assert found.names == ("fp16", "mine", "nvfp4")
    assert found.scaling is scaling
    assert not FormatSet([])


def test_blocks_of_several_sizes_are_measured_in_common_multiples() -> None:
    formats = [BlockFormat(f"of {size}".replace(" ", "_"), E4M3, size, "e8m0") for size in (6, 10)]
    found = FormatSet([*formats, "e5m2"], ("block", 4))
    assert found.block_sizes == (4, 6, 10)
    assert found.block == next(n for n in range(1, 1000) if not (n % 4 or n % 6 or n % 10))


def gap_above_one(dtype: Any) -> float:
    return float(np.nextafter(np.array(1, dtype), np.array(2, dtype))) - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_format_is_judged_if_weights_are_stored_finer(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    stored = gap_above_one(getattr(ml_dtypes if dtype == torch.bfloat16 else np, name))
    gaps = {"bf16": 2**-7, "fp16": 2**-10, "e4m3fn": 2**-3, "mxfp4": 0.5}
    assert FormatSet([*gaps]).judged(dtype) == [gap > stored for gap in gaps.values()]


def test_a_format_is_judged_for_weights_in_a_finer_format() -> None:
    judged = FormatSet(["bf16", "fp16", "e4m3fn", "nvfp4"]).judged(E4M3)
    assert judged == [False, False, False, True]


@pytest.mark.parametrize("scaling", ["row", ("block", 0), ("block", True), ("tile", 8), 3, ()])
def test_a_wrong_scaling_is_refused(scaling: Any) -> None:
    with pytest.raises(ValueError, match="expected 'tensor', 'channel' or"):
        FormatSet("bf16", scaling)


def test_two_formats_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two different formats are named 'nvfp4'"):
        FormatSet(["nvfp4", FloatFormat("nvfp4", 2, 1, 1)])


def test_repr_shows_names_and_scaling() -> None:
    assert repr(FormatSet("bf16", None)) == "FormatSet(('bf16',), scaling=None)"
    assert math.lcm() == FormatSet([]).block == 1


def test_formats_need_the_blocks_of_their_own_scales_alone() -> None:
    formats = FormatSet(("bf16", "e4m3fn", "mxfp8", "nvfp4"), ("block", 48))
    expected = {
        ("bf16",): 1,
        ("e4m3fn",): 48,
        ("nvfp4",): 16,
        ("bf16", "mxfp8_e4m3"): 32,
        ("e4m3fn", "mxfp8_e4m3", "nvfp4"): 96,
        (): 1,
    }
    assert {names: formats.find_block(names) for names in expected} == expected
