"""`CharacterTransformer`: the small language model of `altgrad demo`, and the text it learns.

The model is ordinary Lightning code without AltGrad. The text is the source of Python's standard
library, so that the demo needs no download. `demo` trains the model.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from altgrad_lightning.packages import lightning

_CONTEXT = 128  # characters
_CHARACTERS = 128  # all of ASCII


def standard_library_text(max_bytes: int = 2_000_000) -> bytes:
    """Return ASCII source of the running Python's standard library, in a fixed order."""
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
    """A dataset of random windows of a text, each a tensor of character codes, int64 (129,).

    A window is one character longer than the model's context of 128 characters, so that the last
    character of the context has a next character to predict.

    Args:
        text: ASCII text of at least 129 characters.
        count: Number of windows.
    """

    def __init__(self, text: bytes, count: int) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.starts = torch.randint(len(text) - _CONTEXT, (count,))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.text[start : start + _CONTEXT + 1].long()


class Block(nn.Module):
    """A pre-norm transformer block with causal attention.

    Args:
        width: Number of features.
        heads: Number of attention heads, which divides `width`.
    """

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
        """Return the output, float32 like the input (batch, length, width)."""
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
    """A small character-level language model.

    Args:
        width: Number of features.
        heads: Number of attention heads in a block.
        depth: Number of blocks.
    """

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
        """Return logits, float32 (batch, 128, 128), for characters int64 (batch, 128)."""
        x = self.characters(context) + self.positions.weight
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def training_step(self, batch: Tensor, _batch_index: int) -> Tensor:
        """Return the cross-entropy in nats per character, for a batch int64 (batch, 129)."""
        context, following = batch[:, :-1], batch[:, 1:]
        loss = functional.cross_entropy(self(context).flatten(0, 1), following.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW for all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
