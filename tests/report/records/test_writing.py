"""`RunFile`: written lines stay readable if the process is killed or the disk is full."""

import gc
import itertools
import math
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from altgrad.report import FormatInfo, Header, RecipeInfo, RunFile, RunFileError, read
from altgrad.report.records.reading import read_header
from tests.report.records.recording import assert_same, header_from, written
from tests.report.records.schema_2 import write_schema_2

# --- files


def test_each_run_in_a_folder_has_its_own_file(tmp_path, records, header) -> None:
    first = written(tmp_path, header, records[:1])
    content = first.read_bytes()
    for number in range(2, 12):
        assert written(tmp_path, header, records[:2]).name == f"altgrad-{number}.jsonl"
    assert first.read_bytes() == content
    run = read(tmp_path)
    assert run.path.name == "altgrad-11.jsonl"
    (note,) = run.notes
    assert (
        "altgrad-11.jsonl is read, the newest run file in its folder (the others: altgrad.j" in note
    )
    assert read(first).steps == (0,)


def test_a_killed_process_loses_at_most_the_last_line(tmp_path, records) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from altgrad.report import RunFile
from tests.report.records.recording import header_from, make_records
records = make_records(max_elements=1000)
file = RunFile.create({str(tmp_path)!r}, header_from(records[0]))
step = 0
while True:
    file.append(step, records[step % 3], skipped={{}})
    if step == 50:
        print("fifty", flush=True)
    step += 1
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"fifty\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    run = read(tmp_path)
    assert set(range(51)) <= set(run.steps)
    assert len(run.rows) == 7 * len(run.steps)
    lines = (tmp_path / "altgrad.jsonl").read_bytes().split(b"\n")[2:]  # behind header and columns
    assert len(lines) - len(run.steps) <= 1
    # Nor does a killed process keep the lock.
    with RunFile.resume(run.path, 40, read_header(run.path)) as file:
        assert file.path == run.path
    assert read(tmp_path).steps == (*range(40),)


