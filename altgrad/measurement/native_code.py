"""Find the machine code of the native kernel: in a folder of the user, or by compiling it.

numba, which the extra ``altgrad[fast]`` installs, compiles the kernel in some 20 seconds. It would
stop the training meanwhile, as it holds Python's global lock. So a process of its own compiles in
the background (`native_compiler`), and leaves the code in a file. Until then the eager kernel
measures; from then on, and in later runs from the start, the native one does. A training loads the
file by llvmlite, a part of numba, and never imports numba itself.

The name of the file has the hash of all that the code depends on: the source of the kernel, the
versions of numba and llvmlite, and the processor. The file begins with the hash of its content, so
that a torn file counts as missing. It is renamed once it is written: any number of processes may
compile at once, and be killed.

The environment variable ``ALTGRAD_KERNEL`` chooses a kernel: ``eager``, or ``native``, for which
`prepare` waits. ``ALTGRAD_CACHE`` names the folder.

This file imports no torch. Read `native_kernel` and `native_rounding` first; `native_rows` comes
next.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

Function: TypeAlias = Callable[..., None]
"""A native function; `native_kernel.row_sums` and `native_rounding.store` have the arguments."""

SYMBOLS = ("altgrad_row_sums", "altgrad_store")
"""Names of the functions in the machine code: the kernel, and the rounding."""
CHOICE, CACHE = "ALTGRAD_KERNEL", "ALTGRAD_CACHE"
"""Names of the environment variables for the kernel, ``eager`` or ``native``, and the folder."""

_INTEGER, _REAL = ctypes.c_int64, ctypes.c_double
# As in `make_assembly` of both sources. A call by ctypes frees Python's global lock.
_PROTOTYPES = (
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[_INTEGER] * 5, *[_REAL] * 2),
    ctypes.CFUNCTYPE(None, *[_INTEGER] * 7, *[_REAL] * 4),
)
_ROOT = Path(__file__).parents[1]
_SOURCES = (
    *("measurement/native_bits.py", "measurement/native_kernel.py"),
    *("measurement/native_rounding.py", "measurement/native_compiler.py"),
    *("measurement/native_table.py", "measurement/columns.py", "measurement/histogram.py"),
    "quantization/binary64.py",
)
_DIGEST_BYTES = 32  # of SHA-256
_NICENESS = 10  # of the process that compiles in the background: a training goes first
_logger = logging.getLogger("altgrad")


class NativeCode:
    """The native kernel of a process: loaded, being compiled, or missing."""

    def __init__(self) -> None:
        self._functions: tuple[Function, ...] = ()
        self._engine: Any = None  # owns the memory of the machine code
        self._thread: threading.Thread | None = None
        self._has_looked = self._has_failed = False

    @property
    def function(self) -> Function | None:
        """The native kernel; None if it is not loaded, or ``ALTGRAD_KERNEL=eager``."""
        return self._find(0)

    @property
    def rounding(self) -> Function | None:
        """The native rounding; None if it is not loaded, or ``ALTGRAD_KERNEL=eager``."""
        return self._find(1)

    @property
    def is_loaded(self) -> bool:
        """True if the kernel is loaded, also if ``ALTGRAD_KERNEL`` switches it off."""
        return bool(self._functions)

    @property
    def is_compiling(self) -> bool:
        """True while another process compiles the kernel."""
        return self._thread is not None and self._thread.is_alive()

    def describe(self) -> str:
        """Return which kernel measures tensors on the CPU, for a run file."""
        if self.function is not None:
            return "native"
        return "eager, then native" if self.is_compiling and read_choice() is None else "eager"

    def prepare(self, *, compiles: bool) -> None:
        """Load the kernel if it is compiled; otherwise have it compiled in the background.

        Nothing happens without numba, or with ``ALTGRAD_KERNEL=eager``. With
        ``ALTGRAD_KERNEL=native``, wait until the kernel is compiled.

        Args:
            compiles: If False, load a compiled kernel at most.

        Raises:
            RuntimeError: ``ALTGRAD_KERNEL=native``, but the kernel cannot be compiled or loaded.
            ValueError: ``ALTGRAD_KERNEL`` has another value.
        """
        choice = read_choice()
        is_done = self._has_failed or self._thread or (self._has_looked and not compiles)
        if choice == "eager" or self._functions or (is_done and choice is None):
            return
        try:
            path = find_file()
            self._has_looked = True
            if self._load(path):
                return
            if choice == "native":
                self._compile(path)
            elif compiles:
                self._start(path)
        except Exception as error:
            self._fail(error)
            if choice == "native":
                raise RuntimeError(
                    f"{CHOICE}=native: {error}; expected a kernel that numba can compile; do pip "
                    f"install 'altgrad[fast]', or unset {CHOICE}"
                ) from error

    def wait(self) -> None:
        """Wait until the process that compiles in the background, if there is one, has ended."""
        if self._thread is not None:
            self._thread.join()

    def _start(self, path: Path) -> None:
        """Compile the kernel in another process, and load it in a thread of this one."""

        def compile_and_load() -> None:
            try:
                self._compile(path, _NICENESS)
            except Exception as error:  # noqa: BLE001 - the eager kernel goes on
                self._fail(error)

        # A daemon: the process may end before the kernel is compiled.
        self._thread = threading.Thread(
            target=compile_and_load, name="altgrad-compile", daemon=True
        )
        self._thread.start()

    def _compile(self, path: Path, niceness: int = 0) -> None:
        compile_file(path, niceness)
        if not self._load(path):
            raise RuntimeError(f"{path} is missing or torn after it was compiled")

    def _load(self, path: Path) -> bool:
        """Load machine code from a file. Return False if the file is missing or torn."""
        code = read_file(path)
        if code is None:
            return False
        self._engine, addresses = load_code(code)
        pairs = zip(_PROTOTYPES, addresses, strict=True)
        self._functions = tuple(prototype(address) for prototype, address in pairs)
        return True

    def _find(self, number: int) -> Function | None:
        return self._functions[number] if self._functions and read_choice() != "eager" else None

    def _fail(self, error: Exception) -> None:
        """Keep to the eager kernel; say why in the log, if numba is installed."""
        self._has_failed = True
        if find_spec("numba") is not None:
            _logger.info("numba is installed, but the eager kernel measures: %s", error)


native_code = NativeCode()
"""The native kernel of this process."""


def read_choice() -> str | None:
    """Return the kernel that ``ALTGRAD_KERNEL`` names; None if it is not set.

    Returns:
        ``"eager"``, ``"native"`` or None.

    Raises:
        ValueError: The variable has another value.
    """
    choice = os.environ.get(CHOICE) or None
    if choice not in (None, "eager", "native"):
        raise ValueError(f"{CHOICE}={choice}: expected eager or native; unset it for the default")
    return choice


def find_folder() -> Path:
    """Return the folder for compiled code: that of ``ALTGRAD_CACHE``, or one of the user."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"], "altgrad")
    return Path.home() / ".cache" / "altgrad"


