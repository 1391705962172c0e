"""How torchao and bitsandbytes pack optimizer states, and how to read them.

torchao keeps a state as a tensor of a class of its own, which has codes of 8 bits and a scale per
block. bitsandbytes keeps codes, scales and a table of the codes' values under names of its own.

Read `recipe` first; `libraries` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from altgrad.recipes.packed_states import PackedStates, StateParts

# --- torchao: torchao/optim/subclass_8bit.py, subclass_fp8.py


def take_torchao_apart(state: Mapping[str, Any]) -> StateParts:
    """Return the tensors of a state of torchao's AdamW8bit or AdamWFp8, sorted by their length.

    torchao packs the moments of large parameters: 8 bits for each element, a *code*, and a scale
    for each block of elements.

    Args:
        state: The state of a parameter, ``optimizer.state[parameter]``.

    Returns:
        In `elements` the codes, uint8, or the moments themselves if they are not packed; in
        `blocks` the scales; in `shared` the step, and for AdamW8bit the values of the codes.
    """
    elements, blocks, shared = dict[str, Tensor](), dict[str, Tensor](), dict[str, Any]()
    for name, value in state.items():
        if hasattr(value, "codes"):
            elements[f"{name}.codes"] = value.codes.view(torch.uint8)
            blocks[f"{name}.scale"] = value.scale
            if hasattr(value, "qmap"):
                shared[f"{name}.qmap"] = value.qmap
        elif name == "step":
            shared[name] = value
        else:
            elements[name] = value
    return StateParts(elements, blocks, shared)


def put_torchao_together(parts: StateParts) -> dict[str, Any]:
    """Return the state of torchao's AdamW8bit or AdamWFp8, made of its codes, scales and tables.

    Args:
        parts: What `take_torchao_apart` returns: in `elements` the codes of 8 bits, or moments that
            are not packed; in `blocks` the scales; in `shared` the step and any table of values.

    Returns:
        The state of a parameter, as in ``optimizer.state[parameter]``.
    """
    state = {name: each for name, each in parts.shared.items() if not name.endswith(".qmap")}
    for key, codes in parts.elements.items():
        name = key.removesuffix(".codes")
        state[name] = codes if name == key else _make_torchao(name, codes, parts)
    return state


def _make_torchao(name: str, codes: Tensor, parts: StateParts) -> Tensor:
    """Return a packed state of torchao, which looks like a tensor in float32."""
    library, scale = import_module("torchao.optim.adam"), parts.blocks[f"{name}.scale"]
    made: Tensor
    if (table := parts.shared.get(f"{name}.qmap")) is None:
        made = library.OptimStateFp8(codes.view(torch.float8_e4m3fn), scale, torch.float32)
    else:
        is_signed = name == "exp_avg"  # the second moment has a table without a sign
        made = library.OptimState8bit(codes, scale, table, is_signed, torch.float32)
    return made


def read_torchao(state: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the states of a parameter as torch's AdamW keeps them.

    Args:
        state: The state of a parameter of torchao's AdamW8bit or AdamWFp8.

    Returns:
        The states by name, in the shape of the parameter.
    """
    return {
        name: each.dequantize() if hasattr(each, "codes") else each for name, each in state.items()
    }


TORCHAO_FP8_STATES = PackedStates(take_torchao_apart, put_torchao_together, only_whole=True)
"""The states of torchao's AdamWFp8: torchao/optim/adam.py, _new_buffer."""
TORCHAO_STATES = replace(TORCHAO_FP8_STATES, table_bytes=4 * 256)
"""The states of torchao's AdamW8bit, each with the 256 values of the codes in float32."""

# --- bitsandbytes: bitsandbytes/optim/optimizer.py, Optimizer2State

_MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
"""The ends of the names that bitsandbytes has for the moments: state1, absmax1 and qmap1."""


def take_bnb_apart(state: Mapping[str, Any]) -> StateParts:
    """Return the tensors of a state of bitsandbytes' AdamW8bit, sorted by their length.

    bitsandbytes packs the moments of large parameters: 8 bits for each element, a *code*, and a
    scale for each block of elements.

    Args:
        state: The state of a parameter, ``optimizer.state[parameter]``.

    Returns:
        In `elements` the codes, or the moments themselves if they are not packed; in `blocks` the
        scales; in `shared` the step and the tables of the codes' values.
    """

    def pick(start: str) -> dict[str, Any]:
        return {name: each for name, each in state.items() if name.startswith(start)}

    return StateParts(pick("state"), pick("absmax"), pick("qmap") | pick("step"))


def put_bnb_together(parts: StateParts) -> dict[str, Any]:
    """Return the state of bitsandbytes' AdamW8bit, made of its codes, scales and tables.

    Args:
        parts: What `take_bnb_apart` returns: in `elements` the codes of 8 bits, or moments that are
            not packed; in `blocks` the scales; in `shared` the step and the codes' values.

    Returns:
        The state of a parameter, as in ``optimizer.state[parameter]``.
    """
    return {**parts.shared, **parts.elements, **parts.blocks}


def read_bnb(state: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the states of a parameter as torch's AdamW keeps them.

    Args:
        state: The state of a parameter of bitsandbytes' AdamW8bit, of whole blocks if it is packed.

    Returns:
        The moments by name, float32 in the shape of the parameter.
    """
    return {name: _unpack_bnb(state, end) for name, end in _MOMENTS.items()}


def _unpack_bnb(state: Mapping[str, Any], end: str) -> Tensor:
    codes: Tensor = state[f"state{end}"]
    if codes.dtype != torch.uint8:
        return codes
    values = state[f"qmap{end}"][codes.int()].view(len(state[f"absmax{end}"]), -1)
    unpacked: Tensor = values * state[f"absmax{end}"][:, None]
    return unpacked.view(codes.shape)


BNB_STATES = PackedStates(take_bnb_apart, put_bnb_together)
"""The states of bitsandbytes' AdamW8bit: bitsandbytes/optim/optimizer.py, init_state."""
