"""Rows of parameter kinds: dtypes, sharing, classes of tensors, adapters of low rank."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.compatibility.trial import Row, make_rows
from tests.observation.wrapped import WithoutTake, Wrapped
from tests.step_truth.designs import Design
from tests.step_truth.modes import Run
from tests.step_truth.plain_modes import FrozenAndUnused, Sparse, Tied, batches, network
from tests.step_truth.recording import Journal

GROUP = "Parameter kinds"


def make_wrapped(kind: type[Wrapped]) -> nn.Module:
    net = network()
    net[0].weight = nn.Parameter(kind(net[0].weight.detach().clone()))
    return net


class OddOne(nn.Module):
    """A net with one parameter more, which adds to each output."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.net = network()
        self.odd = nn.Parameter(
            values, requires_grad=values.is_floating_point() or values.is_complex()
        )

    def forward(self, batch: Tensor) -> Tensor:
        total = self.odd.real.sum() if self.odd.is_complex() else self.odd.sum()
        return self.net(batch) + total


class Convolved(nn.Module):
    """A convolution in the memory format `channels_last`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(batch.reshape(-1, 2, 4, 1).expand(-1, -1, -1, 4))


def make_parametrized(name: str) -> nn.Module:
    net = network()
    getattr(nn.utils.parametrizations, name)(net[0])
    return net


def make_pruned() -> nn.Module:
    net = network()
    nn.utils.prune.l1_unstructured(net[0], "weight", amount=0.5)
    return net


def make_lazy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2))


def make_initialized() -> nn.Module:
    net = make_lazy()
    net(torch.ones(1, 4))
    return net


def make_transposed() -> nn.Module:
    net = network()
    net[0].weight = nn.Parameter(net[0].weight.detach().t())
    return net


def make_lora(**options: Any) -> nn.Module:
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "3"], **options)
    return peft.get_peft_model(network(), config)


def make_qlora() -> nn.Module:
    """Return a net whose first layer is frozen in 4 bits, with an adapter of low rank."""
    layers = importlib.import_module("bitsandbytes.nn")
    net = network()
    packed = layers.Linear4bit(4, 4, compute_dtype=torch.float32)
    packed.load_state_dict(net[0].state_dict())
    net[0] = packed.to("cpu")
    peft = importlib.import_module("peft")
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))


def make_float8() -> nn.Module:
    float8 = importlib.import_module("torchao.float8")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    return float8.convert_to_float8_training(net, config=float8.Float8LinearConfig(emulate=True))


def shorten(name: str) -> str:
    """Return the name without the words that a parametrization adds."""
    name = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)
    return re.sub(r"parametrizations\.(\w+)\.(original\d)$", r"\1.\2", name)


def train_kind(make: Callable[[], nn.Module], design: Design, _: Path) -> Journal:
    """Train a model by SGD in its own dtype."""
    net = make()
    journal = Journal(net)
    journal.names = {p: shorten(name) for p, name in journal.names.items()}
    held = [p for p in net.parameters() if p.is_floating_point() or p.is_complex()]
    dtype = held[-1].dtype
    optimizer = journal.optimizer(SGD, held, lr=0.01, momentum=0.9, foreach=False)
    with design.watch(net, optimizer):
        for batch in batches():
            (net(batch.to(dtype)).float() - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return journal


def list_rows() -> list[Row]:
    makes: dict[str, Callable[[], nn.Module]] = {
        "float32": network,
        "float64": lambda: network().double(),
        "bfloat16": lambda: network().bfloat16(),
        "float16": lambda: network().half(),
        "complex64 beside float32": lambda: OddOne(torch.ones(3, dtype=torch.complex64)),
        "int64, not trained": lambda: OddOne(torch.ones(3, dtype=torch.int64)),
        "no dimension": lambda: OddOne(torch.tensor(0.5)),
        "no element": lambda: OddOne(torch.ones(3, 0)),
        "tied": Tied,
        "frozen and unused": FrozenAndUnused,
        "sparse gradients": Sparse,
        "lazy, initialized before `attach`": make_initialized,
        "lazy, initialized after `attach`": make_lazy,
        "transposed in memory": make_transposed,
        "channels last": Convolved,
        "`weight_norm`": partial(make_parametrized, "weight_norm"),
        "`spectral_norm`": partial(make_parametrized, "spectral_norm"),
        "`orthogonal`": partial(make_parametrized, "orthogonal"),
        "pruned": make_pruned,
        "a subclass of Tensor": partial(make_wrapped, Wrapped),
        "a subclass of Tensor without `take`": partial(make_wrapped, WithoutTake),
        "LoRA (peft)": make_lora,
        "DoRA (peft)": partial(make_lora, use_dora=True),
        "QLoRA (peft, bitsandbytes)": make_qlora,
        "float8 training (torchao)": make_float8,
    }
    runs: dict[str, Run] = {name: partial(train_kind, make) for name, make in makes.items()}
    return make_rows(GROUP, runs)
