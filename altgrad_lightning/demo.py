"""`altgrad demo`: train a small language model and see which formats its weights could live in."""

from __future__ import annotations

import logging
import shlex
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from altgrad.report import RunReport, page, png, print_report
from altgrad.report.records import read
from altgrad_lightning.callback import PrecisionMonitor
from altgrad_lightning.packages import lightning

_CONTEXT = 128
_BATCH = 16
_CHARACTERS = 128  # ASCII


def demo(
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps to train.")] = 300,
    folder: Annotated[Path, typer.Option(help="Where logs and report go.")] = Path("altgrad-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the batches.")] = 0,
) -> None:
    """Train a character transformer on Python's own source and judge three formats.

    About a minute on a laptop's CPU. Shows what each format would do to each layer, and writes a
    page with pictures and TensorBoard logs.
    """
    console = Console()
    if not 0 <= seed < 2**32:
        sys.exit(f"--seed {seed}: expected a number from 0 to 2**32 - 1")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"cannot write to folder {folder}: {error}")
    lightning.seed_everything(seed, verbose=False)
    text = standard_library_text()
    model = CharacterTransformer()
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
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
        trainer.fit(model, DataLoader(Windows(text, steps * _BATCH), batch_size=_BATCH))

    assert monitor.path is not None  # the folder can be written to
    report = RunReport.of(read(monitor.path))
    print_report(report, console)
    log_dir = Path(logger.log_dir)
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


def standard_library_text(max_bytes: int = 2_000_000) -> bytes:
    """ASCII source of the running Python's standard library, always in the same order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b""
    for path in sorted(folder.glob("*.py")):
        source = path.read_bytes()
        if source.isascii():
            text += source
        if len(text) >= max_bytes:
            break
    return text[:max_bytes]


class Windows(Dataset[Tensor]):
    """Random windows of a text, one character longer than the context."""

    def __init__(self, text: bytes, count: int) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.starts = torch.randint(len(text) - _CONTEXT, (count,))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.text[start : start + _CONTEXT + 1].long()


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.query_key_value(self.attention_norm(x)).view(
            batch, length, 3, self.heads, width // self.heads
        )
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class CharacterTransformer(lightning.LightningModule):
    """A small character-level language model; nothing in it knows of AltGrad."""

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.characters = nn.Embedding(_CHARACTERS, width)
        self.positions = nn.Embedding(_CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _CHARACTERS, bias=False)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, context: Tensor) -> Tensor:
        x = self.characters(context) + self.positions.weight
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def training_step(self, batch: Tensor, _batch_index: int) -> Tensor:
        context, following = batch[:, :-1], batch[:, 1:]
        loss = functional.cross_entropy(self(context).flatten(0, 1), following.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
