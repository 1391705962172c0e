"""`PrecisionMonitor` in LightningCLI's YAML, with nested rules, and errors that name the key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.cli import LightningCLI

from altgrad.report import read
from tests.lightning.runs import Net, batches

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(Net):
    def train_dataloader(self) -> Any:
        return batches(4)


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


@pytest.fixture
def run_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Return a function that runs the command line of Lightning, and returns its error."""

    def run(config: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(config.replace("FOLDER", str(tmp_path)))
        arguments = ["fit", "--config", str(path)]
        settings: dict[str, Any] = {"seed_everything_default": False, "save_config_callback": None}
        try:
            LightningCLI(Module, args=arguments, **settings)
        except (SystemExit, TypeError, ValueError) as error:
            return f"{capsys.readouterr().err}{error}"
        return ""

    return run


def test_a_run_is_configured_by_yaml(tmp_path: Path, run_cli: Callable[[str], str]) -> None:
    assert not run_cli(CONFIG)
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


@pytest.mark.parametrize(
    ("right", "wrong", "parts"),
    [
        ("e4m3fn, mxfp4]", "e4m3fm, mxfp4]", ["PrecisionMonitor", "e4m3fm", "nearest: e4m3fn"]),
        (
            "every_n_steps: 2\n        scaling",
            "every_n_steps: two\n        scaling",
            ["every_n_steps", "two"],
        ),
        ("max_elements: all", "max_elements: most", ["sampling", "most"]),
        ("enabled: false", "enable: false", ["sampling", "enable"]),
        ("preset: economy", "preset: cheap", ["preset", "cheap"]),
        ('layers: "*.bias"', 'layers: "*.bios"', ["'*.bios'", "layers.0.bias"]),
    ],
    ids=str,
)
def test_an_error_names_the_invalid_key_or_value(
    run_cli: Callable[[str], str], right: str, wrong: str, parts: list[str]
) -> None:
    assert right in CONFIG
    message = run_cli(CONFIG.replace(right, wrong, 1))
    for part in parts:
        assert part in message, message[-2000:]
