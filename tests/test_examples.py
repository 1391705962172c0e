"""Every example runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


QUICK = {"lightning_callback.py", "one_step.py", "plain_pytorch.py", "update_monitor.py"}
SHORTER = {"predict_and_confirm.py": ["--seeds", "1", "--steps", "30"]}
"""Shorter arguments for examples that another test runs in full."""


def run_script(*command: str, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(path, id=path.name, marks=() if path.name in QUICK else pytest.mark.slow)
        for path in sorted(EXAMPLES.glob("*.py"))
    ],
)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    assert run_script(str(example), *SHORTER.get(example.name, ()), cwd=tmp_path)


def test_the_torchrun_example_prints_the_whole_model_once(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run_script(*torchrun, str(EXAMPLES / "fsdp2_cpu.py"), cwd=tmp_path)
    title, *lines = output.splitlines()
    assert title == "2 processes, without Lightning"
    assert len(lines) == 6
    assert "1,024 of  8,192 elements" in lines[0]  # the layer, not its local shard


def test_there_are_examples() -> None:
    assert len(list(EXAMPLES.glob("*.py"))) >= 2
