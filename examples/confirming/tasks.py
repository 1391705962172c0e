"""What is trained: a perceptron on digits, from the start and fine-tuned.

Read this file first; `real_runs` comes next. The digits are those that scikit-learn ships.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]
"""Inputs of a classifier, and the class of each, int64."""
PRETRAINING_STEPS, PRETRAINING_RATE = 300, 1e-3


class Task(NamedTuple):
    """A model to train, and its data.

    Attributes:
        model: Function that makes the model, with equal weights at each call.
        batches: The batches to train on, one for each step.
        training: Examples from the training set, for the loss.
        held_out: Examples that no batch contains, for the accuracy after training.
    """

    model: Callable[[], nn.Module]
    batches: list[Batch]
    training: Batch
    held_out: Batch


def digits(seed: int, steps: int) -> Task:
    """Make the task to train a perceptron on the 8x8 digits that scikit-learn ships.

    Args:
        seed: Seed of the weights and of the batches.
        steps: Number of batches, with 128 digits each.

    Returns:
        The task. Inputs are float32 (digits, 64), from 0 to 1.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    training, held_out = order[:1437], order[1437:]
    generator = torch.Generator().manual_seed(seed)
    drawn = training[torch.randint(len(training), (steps, 128), generator=generator)]

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, 128),
            nn.LayerNorm(128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.LayerNorm(128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def batch(rows: Tensor) -> Batch:
        return inputs[rows], labels[rows]

    return Task(model, [batch(rows) for rows in drawn], batch(training), batch(held_out))


def shifted_digits(seed: int, steps: int) -> Task:
    """Make the task to fine-tune a perceptron, trained on the digits, on digits that are shifted.

    Each image is shifted by one pixel to the right. Before, the perceptron is trained in float32
    for 300 steps of AdamW at 1e-3.

    Args:
        seed: Seed of the weights and of the batches.
        steps: Number of batches to fine-tune on, with 128 digits each.

    Returns:
        The task. Inputs are float32 (digits, 64), from 0 to 1.
    """
    before = digits(seed, PRETRAINING_STEPS + steps)
    net = before.model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=PRETRAINING_RATE)
    for batch in before.batches[:PRETRAINING_STEPS]:
        optimizer.zero_grad()
        loss_and_accuracy(net, batch)[0].backward()
        optimizer.step()

    def shift(batch: Batch) -> Batch:
        images, labels = batch
        return images.unflatten(1, (8, 8)).roll(1, dims=2).flatten(1), labels

    return Task(
        lambda: copy.deepcopy(net),
        [shift(batch) for batch in before.batches[PRETRAINING_STEPS:]],
        shift(before.training),
        shift(before.held_out),
    )


def loss_and_accuracy(net: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    """Return the cross-entropy of a batch in nats, and the share of inputs classified rightly.

    Args:
        net: The classifier.
        batch: The inputs and their classes.

    Returns:
        The loss, float32 (), with its graph, and the share.
    """
    inputs, classes = batch
    logits, classes = net(inputs).float().flatten(0, -2), classes.flatten()
    right = (logits.argmax(-1) == classes).float().mean().item()
    return functional.cross_entropy(logits, classes), right
