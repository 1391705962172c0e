"""Train with one part in bf16 at a time: weights, moments or gradients, and with all of them.

    python -m benchmarks.bf16_parts      # two minutes, from the root of the repository

What `model.to(torch.bfloat16)` loses is the sum of three parts. Here each part is alone in bf16:

- **weights**: kept on the grid of bf16 by a `WeightStorage`, all else in float32.
- **moments**: both moments of AdamW are kept on the grid of bf16.
- **gradients**: computed by a copy of the net in bf16, for a net and an optimizer in float32.
- **all**: `model.to(torch.bfloat16)` with torch's own AdamW.

*Lost* is by how much less the loss fell, as a share of its fall in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from altgrad import Recipe
from benchmarks.calibration.configs import Config, make_optimizer
from benchmarks.calibration.tasks import TASKS, Data
from benchmarks.paired import print_environment, print_table, script_arguments, write_json
from examples.predict_and_confirm import Batch, loss_and_accuracy

CONFIGS = (
    Config("mlp", "adamw-999", 1e-5, start="tuned"),
    Config("mlp", "adamw-999", 1e-4, start="tuned"),
    Config("mlp", "adamw-999", 1e-3),
    Config("mlp", "adamw-999", 1e-3, steps=2000),
    Config("transformer", "adamw-999", 1e-5, start="tuned"),
    Config("transformer", "adamw-999", 1e-3),
)


def compute_gradients(net: nn.Module, batch: Batch) -> None:
    """Set the gradients of a net to those of a batch, computed in the dtype of its weights.

    Args:
        net: The net.
        batch: The batch.
    """
    inputs, classes = batch
    dtype = next(net.parameters()).dtype
    outputs = net(inputs.to(dtype) if inputs.is_floating_point() else inputs).flatten(0, -2)
    net.zero_grad()
    nn.functional.cross_entropy(outputs.float(), classes.flatten()).backward()


def compute_gradients_in_bf16(net: nn.Module, batch: Batch) -> None:
    """Set the gradients of a net in float32 to those that a copy in bf16 computes.

    Args:
        net: The net.
        batch: The batch.
    """
    low = copy.deepcopy(net).bfloat16()
    compute_gradients(low, batch)
    for ours, theirs in zip(net.parameters(), low.parameters(), strict=True):
        assert theirs.grad is not None
        ours.grad = theirs.grad.float()


def train(
    net: nn.Module,
    optimizer: Optimizer,
    data: Data,
    compute: Callable[[nn.Module, Batch], None] = compute_gradients,
) -> float:
    """Train a net, and return its loss afterwards, computed in float32.

    Args:
        net: The net.
        optimizer: Its optimizer.
        data: The data.
        compute: Function that computes the gradients.
    """
    for batch in data.batches:
        compute(net, batch)
        optimizer.step()
    with torch.no_grad():
        return loss_and_accuracy(net.float(), data.training)[0].item()


def find_losses(config: Config) -> dict[str, float]:
    """Train in float32, and with each part in bf16; return the losses.

    Args:
        config: The way to train.

    Returns:
        The loss at the start, and that after each run, by name.
    """
    task, is_tuned = TASKS[config.task], config.start == "tuned"
    start = task.make_start(config.seed, is_tuned=is_tuned)
    data = task.draw(config.seed, config.steps, is_tuned)

    def train_stored(recipe: Recipe | None, compute=compute_gradients) -> float:
        net = copy.deepcopy(start)
        optimizer = make_optimizer(config, net.parameters())
        if recipe is not None:
            recipe.attach(optimizer)
        return train(net, optimizer, data, compute)

    low = copy.deepcopy(start).bfloat16()
    with torch.no_grad():
        initial = loss_and_accuracy(start, data.training)[0].item()
    return {
        "start": initial,
        "fp32": train_stored(None),
        "weights": train_stored(Recipe("weights", weights="bf16")),
        "moments": train_stored(Recipe("moments", states={"*": "bf16"})),
        "gradients": train_stored(None, compute_gradients_in_bf16),
        "all": train(low, make_optimizer(config, low.parameters()), data),
    }


def main() -> None:
    arguments = script_arguments("Put one part of a training in bf16 at a time.").parse_args()
    torch.set_num_threads(1)
    print_environment()
    configs = CONFIGS[:2] if arguments.quick else CONFIGS
    found = [find_losses(config) for config in configs]
    parts = ("weights", "moments", "gradients", "all")
    rows = []
    for config, losses in zip(configs, found, strict=True):
        fall = losses["start"] - losses["fp32"]
        cells = (
            f"{100 * (losses[part] - losses['fp32']) / fall:.2f} %, "
            f"x {losses[part] / losses['fp32']:.3g}"
            for part in parts
        )
        rows.append((config.task, config.start, f"{config.lr:g}", f"{config.steps}", *cells))
    print()
    print_table(("net", "start", "lr", "steps", *parts), rows)
    write_json(arguments.json, {"configs": [c._asdict() for c in configs], "losses": found})


if __name__ == "__main__":
    main()
