"""`OutsideChanges`: what changes layers besides the steps of the run's optimizer.

A checkpoint is loaded, weights are clipped, a moment is reset: weights and optimizer states of the
*run*, the training that is watched, may change between two steps. Twins, which step a sample of
each layer, then take over the layers found here. Where torch counts no write, as by compiled code,
weights are watched: gathered after each step, and compared before the next.

Read `run_states` first; `sampled_gradients` comes next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from altgrad.twins.layer_plan import LayerPlan, Stepped
from altgrad.twins.optimizer_twin import OptimizerTwin
from altgrad.twins.run_states import RunStates
from altgrad.twins.run_weights import RunWeights
from altgrad.twins.twin import Twin


class OutsideChanges:
    """A finder of layers that something other than a step has changed since the last step.

    Args:
        plan: The layers with their samples.
        run: The weights of the training at the sampled elements.
    """

    def __init__(self, plan: LayerPlan, run: RunWeights) -> None:
        self._plan = plan
        self._run = run
        self._states = RunStates()
        # Layers whose weights, and whose states, were written to before the checkpoint.
        self._loaded: tuple[Collection[str], Collection[str]] = (), ()
        self._suspicions = 0  # checks after which a write was suspected that torch did not count

    def find(
        self, optimizer: Optimizer, stepped: Sequence[Stepped], reference: Twin
    ) -> tuple[set[str], set[str]]:
        """Return the layers to which something besides the optimizer has written.

        Args:
            optimizer: The training's optimizer.
            stepped: The layers that it steps.
            reference: The *reference twin*, a sample that is stepped as the training is.

        Returns:
            Names of the layers whose weights, and of those whose optimizer states were written to
            since the last step. After a resume, that is the last step before the checkpoint.
        """
        written, changed = self._loaded
        other_weights, other_states = self._plan.restore(optimizer, stepped)
        moved = self._states.find_changed(optimizer, stepped)
        # States that only went to another device and back, or were loaded again, are as before.
        moved -= {name for name in moved if self._has_state(optimizer, name, reference)}
        return (
            {*written, *other_weights, *self._run.find_written()},
            {*changed, *other_states, *moved},
        )

    def _has_state(self, optimizer: Optimizer, name: str, reference: Twin) -> bool:
        """Return True if a layer's optimizer state in the training equals the reference twin's."""
        layer = self._plan.layers.get(name)
        if layer is None or not isinstance(reference, OptimizerTwin):
            return False
        return reference.has_state(name, layer.read_state(optimizer), layer)

    def forget_loaded(self) -> None:
        """Forget the changes before a checkpoint, which twins have taken over."""
        self._loaded = (), ()

    def remember(self, optimizer: Optimizer, stepped: Sequence[Stepped]) -> None:
        """Remember all writes so far, right after a step: only later ones are changes.

        Args:
            optimizer: The training's optimizer.
            stepped: The layers that it has stepped.
        """
        self._run.remember_writes()
        self._states.remember(optimizer, stepped)

    def note_check(self, *, is_suspected: bool, can_rest: bool) -> None:
        """Start or stop watching weights for writes that torch does not count, after a self-check.

        The first suspicion begins a watch, which ends at a check after which it can rest. The
        second one begins a watch for good.

        Args:
            is_suspected: True if the reference twin, a sample that steps as the training does,
                differed from it before the step without a write that torch had counted.
            can_rest: True if no write was found since the check before, and nothing else needs the
                watch.
        """
        self._suspicions += is_suspected
        if is_suspected:
            self._run.is_watching = True
        elif can_rest and self._suspicions < 2:
            self._run.is_watching = False

    def state_dict(
        self, optimizer: Optimizer, stepped: Sequence[Stepped], reference: Twin
    ) -> dict[str, Any]:
        """Return the changes since the last step, for a resumed run to find them again.

        Args:
            optimizer: The training's optimizer.
            stepped: The layers that it steps.
            reference: The reference twin, a sample that is stepped as the training is.

        Returns:
            A dict with the keys ``written``, ``changed`` and ``suspicions``.
        """
        written, changed = self.find(optimizer, stepped, reference)
        return {
            "written": sorted(written),
            "changed": sorted(changed),
            "suspicions": self._suspicions,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`, before the first step."""
        self._loaded = state["written"], state["changed"]
        self._suspicions = state["suspicions"]
