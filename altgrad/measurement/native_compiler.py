"""Compile the native kernel, as a process of its own, and write its machine code to a file.

    python -m altgrad.measurement.native_compiler FILE NICENESS

`native_code` starts this process. It ends when its input does, so that it never outlives the
training that has started it. Of several processes that compile the same file, one works and the
others wait for it.

This file imports no torch. Read `native_kernel` and `native_code` first.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from altgrad.measurement.native_code import SYMBOLS, make_target, read_file, write_file


def compile_kernel() -> bytes:
    """Compile the kernel and the rounding for this processor.

    Returns:
        An object file, with the functions that `SYMBOLS` names.

    Raises:
        RuntimeError: The code calls functions that are found in numba alone.
    """
    import llvmlite.binding as llvm

    from altgrad.measurement import native_kernel, native_rounding

    module = llvm.parse_assembly("")
    for symbol, source in zip(SYMBOLS, (native_kernel, native_rounding), strict=True):
        assembly, name = source.make_assembly()
        part = llvm.parse_assembly(assembly)
        part.get_function(name).name = symbol
        module.link_in(part)
    # LLVM ends the process that loads code with unknown functions, without an error of Python.
    called = {each.name for each in module.functions if each.is_declaration}
    unknown = sorted(each for each in called if not each.startswith("llvm."))
    if unknown:
        raise RuntimeError(f"this numba makes code that calls {', '.join(unknown)}")
    code: bytes = make_target().emit_object(module)
    return code


def main() -> None:
    """Compile the kernel into the file that the command line names, unless it is there."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(int(sys.argv[2]))
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        if read_file(path) is None:
            write_file(path, compile_kernel())


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process compiles the same file, where the file system has locks."""
    lock = FileLock(path.with_suffix(".lock"))
    # Without locks, several processes may compile, and write the same file.
    with contextlib.suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _end_with_input() -> None:
    """End this process when the process that has started it ends, and its pipe closes."""
    # Not by sys.stdin, whose lock this thread would hold when Python ends.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
