"""`LoadedLanes`: the lanes of a checkpoint, until the optimizer of each makes its first step.

A *lane* is a set of layers, small samples of which are stepped together by *twins*, as recipes say.
Which layers an optimizer steps is known only when it does.

Read `optimizer_run` first; `twin_checks` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.twins.lane import Lane
from altgrad.twins.lane_pieces import join_pieces
from altgrad.twins.layer_plan import LaneKind, Stepped
from altgrad.twins.twin_source import TwinSource


class LoadedLanes:
    """The states of lanes from a checkpoint that no lane has taken over yet.

    A *lane* is a set of layers, small samples of which are stepped together by *twins*, as recipes
    say.

    Args:
        source: The layers of the training.

    Attributes:
        states: The states, results of `Lane.state_dict` with the kind of the lane.
    """

    def __init__(self, source: TwinSource) -> None:
        self.states: list[Mapping[str, Any]] = []
        self._source = source

    def restore(
        self, lane: Lane, kind: LaneKind, optimizer: Optimizer, stepped: Sequence[Stepped]
    ) -> bool:
        """Restore a lane, a set of layers, from loaded ones of its kind with some of these layers.

        There are several loaded ones if several ranks shared the layers.

        Args:
            lane: The lane, which has made no step yet.
            kind: The properties that its layers share.
            optimizer: The training's optimizer.
            stepped: The layers of the lane that the optimizer is about to step.

        Returns:
            True if there is such a lane, and it was restored.
        """
        names = {each.name for each in stepped}
        pieces = [
            each
            for each in self.states
            if each["kind"] == kind.describe() and not names.isdisjoint(each["samples"])
        ]
        self.states = [each for each in self.states if not any(each is one for one in pieces)]
        if len(pieces) == 1 and not self._source.is_shared:
            return self._load_lane(lane, pieces[0])
        if not pieces:
            return False
        wanted = lane.describe_samples(optimizer, stepped)
        state = join_pieces(pieces, wanted)
        known = {name for each in pieces for name in each["samples"]}
        if lost := [n for n in wanted if n in known and (not state or n not in state["samples"])]:
            self._source.warn(
                f"has the twins of {few(lost)} begin anew: the restored state has other elements, "
                "since another number of ranks held the layers"
            )
        return state is not None and self._load_lane(lane, state)

    def _load_lane(self, lane: Lane, state: Mapping[str, Any]) -> bool:
        """Restore a lane, a set of layers, unless it has recipes that are not in the state.

        The twins of these recipes would start later than the others.

        Returns:
            True if it was restored.
        """
        if new := sorted(lane.recipes - set(state["recipes"])):
            self._source.warn(
                f"has all twins begin anew: the restored state has no recipe {few(new)}"
            )
            return False
        lane.load_state_dict(state)
        return True
