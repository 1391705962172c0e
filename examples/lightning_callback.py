"""Add `PrecisionMonitor` to a Lightning Trainer, and look at its charts in TensorBoard."""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from altgrad_lightning import PrecisionMonitor


class Classifier(pl.LightningModule):
    """A module like any of yours; it needs no change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], _batch_index: int) -> Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    data = TensorDataset(torch.randn(2048, 64), torch.randint(10, (2048,)))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        log_every_n_steps=10,
        callbacks=[PrecisionMonitor(formats=["bf16", "e4m3fn"])],
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=32))
    print("tensorboard --logdir lightning_logs")