class Disk:
    """A file on a disk that has room for so many bytes; None is enough for all."""

    room: int | None = None

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: memoryview) -> int:
        if self.room is None:
            return self.file.write(data)
        if self.file.tell() > self.room:
            raise OSError(28, "No space left on device")
        return self.file.write(data[:500])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> list[Disk]:
    """Return the files that are opened during a test, the latest one last."""
    open_file, disks = Path.open, []

    def open_on_disk(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        file = open_file(path, mode, *arguments, **options)
        if mode == "rb":
            return file
        disks.append(Disk(file))
        return disks[-1]

    monkeypatch.setattr(Path, "open", open_on_disk)
    return disks


def test_a_disk_that_is_full_leaves_whole_lines(tmp_path, records, header, disks) -> None:
    file = RunFile.create(tmp_path, header)
    disk = disks[-1]
    file.append(0, records[0], skipped={})
    size = file.path.stat().st_size
    disk.room = size + 600
    with pytest.raises(OSError, match="No space left"):
        file.append(1, records[1], skipped={})
    assert file.path.stat().st_size == size
    disk.room = None
    file.append(2, records[2], skipped={})
    file.close()
    assert (read(file.path).steps, read(file.path).notes) == ((0, 2), [])


def test_a_disk_that_is_full_from_the_start_leaves_no_file(
    tmp_path, header, disks, monkeypatch
) -> None:
    monkeypatch.setattr(Disk, "room", -1)
    with pytest.raises(OSError, match="No space left"):
        RunFile.create(tmp_path, header)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    written(tmp_path, header, [])
    assert [path.name for path in tmp_path.iterdir()] == ["altgrad.jsonl"]


def test_an_interrupted_write_leaves_whole_lines(tmp_path, records, header, disks) -> None:
    file = RunFile.create(tmp_path, header)
    file.append(0, records[0], skipped={})
    write, disks[-1].write = disks[-1].write, lambda data: press_control_c(write, data)
    with pytest.raises(KeyboardInterrupt):
        file.append(1, records[1], skipped={})
    del disks[-1].write
    file.append(2, records[2], skipped={})
    file.close()
    assert (read(file.path).steps, read(file.path).notes) == ((0, 2), [])


def press_control_c(write: Any, data: memoryview) -> None:
    write(data[:100])
    raise KeyboardInterrupt


def test_no_line_follows_a_torn_one_that_cannot_be_cut_off(
    tmp_path, records, header, disks
) -> None:
    file = RunFile.create(tmp_path, header)
    file.append(0, records[0], skipped={})
    disk = disks[-1]
    disk.room = file.path.stat().st_size + 500
    disk.truncate = lambda _: press_control_c(lambda _: fail_to_truncate(), b"")
    with pytest.raises(OSError, match="No space left"):
        file.append(1, records[1], skipped={})
    disk.room = None
    with pytest.raises(ValueError, match="closed"):
        file.append(2, records[2], skipped={})
    assert read(file.path).steps[0] == 0


def fail_to_truncate() -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("piece", [1, 7, 200])
def test_a_reader_beside_a_writer_never_calls_a_file_damaged(
    tmp_path, records, header, disks, monkeypatch, piece: int
) -> None:
    seen: set[tuple[int, ...]] = set()
    pieces = itertools.count()

    def write_piece(disk: Disk, data: memoryview) -> int:
        count = disk.file.write(data[: max(piece, len(data) // 50)])
        if next(pieces) % 3 == 0 or piece == 200:  # a step is some three pieces of 200 bytes
            for path in tmp_path.glob("altgrad*.jsonl"):
                seen.add(read(path).steps)
        return count

    monkeypatch.setattr(Disk, "write", write_piece)
    with RunFile.create(tmp_path, header) as file:
        for step, record in enumerate(records):
            file.append(step, record, skipped={})
    RunFile.resume(file.path, 1, header).close()
    assert seen >= {(0,), (0, 1), (0, 1, 2)}


def test_a_file_system_without_hard_links_has_run_files(
    tmp_path, records, header, monkeypatch
) -> None:
    monkeypatch.setattr("os.link", lambda *_: fail_to_link())
    for number in range(2):
        assert read(written(tmp_path, header, records[: number + 1])).steps == (0, 1)[: number + 1]
    assert {path.name for path in tmp_path.iterdir()} == {"altgrad.jsonl", "altgrad-2.jsonl"}


def fail_to_link() -> None:
    raise OSError(1, "Operation not permitted")


def test_appending_to_a_closed_file_is_an_error(tmp_path, records, header) -> None:
    file = RunFile.create(tmp_path, header)
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.append(0, records[0], skipped={})


# --- resumed


def test_a_file_that_nobody_closes_is_closed_without_a_warning(tmp_path, records, header) -> None:
    """A training that raises leaves the file to the garbage collector, in a cycle."""
    file = RunFile.create(tmp_path, header)
    file.append(0, records[0], skipped={})
    cycle: list[Any] = [file]
    cycle.append(cycle)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del file, cycle
        gc.collect()
    assert not caught
    with RunFile.resume(tmp_path / "altgrad.jsonl", 1, header) as resumed:
        assert resumed.path == tmp_path / "altgrad.jsonl"  # the lock is free


def test_the_end_of_the_process_closes_a_file_without_a_warning(tmp_path, header) -> None:
    """Have the process read the header of another file, which takes no torch."""
    with RunFile.create(tmp_path / "other", header) as other:
        pass
    code = f"""
from pathlib import Path
from altgrad.report import RunFile
from altgrad.report.records.reading import read_header
file = RunFile.create({str(tmp_path / "own")!r}, read_header(Path({str(other.path)!r})))
raise SystemExit(3)
"""
    ended = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 3
    assert "altgrad.jsonl" not in ended.stderr
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["altgrad.jsonl"]


def test_a_resumed_run_has_every_step_once(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    with RunFile.resume(path, 2, header) as file:
        assert file.path == path
        file.append(2, records[0], skipped={})
        file.append(3, records[1], skipped={})
    run = read(path)
    assert run.steps == (0, 1, 2, 3)
    assert len(run.rows) == 4 * 7
    assert_same(run.series("update_rms")[2], records[0].model["update_rms"])
    assert run.notes == ["altgrad.jsonl: resumed before step 2, which supersedes 1 line"]
    RunFile.resume(path, 1, header).close()  # resume again, from an earlier step
    assert read(path).steps == (0,)


def test_a_resumed_run_with_other_formats_writes_a_new_file(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    content = path.read_bytes()
    other = header_from(records[0], ("bf16", "e5m2"))
    with RunFile.resume(path, 1, other) as file:
        file.append(1, records[1], skipped={})
    assert path.read_bytes() == content
    assert file.path.name == "altgrad-2.jsonl"
    run = read(file.path)
    assert (run.steps, run.predecessors) == ((0, 1), [path])
    assert [*run.formats] == ["bf16", "e5m2", "e4m3fn"]


def test_a_resumed_run_with_other_recipes_writes_a_new_file(tmp_path, records, header) -> None:
    named = {name: make_recipe(name) for name in ("bf16", "bf16-sr", "fp32")}
    before = replace(header, recipes={name: named[name] for name in ("bf16", "bf16-sr")})
    after = replace(header, recipes={name: named[name] for name in ("fp32", "bf16")})
    path = written(tmp_path, before, records)
    with RunFile.resume(path, 1, after) as file:
        file.append(1, records[1], skipped={})
    run = read(file.path)
    assert (run.path.name, run.steps, run.predecessors) == ("altgrad-2.jsonl", (0, 1), [path])
    assert run.recipes == named
    assert [*run.recipes] == ["fp32", "bf16", "bf16-sr"]
    with RunFile.resume(path, 1, before) as file:
        assert file.path == path


def test_a_run_that_resumes_a_file_of_schema_2_writes_a_new_file(tmp_path, records, header) -> None:
    path = write_schema_2(tmp_path, header, records)
    content = path.read_bytes()
    with RunFile.resume(path, 2, header) as file:
        file.append(2, records[0], skipped={})
        file.append(3, records[1], skipped={})
    assert (path.read_bytes(), file.path.name) == (content, "altgrad-2.jsonl")
    run = read(file.path)
    assert (run.steps, run.predecessors, run.notes) == ((0, 1, 2, 3), [path], [])
    for step, record in ((1, records[1]), (2, records[0]), (3, records[1])):
        for layer, figures in {**record.layers, None: record.model}.items():
            assert_same(run.series("update_rms", layer)[step], figures["update_rms"])
    with RunFile.resume(file.path, 3, header) as again:
        assert again.path == file.path  # which has today's schema


def make_recipe(name: str) -> RecipeInfo:
    return RecipeInfo(name, name, "stochastic", None, {"*": "bf16"}, None, None, False, 8.0)


def test_a_file_of_another_kind_is_not_resumed(tmp_path, header) -> None:
    path = tmp_path / "altgrad.jsonl"
    path.write_text("mine\n")
    with pytest.raises(RunFileError, match="expected a run file of AltGrad"):
        RunFile.resume(path, 3, header)
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "expected the key 'formats', got {}"),
        (None, "expected an object, got None"),
        (
            {"formats": ["bf16"], "scaling": None, "layers": {}},
            r"\['formats'\]: expected an object, got \['bf16'\]",
        ),
        (
            {"formats": {}, "scaling": None, "layers": {"w": {}}},
            r"\['layers'\]\['w'\]: expected the key 'shape'",
        ),
        (
            Header({"f": FormatInfo("f", 6, math.inf, 0.5, 0.5, 0.25, scaled=True)}, {}),
            r"\['formats'\]\['f'\]\['max'\]: expected a number from .*, got 'inf'",
        ),
    ],
    ids=str,
)
def test_an_invalid_header_is_an_error_and_leaves_no_file(
    tmp_path: Path, header: Any, message: str
) -> None:
    expected = rf"header=.*: expected the return value of UpdateMonitor.run_header.*; {message}"
    with pytest.raises(TypeError, match=expected):
        RunFile.create(tmp_path / "new", header)
    with pytest.raises(TypeError, match=expected):
        RunFile.resume(tmp_path / "altgrad.jsonl", 0, header)
    assert not [*tmp_path.iterdir()]


def test_a_header_that_json_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    header = {"formats": {}, "scaling": None, "layers": {}, "versions": {"x": object()}}
    with pytest.raises(TypeError, match="expected a text"):
        RunFile.create(tmp_path, header)
    assert not [*tmp_path.iterdir()]


def test_layers_that_appear_in_mid_run_are_described_like_others(tmp_path, records, header) -> None:
    names = [*header.layers]
    first = replace(header, layers={names[0]: header.layers[names[0]]})
    later = {name: header.layers[name] for name in names[1:]}
    with RunFile.create(tmp_path, first) as file:
        file.append(0, records[0], skipped={})
        file.add_layers(later)
        file.append(1, records[1], skipped={})
    run = read(file.path)
    assert dict(run.layers) == dict(header.layers)
    assert run.steps == (0, 1)
    line = b'{"layers":{"a":{"shape":3}}}\n'
    file.path.write_bytes(file.path.read_bytes() + line + line)
    with pytest.raises(RunFileError, match="damaged, line "):
        read(file.path)
