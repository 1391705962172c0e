"""`OptimizerRun`: the lanes of one optimizer of the run, and what is known between two steps.

The *run* is the training that is watched. A *lane* is a set of layers, small samples of which are
stepped together by *twins*, as recipes say. Whether the optimizer draws random numbers, and which
lanes have been checked, is known only after some steps.

Read `rank_states` first; `loaded_lanes` comes next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.twins.generators import may_draw
from altgrad.twins.hyperparameters import Changes, HyperparameterFollower
from altgrad.twins.lane import Lane
from altgrad.twins.lane_sorter import LaneSorter
from altgrad.twins.layer_plan import LaneKind, Stepped
from altgrad.twins.micro_gradients import MicroGradients

_MOST_TRIES = 8
"""Number of steps in which no weight moves, after which twins are checked at observed steps alone.

Each check copies counts to the host.
"""


class OptimizerRun:
    """The lanes of one optimizer of the training, and what is known of it between two steps.

    A *lane* is a set of layers whose samples are stepped together by *twins*, as recipes say.

    Args:
        optimizer: The optimizer.
        sorter: The sorter of its layers into lanes.

    Attributes:
        sorter: The `sorter` argument.
        follower: A record of the optimizer's hyperparameters.
        changes: Changes of hyperparameters before the running step.
        lanes: The lanes by kind.
        stepped: The layers of each lane.
        micro: The hooks on the layers of each lane, for recipes that add up gradients.
        captured: The lanes that take part in the running step.
        checked: The lanes with a self-check so far, which compares a sample with the training.
        may_draw: True if the optimizer may draw random numbers.
        draws: True once its step was seen to draw some.
        random_states: The states of generators before a checked step, by device.
    """

    def __init__(self, optimizer: Optimizer, sorter: LaneSorter) -> None:
        self.sorter = sorter
        self.follower = HyperparameterFollower(optimizer)
        self.changes: Changes = {}  # of hyperparameters, before the running step
        self.lanes: dict[LaneKind, Lane] = {}
        self.stepped: Mapping[LaneKind, Sequence[Stepped]] = {}  # layers, by lane
        self.micro: dict[LaneKind, MicroGradients] = {}  # for recipes that add up gradients
        self.captured: list[LaneKind] = []  # lanes that take part in the running step
        self.checked: set[LaneKind] = set()  # lanes with a self-check so far
        self.may_draw = may_draw(type(optimizer))
        self.draws = False  # until its step is seen to draw random numbers
        self.random_states: dict[torch.device, Tensor] = {}  # before a checked step
        self._tries: Counter[LaneKind] = Counter()  # checks of a lane before any weight moved

    def is_first_check(self, kind: LaneKind, *, has_moved: bool) -> bool:
        """Return True for each self-check of some layers up to the first at which weights moved.

        The self-check compares the training with a sample that the same optimizer steps. At a
        learning rate of 0, as in the first step of a warm-up, no weight moves, and every optimizer
        looks right. After 8 checks without a moved weight, the result is False, too.

        Args:
            kind: The properties of the layers, whose samples lie in one tensor (a *lane*).
            has_moved: True if a weight of these layers has moved since their start.
        """
        is_first = kind not in self.checked
        self._tries[kind] += 1
        if has_moved or self._tries[kind] >= _MOST_TRIES:
            self.checked.add(kind)
        return is_first


def get_random_state(device: torch.device) -> Tensor:
    """Return the state of the generator from which operations on a device draw."""
    if device.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    # MPS has one device, and takes no argument.
    arguments = () if device.type == "mps" else (device,)
    return module.get_rng_state(*arguments)  # type: ignore[no-any-return]
