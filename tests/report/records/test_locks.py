"""One writer at a time: locks of run files, in file systems with and without locks."""

import errno
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from altgrad import StepRecord
from altgrad.report import Header, RunFile, read
from altgrad.report.records.locks import take_lock
from tests.report.records.recording import header_from, make_records, written

fcntl = pytest.importorskip("fcntl")

ROOT = str(Path(__file__).parents[3])
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
TAKEN = "RunFile: .*altgrad.jsonl is being written by another run, or by a RunFile of this process"


@pytest.fixture(params=[None, *NO_LOCKS], ids=lambda code: errno.errorcode.get(code, "locks"))
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Return the error of a file system without locks; None with locks."""
    if request.param is not None:
        monkeypatch.setattr(fcntl, "flock", lambda *_: fail(request.param))
    return request.param


def fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


def write_script(path: Path, locks: int | None, *lines: str) -> str:
    """Write a script that takes a lock, in a file system with or without locks."""
    return f"""
import fcntl, os, sys; sys.path.insert(0, {ROOT!r})
from pathlib import Path
from altgrad.report.records.locks import take_lock
path = Path({str(path)!r})
def flock(*_): raise OSError({locks}, "no locks")
if {locks}: fcntl.flock = flock
lock = take_lock(path)
""" + "\n".join(lines)


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path: Path, locks: int | None) -> None:
    path = tmp_path / "altgrad.jsonl"
    for _ in range(2):
        lock = take_lock(path)
        assert lock is not None
        assert take_lock(path) is None
        lock.release()
        assert not [*tmp_path.iterdir()]


def test_a_process_that_died_keeps_no_lock(tmp_path: Path, locks: int | None) -> None:
    path = tmp_path / "altgrad.jsonl"
    script = write_script(path, locks, "print(type(lock).__name__, flush=True)", "input()")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"WriterLock\n"
        assert take_lock(path) is None
        process.kill()
    lock = take_lock(path)
    assert lock is not None
    lock.release()
    assert not [*tmp_path.iterdir()]


def test_a_fork_of_the_writer_does_not_release_its_lock(tmp_path: Path, locks: int | None) -> None:
    lines = (
        "if (child := os.fork()) == 0: lock.release(); os._exit(0)",
        "os.waitpid(child, 0)",
        "assert take_lock(path) is None",
        "lock.release()",
        "assert take_lock(path) is not None",
    )
    script = write_script(tmp_path / "altgrad.jsonl", locks, *lines)
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_a_process_that_ends_without_closing_leaves_no_file_of_a_lock(tmp_path: Path) -> None:
    lines = (
        "lock.release()",
        "from altgrad.report import Header, RunFile",
        "file = RunFile.create(path.parent, Header({}, {}))",
        "assert {each.name for each in path.parent.iterdir()} == {path.name, path.name + '.lock'}",
    )
    script = write_script(tmp_path / "altgrad.jsonl", None, *lines)
    subprocess.run([sys.executable, "-c", script], check=True)
    assert [each.name for each in tmp_path.iterdir()] == ["altgrad.jsonl"]


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        take_lock(tmp_path / "altgrad.jsonl")


def test_a_run_that_is_resumed_while_it_is_written_gets_a_file_of_its_own(
    tmp_path: Path, records: list[StepRecord], header: Header, locks: int | None
) -> None:
    with RunFile.create(tmp_path, header) as first:
        for step in range(3):
            first.append(step, records[step], skipped={})
        with pytest.warns(UserWarning, match=TAKEN) as caught:
            second = RunFile.resume(first.path, 2, header)
        assert [each.filename for each in caught] == [__file__]
        for step in range(2, 5):
            second.append(step, records[0], skipped={})
            first.append(step + 1, records[1], skipped={})
        second.close()
    assert (first.path.name, second.path.name) == ("altgrad.jsonl", "altgrad-2.jsonl")
    assert read(first.path).steps == (0, 1, 2, 3, 4, 5)
    run = read(tmp_path)
    assert (run.path, run.steps, run.predecessors) == (second.path, (*range(5),), [first.path])
    with RunFile.resume(first.path, 2, header) as third:
        assert third.path == first.path
    assert {path.name for path in tmp_path.iterdir()} == {"altgrad.jsonl", "altgrad-2.jsonl"}


def test_a_file_that_was_closed_can_be_resumed(
    tmp_path: Path, records: list[StepRecord], header: Header
) -> None:
    path = written(tmp_path, header, records)
    for step in (2, 1):
        file = RunFile.resume(path, step, header)
        file.close()
        file.close()  # again
        assert file.path == path
    assert read(path).steps == (0,)


def test_no_line_is_lost_if_a_writer_ignores_the_lock(
    tmp_path: Path, records: list[StepRecord], header: Header
) -> None:
    with RunFile.create(tmp_path, header) as file:
        file.append(0, records[0], skipped={})
        other = tmp_path / "other"
        content = written(other, header, records, steps=(5, 6, 7)).read_bytes()
        with file.path.open("ab") as stranger:
            stranger.write(content.partition(b"\n")[2])
        file.append(1, records[1], skipped={})
    assert read(file.path).steps == (0, 1, 5, 6, 7)


def resume_and_append(path: Path, number: int, barrier: Any, done: Any) -> None:
    records = make_records(max_elements=1000)
    barrier.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        file = RunFile.resume(path, 1, header_from(records[0]))
    for step in range(20):
        file.append(100 * number + step, records[step % 3], skipped={})
    barrier.wait()
    file.close()
    done.put((number, str(file.path)))


@pytest.mark.slow
def test_many_processes_that_resume_one_file_lose_no_row(
    tmp_path: Path, records: list[StepRecord], header: Header
) -> None:
    path = written(tmp_path, header, records[:1])
    context = multiprocessing.get_context("spawn")
    barrier, done = context.Barrier(3), context.Queue()
    numbers = range(1, 4)
    processes = [
        context.Process(target=resume_and_append, args=(path, number, barrier, done))
        for number in numbers
    ]
    for process in processes:
        process.start()
    paths = dict(done.get(timeout=300) for _ in numbers)
    for process in processes:
        process.join()
    assert len({*paths.values()}) == 3
    assert str(path) in paths.values()
    for number, each in paths.items():
        assert read(each).steps == (0, *range(100 * number, 100 * number + 20))
    assert len([*tmp_path.iterdir()]) == 3


def write_and_resume(folder: Path, count: int) -> None:
    """Write runs that end in a torn line, as if they were killed, and resume each twice."""
    records = make_records(max_elements=1000)
    header = header_from(records[0])
    for _ in range(count):
        path = written(folder, header, records)
        for torn in (20, 300):
            with path.open("ab") as file:
                file.write(b'{"step":7,"layer":"w","figures":{"' + b"a" * torn)
            with RunFile.resume(path, 1, header) as file:
                for step in (1, 2):
                    file.append(step, records[step], skipped={})


@pytest.mark.slow
def test_a_reader_beside_runs_that_are_resumed_finds_no_damage(tmp_path: Path) -> None:
    count = 100
    writer = multiprocessing.get_context("spawn").Process(
        target=write_and_resume, args=(tmp_path, count)
    )
    writer.start()
    steps: set[tuple[int, ...]] = set()
    while writer.exitcode is None:
        if any(tmp_path.glob("altgrad*.jsonl")):
            steps.add(read(tmp_path).steps)
    assert writer.exitcode == 0
    assert len([*tmp_path.iterdir()]) == count
    assert steps <= {(), (0,), (0, 1), (0, 1, 2)}
    assert read(tmp_path).steps == (0, 1, 2)
