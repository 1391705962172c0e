"""`UpdateMonitor`: judge formats step by step, in any training loop."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from altgrad.arena import Arena
from altgrad.measuring import DEFAULT_FORMATS, Formats, Measurer
from altgrad.merging import StepVectors
from altgrad.observation import OptimizerStep, SkipReason, StepObserver
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.block_formats import BlockFormat, get_formats
from altgrad.quantization.scaling import Scaling
from altgrad.records import StepRecord
from altgrad.row_kernel import EverMoved
from altgrad.sampling import (
    OverheadBudget,
    SamplingRule,
    StepSchedule,
    describe_layers,
    resolve_layers,
    sample_elements,
)
from altgrad.scales import Scales, is_scaled

DEFAULT_MAX_ELEMENTS = 1024
"""A share is then known to 0.016 at worst (one standard error); see benchmarks/README.md."""
_BITS = torch.arange(8, dtype=torch.uint8)
STEPS_PER_SCALE = 100
"""Observed steps for which an amax scale holds, unless a weight is seen to exceed it."""


class UpdateMonitor:
    """Watches the optimizer steps of a module and judges number formats by them.

    It observes by a `StepObserver`: training is not touched, and what fails in here ends the
    observation with one warning. Small parameters are measured whole, large ones by
    elements that are drawn once, so that the same ones are watched all the time.

    Example:
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
        compile: Whether to measure in code that torch.compile makes: half a minute once, for
            long runs that measure all elements.
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
        compile: bool = False,
        tell: Callable[[str], object] | None = None,
        strict: bool = False,
    ) -> None:
        self._teller = tell
        self.latest: StepRecord | None = None
        self._on_record = on_record
        self._seed = seed
        own_formats = get_formats(formats)
        of_rules = [format for rule in sampling for format in get_formats(rule.formats or ())]
        self._measurer = Measurer([*own_formats, *of_rules], scaling, compile=compile)
        self._amax_scaled = [
            format.name
            for format in self._measurer.formats
            if is_scaled(format, scaling) and not isinstance(format, BlockFormat)
        ]
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
        self.layers = resolve_layers(
            self._observer.names,
            sampling,
            every_n_steps=every,
            max_elements=max_elements,
            formats=tuple(format.name for format in own_formats),
        )
        self._sampling = tuple(sampling)
        self._formats_of = {
            name: tuple(self._canonical(format) for format in layer.formats)
            for name, layer in self.layers.items()
        }
        self._budget = None if overhead_budget is None else OverheadBudget(overhead_budget, every)
        self._scales: dict[str, Scales] = {}
        self._steps_until_scales = 0
        self._exceeded: set[str] = set()  # layers whose scale is to be taken again
        self._just_scaled: set[str] = set()
        self._arenas: WeakKeyDictionary[Optimizer, Arena] = WeakKeyDictionary()
        self._ever: dict[str, EverMoved] = {}  # of parameters that are in no arena
        self._restored: dict[str, Tensor] = {}
        self._last_seen: dict[str, int] = {}  # by layer, the index of its last observed step
        self._clock = _Clock()
        self._told: set[str] = set()

    @property
    def skipped(self) -> Counter[SkipReason]:
        """As in `StepObserver`."""
        return self._observer.skipped

    @property
    def is_observing(self) -> bool:
        """Whether it is attached and nothing has failed."""
        return self._observer.is_observing

    def describe(self) -> str:
        """A dry run: a table of the layers, and which rule each of them got."""
        return describe_layers(self.layers, self._sampling)

    def attach(self, *optimizers: Any, scaler: GradScaler | None = None) -> UpdateMonitor:
        """Watch these optimizers from now on; arguments and errors as of `StepObserver.attach`."""
        self._observer.attach(*optimizers, scaler=scaler)
        self._tell_of_dtypes()
        return self

    def detach(self) -> None:
        """Watch no more; what was learnt of the elements stays, also if the optimizers do not."""
        self._observer.detach()
        self._restored |= self._ever_by_layer()

    def __enter__(self) -> UpdateMonitor:  # noqa: PYI034 - typing has Self only from Python 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on: which elements have moved so far, and the interval."""
        ever = {**self._restored, **self._ever_by_layer()}
        return {
            "formats": self._measurer.names,
            "ever_moved": {name: _packed(tensor) for name, tensor in ever.items()},
            "scales": {name: scales.state_dict() for name, scales in self._scales.items()},
            "steps_until_scales": self._steps_until_scales,
            "last_seen": dict(self._last_seen),
            "skipped": dict(self.skipped),
            "budget": None if self._budget is None else self._budget.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, before `attach`.

        What was learnt of elements under other formats, or of another number of elements of a
        layer, is left out, with a warning.
        """
        if tuple(state["formats"]) == self._measurer.names:
            self._restored = {
                name: _unpacked(*packed) for name, packed in state["ever_moved"].items()
            }
            parameters = self._observer.parameters
            self._scales = {
                name: Scales.from_state_dict(scales, parameters[name].device)
                for name, scales in state["scales"].items()
                if name in parameters and list(parameters[name].shape) == list(scales["shape"])
            }
            self._steps_until_scales = state["steps_until_scales"]
        else:
            self._tell(
                f"goes on with formats {self._measurer.names} from a run with "
                f"{tuple(state['formats'])}: never_moved_frac begins anew"
            )
        self._last_seen = dict(state["last_seen"])
        self.skipped.update(state["skipped"])
        if self._budget is not None and state["budget"] is not None:
            self._budget.load_state_dict(state["budget"])

    # --- before a step

    def _is_due(self, index: int) -> bool:
        if not self._is_wanted(index):
            return False
        again = self._budget is None or index == self._clock.index
        if not again and self._budget is not None and not self._budget.is_due(index):
            return False
        if self._steps_until_scales == 0 or self._exceeded:
            start = time.perf_counter()
            self._refresh_scales()
            self._clock.add(time.perf_counter() - start)
        return True

    def _should_copy(self, name: str, index: int) -> bool:
        layer = self.layers.get(name)
        if layer is None or not layer.enabled:
            return False
        last = self._last_seen.get(name, index)
        return last == index or last > index or index - last >= layer.every_n_steps

    def _elements(self, name: str, parameter: Tensor) -> Tensor | None:
        if parameter.dtype not in INPUT_DTYPES or name not in self.layers:
            return None
        blocks = [f.block_size for f in self._measurer.formats if isinstance(f, BlockFormat)]
        scaling = self._measurer.scaling
        if isinstance(scaling, tuple):
            blocks.append(scaling[1])
        return sample_elements(
            name,
            parameter.shape,
            self.layers[name].max_elements,
            seed=self._seed,
            block=max(blocks, default=1),
        )

    def _memory(self, optimizer: Optimizer) -> Callable[..., Any]:
        if optimizer not in self._arenas:
            self._arenas[optimizer] = Arena(self._measurer, self._scales_of, self._restored)
        return self._arenas[optimizer].place

    @torch.no_grad()
    def _refresh_scales(self) -> None:
        """From the weights as they are before the step, of all layers known or those exceeded."""
        everywhere = self._observer.parameters
        wanted = everywhere if self._steps_until_scales == 0 else self._exceeded
        parameters = {
            name: everywhere[name]
            for name in wanted
            if name in everywhere and self._is_measured(name, everywhere[name])
        }
        scales = self._measurer.scales_of_each([*parameters.values()])
        self._scales |= zip(parameters, scales, strict=True)
        self._just_scaled |= parameters.keys()
        for arena in self._arenas.values():
            arena.scales_changed()
        if self._steps_until_scales == 0:
            self._steps_until_scales = STEPS_PER_SCALE
        self._exceeded.clear()

    def _scales_of(self, name: str) -> Scales:
        if name not in self._scales:
            self._scales[name] = self._measurer.scales_of(self._observer.parameters[name])
        return self._scales[name]

    def _is_measured(self, name: str, parameter: Tensor) -> bool:
        layer = self.layers.get(name)
        return (
            (layer is None or layer.enabled)
            and parameter.requires_grad
            and parameter.dtype in INPUT_DTYPES
            and not is_lazy(parameter)
        )

    # --- after a step

    def _on_step(self, step: OptimizerStep) -> None:
        self._clock.add(self._observer.copy_seconds)
        seconds = self._clock.seconds(step.index)
        start = time.perf_counter()
        vectors = StepVectors(self._measurer.names, self._formats_of)
        measured = self._measure_together(step, vectors)
        for position, name in enumerate(step.names):
            if name not in measured:
                self._measure_alone(step, position, vectors)
        record, skipped = vectors.record(step.index, seconds, step.found_inf)
        if record is None:
            return
        if skipped and not record.model["update_rms"] > 0:
            self.skipped["inf"] += 1
            return
        self._last_seen |= dict.fromkeys(record.layers, step.index)
        self._steps_until_scales -= 1
        self._note_exceeded(record)
        if self._budget is not None:
            self._budget.update(record.own_seconds, record.training_seconds)
            self._budget.observed(step.index)
        self.latest = record
        self._clock.add(time.perf_counter() - start)
        self._clock.tick(step.index)
        if self._on_record is not None:
            self._on_record(record)

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
            vectors.add(names, self._measurer.vectors_of(batch), batch.weights)
            measured |= {name for name in names if name is not None}
        return measured

    def _measure_alone(self, step: OptimizerStep, position: int, vectors: StepVectors) -> None:
        """One parameter of too many elements for that, or of a dtype that is not measured."""
        name, before = step.names[position], step.before[position]
        after, gradient = step.after[position], step.gradients[position]
        if {before.dtype, gradient.dtype} - {*INPUT_DTYPES}:
            return
        statistics = self._measurer.statistics_of(
            before, after, gradient, self._scales_of(name), self._ever_of(name, before)
        )
        vector = torch.cat((statistics.sums, statistics.maxima)).unsqueeze(0)
        vectors.add([name], vector, vector.new_ones(1, 1))

    def _ever_of(self, name: str, before: Tensor) -> EverMoved:
        count, formats = before.numel(), len(self._measurer.formats)
        ever = self._ever.get(name)
        if ever is None or ever.moved.shape[-1] != count:
            both = torch.zeros(1, 1 + formats, count, dtype=torch.bool, device=before.device)
            restored = self._restored.pop(name, None)
            if restored is not None and restored.shape == both.shape[1:]:
                both[0] = restored
            self._ever[name] = EverMoved(both[:, :1], both[:, 1:])
        return self._ever[name]

    def _note_exceeded(self, record: StepRecord) -> None:
        """Layers with a weight above the top of a scale that was to fit them all, or without any.

        Weights that are all 0, as those of biases are at first, set no scale.
        """
        keys = [f"saturated_frac/{name}" for name in self._amax_scaled]
        layers = record.layers
        if any(record.model.get(key, 0) > 0 for key in keys):
            self._exceeded |= {
                name for name in layers if any(layers[name].get(key, 0) > 0 for key in keys)
            }
        if keys:
            just_scaled = self._just_scaled & layers.keys()
            self._exceeded |= {name for name in just_scaled if layers[name]["weight_rms"] == 0}
        self._just_scaled -= layers.keys()

    def _ever_by_layer(self) -> dict[str, Tensor]:
        ever = {
            place.name: segment.ever_of(place)
            for arena in self._arenas.values()
            for segment in arena.segments
            for place in segment.places
            if place.name is not None
        }
        return ever | {name: torch.cat(each, dim=1)[0] for name, each in self._ever.items()}

    def _tell_of_dtypes(self) -> None:
        parameters = self._observer.parameters
        trained = {name: p.dtype for name, p in parameters.items() if p.requires_grad}
        if others := [name for name, dtype in trained.items() if dtype not in INPUT_DTYPES]:
            self._tell(f"leaves out parameters of other dtypes: {others}")
        for dtype in sorted({*trained.values()} & {*INPUT_DTYPES}, key=str):
            judges = zip(self._measurer.names, self._measurer.judges(dtype), strict=True)
            if coarse := [name for name, judged in judges if not judged]:
                self._tell(
                    f"cannot judge {', '.join(coarse)} for weights already stored in {dtype}: "
                    "updates that stalled are no longer there to see, and those figures are NaN. "
                    "Read unmoved_frac"
                )

    def _canonical(self, format: str) -> str:
        if format in self._measurer.names:
            return format
        return get_formats(format)[0].name

    def _tell(self, message: str) -> None:
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


def _packed(ever: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Shape and eight elements to a byte, on the CPU."""
    bits = ever.flatten().cpu().to(torch.uint8)
    bits = torch.cat((bits, bits.new_zeros(-len(bits) % 8))).view(-1, 8)
    return tuple(ever.shape), (bits << _BITS).sum(1, dtype=torch.uint8)


def _unpacked(shape: tuple[int, ...], bits: Tensor) -> Tensor:
    ever = (bits.cpu()[:, None] >> _BITS & 1).flatten()
    return ever[: math.prod(shape)].view(shape).bool()


class _Clock:
    """Seconds spent on observing, and of the training between observed steps."""

    def __init__(self) -> None:
        self.index: int | None = None
        self._own = 0.0  # since the last observed step
        self._own_of_last = math.nan
        self._end = math.nan

    def add(self, seconds: float) -> None:
        """Spent on observing."""
        self._own += seconds

    def seconds(self, index: int) -> tuple[float, float]:
        """What observing the last step took, and a mean step of training since then."""
        if self.index is None or index <= self.index:  # of another optimizer, or counted anew
            return math.nan, math.nan
        training = time.perf_counter() - self._end - self._own
        return self._own_of_last, max(training, 0.0) / (index - self.index)

    def tick(self, index: int) -> None:
        """A step has been observed; other optimizers may have one of the same index."""
        if self.index is None:  # the first does what no other has to do: it tells nothing
            self._own = math.nan
        self._own_of_last = self._own + (self._own_of_last if index == self.index else 0.0)
        self._own = 0.0
        self.index, self._end = index, time.perf_counter()
