"""`native_rounding`: its code is loaded beside the kernel's; `test_native_storage` has its bits."""

from pathlib import Path

import pytest
import torch

from altgrad.measurement.native_code import native_code, read_file
from altgrad.quantization import get_format, quantize


def test_it_is_in_the_file_of_the_kernel(compiled_kernel: Path) -> None:
    assert b"altgrad_store" in (read_file(compiled_kernel) or b"")


@pytest.mark.usefixtures("native_kernel")
def test_it_rounds_as_the_public_function_does() -> None:
    e5m2, weights = get_format("e5m2"), torch.randn(1000) * 30_000
    expected = quantize(weights, e5m2)
    function = native_code.rounding
    assert function is not None
    address, spacing = weights.data_ptr(), 2.0 ** (e5m2.emax - 2)
    function(address, 1000, 0, 1, 0, 0, 1, spacing, e5m2.max, 0.25, e5m2.smallest_subnormal)
    assert torch.equal(weights, expected)
