"""`Checkpoint`: save and restore all that a resumed run needs, equal on all ranks.

Each part of a monitor has a state of its own. This file knows their names in a checkpoint, and
which of them earlier versions of AltGrad have written.

Read `moved_history`, `scale_state` and `training_steps` first. `monitor` comes next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from altgrad.distributed.host_group import LostRankError
from altgrad.distributed.peers import Peers
from altgrad.monitor.moved_history import MovedHistory
from altgrad.monitor.run_samples import EMPTY, RunSamples
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.training_steps import TrainingSteps
from altgrad.observation import SkipReason

_ENTRIES = ("formats", "ever_moved", "scales", "last_seen", "skipped", "budgets")
"""Entries of the state that each version of AltGrad has written."""


class Checkpoint:
    """The state of a monitor that a resumed run needs: moved elements, scales, intervals, samples.

    Args:
        steps: The training steps.
        scale_state: The amax, largest finite magnitude, of each layer, from which scales follow.
        skipped: Number of skipped steps by reason.
        history: The flags of elements that have moved.
        samples: The samples of the layers that are followed from the start of the run.
        warn_here: Function that is called with each notice that concerns this rank alone.
        strict: If True, raise an error if another rank does not answer; otherwise warn.
    """

    def __init__(
        self,
        steps: TrainingSteps,
        scale_state: ScaleState,
        skipped: Counter[SkipReason],
        history: MovedHistory,
        samples: RunSamples,
        *,
        warn_here: Callable[[str], None],
        strict: bool,
    ) -> None:
        self._steps = steps
        self._scale_state = scale_state
        self._skipped = skipped
        self._history = history
        self._samples = samples
        self._warn_here = warn_here
        self._strict = strict

    def state_dict(self, peers: Peers) -> dict[str, Any]:
        """Return the state of all parts, which all ranks gather together.

        Args:
            peers: The ranks that share the parameters.

        Returns:
            A dict of plain data and tensors. Without an answer from another rank, its
            ``ever_moved`` and ``twins`` begin anew.

        Raises:
            LostRankError: Another rank does not answer, and `strict` is True.
        """
        return {
            **self._history.describe(),
            "scales": self._scale_state.state_dict(),
            "skipped": dict(self._skipped),
            **self._steps.state_dict(),
            **self._gather(peers),
        }

    def _gather(self, peers: Peers) -> dict[str, Any]:
        """Return the entries of which each rank has a part."""
        try:
            flags = self._history.gather_flags(peers)
            return {"ever_moved": flags, **self._samples.state_dict(peers)}
        except LostRankError as error:
            if self._strict:
                raise
            self._warn_here(
                "state_dict() was not called on every rank, so that never_moved_frac and twins "
                f"will begin anew: {error}"
            )
            return {"ever_moved": {}, **EMPTY}

    def describe(self) -> dict[str, object]:
        """Return the state that decides what is observed next, for ranks to compare.

        Returns:
            A dict of plain data.
        """
        steps = self._steps.state_dict()
        return {
            "scales": self._scale_state.description(),
            "last_seen": sorted(steps["last_seen"].items()),
            "budgets": steps["budgets"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of all parts, before the monitor is attached.

        Args:
            state: A result of `state_dict`.

        Raises:
            ValueError: An entry of the state is missing or damaged.
        """
        if missing := [name for name in _ENTRIES if name not in state]:
            raise ValueError(
                f"state={sorted(state)}: expected the entries of UpdateMonitor.state_dict(), of "
                f"which {missing} are missing; leave out load_state_dict() to begin anew"
            )
        self._history.load_state_dict(state)
        self._scale_state.load_state_dict(state["scales"])
        self._skipped.clear()
        self._skipped.update(state["skipped"])
        self._steps.load_state_dict(state)
        self._samples.load_state_dict(state)
