"""`native_code`: the native kernel is loaded where it is compiled, and nothing breaks otherwise."""

import logging
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from altgrad.measurement import native_code as module
from altgrad.measurement.native_code import (
    CACHE,
    CHOICE,
    NativeCode,
    find_file,
    find_folder,
    read_choice,
    read_file,
    write_file,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _default_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CHOICE, raising=False)
    monkeypatch.setenv(CACHE, str(tmp_path))


def fake_file(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Have the kernel in a file, as if numba were installed."""
    monkeypatch.setattr(module, "find_file", lambda: path)
    monkeypatch.setattr(module, "find_spec", lambda _: object())


def run_python(code: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    environment.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.stdout.strip()


def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "fast")
    with pytest.raises(ValueError, match="ALTGRAD_KERNEL=fast: expected eager or native"):
        read_choice()
    with pytest.raises(ValueError, match="expected eager or native"):
        NativeCode().prepare(compiles=True)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernel.o"
    assert read_file(path) is None
    write_file(path, b"code")
    assert read_file(path) == b"code"
    assert [each.name for each in path.parent.iterdir()] == ["kernel.o"]


@pytest.mark.parametrize("size", [0, 10, 32, 35])
def test_a_torn_file_counts_as_missing(tmp_path: Path, size: int) -> None:
    path = tmp_path / "kernel.o"
    write_file(path, b"code")
    path.write_bytes(path.read_bytes()[:size])
    assert read_file(path) is None


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, "/one")
    assert find_folder() == Path("/one")
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert find_folder() == Path("/two/altgrad")


def test_the_name_of_the_file_follows_versions_and_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "version", lambda name: f"{name} 1")
    monkeypatch.setattr(module, "describe_processor", lambda: ("target", "cpu", "features"))
    name = find_file()
    assert find_file() == name
    monkeypatch.setattr(module, "describe_processor", lambda: ("target", "cpu", "others"))
    other = find_file()
    monkeypatch.setattr(module, "version", lambda name: f"{name} 2")
    assert len({name, other, find_file()}) == 3


def test_without_numba_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    code = NativeCode()
    with caplog.at_level(logging.INFO):
        code.prepare(compiles=True)
    assert (code.function, code.describe(), caplog.text) == (None, "eager", "")
    monkeypatch.setenv(CHOICE, "native")
    with pytest.raises(RuntimeError, match=r"pip install 'altgrad\[fast\]'"):
        code.prepare(compiles=True)


def test_eager_looks_for_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_file", lambda: pytest.fail("looked"))
    monkeypatch.setenv(CHOICE, "eager")
    NativeCode().prepare(compiles=True)


def test_a_failed_compilation_is_logged_once_and_eager_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Read-only file system")

    fake_file(monkeypatch, tmp_path / "kernel.o")
    monkeypatch.setattr(module, "compile_file", refuse)
    code = NativeCode()
    with caplog.at_level(logging.INFO, "altgrad"):
        for _ in range(3):
            code.prepare(compiles=True)
            code.wait()
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "the eager kernel measures: Read-only file system" in record.message
    assert code.describe() == "eager"


def test_measure_starts_no_compilation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_file(monkeypatch, tmp_path / "kernel.o")
    monkeypatch.setattr(module, "compile_file", lambda *_: pytest.fail("compiled"))
    code = NativeCode()
    code.prepare(compiles=False)
    assert code.describe() == "eager"


def test_the_kernel_serves_the_run_that_has_compiled_it(
    compiled_kernel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "kernel.o"
    fake_file(monkeypatch, path)
    seen = []

    def compile_file(_: Path, __: int) -> None:
        seen.append(code.describe())
        path.write_bytes(compiled_kernel.read_bytes())

    monkeypatch.setattr(module, "compile_file", compile_file)
    code = NativeCode()
    code.prepare(compiles=True)
    code.wait()
    assert (seen, code.describe()) == (["eager, then native"], "native")
    assert code.function is not None
    monkeypatch.setenv(CHOICE, "eager")
    assert (code.function, code.describe()) == (None, "eager")


def test_a_compiled_kernel_is_loaded_without_numba(compiled_kernel: Path) -> None:
    code = """
import sys
from altgrad.measurement.native_code import native_code
assert not {"numba", "llvmlite", "torch"} & {*sys.modules}
native_code.prepare(compiles=True)
print(native_code.describe(), "numba" in sys.modules, native_code.is_compiling)
"""
    variables = {CACHE: str(compiled_kernel.parent), CHOICE: ""}
    assert run_python(code, **variables) == "native False False"


def test_importing_altgrad_loads_neither_numba_nor_llvmlite() -> None:
    code = """
import sys, torch
from altgrad import UpdateMonitor, measure
measure(torch.ones(3), torch.zeros(3))
model = torch.nn.Linear(2, 2)
UpdateMonitor(model).attach(torch.optim.SGD(model.parameters(), 0.1)).detach()
print({"numba", "llvmlite"} & {*sys.modules})
"""
    assert run_python(code, **{CHOICE: "eager"}) == "set()"
