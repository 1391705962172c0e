"""Two processes that share a model, on CPU: each measures its shard, the figures are of the whole.

python examples/fsdp2_cpu.py                                      # Lightning starts them
torchrun --standalone --nproc-per-node 2 examples/fsdp2_cpu.py    # without Lightning
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


def shared_model(mesh: DeviceMesh) -> nn.Module:
    """Of each parameter every process has some rows; a fourth one would have none of the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 3))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def with_torchrun() -> None:
    """Every process attaches a monitor; all come to the same figures."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    model = shared_model(init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(rank)  # data of its own for each process

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
    """A module that Lightning's ModelParallelStrategy shares."""

    def configure_model(self) -> None:
        """Shard the model; Lightning calls this in each process."""
        assert self.device_mesh is not None
        self.net = shared_model(self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], _batch_index: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def with_lightning() -> None:
    """Lightning starts the second process, which runs this file as well."""
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
    """Figures of the last observed step, which are equal in every process."""
    for name, figures in layers.items():
        kept = "  ".join(f"{f} {figures[f'kept_update_ratio/{f}']:.2f}" for f in FORMATS)
        print(f"{name:18} {figures.elements:6,} of {figures.population:6,} elements   {kept}")


if __name__ == "__main__":
    if distributed.is_torchelastic_launched():
        with_torchrun()
        # Let go of all that holds groups of gloo first: a thread of gloo that meets the end of the
        # interpreter makes torch abort.
        gc.collect()
        distributed.destroy_process_group()
    else:
        with_lightning()
