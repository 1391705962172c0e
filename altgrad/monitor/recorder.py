"""`Recorder`: make the record of an observed optimizer step, from the sums of all ranks.

A step has one road, whether it is measured, skipped or failed, on one rank or on several::

    prepare, before the step: each amax that is due
    make_record, after it:
        outcome ── Engine.measure ──► StepSums of this rank ── Peers.combine ──► StepSums of all
        StepSums of all ──► StepRecord, or the reason why the step moved no weight

An error is part of the `StepSums` of its rank, and `Peers.combine` raises it on every rank.

Read `engine` and `run_samples` first. `training_steps` comes next and joins the records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.peers import StepSums
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.step_record import StepRecord, step_record
from altgrad.measurement.twin_figures import TwinValues
from altgrad.measurement.twin_parts import TwinShare
from altgrad.monitor.engine import Engine
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.monitor.run_samples import RunSamples
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.sharding import Sharding
from altgrad.observation import SkipReason, StepOutcome
from altgrad.quantization.format_set import FormatSet


class Recorder:
    """A maker of records: figures of one step of one optimizer, over the elements of all ranks.

    Args:
        formats: The formats for which figures (values of metrics) are computed.
        layers: The layers that are measured.
        scale_state: The amax, largest finite magnitude, of each layer, from which scales follow.
        engine: The engine that measures steps on this rank.
        samples: The samples of the layers that are followed from the start of the run.
        sharding: The ranks that share the parameters.
        find_optimizers: Function that returns all optimizers whose steps are observed.
    """

    def __init__(
        self,
        formats: FormatSet,
        layers: MeasuredLayers,
        scale_state: ScaleState,
        engine: Engine,
        samples: RunSamples,
        sharding: Sharding,
        find_optimizers: Callable[[], Sequence[Optimizer]],
    ) -> None:
        self._formats = formats
        self._layers = layers
        self._scale_state = scale_state
        self._engine = engine
        self._samples = samples
        self._sharding = sharding
        self._find_optimizers = find_optimizers

    def find_attached(self) -> dict[str, Tensor]:
        """Return the measured parameters that observed optimizers of this rank step, by name."""
        return self._layers.find_stepped(self._find_optimizers())

    def find_stepped(self) -> dict[str, Tensor]:
        """Return the measured parameters that all ranks step, by name in the same order."""
        return self._sharding.peers.agreed(self.find_attached)

    def begin(self) -> None:
        """Compute each amax that twins need, which make every step from now on.

        If ranks share the parameters, they call this method together. A rank alone computes an amax
        when a twin, a sample that is stepped as a recipe says, first needs it.
        """
        if self._sharding.is_shared and self._samples.needs_amax:
            self._scale_state.begin(self.find_stepped(), self._sharding.peers)

    def prepare(self, optimizer: Optimizer) -> None:
        """Prepare to observe the coming step of an optimizer: compute each amax that is due.

        Raises:
            RuntimeError: Layers of the optimizer were sharded after the monitor was attached.
        """
        peers = self._sharding.peers
        self._sharding.check(optimizer, self._layers)
        are_new = peers.before_step(optimizer)
        if self._scale_state.prepare(self.find_stepped, peers, are_new=are_new):
            self._change_scales()
        self._samples.begin([optimizer])  # layers that it has got since `attach`

    def make_record(
        self, outcome: StepOutcome, seconds: tuple[float, float]
    ) -> StepRecord | SkipReason | None:
        """Measure a step that an optimizer has just made, and return its figures.

        The sums that were measured, such as that of the squared updates of each layer, are added up
        over all ranks.

        Args:
            outcome: The step.
            seconds: Time to observe the last observed step and mean time of a training step, in
                seconds.

        Returns:
            The record, or the reason why the step moved no weight. None if it had none of the
            measured layers.

        Raises:
            Exception: The step, or measuring it, has failed on any rank.
        """
        peers = self._sharding.peers
        if self._scale_state.settle(self.find_stepped, peers):
            self._change_scales()
        local = self._measure(outcome, seconds)
        return self._read(outcome.index, peers.combine(outcome.optimizer, outcome.index, local))

    def _measure(self, outcome: StepOutcome, seconds: tuple[float, float]) -> StepSums:
        """Return the sums of a step on this rank, with one copy to the host, or its error."""
        tensors: Sequence[Tensor] = ()
        read: Callable[[Sequence[Numbers]], TwinShare] = _read_nothing
        with self._sharding.peers.hold_errors():
            tensors, read = self._samples.measure(outcome.optimizer, outcome.shown)
        local, share = self._engine.measure(outcome, seconds, tensors), TwinShare()
        with self._sharding.peers.hold_errors():
            share = read(local.others)
        return local._replace(twins=share)

    def _read(self, index: int, step: StepSums) -> StepRecord | SkipReason | None:
        """Return the figures of a step from the sums of all ranks, or why it moved no weight."""
        if self._sharding.peers.size > 1:
            self._samples.twins.note_ranks(step.twins)
        if not step.names:
            return step.skipped
        parts = step.twins.parts
        averaged = self._samples.twins.find_averaged() if parts else {}
        record = step_record(
            self._formats.names,
            self._layers.settings.judged(step.names),
            step.vectors,
            index,
            step.seconds,
            twins=TwinValues.read_parts(parts, averaged),
        )
        # A fused optimizer reads found_inf on its device, and skips the step without the host.
        is_skipped = step.found_inf and not record.model["update_rms"] > 0
        return "inf" if is_skipped else record

    def _change_scales(self) -> None:
        self._engine.scales_changed()
        self._samples.scales_changed()


def _read_nothing(numbers: Sequence[Numbers]) -> TwinShare:  # noqa: ARG001
    """Return no sums of samples, which could not be measured."""
    return TwinShare()
