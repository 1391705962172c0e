"""`Engine`: measure one optimizer step of all layers on their devices, or else on the host.

Before a step, the engine chooses elements and assigns memory; after it, it measures the copies and
brings all results to the host in one transfer. The copies of layers on a device that does not
measure are themselves brought to the host in one transfer, and measured there.

Read `arena` first, which measures most layers together, and `host_step`. `recorder` comes next and
calls the engine.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.peers import StepSums
from altgrad.distributed.shards import empty_part
from altgrad.measurement.chunks import Sample
from altgrad.measurement.ever_moved import EverMovedStore
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.numbers import Numbers
from altgrad.monitor.arena import Arena
from altgrad.monitor.host_step import bring_to_host
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.sharding import Sharding
from altgrad.observation import OptimizerStep, StepOutcome
from altgrad.observation.dtensor import to_local_tensor
from altgrad.observation.snapshots import Copies, Memory, Request
from altgrad.quantization.arguments import INPUT_DTYPES


class Engine:
    """An engine that measures optimizer steps, given copies of the weights before and after them.

    Of each layer it computes sums, such as that of the squared updates, from which metrics follow.

    Small layers are measured together, as their copies lie side by side in an `Arena`. Large layers
    are measured alone.

    Args:
        measurer: The measurer of small and large layers.
        settings: Settings of each layer.
        scale_state: The amax, largest finite magnitude, of each layer, from which scales follow.
        ever_moved: The flags of layers in no arena, which say which elements have moved so far.
        sharding: The ranks that share the parameters.
    """

    def __init__(
        self,
        measurer: Measurer,
        settings: LayerSettings,
        scale_state: ScaleState,
        ever_moved: EverMovedStore,
        sharding: Sharding,
    ) -> None:
        self._measurer = measurer
        self._settings = settings
        self._scale_state = scale_state
        self._ever_moved = ever_moved
        self._sharding = sharding
        # Weak keys: an arena, and its memory, go when the optimizer goes.
        self._arenas: WeakKeyDictionary[Optimizer, Arena] = WeakKeyDictionary()
        self._samples: dict[str, Sample] = {}

    # --- before a step

    def choose_elements(self, name: str, parameter: Tensor) -> Tensor | None:
        """Choose the elements of a layer's local shard to copy at each step, and remember these.

        Args:
            name: Name of the layer.
            parameter: The layer's parameter.

        Returns:
            Indices into the flattened local shard, int64 (elements). None for all elements.

        Raises:
            RuntimeError: The parameter was sharded, or got other DTensor placements, after
                `attach`.
        """
        self._samples.pop(name, None)
        if parameter.dtype not in INPUT_DTYPES:
            return None
        part, peers = empty_part(), self._sharding.peers
        if self._settings.get(name).enabled:
            if name not in peers.known({name: parameter}):
                raise RuntimeError(
                    f"{name} was sharded or redistributed after attach(): shard the module first, "
                    "then call attach()"
                )
            part = peers.part(name, self._settings.measured_indices(name, parameter.shape))
        if part.indices is not None:
            block = self._settings.block(name)
            self._samples[name] = Sample(parameter.shape, part.indices, block)
        return part.local

    def assign_memory(self, optimizer: Optimizer) -> Memory:
        """Return a function that assigns memory for the copies of an optimizer's layers."""
        reference = weakref.ref(optimizer)  # the observer holds this function, and no optimizer

        def assign(requests: Sequence[Request]) -> Sequence[Copies | None]:
            alive = reference()
            assert alive is not None, "it is being stepped"
            return self._lay_out(alive, requests)

        return assign

    def _lay_out(
        self, optimizer: Optimizer, requests: Sequence[Request]
    ) -> Sequence[Copies | None]:
        """Assign memory for copies of weights and gradients of an optimizer's layers.

        Args:
            optimizer: The optimizer.
            requests: All of its layers that have or had a gradient.

        Returns:
            Memory for each layer; None for layers that `Arena.lay_out` leaves out.
        """
        measured = {
            each.name: each.parameter
            for each in requests
            if self._settings.is_measured(each.name, each.parameter)
        }
        self._scale_state.ensure_amax(measured, self._sharding.peers)
        if optimizer not in self._arenas:
            arena = Arena(self._measurer, self._scale_state, self._ever_moved, self._samples)
            self._arenas[optimizer] = arena
        return self._arenas[optimizer].lay_out(requests)

    def scales_changed(self) -> None:
        """Compute the scales of all layers again, after an amax (largest magnitude) has changed."""
        for arena in self._arenas.values():
            arena.scales_changed()

    # --- after a step

    def measure(
        self, outcome: StepOutcome, seconds: tuple[float, float], others: Sequence[Tensor] = ()
    ) -> StepSums:
        """Compute the sums and maxima, from which metrics follow, of a step on this rank.

        The sums are over the elements of each layer, of quantities such as update². One transfer
        copies all to the host. No error is raised here: `Peers.combine` raises it, so that all
        ranks do so together.

        Args:
            outcome: The step with its copies of weights and gradients, or the error of copying.
            seconds: Time to observe the last observed step and mean time of a training step, in
                seconds.
            others: Further numbers to copy to the host by the same transfer, such as the sums of
                twins, float64 of any shape.

        Returns:
            A `StepSums`: in `vectors` the sums and maxima of each layer, float64 (layers, columns),
            in `names` the layers, and in `others` the further numbers. In `skipped` is the reason
            if no weight moved, and in `error` the error of the step or of the measurement.
        """
        sums = StepSums(seconds, np.zeros((0, 0)), skipped=outcome.skipped, error=outcome.error)
        if outcome.step is None:
            return sums
        try:
            arena = self._arenas.get(outcome.optimizer)
            step = bring_to_host(outcome.step, {} if arena is None else arena.copies)
            return self._measured(step, sums, others)
        except Exception as error:  # noqa: BLE001 - raised when ranks are combined
            return sums._replace(error=error)

    def _measured(self, step: OptimizerStep, sums: StepSums, others: Sequence[Tensor]) -> StepSums:
        """Compute the sums and maxima, from which metrics follow, of each layer in a step.

        The sums are over the elements of a layer, of quantities such as update². The module
        `altgrad.measurement.columns` lists all.

        Args:
            step: The step: weights before it and after it, and gradients.
            sums: The result so far, which has no layers yet.
            others: Further numbers to copy to the host by the same transfer, float64 of any shape.

        Returns:
            A copy of `sums` that also has the sums and maxima of each layer.
        """
        names, parts = self._measure_together(step)
        for name, row in self._measure_alone(step, {*step.names}.difference(names)):
            names.append(name)
            parts.append(row.unsqueeze(0))
        if not parts and others:  # the samples of twins may have elements where none is measured
            device = others[0].device
            parts.append(torch.zeros((0, 0), dtype=torch.float64, device=device))
        if not parts:  # no layer of this step has elements on this rank
            return sums._replace(present=self._present(step), found_inf=_is_set(step.found_inf))
        # A segment measures all its layers. Those that are absent from this step have the name None
        # and are dropped.
        (vectors, *further), found_inf = _on_host(parts, step.found_inf, others)
        rows = [row for row, name in enumerate(names) if name is not None]
        if len(rows) < len(names):
            vectors = vectors[rows]
        return sums._replace(
            names=[name for name in names if name is not None],
            vectors=vectors,
            present=self._present(step),
            found_inf=found_inf,
            others=further,
        )

    def _present(self, step: OptimizerStep) -> list[str]:
        """Return the names of the layers of a step that are measured, on this or another rank."""
        each = zip(step.names, step.before, strict=True)
        measured = [name for name, before in each if before.dtype in INPUT_DTYPES]
        return [name for name in self._settings.enabled(measured) if name not in step.resting]

    def _measure_together(self, step: OptimizerStep) -> tuple[list[str | None], list[Tensor]]:
        """Compute the sums and maxima, from which metrics follow, of the layers in an arena.

        An arena consists of segments, memory in which copies of layers lie side by side. One call
        measures all layers of a segment.

        Args:
            step: The step.

        Returns:
            The name of each layer in the arena, or None if the layer is not in this step. Also, for
            each segment, the sums and maxima of its layers, float64 (layers, columns) on the
            device.
        """
        arena, present = self._arenas.get(step.optimizer), {*step.names}
        names: list[str | None] = []
        parts: list[Tensor] = []
        for segment in () if arena is None else arena.segments:
            names += segment.empty_absent(present)
            parts.append(self._measurer.measure_batch(segment.batch))
        return names, parts

    def _measure_alone(self, step: OptimizerStep, names: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Compute the sums and maxima, from which metrics follow, of large layers one by one.

        Layers are large if they do not fit into the memory in which several are measured together.

        Args:
            step: The step.
            names: Names of the layers. Those with a dtype that is not measured are skipped.

        Returns:
            An iterator over pairs of a name and the layer's sums and maxima, float64 (columns).
        """
        if not names:
            return
        formats = self._measurer.formats
        each = zip(step.names, step.before, step.after, step.gradients, strict=True)
        for name, before, after, gradient in each:
            if name not in names or {before.dtype, gradient.dtype} - {*INPUT_DTYPES}:
                continue
            sample, elements = self._samples.get(name), before.numel()
            if sample is not None and not elements:
                continue  # all sampled elements are on other ranks
            # A sample with every element is a whole layer, which is split into chunks faster.
            if sample is not None and elements == sample.shape.numel():
                sample = None
            amaxes = self._scale_state.amaxes(name) if formats.needs_amax else None
            ever = self._ever_moved.get_row(name, 1 + len(formats), elements, before.device)
            row = self._measurer.measure_tensor(before, after, gradient, amaxes, ever, sample)
            yield name, row

    # --- flags

    def flags(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each small layer, and flags that say which of its elements have moved.

        Returns:
            An iterator over pairs of a name and flags, bool (1 + formats, elements). Row 0 says
            which elements have moved, each other row which have had an update that a format keeps a
            part of.
        """
        for arena in self._arenas.values():
            yield from arena.flags()

    def free_arenas(self) -> None:
        """Free the memory for copies of small layers, but keep which elements have moved so far.

        Flags that say so go to the `EverMovedStore`.
        """
        for arena in self._arenas.values():
            arena.free()


def _on_host(
    parts: Sequence[Tensor], found_inf: Tensor | None, others: Sequence[Tensor]
) -> tuple[list[Numbers], bool]:
    """Copy the sums of layers, a flag and further numbers to the host, all in one transfer.

    Args:
        parts: One or more tensors of sums and maxima, float64 (layers, columns) each.
        found_inf: Flag of a GradScaler, any dtype (1): not 0 if the step was skipped. None without
            a GradScaler.
        others: Further numbers, float64 of any shape.

    Returns:
        Arrays on the host: the sums and maxima of all parts, float64 (layers, columns), then the
        further numbers, each in its shape. And True if the step was skipped.
    """
    device = parts[0].device
    rows = torch.cat([each.to(device) for each in parts])
    flag = [] if found_inf is None else [to_local_tensor(found_inf).to(device).view(1).double()]
    # Each copy to the host waits for the device: all numbers go in one.
    each = [rows, *others, *flag]
    flat = torch.cat([one.to(device).flatten() for one in each]) if len(each) > 1 else rows
    numbers = flat.cpu().numpy()
    if len(each) == 1:
        return [numbers], False
    ends = np.cumsum([one.numel() for one in each])
    split = np.split(numbers, ends[:-1])
    shaped = [part.reshape(one.shape) for part, one in zip(split, each, strict=True)]
    return (shaped, False) if found_inf is None else (shaped[:-1], bool(shaped[-1][0]))


def _is_set(found_inf: Tensor | None) -> bool:
    """Return True if a GradScaler skipped the step, read from the device; False without a flag."""
    return found_inf is not None and bool(to_local_tensor(found_inf).item())
