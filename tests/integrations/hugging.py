"""Small trainings by the Trainer of Hugging Face, and a callback that records their steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

SIZE = 8


class Net(nn.Module):
    """A model with dropout, so that a random number drawn by an observer would show."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(SIZE, 16), nn.Dropout(0.2), nn.LayerNorm(16), nn.Linear(16, SIZE)
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.layers(x)
        return {"loss": (out - 1).square().mean(), "logits": out}


NAMES = [name for name, _ in Net().named_parameters()]


class Recorder(TrainerCallback):
    """The truth: clones of the weights from the Trainer's events around each optimizer step."""

    def __init__(self, begin: str = "on_pre_optimizer_step") -> None:
        self.steps: list[list[tuple[Tensor, Tensor]]] = []
        self._before: list[Tensor] = []
        setattr(self, begin, self._clone)

    def _clone(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self._before = [p.detach().clone() for p in model.parameters()]

    def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        after = [p.detach().clone() for p in model.parameters()]
        self.steps.append([*zip(self._before, after, strict=True)])


def make_trainer(
    folder: Path, *callbacks: TrainerCallback, optimizers: Any = (None, None), **options: Any
) -> Trainer:
    torch.manual_seed(0)
    data = [{"x": row, "labels": row} for row in torch.randn(64, SIZE)]
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "logging_steps": 2,
        "save_strategy": "no",
        "seed": 0,
    }
    model = Net()
    chosen = optimizers(model) if callable(optimizers) else optimizers
    arguments = TrainingArguments(**{**settings, **options})
    return Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=[*callbacks],
        optimizers=chosen,
    )
