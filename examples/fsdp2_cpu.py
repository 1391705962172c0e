"""Train a model that is sharded over two CPU processes, and print figures of the whole model.

    python examples/fsdp2_cpu.py                                      # Lightning starts them
    torchrun --standalone --nproc-per-node 2 examples/fsdp2_cpu.py    # without Lightning

Each process measures its own shard of each parameter. The sums of all shards are added up, so that
every process gets the same figures.
"""

import gc
from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from altgrad import Figures, UpdateMonitor
from altgrad_lightning import PrecisionMonitor

FORMATS = ["bf16", "e4m3fn"]
STEPS = 20


def make_sharded_model(mesh: DeviceMesh) -> nn.Module:
    """Make a model, and shard the rows of each parameter over the processes of a mesh."""
    torch.manual_seed(0)
    # Three rows for two processes: shards may differ in size.
    model = nn.Sequential(nn.Linear(32, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 3))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_with_torchrun() -> None:
    """Train in a process that torchrun has started. Every process attaches a monitor."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    model = make_sharded_model(init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(rank)  # other data in each process

    monitor = UpdateMonitor(model, formats=FORMATS, every_n_steps=10)
    with monitor.attach(optimizer):
        for _ in range(STEPS):
            loss = model(torch.randn(16, 32, generator=generator)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    if rank == 0 and monitor.latest is not None:
        print(f"{size} processes, without Lightning")
        show(monitor.latest.layers)


class Model(pl.LightningModule):
    """A module for Lightning's ModelParallelStrategy, which leaves the sharding to the module."""

    def configure_model(self) -> None:
        """Shard the model. Lightning calls this method in each process."""
        assert self.device_mesh is not None
        self.net = make_sharded_model(self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], _batch_index: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train_with_lightning() -> None:
    """Train in a Trainer, which starts the second process with the same file."""
    monitor = PrecisionMonitor(formats=FORMATS, every_n_steps=10)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[monitor],
    )
    inputs = torch.randn(16 * STEPS * 2, 32, generator=torch.Generator().manual_seed(0))
    trainer.fit(Model(), DataLoader(TensorDataset(inputs), batch_size=16))
    if trainer.is_global_zero and monitor.latest is not None:
        print(f"{trainer.world_size} processes, Lightning's ModelParallelStrategy; {monitor.path}")
        show(monitor.latest)


def show(layers: Mapping[str, Figures]) -> None:
    """Print figures of the last observed step, which are equal in every process."""
    for name, figures in layers.items():
        kept = "  ".join(f"{f} {figures[f'kept_update_ratio/{f}']:.2f}" for f in FORMATS)
        print(f"{name:18} {figures.elements:6,} of {figures.population:6,} elements   {kept}")


if __name__ == "__main__":
    if distributed.is_torchelastic_launched():
        train_with_torchrun()
        # Free all objects that hold a gloo group: torch aborts if a thread of gloo still runs when
        # the interpreter ends.
        gc.collect()
        distributed.destroy_process_group()
    else:
        train_with_lightning()
