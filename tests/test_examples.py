"""Every example runs; `test_example_observers` runs those that observe steps."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


QUICK = ["lightning_callback.py", "one_step.py", "plain_pytorch.py", "update_monitor.py"]
ELSEWHERE = {"huggingface_trainer.py"}
"""Examples that another test runs in full."""
SHORTER = {"predict_and_confirm.py": ["--seeds", "1", "--steps", "10"]}
"""Arguments for an example whose parts other tests run for longer."""


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


@pytest.mark.default_twins
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_a_short_example_runs_in_this_process(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted({path.name for path in EXAMPLES.glob("*.py")} - {*QUICK} - ELSEWHERE)
)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    assert run_script(str(EXAMPLES / name), *SHORTER.get(name, ()), cwd=tmp_path)


@pytest.mark.slow
def test_the_torchrun_example_prints_the_whole_model_once(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = run_script(*torchrun, str(EXAMPLES / "fsdp2_cpu.py"), cwd=tmp_path)
    title, *lines = output.splitlines()
    assert title == "2 processes, without Lightning"
    assert len(lines) == 6
    assert "1,024 of  8,192 elements" in lines[0]  # the layer, not its local shard


def test_there_are_examples() -> None:
    assert len(list(EXAMPLES.glob("*.py"))) >= 2
