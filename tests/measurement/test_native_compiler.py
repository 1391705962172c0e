"""`native_compiler`: a process that compiles once, and never outlives the one that started it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad.measurement import native_compiler
from altgrad.measurement.native_code import compile_file, read_file, write_file

ROOT = Path(__file__).parents[2]


def start(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "altgrad.measurement.native_compiler", str(path), "0"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_it_ends_when_its_input_does(tmp_path: Path) -> None:
    path = tmp_path / "kernel.o"
    with start(path) as process:
        process.communicate()  # closes the input
        assert process.returncode == 1
    assert not path.exists()


def test_a_file_that_is_there_is_not_compiled_again(tmp_path: Path) -> None:
    path = tmp_path / "kernel.o"
    write_file(path, b"code")
    compile_file(path, 0)
    assert read_file(path) == b"code"


def test_an_error_is_raised_with_the_last_line(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    with pytest.raises(RuntimeError, match="File exists"):
        compile_file(occupied / "kernel.o", 0)


def test_code_that_needs_numba_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from altgrad.measurement import native_kernel

    assembly = "declare void @numba_raise()\ndefine void @f() { call void @numba_raise() ret void }"
    monkeypatch.setattr(native_kernel, "make_assembly", lambda: (assembly, "f"))
    with pytest.raises(RuntimeError, match="makes code that calls numba_raise"):
        native_compiler.compile_kernel()
