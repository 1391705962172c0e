"""Raw lines of regular files: pipes, devices and bad paths are one sentence, and never block."""

import io
import os
import socket
from pathlib import Path

import pytest

from altgrad.report import RunFileError
from altgrad.report.records import raw_lines
from altgrad.report.records.raw_lines import read_raw_lines


def read_all(path: Path) -> list[tuple[int, bytes]]:
    return [*read_raw_lines(path)]


def test_lines_are_numbered_from_1_and_keep_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a\n\n\xff\r\nend")
    assert read_all(path) == [(1, b"a\n"), (2, b"\n"), (3, b"\xff\r\n"), (4, b"end")]
    path.write_bytes(b"")
    assert read_all(path) == []


def make_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def make_socket(folder: Path) -> Path:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
    return path


def make_loop(folder: Path) -> Path:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a"


def make_link_to_zeros(folder: Path) -> Path:
    (folder / "zeros").symlink_to("/dev/zero")
    return folder / "zeros"


UNREADABLE = {
    "a pipe": (make_pipe, "expected a regular file"),
    "a socket": (make_socket, "expected a regular file"),
    "a device": (make_link_to_zeros, "expected a regular file"),
    "a folder": (lambda folder: folder, "expected a regular file"),
    "a loop of links": (make_loop, "file cannot be read (Too many levels of symbolic links)"),
    "a long path": (lambda folder: folder / ("a" * 5000), "file cannot be read (File name too"),
    "a path below a file": (
        lambda _: Path(__file__) / "altgrad.jsonl",
        "file cannot be read (Not a directory)",
    ),
    "a NUL": (lambda folder: folder / "a\0b", "expected a valid path"),
    "a surrogate": (lambda folder: folder / "a\ud800b", "expected a valid path"),
    "nothing": (lambda folder: folder / "none", "file or folder is missing"),
    "a dangling link": (
        lambda folder: (folder / "link").symlink_to(folder / "none") or folder / "link",
        "file or folder is missing",
    ),
    "an escape": (lambda folder: folder / "\x1b[31m\n", "file or folder is missing"),
}


@pytest.mark.skipif(os.name != "posix", reason="Windows has other kinds of files")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_regular_file_is_one_sentence(tmp_path: Path, kind: str) -> None:
    make, reason = UNREADABLE[kind]
    with pytest.raises(RunFileError) as caught:
        read_all(make(tmp_path))
    assert f": {reason}" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_line_without_an_end_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"short\n")
        file.truncate(2**40)  # one TiB of zeros, which take no room on the disk
    with pytest.raises(RunFileError, match=r"line 2 is longer than 67,108,864 bytes"):
        read_all(path)


def test_a_line_of_the_largest_length_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_lines, "MOST_BYTES", 5)
    path = tmp_path / "file"
    path.write_bytes(b"1234\n12345")
    assert read_all(path) == [(1, b"1234\n"), (2, b"12345")]
    path.write_bytes(b"1234\n12345\n")
    with pytest.raises(RunFileError, match="line 2 is longer"):
        read_all(path)


def test_lines_that_are_written_meanwhile_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntw")
    lines = read_raw_lines(path)
    assert next(lines) == (1, b"one\n")
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert [*lines] == [(2, b"tw")]


def test_an_error_while_reading_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.BytesIO):
        def fileno(self) -> int:
            return 0

        def readline(self, _: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    path = tmp_path / "file"
    path.write_bytes(b"one\n")
    size = path.stat()
    monkeypatch.setattr(Path, "open", lambda *_: Broken())
    monkeypatch.setattr(os, "fstat", lambda _: size)
    with pytest.raises(RunFileError, match=r"file cannot be read \(Input/output error\)"):
        read_all(path)
