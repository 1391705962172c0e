"""`altgrad demo`: train a small language model and see which formats its weights could live in."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from altgrad.report import RunReport, page, png, print_report, read

if TYPE_CHECKING:
    from altgrad_lightning import PrecisionMonitor

BATCH_SIZE = 16
"""The number of windows of text in a batch."""


def demo(
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps to train.")] = 300,
    folder: Annotated[Path, typer.Option(help="Where logs and report go.")] = Path("altgrad-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the batches.")] = 0,
) -> None:
    """Train a character transformer on Python's own source and judge three formats.

    About a minute on a laptop's CPU. Shows what each format would do to each layer, and writes a
    page with pictures and TensorBoard logs.
    """
    if not 0 <= seed < 2**32:
        sys.exit(f"--seed {seed}: expected a number from 0 to 2**32 - 1")
    try:
        import_module("altgrad_lightning.demo_model")
    except ImportError as error:
        sys.exit(f"altgrad demo cannot run here ({error}): pip install 'altgrad[demo]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"cannot write to folder {folder}: {error}")
    _report(_train(steps, folder, seed), folder)


def _train(steps: int, folder: Path, seed: int) -> PrecisionMonitor:
    """Train the model under a monitor, with logs in the folder."""
    from torch.utils.data import DataLoader

    from altgrad_lightning.callback import PrecisionMonitor
    from altgrad_lightning.demo_model import CharacterTransformer, Windows, standard_library_text
    from altgrad_lightning.packages import lightning

    lightning.seed_everything(seed, verbose=False)
    text = standard_library_text()
    model = CharacterTransformer()
    parameters = sum(p.numel() for p in model.parameters())
    Console().print(
        f"Training a character transformer of {parameters / 1e6:.2f} M parameters in fp32 on "
        f"{len(text) / 1e6:.1f} MB of the standard library's source, {steps} steps of AdamW."
    )
    logger = lightning.loggers.TensorBoardLogger(
        save_dir=folder, name=None, default_hp_metric=False
    )
    monitor = PrecisionMonitor(max_elements=None)  # of so small a model all: no figure is a guess
    logging.getLogger(lightning.__name__).setLevel(logging.WARNING)  # no advertisements
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[monitor],
        log_every_n_steps=10,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        # The batches are cut out of memory: workers would only slow this down.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning's own business with a newer torch.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        trainer.fit(model, DataLoader(Windows(text, steps * BATCH_SIZE), batch_size=BATCH_SIZE))
    return monitor


def _report(monitor: PrecisionMonitor, folder: Path) -> None:
    """Print the report of the run, and write its page and picture beside its logs."""
    assert monitor.path is not None  # the folder can be written to
    console = Console()
    report = RunReport.of(read(monitor.path))
    print_report(report, console)
    log_dir = monitor.path.parent
    (log_dir / "report.html").write_text(page(report), encoding="utf-8")
    (log_dir / "formats.png").write_bytes(png(report.pictures()["kept"], dpi=150))
    shown = {
        "Report": log_dir / "report.html",
        "Picture": log_dir / "formats.png",
        "Run file": f"{monitor.path} (altgrad report {shlex.quote(str(log_dir))})",
        "TensorBoard": f"tensorboard --logdir {shlex.quote(str(folder))} (Custom Scalars, Images)",
    }
    for name, where in shown.items():
        console.print(f"{name + ':':13}{where}", soft_wrap=True, highlight=False)
