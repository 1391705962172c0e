"""`altgrad demo`: train a small language model and report which formats suit its weights.

`demo` trains the model of `demo_model` under a `PrecisionMonitor`, then prints the report and
writes pictures.

Read `demo_model` next.
"""

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

from altgrad.report import RunReport, page, png, print_first_screen, read

if TYPE_CHECKING:
    from altgrad_lightning import PrecisionMonitor

BATCH_SIZE = 16
"""Number of sequences of characters in a batch."""


def demo(
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps to train.")] = 300,
    folder: Annotated[Path, typer.Option(help="Where logs and report go.")] = Path("altgrad-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the batches.")] = 0,
) -> None:
    """Train a character transformer on Python's own source and judge three formats.

    The demo takes about a minute on a laptop's CPU. It prints a verdict for each
    layer and format, and writes a page with pictures and TensorBoard logs.
    \f
    Args:
        steps: Number of optimizer steps, at least 10.
        folder: Folder for logs and the report.
        seed: Seed of the weights and the batches, from 0 to 2**32 - 1.
    """  # noqa: D301 - typer's help ends at the form feed
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
    """Train the model under a `PrecisionMonitor`, with logs in `folder`, and return the monitor."""
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
    monitor = PrecisionMonitor(
        max_elements=None, summary=False
    )  # all elements of a small model: figures are exact
    logging.getLogger(lightning.__name__).setLevel(
        logging.WARNING
    )  # or Lightning prints tips on its products
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
        # Batches are slices of memory, which worker processes would only slow down.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning 2.6 calls a function that torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        trainer.fit(model, DataLoader(Windows(text, steps * BATCH_SIZE), batch_size=BATCH_SIZE))
    return monitor


def _report(monitor: PrecisionMonitor, folder: Path) -> None:
    """Print the report of the run, and write a page and a picture to the folder of the run file."""
    assert monitor.path is not None  # `demo` made the folder, so the run file exists
    console = Console()
    report = RunReport.from_run(read(monitor.path))
    print_first_screen(report, console)
    log_dir = monitor.path.parent
    number = monitor.path.stem.removeprefix("altgrad")  # "-2" for the second run of a folder
    html, picture = log_dir / f"report{number}.html", log_dir / f"recipes{number}.png"
    console.print("Drawing the page and a picture of it …")
    html.write_text(page(report), encoding="utf-8")
    picture.write_bytes(png(report.pictures()["kept"], dpi=150))
    shown = {
        "Report": html,
        "Picture": picture,
        "Run file": f"{monitor.path} (altgrad report {shlex.quote(str(log_dir))})",
        "TensorBoard": f"tensorboard --logdir {shlex.quote(str(folder))} (Images, Text)",
    }
    for name, where in shown.items():
        # A path is no markup.
        console.print(f"{name + ':':13}{where}", soft_wrap=True, highlight=False, markup=False)
