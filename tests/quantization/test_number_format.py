"""`NumberFormat`: one interface for both kinds of format."""

from typing import Any

import pytest

from altgrad.quantization import BLOCK_FORMATS, FORMATS, FloatFormat, NumberFormat
from altgrad.quantization.number_format import get_applied_scaling


@pytest.mark.parametrize("format", [*FORMATS.values(), *BLOCK_FORMATS.values()], ids=str)
def test_both_kinds_of_format_are_number_formats(format: NumberFormat) -> None:
    assert isinstance(format, NumberFormat)
    assert isinstance(format.element, FloatFormat)
    assert (format.block_size is None) is isinstance(format, FloatFormat)
    assert format.has_tensor_scale is (format.name == "nvfp4")
    assert format.power_of_two is (format.name != "nvfp4")


@pytest.mark.parametrize("other", ["bf16", None, 8, object()])
def test_other_objects_are_not_number_formats(other: object) -> None:
    assert not isinstance(other, NumberFormat)


@pytest.mark.parametrize("scaling", [None, "tensor", "channel", ("block", 8)])
@pytest.mark.parametrize("format", [*FORMATS.values(), *BLOCK_FORMATS.values()], ids=str)
def test_block_formats_and_formats_of_16_bits_ignore_the_scaling_of_a_run(
    format: NumberFormat, scaling: Any
) -> None:
    own = {"nvfp4": ("block", 16), "bf16": None, "fp16": None}
    of_blocks = ("block", 32) if format.name.startswith("mx") else scaling
    assert get_applied_scaling(format, scaling) == own.get(format.name, of_blocks)
