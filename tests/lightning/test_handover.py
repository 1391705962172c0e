"""`Handover`: findings get from a child process to the one that made the object, and no further."""

import gc
import multiprocessing
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from altgrad_lightning.handover import Handover
from altgrad_lightning.result import Result


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def give(handover: Handover, step: int) -> None:
    handover.give(Result(latest_step=step))


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_the_last_findings_of_a_child_are_taken_once(folder: Path, method: str) -> None:
    handover = Handover()
    assert handover.take() is None
    for step in (3, 4):
        context = multiprocessing.get_context(method)
        child = context.Process(target=give, args=(handover, step))
        child.start()
        child.join()
    assert handover.take().latest_step == 4
    assert handover.take() is None
    assert [*folder.iterdir()] == []


def test_findings_that_nobody_takes_leave_no_file(folder: Path) -> None:
    handover = Handover()
    child = multiprocessing.get_context("spawn").Process(target=give, args=(handover, 1))
    child.start()
    child.join()
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    del handover
    gc.collect()
    assert [*folder.iterdir()] == []


def test_the_process_itself_and_strangers_pass_nothing_on(folder: Path) -> None:
    handover = Handover()
    give(handover, 1)
    copy = folder / "copy.pickle"
    copy.write_bytes(pickle.dumps(handover))
    script = """
import pickle, sys
from altgrad_lightning.result import Result
handover = pickle.loads(open(sys.argv[1], "rb").read())
handover.give(Result(latest_step=2))
assert handover.take() is None
"""
    subprocess.run([sys.executable, "-c", script, str(copy)], check=True)
    assert handover.take() is None
    assert [*folder.iterdir()] == [copy]
