"""`StepMeasuring`: what an optimizer step did to all layers, measured on their devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.layers import ShardedLayers
from altgrad.distributed.shards import empty_part
from altgrad.measurement.chunks import Sample
from altgrad.measurement.ever_moved import EverMovedOfLayers
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.step_record import StepVectors
from altgrad.monitor.arena import Arena
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.scale_state import ScaleState
from altgrad.observation import OptimizerStep
from altgrad.observation.snapshots import Memory
from altgrad.quantization.arguments import INPUT_DTYPES


class StepMeasuring:
    """Measures most layers side by side in an arena, and alone those of too many elements for it.

    Args:
        measurer: Who measures.
        settings: How each layer is observed.
        scale_state: What the scales follow from.
        ever_moved: What elements have done so far.

    Attributes:
        sharded: What knows which elements lie here, where parameters are sharded.
    """

    def __init__(
        self,
        measurer: Measurer,
        settings: LayerSettings,
        scale_state: ScaleState,
        ever_moved: EverMovedOfLayers,
    ) -> None:
        self._measurer = measurer
        self._settings = settings
        self._scale_state = scale_state
        self._ever_moved = ever_moved
        self._arenas: WeakKeyDictionary[Optimizer, Arena] = WeakKeyDictionary()
        self._samples: dict[str, Sample] = {}
        self.sharded: ShardedLayers | None = None

    # --- before a step

    def elements(self, name: str, parameter: Tensor) -> Tensor | None:
        """Which of the elements that lie here are copied; None for all."""
        if parameter.dtype not in INPUT_DTYPES:
            return None
        if self.sharded is not None:
            is_enabled = self._settings.of(name).enabled
            part = self.sharded.measured_part_of(name) if is_enabled else empty_part()
            self._samples[name] = Sample(parameter.shape, part.indices)
            return part.local
        indices = self._settings.indices(name, parameter.shape)
        if indices is not None:
            self._samples[name] = Sample(parameter.shape, indices)
        return indices

    def memory(self, optimizer: Optimizer) -> Memory:
        """Where the copies of an optimizer's parameters go."""
        if optimizer not in self._arenas:
            arena = Arena(self._measurer, self._scale_state, self._ever_moved, self._samples)
            self._arenas[optimizer] = arena
        return self._arenas[optimizer].place

    def scales_changed(self) -> None:
        """Have what depends on the scales made anew."""
        for arena in self._arenas.values():
            arena.scales_changed()

    # --- after a step

    def nothing(self) -> StepVectors:
        """The vectors of no layer."""
        return StepVectors(
            self._measurer.formats.names, lambda name: self._settings.of(name).formats
        )

    def vectors_of(self, step: OptimizerStep, parameters: Mapping[str, Tensor]) -> StepVectors:
        """Those of the layers that were stepped.

        Args:
            step: The step.
            parameters: Of the model, by name.
        """
        vectors = self.nothing()
        measured = self._measure_together(step, vectors)
        self._measure_alone(step, {*step.names} - measured, parameters, vectors)
        return vectors

    def _measure_together(self, step: OptimizerStep, vectors: StepVectors) -> set[str]:
        """The parameters that lie in the arena; returns their names."""
        arena = self._arenas[step.optimizer]
        present = {*step.names}
        measured: set[str] = set()
        for segment in arena.segments:
            absent = [place for place in segment.places if place.name not in present]
            segment.leave_out(absent)
            names = [name if name in present else None for name in segment.names]
            batch = arena.batch_of(segment)
            vectors.add(names, self._measurer.measure_batch(batch))
            measured |= {name for name in names if name is not None}
        return measured

    def _measure_alone(
        self,
        step: OptimizerStep,
        names: set[str],
        parameters: Mapping[str, Tensor],
        vectors: StepVectors,
    ) -> None:
        """Those of too many elements for that; not those of a dtype that is not measured."""
        if not names:
            return
        kinds = 1 + len(self._measurer.formats)
        each = zip(step.names, step.before, step.after, step.gradients, strict=True)
        for name, before, after, gradient in each:
            if name not in names or {before.dtype, gradient.dtype} - {*INPUT_DTYPES}:
                continue
            parameter = parameters[name]
            if self.sharded is not None and not before.numel():
                continue  # others have all that is measured of it
            self._scale_state.look_at(name, parameter)
            amax = self._scale_state.amax(name) if self._measurer.formats.needs_amax else None
            ever = self._ever_moved.row_of(name, kinds, before.numel(), before.device)
            is_whole = before.numel() == parameter.numel()
            sample = None if is_whole else self._samples[name]
            row = self._measurer.measure_tensor(before, after, gradient, amax, ever, sample)
            vectors.add([name], row.unsqueeze(0))

    # --- what elements have done so far

    def ever_moved_in_arenas(self) -> Iterator[tuple[str, Tensor]]:
        """By layer, of those that lie in one."""
        for arena in self._arenas.values():
            yield from arena.ever_moved()

    def clear_arenas(self) -> None:
        """Forget what lies there."""
        for arena in self._arenas.values():
            arena.clear()

    def leave_arenas(self) -> None:
        """Keep what elements have done so far, also if the optimizers do not live on."""
        for name, ever in self.ever_moved_in_arenas():
            self._ever_moved.leave(name, ever)
        self.clear_arenas()
