"""A run file that is deleted, replaced or moved while it is being written loses no line."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from altgrad.report import RunFile, read
from altgrad.report.records import file_names, writing
from tests.report.records.recording import read_strict_lines


def delete(path: Path) -> None:
    path.unlink()


def delete_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def edit(path: Path) -> None:
    """Replace a file as editors and rsync do."""
    path.with_suffix(".draft").write_text("other\n")
    path.with_suffix(".draft").replace(path)


@pytest.mark.parametrize(
    ("lose", "name"),
    [
        (delete, "altgrad.jsonl"),
        (delete_folder, "altgrad.jsonl"),
        (edit, "altgrad-2.jsonl"),
    ],
)
def test_a_lost_file_is_written_anew_with_all_its_lines(
    tmp_path: Path, records, header, lose: Callable[[Path], None], name: str
) -> None:
    file = RunFile.create(tmp_path / "run", header)
    first = file.path
    file.append(0, records[0], skipped={})
    before = first.read_bytes()
    lose(first)
    with pytest.warns(UserWarning, match="was deleted or replaced while .* until the run") as told:
        file.append(1, records[1], skipped={})
    assert len(told) == 1
    assert str(first) in str(told[0].message)
    file.append(2, records[2], skipped={})
    file.close()
    assert file.path == tmp_path / "run" / name
    assert file.path.read_bytes().startswith(before)
    run = read(file.path)
    assert (run.steps, run.notes) == ((0, 1, 2), [])
    assert read_strict_lines(file.path)
    if lose is edit:
        assert first.read_text() == "other\n"
    assert [*tmp_path.rglob("*.lock")] == []


def test_a_file_that_is_deleted_twice_has_one_warning(tmp_path: Path, records, header) -> None:
    file = RunFile.create(tmp_path, header)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step, record in enumerate(records):
            file.path.unlink()
            file.append(step, record, skipped={})
    file.close()
    assert len(told) == 1
    assert read(file.path).steps == (0, 1, 2)


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_the_lines(tmp_path: Path, records, header) -> None:
    file = RunFile.create(tmp_path, header)
    file.path.unlink()
    with pytest.raises(UserWarning, match="was deleted"):
        file.append(0, records[0], skipped={})
    file.close()
    assert read(file.path).steps == (0,)


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_moved_file_gets_the_lines_that_follow(
    tmp_path: Path, records, header, whole_folder: bool
) -> None:
    file = RunFile.create(tmp_path / "run", header)
    file.append(0, records[0], skipped={})
    moved = tmp_path / "moved" / ("altgrad.jsonl" if whole_folder else "altgrad-old.jsonl")
    if whole_folder:
        (tmp_path / "run").rename(tmp_path / "moved")
    else:
        moved.parent.mkdir()
        file.path.rename(moved)
    with pytest.warns(UserWarning, match="was moved while .* new path to altgrad report") as told:
        file.append(1, records[1], skipped={})
    assert len(told) == 1
    file.append(2, records[2], skipped={})
    file.close()
    assert read(moved).steps == (0, 1, 2)
    assert not file.path.exists()


def test_a_file_that_nfs_keeps_under_another_name_is_deleted(
    tmp_path: Path, records, header
) -> None:
    file = RunFile.create(tmp_path, header)
    file.path.rename(tmp_path / ".nfs000000000120d1")  # as NFS does with an open file
    with pytest.warns(UserWarning, match="was deleted"):
        file.append(0, records[0], skipped={})
    file.close()
    assert read(tmp_path).steps == (0,)


@pytest.mark.filterwarnings("error")
def test_a_run_goes_on_after_the_current_folder_has_changed(
    tmp_path: Path, records, header, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with RunFile.create("run", header) as file:
        monkeypatch.chdir("/")
        file.append(0, records[0], skipped={})
    assert read(tmp_path / "run").steps == (0,)


@pytest.mark.filterwarnings("error")
def test_a_file_system_without_lasting_numbers_of_files_is_left_alone(
    tmp_path: Path, records, header, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "has_name", lambda *_: False)
    with RunFile.create(tmp_path, header) as file:
        file.append(0, records[0], skipped={})
    assert read(tmp_path).steps == (0,)


def test_a_path_that_cannot_be_looked_at_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(116, "Stale file handle")

    with (tmp_path / "a").open("w+b") as file:
        monkeypatch.setattr(Path, "stat", fail)
        assert file_names.has_name(file, tmp_path / "a")


def test_a_lock_that_another_writer_has_made_meanwhile_is_kept(
    tmp_path: Path, records, header
) -> None:
    first = RunFile.create(tmp_path / "run", header)
    shutil.rmtree(tmp_path / "run")
    with RunFile.create(tmp_path / "run", header) as second:
        lock = Path(f"{second.path}.lock")
        first.close()
        assert lock.exists()
        second.append(0, records[0], skipped={})
    assert read(tmp_path / "run").steps == (0,)


def test_two_runs_in_a_folder_that_was_deleted_have_a_file_each(
    tmp_path: Path, records, header
) -> None:
    first = RunFile.create(tmp_path / "run", header)
    first.append(0, records[0], skipped={})
    shutil.rmtree(tmp_path / "run")
    with RunFile.create(tmp_path / "run", header) as second:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            first.append(1, records[1], skipped={})
        second.append(5, records[2], skipped={})
    first.close()
    assert first.path.name == "altgrad-2.jsonl"
    assert read(first.path).steps == (0, 1)
    assert read(second.path).steps == (5,)
