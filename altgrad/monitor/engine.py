"""`Engine`: what an optimizer step did to all layers, measured on their devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.peers import Peers, StepSums
from altgrad.distributed.shards import empty_part
from altgrad.measurement.chunks import Sample
from altgrad.measurement.ever_moved import EverMovedOfLayers
from altgrad.measurement.measurer import Measurer
from altgrad.monitor.arena import Arena
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.scale_state import ScaleState
from altgrad.observation import OptimizerStep, StepOutcome
from altgrad.observation.dtensor import local_of
from altgrad.observation.snapshots import Copies, Request
from altgrad.quantization.arguments import INPUT_DTYPES


class Engine:
    """Measures most layers side by side in an arena, and alone those of too many elements for it.

    Args:
        measurer: What measures.
        settings: How each layer is observed.
        scale_state: What the scales follow from.
        ever_moved: What elements have done so far.
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

    # --- before a step

    def choose(self, name: str, parameter: Tensor, peers: Peers) -> Tensor | None:
        """Return which elements of the local shard of a parameter are copied.

        Args:
            name: Name of the layer.
            parameter: The parameter.
            peers: The ranks that share the parameters.

        Returns:
            int64, flat indices into the local shard; None for all.
        """
        self._samples.pop(name, None)
        if parameter.dtype not in INPUT_DTYPES:
            return None
        part = empty_part()
        if self._settings.of(name).enabled:
            part = peers.part(name, self._settings.measured_indices(name, parameter.shape))
        if part.indices is not None:
            self._samples[name] = Sample(parameter.shape, part.indices)
        return part.local

    def lay_out(
        self, optimizer: Optimizer, requests: Sequence[Request], peers: Peers
    ) -> Sequence[Copies | None]:
        """Return where the copies of an optimizer's parameters go; see `Arena.lay_out`.

        Args:
            optimizer: The optimizer.
            requests: All of its parameters that have a gradient, or had one.
            peers: The ranks that share the parameters.
        """
        measured = {
            each.name: each.parameter
            for each in requests
            if self._settings.is_measured(each.name, each.parameter)
        }
        self._scale_state.look_at(measured, peers)
        if optimizer not in self._arenas:
            arena = Arena(self._measurer, self._scale_state, self._ever_moved, self._samples)
            self._arenas[optimizer] = arena
        return self._arenas[optimizer].lay_out(requests)

    def scales_changed(self) -> None:
        """Measure under the scales of amax that have been taken again."""
        for arena in self._arenas.values():
            arena.scales_changed()

    # --- after a step

    def measure(self, outcome: StepOutcome, seconds: tuple[float, float]) -> StepSums:
        """Return what a step came to on this rank, with one copy to the host.

        An error, of the step or of measuring it, is part of what is returned.

        Args:
            outcome: What the observer saw of the step.
            seconds: What observing took, and what training takes, in seconds.
        """
        nothing = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        sums = StepSums(seconds, nothing, skipped=outcome.skipped, error=outcome.error)
        if outcome.step is None:
            return sums
        try:
            return self._measured(outcome.step, sums)
        except Exception as error:  # noqa: BLE001 - whoever combines the ranks raises it
            return sums._replace(error=error)

    def _measured(self, step: OptimizerStep, sums: StepSums) -> StepSums:
        names, parts = self._measure_together(step)
        for name, row in self._measure_alone(step, {*step.names}.difference(names)):
            names.append(name)
            parts.append(row.unsqueeze(0))
        if not parts:  # no layer of this step has elements here
            return sums._replace(present=self._present(step), found_inf=_is_set(step.found_inf))
        vectors, found_inf = _on_host(parts, step.found_inf)
        rows = [row for row, name in enumerate(names) if name is not None]
        if len(rows) < len(names):
            vectors = vectors[rows]
        return sums._replace(
            names=[name for name in names if name is not None],
            vectors=vectors,
            present=self._present(step),
            found_inf=found_inf,
        )

    def _present(self, step: OptimizerStep) -> list[str]:
        each = zip(step.names, step.before, strict=True)
        measured = [name for name, before in each if before.dtype in INPUT_DTYPES]
        return [name for name in self._settings.enabled(measured) if name not in step.resting]

    def _measure_together(self, step: OptimizerStep) -> tuple[list[str | None], list[Tensor]]:
        """Measure the layers that lie in the arena; return names for the rows of all parts."""
        arena, present = self._arenas.get(step.optimizer), {*step.names}
        names: list[str | None] = []
        parts: list[Tensor] = []
        for segment in () if arena is None else arena.segments:
            names += segment.names_with(present)
            parts.append(self._measurer.measure_batch(segment.batch))
        return names, parts

    def _measure_alone(self, step: OptimizerStep, names: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Measure layers of too many elements for the arena, unless their dtype is not measured."""
        if not names:
            return
        formats = self._measurer.formats
        each = zip(step.names, step.before, step.after, step.gradients, strict=True)
        for name, before, after, gradient in each:
            if name not in names or {before.dtype, gradient.dtype} - {*INPUT_DTYPES}:
                continue
            sample, elements = self._samples.get(name), before.numel()
            if sample is not None and not elements:
                continue  # other ranks have all that is measured of it
            if sample is not None and elements == sample.shape.numel():
                sample = None
            amax = self._scale_state.amax(name) if formats.needs_amax else None
            ever = self._ever_moved.row_of(name, 1 + len(formats), elements, before.device)
            row = self._measurer.measure_tensor(before, after, gradient, amax, ever, sample)
            yield name, row

    # --- what elements have done so far

    def histories(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the elements of the layers in arenas have done, by name."""
        for arena in self._arenas.values():
            yield from arena.histories()

    def leave_arenas(self) -> None:
        """Keep what elements have done so far, also if the optimizers do not live on."""
        for arena in self._arenas.values():
            arena.leave()


@torch.inference_mode(mode=False)  # what is made in that mode could not be copied later
def _on_host(parts: Sequence[Tensor], found_inf: Tensor | None) -> tuple[Tensor, bool]:
    """Copy all rows to the host at once, with whether the optimizer skipped the step.

    Args:
        parts: float64 (rows, columns) each, one or more.
        found_inf: One element, not 0 if the step was skipped; None if that is not known.
    """
    together = [each.to(parts[0].device) for each in parts]
    if found_inf is not None:  # it rides along
        together.append(together[0].new_zeros(1, together[0].shape[1]))
        together[-1][0, 0] = local_of(found_inf)
    rows = torch.cat(together).cpu()
    return (rows, False) if found_inf is None else (rows[:-1], bool(rows[-1, 0]))


def _is_set(found_inf: Tensor | None) -> bool:
    return found_inf is not None and bool(local_of(found_inf).item())
