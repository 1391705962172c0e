"""One callback for `lightning` and for `pytorch_lightning`, whichever are installed."""

import subprocess
import sys
import textwrap
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn

from altgrad_lightning import PrecisionMonitor

PACKAGES = [pytorch_lightning, lightning.pytorch]


def make_net(package: ModuleType) -> Any:
    class Net(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Net()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("wrap", [list, lambda callbacks: callbacks[0]], ids=["list", "bare"])
def test_the_trainer_of_either_package_accepts_the_callback(
    package: ModuleType, wrap: Any, tmp_path: Any
) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=1)
    trainer = package.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=wrap([monitor]),
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_net(package), torch.utils.data.DataLoader(torch.ones(3, 4)))
    assert monitor.latest_step == 2
    assert list(monitor.latest) == ["layer.weight", "layer.bias"]


def test_the_two_packages_have_two_callback_classes() -> None:
    """A Trainer checks for the Callback of its own package, so both are base classes."""
    assert lightning.pytorch.Callback is not pytorch_lightning.Callback
    assert issubclass(PrecisionMonitor, lightning.pytorch.Callback)
    assert issubclass(PrecisionMonitor, pytorch_lightning.Callback)


def run(script: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    command = [sys.executable, "-W", "ignore", "-c", block + textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("installed", "missing"),
    [
        ("pytorch_lightning", "lightning"),
        pytest.param("lightning.pytorch", "pytorch_lightning", marks=pytest.mark.slow),
    ],
)
def test_one_installed_package_is_enough(installed: str, missing: str) -> None:
    result = run(
        f"""
        from altgrad_lightning import PrecisionMonitor
        import altgrad_lightning.demo_model
        import {installed} as package
        assert isinstance(PrecisionMonitor(), package.Callback)
        assert package.Trainer(callbacks=PrecisionMonitor(), logger=False, barebones=False)
        print(altgrad_lightning.demo_model.lightning.__name__, {missing!r} in sys.modules)
        """,
        missing,
    )
    assert result.stdout.split() == [installed, "True"], (
        result.stderr
    )  # sys.modules has None, which blocks the import


def test_without_a_package_the_error_names_the_command_to_install_one_or_the_dependency() -> None:
    result = run(
        """
        def show_error():
            try:
                from altgrad_lightning import PrecisionMonitor
            except ImportError as error:
                print(str(error).replace("\\n", " "))

        show_error()
        del sys.modules["lightning"], sys.modules["pytorch_lightning"]
        sys.modules["torchmetrics"] = None
        show_error()
        """,
        "lightning",
        "pytorch_lightning",
    )
    without, incomplete = result.stdout.splitlines()
    assert "pip install 'altgrad[lightning]'" in without
    assert "torchmetrics" in incomplete


@pytest.mark.parametrize(
    "package",
    ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.slow)],
)
def test_the_package_in_use_keeps_its_logger(package: str) -> None:
    result = run(
        f"""
        import {package}
        from lightning_utilities.core import rank_zero
        from altgrad_lightning import PrecisionMonitor
        print(rank_zero.log.name)
        """
    )
    assert result.stdout.startswith(package), result.stderr
