"""`UpdateMonitor`: judge formats step by step, in any training loop."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.distributed.host_group import LostRankError
from altgrad.distributed.layers import ShardedLayers
from altgrad.distributed.step_message import Own, StepMessage
from altgrad.measurement.ever_moved import EverMovedOfLayers, PackedBits
from altgrad.measurement.histogram import Histogram
from altgrad.measurement.measure import DEFAULT_FORMATS
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.step_record import StepRecord
from altgrad.monitor.agreement import Agreement
from altgrad.monitor.describe import describe_layers
from altgrad.monitor.header import describe_layer, describe_run
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.overhead import Budgets, Clock
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.schedule import StepSchedule
from altgrad.monitor.step_measuring import StepMeasuring
from altgrad.monitor.weight_octaves import weight_octaves
from altgrad.observation import OptimizerStep, SkipReason, StepObserver
from altgrad.observation.dtensor import is_sharded, local_of
from altgrad.observation.observer import Look
from altgrad.observation.rules import LayerSampling, SamplingRule
from altgrad.observation.snapshots import Memory
from altgrad.observation.stored import stored_formats
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.block_formats import Formats, get_formats
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import NumberFormat

DEFAULT_MAX_ELEMENTS = 1024
"""A share is then known to 0.016 at worst (one standard error); see benchmarks/README.md."""


_REASONS: tuple[SkipReason, ...] = ("no gradients", "learning rate 0", "inf")
"""Why a step was none, by numbers that processes can compare; the largest is said."""


class UpdateMonitor:
    """Watches the optimizer steps of a module and judges number formats by them.

    It observes by a `StepObserver`: training is not touched, and what fails in here ends the
    observation with one warning. Small parameters are measured whole, large ones by
    elements that are drawn once, so that the same ones are watched all the time.

    Examples:
        >>> import torch
        >>> from altgrad import UpdateMonitor
        >>> model = torch.nn.LayerNorm(512)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> with UpdateMonitor(model, formats=["fp16", "bf16"]).attach(optimizer) as monitor:
        ...     loss = (model(torch.randn(8, 512)) - 1).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> monitor.latest.layers["weight"]["stall_frac/bf16"]
        1.0

    Args:
        module: As in `StepObserver`.
        on_record: Called with the `StepRecord` of each observed step.
        formats: Formats to judge, as in `altgrad.measure`.
        every_n_steps: Observe each n-th step of an optimizer, or those that a `StepSchedule` says,
            or those for which a function of the step's index returns True.
        max_elements: How many elements of a parameter are measured at most, of those that have more
            than 2,048; None measures all of them, and copies all weights and gradients.
        sampling: Rules for single layers; the first that matches a layer's name holds.
        scaling: As in `altgrad.measure`. A scale is taken from the whole parameter at the first
            observed step and after every 100 of them, and after one in which a weight exceeded it.
        overhead_budget: The share of all time that observing may take, such as 0.01: steps are then
            observed less often than `every_n_steps` says, as needed. None sets no limit. On an
            accelerator it counts what the host takes, which includes waiting for the results.
        seed: Of the choice of elements.
        tell: Called, instead of a warning, with what a user is to know, each thing once.
        strict: Whether what fails in here is raised into the training.

    Attributes:
        latest: The last record; None before the first.
        skipped: How many steps should have been observed and were none, by reason.

    Raises:
        TypeError, ValueError: An argument that cannot be meant; a rule that matches no layer.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[tuple[str, Tensor]],
        on_record: Callable[[StepRecord], object] | None = None,
        *,
        formats: Formats = DEFAULT_FORMATS,
        every_n_steps: int | StepSchedule | Callable[[int], bool] = 1,
        max_elements: int | None = DEFAULT_MAX_ELEMENTS,
        sampling: Sequence[SamplingRule] = (),
        scaling: Scaling | None = "tensor",
        overhead_budget: float | None = None,
        seed: int = 0,
        tell: Callable[[str], object] | None = None,
        strict: bool = False,
    ) -> None:
        self._teller = tell
        self._is_strict = strict
        self._told: set[str] = set()
        self.latest: StepRecord | None = None
        self._on_record = on_record
        own_formats = get_formats(formats)
        of_rules = [format for rule in sampling for format in get_formats(rule.formats or ())]
        self._formats = FormatSet([*own_formats, *of_rules], scaling)
        self._is_wanted, every = _policy(every_n_steps)
        self._observer = StepObserver(
            module,
            self._on_step,
            self._is_due,
            elements=self._elements,
            memory=self._memory,
            should_copy=self._should_copy if sampling else None,
            read_found_inf=False,
            strict=strict,
        )
        self._sampling = tuple(sampling)
        self._settings = LayerSettings(
            self._observer.names,
            sampling,
            self._formats,
            own_formats,
            every_n_steps=every,
            max_elements=max_elements,
            seed=seed,
        )
        self._budgets = None if overhead_budget is None else Budgets(overhead_budget, every)
        self._clock = Clock()
        self._scale_state = ScaleState(self._formats)
        self._ever_moved = EverMovedOfLayers(self._tell)
        self._measuring = StepMeasuring(
            Measurer(self._formats), self._settings, self._scale_state, self._ever_moved
        )
        self._sharded: ShardedLayers | None = None
        self._agreement: Agreement | None = None
        self._loaded: dict[str, PackedBits] = {}  # of elements wherever they lie
        self._last_seen: dict[str, int] = {}  # by layer, the index of its last observed step
        self._lock = threading.RLock()  # two threads may step two optimizers

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """All that are judged, those that only rules name included."""
        return self._formats.formats

    @property
    def scaling(self) -> Scaling | None:
        """As given."""
        return self._formats.scaling

    @property
    def layers(self) -> Mapping[str, LayerSampling]:
        """How each layer is observed, by name."""
        return self._settings.by_name

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those that are measured, by name."""
        return self._settings.measured(self._observer.parameters)

    def weight_octaves(self) -> Histogram:
        """How many of all measured parameters' elements lie in each octave of magnitude, estimated.

        Where parameters are sharded all processes have to call it, and wait for each other.

        Raises:
            LostRankError: Not all of them have; the observation ends then.
            RuntimeError: They have not met, as they do at `attach`.
        """
        if not self._is_sharded:
            return weight_octaves(self.parameters)
        sharded = self._share()
        return weight_octaves(sharded.known(self.parameters), sharded)

    def run_header(self) -> dict[str, Any]:
        """Return formats, scaling and layers as plain data, for `altgrad.report.RunFile`."""
        layers = {
            name: describe_layer(parameter, self.layers[name], self.elements_of(name))
            for name, parameter in self.parameters.items()
        }
        return describe_run(self.formats, self.scaling, layers) | {
            "versions": {"torch": torch.__version__}
        }

    def elements_of(self, name: str) -> int:
        """How many elements of a layer are measured in a step."""
        shape = self._observer.parameters[name].shape
        indices = self._settings.measured_indices(name, shape)
        return shape.numel() if indices is None else len(indices)

    @property
    def skipped(self) -> Counter[SkipReason]:
        """As in `StepObserver`."""
        return self._observer.skipped

    @property
    def is_observing(self) -> bool:
        """Whether it is attached and nothing has failed."""
        return self._observer.is_observing

    @property
    def _is_sharded(self) -> bool:
        return any(map(is_sharded, self._observer.parameters.values()))

    @property
    def is_shared(self) -> bool:
        """Whether parameters are sharded, so that all processes observe together."""
        return self._sharded is not None

    def describe(self) -> str:
        """A dry run: a table of the layers, and which rule each of them got."""
        return describe_layers(self.layers, self._sampling)

    def attach(self, *optimizers: Any, scaler: GradScaler | None = None) -> UpdateMonitor:
        """Watch these optimizers from now on; arguments and errors as of `StepObserver.attach`.

        Where parameters are sharded, all processes have to call it, and wait for each other. Under
        DistributedDataParallel, where each has all of them, it does nothing but in the first one.

        Raises:
            ValueError: Also where the processes have different layers, settings or states, or one
                that can be observed and one that cannot.
            LostRankError: Not all processes have called it.
        """
        self._observer.read_names()  # it may have been sharded since it was made
        if self._is_sharded:
            self._share()
            assert self._agreement is not None
            self._agreement.attach(optimizers, scaler)
        elif self._observer.is_replica:
            return self
        self._observer.attach(*optimizers, scaler=scaler)
        self._leave_out_formats(optimizers)
        self._tell_of_dtypes()
        return self

    def _share(self) -> ShardedLayers:
        """What is observed together with other processes."""
        if self._sharded is None:
            sharded = ShardedLayers(self._settings.measured_indices, self._formats.scaling)
            self._sharded = self._measuring.sharded = sharded
            self._scale_state.share(sharded.amax_of)
            self._observer.agree = self._finish_together
            self._observer.leave_out = self._leave_out_unreduced
            self._agreement = Agreement(
                sharded, self._observer, self._settings, self._formats, self._decides, self._tell
            )
        return self._sharded

    def _decides(self) -> dict[str, dict[str, Any]]:
        """What processes have to have alike to decide and to measure alike, beside layers."""
        return {
            "settings": {
                "formats": self._formats.formats,
                "scaling": self._formats.scaling,
                "seed": self._settings.seed,
                "overhead_budget": None if self._budgets is None else self._budgets.share,
            },
            "state": {
                "scales": self._scale_state.description(),
                "last_seen": sorted(self._last_seen.items()),
                "budgets": None if self._budgets is None else self._budgets.state_dict(),
            },
        }

    def _leave_out_formats(self, optimizers: Sequence[Any]) -> None:
        """Of layers that a `WeightStorage` stores no finer: what stalls there is never a step."""
        stored = stored_formats(optimizers)
        for name, parameter in self._observer.parameters.items():
            element, judged = stored.get(parameter), self._settings.of(name).formats
            if element is None:
                continue
            formats = (f for f in self._formats if f.name in judged)
            hidden = [f.name for f in formats if not f.is_coarser_than(element)]
            if hidden:
                self._settings.leave_out_formats(name, hidden)
                self._tell(
                    f"cannot judge {', '.join(hidden)} for weights that a WeightStorage stores in "
                    f"{element.name}: updates that stalled are no longer there to see, and it "
                    "leaves these out for such layers. Read unmoved_frac"
                )

    def _leave_out_unreduced(self, names: Sequence[str], why: str) -> None:
        self._tell(f"leaves out {few(names)}: {why}")

    def detach(self) -> None:
        """Watch no more; what was learnt of the elements stays, also if the optimizers do not.

        Raises:
            Exception: With `strict`, a fault of this process that no step has told any more.
        """
        self._observer.detach()
        self._measuring.leave_arenas()
        untold = None if self._sharded is None else self._sharded.ranks.take_fault()
        if untold is None or isinstance(untold, LostRankError):  # which was raised where it was met
            return
        if self._is_strict:
            raise untold
        self._tell_here(f"had a fault in the last step that it observed: {untold!r}")

    def __enter__(self) -> UpdateMonitor:  # noqa: PYI034 - typing has Self only from Python 3.11 on
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.detach()
        except Exception:
            if kind is None:  # otherwise what ended the training is what counts
                raise

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an UpdateMonitor watches its module in place and cannot be copied or pickled: make "
            "another one for the copy, and load_state_dict() what state_dict() gives"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on: which elements have moved so far, and the interval.

        Where parameters are sharded all processes have to call it, and wait for each other; each
        gets all of it, and any number of processes can go on from it. One that calls it alone is
        warned, gets nothing of which elements have moved, and observes no more.
        """
        ever_moved = self._ever_moved.state_dict(self._measuring.ever_moved_in_arenas())
        if self._sharded is not None:
            ever_moved = self._ever_moved_of_all(self._sharded, ever_moved)
        return {
            "formats": self._formats.names,
            "ever_moved": ever_moved,
            "scales": self._scale_state.state_dict(),
            "last_seen": dict(self._last_seen),
            "skipped": dict(self.skipped),
            "budgets": None if self._budgets is None else self._budgets.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, before `attach`.

        What was learnt of elements under other formats, or of another number of elements of a
        layer, is left out, with a warning; scales are taken anew under another `scaling`.

        Raises:
            RuntimeError: It is attached.
        """
        if self.is_observing:
            raise RuntimeError("the monitor is attached: load_state_dict() before attach()")
        self._measuring.clear_arenas()
        is_alike = tuple(state["formats"]) == self._formats.names
        self._loaded = dict(state["ever_moved"]) if is_alike else {}
        self._ever_moved.load_state_dict(self._loaded)
        if not is_alike:
            self._tell(
                f"goes on with formats {self._formats.names} from a run with "
                f"{tuple(state['formats'])}: never_moved_frac begins anew"
            )
        self._observer.read_names()
        if self._is_sharded:
            with suppress(ValueError):  # which `attach` says, to all
                self._keep_parts(self._share())
        self._scale_state.load_state_dict(state["scales"])
        self._last_seen = dict(state["last_seen"])
        self.skipped.clear()
        self.skipped.update(state["skipped"])
        if self._budgets is not None and state["budgets"] is not None:
            self._budgets.load_state_dict(state["budgets"])

    def _keep_parts(self, sharded: ShardedLayers) -> None:
        """Of what was loaded of elements, that of those that lie here."""
        sharded.look_at(self._observer.parameters)
        names = self._measured(self._observer.names)
        self._ever_moved.keep_parts(sharded.measured_parts_of(names))

    # --- before a step

    def _is_due(self, index: int) -> bool:
        if self._agreement is not None:
            return self._is_due_together(self._agreement, index)
        if not self._is_wanted(index):
            return False
        if self._budgets is not None and not self._budgets.of(self._observer.asking).is_due(index):
            return False
        if self._scale_state.is_due:
            with self._clock.observing():
                self._scale_state.refresh(self._scaled())
                self._measuring.scales_changed()
        return True

    def _is_due_together(self, agreement: Agreement, index: int) -> bool:
        """What fails here is told to the others with the step that it was asked about."""
        ranks = agreement.ranks
        wanted = True
        with ranks.keeping_faults():
            wanted = self._is_wanted(index)
        if not wanted:
            return False
        optimizer = self._observer.asking
        if self._budgets is not None and not self._budgets.of(optimizer).is_due(index):
            return False
        with self._clock.observing():
            agreement.before_step(optimizer)
            scaled = agreement.stepped
            self._scale_state.look_for(scaled)
            if self._scale_state.is_due:
                with ranks.keeping_faults():
                    self._scale_state.refresh(scaled)
                    self._measuring.scales_changed()
        return True

    def _scaled(self) -> dict[str, Tensor]:
        """Those whose scales are kept track of: all that are stepped, trained or not."""
        if self._agreement is not None:
            return self._agreement.stepped
        each = (self._observer.names_of(optimizer) for optimizer in self._observer.optimizers)
        stepped = {*self._measured([*itertools.chain.from_iterable(each)])}
        return {n: p for n, p in self._observer.parameters.items() if n in stepped}

    def _should_copy(self, name: str, index: int) -> bool:
        return self._settings.is_due(name, index, self._last_seen.get(name, index))

    def _elements(self, name: str, parameter: Tensor) -> Tensor | None:
        return self._measuring.elements(name, parameter)

    def _memory(self, optimizer: Optimizer) -> Memory:
        return self._measuring.memory(optimizer)

    # --- after a step

    def _on_step(self, step: OptimizerStep) -> None:
        with self._lock, self._clock.observing():
            self._clock.add(self._observer.copy_seconds)
            record = self._record_of(step)
            if record is None:
                return
            self._note(step.optimizer, record)
            if self._on_record is not None:
                self._on_record(record)
        self._clock.tick(step.optimizer, step.index)

    def _finish_together(self, optimizer: Optimizer, index: int, look: Look) -> None:
        """As `_on_step`, with the other processes; what fails here keeps them waiting no longer."""
        assert self._agreement is not None
        ranks = self._agreement.ranks
        with self._lock, self._clock.observing():
            own = Own({}, torch.zeros(0, 0), (), self._clock.seconds(optimizer, index), False, -1)
            self._settle_scales()
            with ranks.keeping_faults():
                own = self._own_of(look(), own)
            layers = self._agreement.layers_of_step(optimizer)
            step = (index, tuple(layers))
            message = StepMessage(len(self._formats), self._agreement.rows, step)
            together = ranks.merge(message, layers, own, index)
            if not together.names:
                self.skipped.update(_REASONS[together.reason :][:1] if together.reason >= 0 else ())
                return
            record = self._measuring.nothing().record_of(
                index, together.names, together.vectors, together.seconds
            )
            if together.found_inf and not record.model["update_rms"] > 0:
                self.skipped["inf"] += 1
                return
            self._note(optimizer, record)
            if self._on_record is not None:
                with ranks.keeping_faults():
                    self._on_record(record)
        self._clock.tick(optimizer, index)

    def _own_of(self, seen: OptimizerStep | SkipReason, own: Own) -> Own:
        """What is contributed to a step from here."""
        self._clock.add(self._observer.copy_seconds)
        if not isinstance(seen, OptimizerStep):
            return own._replace(reason=_REASONS.index(seen))
        vectors = self._measuring.vectors_of(seen, self._observer.parameters)
        found_inf = None if seen.found_inf is None else local_of(seen.found_inf)
        rows, numbers, skipped = vectors.on_host(found_inf)
        present = self._measured([name for name in seen.names if name not in seen.resting])
        reason = -1 if present or not seen.resting else _REASONS.index("learning rate 0")
        return own._replace(
            rows=rows, vectors=numbers, present=present, found_inf=skipped, reason=reason
        )

    def _measured(self, names: Sequence[str]) -> list[str]:
        return self._settings.measured_names(names, self._observer.parameters)

    def _note(self, optimizer: Optimizer, record: StepRecord) -> None:
        """What follows from a record for the steps to come."""
        self._last_seen |= dict.fromkeys(record.layers, record.index)
        self._scale_state.step_observed(record)
        if self._budgets is not None:
            budget = self._budgets.of(optimizer)
            budget.update(record.own_seconds, record.training_seconds)
            budget.observed(record.index)
        self.latest = record

    def _settle_scales(self) -> None:
        if self._scale_state.has_zero and self._scale_state.settle(self._scaled()):
            self._measuring.scales_changed()

    def _record_of(self, step: OptimizerStep) -> StepRecord | None:
        """None of a step that was none, or had none of the parameters that are measured."""
        seconds = self._clock.seconds(step.optimizer, step.index)
        self._settle_scales()
        vectors = self._measuring.vectors_of(step, self._observer.parameters)
        record, skipped = vectors.record(step.index, seconds, step.found_inf)
        if record is not None and skipped and not record.model["update_rms"] > 0:
            self.skipped["inf"] += 1
            return None
        return record

    # --- what is said to the user

    def _ever_moved_of_all(
        self, sharded: ShardedLayers, own: Mapping[str, PackedBits]
    ) -> dict[str, PackedBits]:
        if not sharded.ranks.have_met:
            return self._loaded
        names = self._measured(self._observer.names)
        try:
            return sharded.ever_moved_state(own, names, kinds=1 + len(self._formats))
        except LostRankError as fault:
            if self._is_strict:
                raise
            warnings.warn(
                "UpdateMonitor.state_dict() was not called in every process, so that "
                f"never_moved_frac will begin anew: {fault}",
                stacklevel=3,
            )
            return {}

    def _tell_of_dtypes(self) -> None:
        parameters = self._observer.parameters
        trained = {name: p.dtype for name, p in parameters.items() if p.requires_grad}
        if others := [name for name, dtype in trained.items() if dtype not in INPUT_DTYPES]:
            self._tell(f"leaves out parameters of other dtypes: {others}")
        for dtype in sorted({*trained.values()} & {*INPUT_DTYPES}, key=str):
            judges = zip(self._formats.names, self._formats.judged(dtype), strict=True)
            if coarse := [name for name, judged in judges if not judged]:
                self._tell(
                    f"cannot judge {', '.join(coarse)} for weights already stored in {dtype}: "
                    "updates that stalled are no longer there to see, and those figures are NaN. "
                    "Read unmoved_frac"
                )

    def _tell(self, message: str) -> None:
        """Say it once, for all processes."""
        if self._sharded is None or self._sharded.ranks.rank == 0:
            self._tell_here(message)

    def _tell_here(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            if self._teller is None:
                warnings.warn(f"UpdateMonitor {message}", stacklevel=3)
            else:
                self._teller(message)


def _policy(
    every_n_steps: int | StepSchedule | Callable[[int], bool],
) -> tuple[Callable[[int], bool], int]:
    """Whether a step is wanted, by its index, and the distance between steps that are."""
    if isinstance(every_n_steps, StepSchedule):
        return every_n_steps.is_due, every_n_steps.every_n_steps
    if callable(every_n_steps):
        return every_n_steps, 1
    return StepSchedule(every_n_steps).is_due, every_n_steps
