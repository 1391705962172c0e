"""`RunSamples`: the samples of the layers that are followed from the start of a run.

With recipes, *twins* follow them: samples that are stored and stepped as a recipe says. Without,
they are weights at the start, compared with those of the run.

Read `twin_layers` and `start_weights` first. `recorder` comes next and measures both in one way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.peers import Peers
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.twin_parts import TwinShare
from altgrad.monitor.start_weights import StartWeights
from altgrad.monitor.twin_layers import TwinLayers
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization.format_set import FormatSet
from altgrad.recipes.recipe import Recipe
from altgrad.twins.batch_norm import BatchStatistic
from altgrad.twins.rank_states import join_states, pack_state
from altgrad.twins.run_average import RunAverage
from altgrad.twins.twins import Twins

EMPTY: Mapping[str, Any] = {
    "twins": {"lanes": [], "resynchronised": {}, "sum_rounding": {}},
    "starts": {},
}
"""The `RunSamples.state_dict` from which all samples begin anew."""


class RunSamples:
    """The samples of a run's layers: twins or, without recipes, the weights at the start.

    A *twin* is a sample of each layer that is stored and stepped as a recipe says.

    Args:
        recipes: The recipes that are tried out; may be empty.
        layers: The layers with their samples and scales.
        registry: All parameters by name, and the module.
        lock: Lock that is held while an optimizer's step is looked at.
        strict: If True, raise errors of twins; otherwise end all twins with one notice.

    Attributes:
        twins: The twins of all recipes.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        layers: TwinLayers,
        registry: ParameterRegistry,
        lock: AbstractContextManager[object],
        *,
        strict: bool,
    ) -> None:
        self.twins = Twins(recipes, layers, lock, strict=strict)
        self._layers = layers
        self._lock = lock
        self._starts = StartWeights(layers)
        if registry.module is not None:
            for name in ("running_mean", "running_var"):
                statistic = BatchStatistic(name, registry.module, registry.names)
                if statistic.has_modules:
                    self.twins.watch_average(statistic)

    @property
    def needs_amax(self) -> bool:
        """True if a recipe stores weights in a format whose scales follow from an amax."""
        formats = [each.weights_format for each in self.twins.recipes]
        stored = [each for each in formats if each is not None]
        return FormatSet(stored, self._layers.scaling).needs_amax

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Begin to follow the layers of the optimizers of a run, before their next steps."""
        self.twins.attach(optimizers)
        self.begin(optimizers)
        self.twins.note_batches()

    def begin(self, optimizers: Sequence[Optimizer]) -> None:
        """Keep weights of new layers as those at the start; twins see new layers in the step."""
        if not self.twins.recipes:
            self._starts.begin(optimizers)

    def watch_average(self, average: RunAverage) -> None:
        """Have twins keep an average of the weights, as the run keeps one of its own."""
        with self._lock:
            self.twins.watch_average(average)

    def measure(
        self, optimizer: Optimizer, shown: Collection[str]
    ) -> tuple[Sequence[Tensor], Callable[[Sequence[Numbers]], TwinShare]]:
        """Measure the samples of an optimizer's layers, after its step.

        Args:
            optimizer: The optimizer.
            shown: Names of the layers whose figures the step reports; none if it was skipped.

        Returns:
            Numbers on the devices of the layers, float64 of any shape. And a function that returns
            the sums of the samples; it takes these numbers on the host, or none after an error.
        """
        if not self.twins.recipes:
            moves = self._starts.measure(optimizer, shown)
            return [each.values for each in moves], partial(self._starts.read, moves)
        sums = self.twins.measure(optimizer, shown) if shown else []
        tensors = [numbers for each in sums for numbers in each.tensors]
        return tensors, partial(self.twins.read, optimizer, sums)

    def scales_changed(self) -> None:
        """Compute scales anew when next needed, since the amax (largest magnitude) has changed."""
        self.twins.scales_changed()

    def state_dict(self, peers: Peers) -> dict[str, Any]:
        """Return the state of the samples on all ranks.

        Args:
            peers: The ranks that share the parameters.

        Returns:
            A dict with the keys ``twins`` and ``starts``.

        Raises:
            LostRankError: A rank does not answer.
        """
        twins = self.twins.state_dict()
        if peers.size > 1 and self.twins.recipes:
            twins = join_states(peers.exchange(pack_state(twins)))
        return {"twins": twins, "starts": self._starts.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the samples from a checkpoint, before the first step.

        Args:
            state: A dict with the entries of a result of `state_dict`, and others. Version 0.1.0
                wrote neither.

        Raises:
            ValueError: An entry is damaged.
        """
        if "twins" in state:
            self.twins.load_state_dict(state["twins"])
        if not self.twins.recipes:
            self._starts.load_state_dict(state.get("starts", {}))
