"""`altgrad demo`: train a small language model and see which formats its weights could live in."""

from __future__ import annotations

import logging
import math
import shlex
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from altgrad import DEFAULT_FORMATS, Figures
from altgrad_lightning.callback import PrecisionMonitor
from altgrad_lightning.packages import lightning

_CONTEXT = 128
_BATCH = 16
_CHARACTERS = 128  # ASCII


def demo(
    steps: Annotated[int, typer.Option(min=10, help="Optimizer steps to train.")] = 300,
    folder: Annotated[Path, typer.Option(help="Where the logs and the picture go.")] = Path(
        "altgrad-demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the batches.")] = 0,
) -> None:
    """Train a character transformer on Python's own source and judge three formats.

    About a minute on a laptop's CPU. Shows a table of layers and formats, writes TensorBoard logs
    and a picture.
    """
    console = Console()
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
    monitor = PrecisionMonitor()
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

    console.print(layer_table(monitor.latest, monitor.latest_step))
    for line in frozen_layers(monitor.latest):
        console.print(line)
    picture = Path(logger.log_dir) / "formats.png"
    draw_layers(monitor.latest, monitor.latest_step, picture)
    console.print(f"Picture:     {picture}", soft_wrap=True)
    console.print(f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder))}", soft_wrap=True)
    console.print("             then filter the tags for stall_frac or kept_update_ratio")


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

    def training_step(self, batch: Tensor, _batch_index: int) -> Tensor:
        context, following = batch[:, :-1], batch[:, 1:]
        x = self.characters(context) + self.positions.weight
        logits = self.head(self.norm(self.blocks(x)))
        loss = functional.cross_entropy(logits.flatten(0, 1), following.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)


def layer_table(figures: Mapping[str, Figures], step: int | None) -> Table:
    """Layers by formats: the share of updates that vanish, and how much of the update is kept."""
    table = Table(
        title=f"Step {step}, had the weights been stored in …",
        caption="stall: share of updates that vanish on the format's grid\n"
        "kept: share of the update's energy that is left (1 all, 0 none)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("layer", no_wrap=True, vertical="bottom")
    for format in DEFAULT_FORMATS:
        table.add_column(f"{format}\nstall", justify="right", no_wrap=True)
        table.add_column("kept", justify="right", no_wrap=True, vertical="bottom")
    for layer, of_layer in figures.items():
        cells = []
        for format in DEFAULT_FORMATS:
            stalled, kept = (
                of_layer[f"stall_frac/{format}"],
                of_layer[f"kept_update_ratio/{format}"],
            )
            colour = _colour(kept)
            cells += [f"[{colour}]{_percent(stalled)}[/]", f"[{colour}]{kept:.2f}[/]"]
        table.add_row(layer, *cells)
    return table


def frozen_layers(figures: Mapping[str, Figures], most_named: int = 3) -> Iterator[str]:
    """A line for each format: which layers would not move at all."""
    for format in DEFAULT_FORMATS:
        frozen = [layer for layer, of in figures.items() if of[f"stall_frac/{format}"] == 1]
        names = ", ".join(frozen[:most_named]) + (", …" if len(frozen) > most_named else "")
        yield (
            f"{format:6} would freeze {len(frozen)} of {len(figures)} layers"
            f"{': ' if frozen else ''}{names}"
        )


def _colour(kept: float) -> str:
    if math.isnan(kept):
        return "dim"
    return "green" if kept >= 0.9 else "yellow" if kept >= 0.5 else "red"


def _percent(share: float) -> str:
    """Whole percent, rounded so that 100 % means all and 0 % none."""
    if math.isnan(share):
        return "–"
    percent = round(100 * share)
    if percent == 100 and share < 1:
        return ">99 %"
    if percent == 0 and share > 0:
        return "<1 %"
    return f"{percent} %"


def draw_layers(figures: Mapping[str, Figures], step: int | None, path: Path) -> None:
    """Write a heat map of layers by formats: how much of the update each format would keep."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kept = [[of[f"kept_update_ratio/{f}"] for f in DEFAULT_FORMATS] for of in figures.values()]
    frozen = [[of[f"stall_frac/{f}"] == 1 for f in DEFAULT_FORMATS] for of in figures.values()]
    figure = Figure(figsize=(6.4, 0.17 * len(figures) + 0.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(kept, vmin=0, vmax=1, cmap="RdYlBu", aspect="auto")
    axes.set_title(f"What would be left of the weight updates of step {step}, stored in …", size=9)
    axes.set_xticks(range(len(DEFAULT_FORMATS)), DEFAULT_FORMATS, size=9)
    axes.set_yticks(range(len(figures)), list(figures), size=7)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xlabel("kept_update_ratio: 1 all, 0 nothing; frozen: every update vanishes", size=8)
    axes.spines[:].set_visible(False)
    for row, of_layer in enumerate(kept):
        for column, share in enumerate(of_layer):
            text = "frozen" if frozen[row][column] else f"{share:.2f}"
            colour = "black" if 0.15 < share < 0.85 else "white"
            axes.text(column, row, text, ha="center", va="center", size=7, color=colour)
    figure.savefig(path)