def find_file() -> Path:
    """Return the path of the file for the compiled kernel, which may be missing.

    Raises:
        ImportError: numba or llvmlite is not installed, or llvmlite cannot be imported.
    """
    parts = [f"numba {version('numba')}", f"llvmlite {version('llvmlite')}", *describe_processor()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in _SOURCES:
        digest.update((_ROOT / source).read_bytes())
    return find_folder() / f"kernel-{digest.hexdigest()[:32]}.o"


def describe_processor() -> tuple[str, str, str]:
    """Return the target, name and features of the processor, as LLVM calls them."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features().flatten()
    return llvm.get_process_triple(), llvm.get_host_cpu_name(), features


def read_file(path: Path) -> bytes | None:
    """Return the machine code in a file; None if the file is missing or torn."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if digest == hashlib.sha256(code).digest() else None


def write_file(path: Path, code: bytes) -> None:
    """Write machine code to a file, which appears whole or not at all.

    Args:
        path: The file; its folder is made.
        code: An object file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_bytes(hashlib.sha256(code).digest() + code)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def make_target() -> Any:
    """Return LLVM's description of this processor, for which code is made and loaded."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple, name, features = describe_processor()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=name, features=features, opt=3, codemodel="jitdefault", jit=True
    )


def load_code(code: bytes) -> tuple[Any, list[int]]:
    """Load machine code into this process.

    Args:
        code: An object file.

    Returns:
        The owner of the code's memory, and the addresses of the functions `SYMBOLS`.
    """
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), make_target())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, [engine.get_function_address(each) for each in SYMBOLS]


def compile_file(path: Path, niceness: int) -> None:
    """Compile the kernel in another process, and wait for it.

    Args:
        path: The file to write.
        niceness: By how much the priority of the process is lower than that of this one, 0 to 19.

    Raises:
        RuntimeError: The process failed.
    """
    # The process must find this package, and compile as numba does by default. Warnings of numba
    # are no errors, even if the user's are.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "PYTHONWARNINGS"))}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT.parent), kept.get("PYTHONPATH")]))
    module = "altgrad.measurement.native_compiler"
    command = [sys.executable, "-m", module, str(path), str(niceness)]
    with subprocess.Popen(  # noqa: S603 - this Python and a module of this package
        command,
        stdin=subprocess.PIPE,  # its end tells the process that this one has ended
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=kept,
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read().strip()
        if process.wait() != 0:
            raise RuntimeError(said.splitlines()[-1] if said else f"exit {process.returncode}")
