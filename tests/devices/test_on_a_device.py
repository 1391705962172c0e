"""Each ``check_*.py`` is run in a process of its own, on a device that needs no hardware.

`simulated` says why; `CONTRIBUTING.md` says how to run a file alone.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices.simulated import IS_POSSIBLE

FOLDER = Path(__file__).parent


@pytest.mark.skipif(not IS_POSSIBLE, reason="needs torch 2.13, and its backend for Python alone")
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("check_*.py")))
def test_a_device_gives_the_bits_of_the_cpu(name: str) -> None:
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    command = [sys.executable, "-m", "pytest", *options, str(FOLDER / name)]
    ended = subprocess.run(
        command, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
