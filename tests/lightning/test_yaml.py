"""`PrecisionMonitor` in LightningCLI's YAML, with nested rules, and errors that name the key."""

import subprocess
import sys
from pathlib import Path

import pytest

from altgrad.report import read

MAIN = """
import warnings
warnings.filterwarnings("ignore")
from pytorch_lightning.cli import LightningCLI
from tests.lightning.runs import Net, batches

class Module(Net):
    def train_dataloader(self):
        return batches(4)

LightningCLI(Module, save_config_kwargs={"overwrite": True})
"""
CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  default_root_dir: FOLDER
  callbacks:
    - class_path: altgrad_lightning.PrecisionMonitor
      init_args:
        formats: [bf16, e4m3fn, mxfp4]
        every_n_steps: 2
        scaling: [block, 4]
        preset: economy
        recipes: [bf16-sr, bf16]
        twin_elements: 16
        layer_charts: ["layers.0.*"]
        sampling:
          - layers: "*.bias"
            enabled: false
          - layers: "layers.0.*"
            formats: bf16
            max_elements: all
            twin_elements: 0
          - layers: "layers.2.*"
            formats: [e4m3fn]
            every_n_steps: 2
"""


def run_cli(tmp_path: Path, config: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "config.yaml").write_text(config.replace("FOLDER", str(tmp_path)))
    command = [sys.executable, "-c", MAIN, "fit", "--config", str(tmp_path / "config.yaml")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_run_is_configured_by_yaml(tmp_path: Path) -> None:
    done = run_cli(tmp_path, CONFIG)
    assert done.returncode == 0, done.stderr[-2000:]
    run = read(tmp_path)
    assert run.steps == (1, 3)
    assert run.scaling == ("block", 4)
    assert [*run.formats] == ["bf16", "e4m3fn", "mxfp4"]
    assert {name: layer.formats for name, layer in run.layers.items()} == {
        "layers.0.weight": ("bf16",),
        "layers.1.weight": ("bf16", "e4m3fn", "mxfp4"),
        "layers.2.weight": ("e4m3fn",),
    }
    assert run.layers["layers.2.weight"].every_n_steps == 2
    assert [*run.recipes] == ["bf16-sr", "bf16"]
    twins = {row.layer: [*row.twins] for row in run.rows if row.step == 3}
    assert twins["layers.1.weight"] == ["bf16-sr", "bf16"]
    assert twins["layers.0.weight"] == []


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("right", "wrong", "parts"),
    [
        ("e4m3fn, mxfp4]", "e4m3fm, mxfp4]", ["PrecisionMonitor", "e4m3fm", "nearest: e4m3fn"]),
        slow(
            "every_n_steps: 2\n        scaling",
            "every_n_steps: two\n        scaling",
            ["every_n_steps", "two"],
        ),
        slow("max_elements: all", "max_elements: most", ["sampling", "most"]),
        ("enabled: false", "enable: false", ["sampling", "enable"]),
        slow("preset: economy", "preset: cheap", ["preset", "cheap"]),
        slow('layers: "*.bias"', 'layers: "*.bios"', ["'*.bios'", "layers.0.bias"]),
    ],
    ids=str,
)
def test_an_error_names_the_invalid_key_or_value(
    tmp_path: Path, right: str, wrong: str, parts: list[str]
) -> None:
    assert right in CONFIG
    failed = run_cli(tmp_path, CONFIG.replace(right, wrong, 1))
    assert failed.returncode != 0
    message = failed.stderr
    for part in parts:
        assert part in message, message[-2000:]
