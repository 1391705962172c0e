"""The files ``check_*.py`` are run in a process of their own, on a device without hardware.

`simulated` has the device. A few of the checks are in the quick suite, all of them in the slow one.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices.simulated import IS_POSSIBLE

FOLDER = Path(__file__).parent
pytestmark = pytest.mark.skipif(not IS_POSSIBLE, reason="needs torch 2.13")


def run_checks(marked: str) -> None:
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-m", marked, str(FOLDER)],
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout


def test_formats_storage_observing_and_twins_give_the_bits_of_the_cpu() -> None:
    run_checks("not slow")


@pytest.mark.slow
def test_all_formats_recipes_and_optimizers_give_the_bits_of_the_cpu() -> None:
    run_checks("slow")
