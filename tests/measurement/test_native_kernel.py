"""`native_kernel`: code that calls nothing of numba; `test_native_rows` has the figures."""

import subprocess
import sys
from pathlib import Path

import pytest

from altgrad.measurement.native_code import read_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["native_bits", "native_kernel", "native_rounding"])
def test_native_code_is_imported_without_torch(module: str) -> None:
    pytest.importorskip("numba")
    code = f"import sys, altgrad.measurement.{module}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_the_code_has_no_functions_of_numba_or_python(compiled_kernel: Path) -> None:
    code = read_file(compiled_kernel)
    assert code is not None
    assert b"altgrad_row_sums" in code
    for name in (b"numba_", b"NRT_", b"PyErr_"):
        assert name not in code
