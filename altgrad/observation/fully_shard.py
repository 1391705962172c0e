"""FSDP2's two sets of parameters: the shards that are stepped, and the whole ones of a forward."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def fully_sharded(module: nn.Module) -> list[Any]:
    """The modules in it to which fully_shard was applied, told without importing it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", ())
    return [each for each in module.modules() if isinstance(each, kind)]


def register_shards(module: nn.Module) -> None:
    """Have it name the parameters that its optimizer steps.

    After a forward without a backward, as in an evaluation, fully_shard leaves the outermost module
    with whole parameters in their places, which no optimizer knows and the next step frees. This
    frees them now; the next forward gathers them again.
    """
    for each in fully_sharded(module):
        each.reshard()
