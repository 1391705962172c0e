"""`join_states`: one state of all twins from those of several ranks, which travel as bytes.

A *twin* steps a sample of each layer of the training as a recipe says; if ranks share the layers,
each rank has the state of the elements that it steps. The joined state has the pieces of all ranks
side by side, and `lane_pieces` takes from them what a rank needs.

Read `lane_pieces` first; `optimizer_run` comes next.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Return the state of a rank's twins, samples stepped as recipes say, as bytes.

    Args:
        state: A result of `Twins.state_dict`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def join_states(packed: Sequence[bytes]) -> dict[str, Any]:
    """Return the state of all ranks' twins, samples stepped as recipes say, from that of each.

    Args:
        packed: A result of `pack_state` of each rank.

    Returns:
        A dict like that of `Twins.state_dict`, with tensors on the CPU. Lanes that several ranks
        have, as those of a checkpoint before the first step, are there once.
    """
    # The bytes come from ranks of the same run. Groups of optimizers may have any values.
    states = [
        torch.load(io.BytesIO(each), map_location="cpu", weights_only=False) for each in packed
    ]
    lanes: dict[object, Any] = {}
    resynchronised: Counter[str] = Counter()
    for state in states:
        for lane in state["lanes"]:
            lanes.setdefault(_identify(lane), lane)
        resynchronised |= Counter(state["resynchronised"])
    joined = {"lanes": [*lanes.values()], "resynchronised": dict(resynchronised)}
    return {**states[0], **joined}


def _identify(lane: Mapping[str, Any]) -> object:
    """Return a key of the layers and elements of a lane, a set of layers that ranks share."""
    samples = {name: tuple(indices.tolist()) for name, (indices, _, _) in lane["samples"].items()}
    return repr(lane["kind"]), tuple(sorted(samples.items()))
