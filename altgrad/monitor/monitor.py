"""`UpdateMonitor`: judge formats step by step, in any training loop.

A monitor makes its parts, each a file of this room, and connects them. Data flows one way. At each
step of an optimizer, a `StepObserver` calls:

1. `training_steps`, before the step: is it due, by `policy`? If so, `recorder` prepares.
2. `engine`: choose elements, and memory for copies of them.
3. `training_steps`, after the step: `recorder` measures the copies (`engine`), adds up the sums of
   all ranks (`altgrad.distributed.peers`), and makes the record.

The record comes back here, to `UpdateMonitor.latest` and the `on_record` callback. The observer
also steps the twins (`altgrad.twins.twins`), at every step.

This is the first file to read of this room. Read `training_steps` next, then `recorder`, then
`engine` and `arena`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from altgrad._messages import Notices, few
from altgrad.distributed.peers import Alone
from altgrad.distributed.twin_message import TwinPlan
from altgrad.measurement.catalogue import NOW
from altgrad.measurement.ever_moved import EverMovedStore
from altgrad.measurement.measure import DEFAULT_FORMATS
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.native_code import native_code
from altgrad.measurement.step_record import StepRecord
from altgrad.monitor.bypass import BypassDetector
from altgrad.monitor.checkpoint import Checkpoint
from altgrad.monitor.describe import describe_layers
from altgrad.monitor.engine import Engine
from altgrad.monitor.header import describe_recipe
from altgrad.monitor.known_losses import KnownLosses
from altgrad.monitor.lagging_average import describe_lagging_average, describe_lags
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.monitor.moved_history import MovedHistory
from altgrad.monitor.policy import StepPolicy
from altgrad.monitor.recorder import Recorder
from altgrad.monitor.run_header import write_header
from altgrad.monitor.run_samples import RunSamples
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.schedule import StepSchedule
from altgrad.monitor.sharding import Sharding
from altgrad.monitor.training_steps import TrainingSteps
from altgrad.monitor.twin_layers import TwinLayers, count_most_sampled
from altgrad.monitor.unjudged import leave_out_unjudged
from altgrad.monitor.watch import Watch
from altgrad.observation import SkipReason, StepObserver
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.observation.rules import TWIN_ELEMENTS, LayerSampling, SamplingRule
from altgrad.observation.stored import get_stored_formats
from altgrad.quantization.block_formats import Formats, get_formats
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import NumberFormat
from altgrad.recipes.names import find_default_recipes, get_recipes
from altgrad.recipes.recipe import Recipe
from altgrad.twins.run_average import RunAverage
from altgrad.twins.twins import Twins

DEFAULT_MAX_ELEMENTS = 1024
"""Default number of sampled elements of a layer; a share then has a standard error of up to 0.016.

That is sqrt(0.5 · 0.5 / 1024); benchmarks/README.md has measurements.
"""


class UpdateMonitor:
    """A monitor of optimizer steps that computes what number formats would keep of each update.

    An update is what a step changes in the weights.

    The training itself is unchanged. An error in the monitor ends the observation with one warning.
    Small layers are measured in full. Large layers are sampled: a sample is drawn once, so that the
    same elements are measured at every step.

    Optimizers may step inside the backward pass, one for each parameter. The steps of one backward
    pass are then one training step: one record, and one in `every_n_steps`.

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
        module: The module whose parameters to observe, or pairs of name and parameter.
        on_record: Callback with the `StepRecord` of each observed step.
        formats: One or several formats to judge, or their names, as in `altgrad.measure`.
        every_n_steps: Interval in steps of an optimizer, a `StepSchedule`, or a function of a
            step's index that returns True if the step is to be observed.
        max_elements: Maximum number of elements sampled from each parameter with more than 2,048
            elements; smaller ones are measured in full. None measures all elements, and copies
            all weights and gradients.
        sampling: Rules for single layers; the first that matches a layer's name applies to it.
        scaling: Which elements share a scale, as in `altgrad.measure`. It follows from their amax,
            the largest magnitude, which for a whole layer is computed at the first observed step,
            after every 100 observed steps, and after a step in which a weight rounded beyond the
            top of its scale.
        recipes: Recipes to try out: `Recipe` objects or short names, such as ``"bf16-sr"``. A twin
            stores a sample of each layer as a recipe says, and makes every step of the optimizer,
            observed or not. None tries the recipes that belong to `formats`; ``()`` tries none.
        twin_elements: Maximum number of elements of each layer that twins step. Layers of fewer
            than 64 elements are stepped whole.
        overhead_budget: Maximum share of the whole time that observing may take, such as 0.01.
            Steps are then observed less often than `every_n_steps` demands. None sets no limit.
            Time is measured on the host, and includes waiting for results of an accelerator. The
            steps of twins count as training.
        seed: Seed of the samples, and of the stochastic rounding of twins.
        warn: Function that is called with each notice for the user, in place of `warnings.warn`.
        strict: If True, re-raise internal errors in the training loop; otherwise warn once and stop
            observing.

    Attributes:
        latest: The record of the last observed step; None before the first.
        skipped: Number of skipped steps among those that were to be observed, by reason.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or a rule matches no layer.
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
        recipes: str | Recipe | Sequence[str | Recipe] | None = None,
        twin_elements: int = TWIN_ELEMENTS,
        overhead_budget: float | None = None,
        seed: int = 0,
        warn: Callable[[str], object] | None = None,
        strict: bool = False,
    ) -> None:
        self.latest: StepRecord | None = None
        self._on_record = on_record
        self._is_strict = strict
        self._notices = Notices(type(self).__name__, warn)
        # What is observed: formats, steps, layers, and the ranks among which layers are sharded.
        own_formats = get_formats(formats)
        rule_formats = [format for rule in sampling for format in get_formats(rule.formats or ())]
        self._formats = FormatSet([*own_formats, *rule_formats], scaling)
        policy = StepPolicy(every_n_steps, overhead_budget)
        registry = ParameterRegistry(module)
        self._sampling = tuple(sampling)
        settings = LayerSettings(
            [*registry.names.values()],
            sampling,
            self._formats,
            own_formats,
            every_n_steps=policy.every_n_steps,
            max_elements=max_elements,
            seed=seed,
            twin_elements=twin_elements,
        )
        self._layers = MeasuredLayers(registry, settings)
        self._sharding = Sharding()
        # Samples that are followed from the start of the run.
        chosen = find_default_recipes(self.formats) if recipes is None else get_recipes(recipes)
        weights = (recipe.weights_format for recipe in chosen)
        stored = [format for format in weights if format is not None]
        self._scale_state = ScaleState(FormatSet([*self.formats, *stored], scaling))
        most = count_most_sampled(
            [twin_elements, *(rule.twin_elements or 0 for rule in sampling)], chosen, scaling
        )
        twin_layers = TwinLayers(
            self._layers,
            self._scale_state,
            self._sharding,
            self._warn,
            warn_here=self._notices.give_once,
            most_elements=most,
            warns_about_omissions=bool(recipes),
        )
        lock = threading.RLock()  # two threads may step two optimizers
        self._samples = RunSamples(chosen, twin_layers, registry, lock, strict=strict)
        # The road of a step: observed, measured, recorded.
        ever_moved = EverMovedStore(self._warn)
        self._engine = Engine(
            Measurer(self._formats), settings, self._scale_state, ever_moved, self._sharding
        )
        self._recorder = Recorder(
            self._formats,
            self._layers,
            self._scale_state,
            self._engine,
            self._samples,
            self._sharding,
            lambda: self._observer.optimizers,
        )
        self._steps = TrainingSteps(
            policy,
            self._layers,
            self._recorder,
            self._sharding,
            lock,
            on_record=self._show,
            on_skip=self._count_skip,
        )
        self._observer = StepObserver(
            registry,
            on_outcome=self._steps.finish,
            should_observe=self._begin_step,
            elements=self._engine.choose_elements,
            memory=self._engine.assign_memory,
            should_copy=self._steps.is_layer_due if sampling else None,
            leave_out=self._leave_out_unseen,
            every_step=self._samples.twins if chosen else None,
            read_found_inf=False,
            strict=strict,
            warn=self._notices.give,
        )
        # What outlasts a run, and what other ranks compare.
        self._history = MovedHistory(
            self._formats.names, ever_moved, self._engine, self._layers, self._warn
        )
        self._checkpoint = Checkpoint(
            self._steps,
            self._scale_state,
            self._observer.skipped,
            self._history,
            self._samples,
            warn_here=self._notices.give_once,
            strict=strict,
        )
        self._watch = Watch(
            self._layers,
            self._formats,
            {
                "formats": self.formats,
                "scaling": scaling,
                "seed": seed,
                "overhead_budget": overhead_budget,
                "recipes": {each.name: describe_recipe(each, scaling) for each in chosen},
            },
            self._checkpoint.describe,
            self._warn,
            TwinPlan([*(recipe.name for recipe in chosen), NOW] if chosen else (), most),
        )
        # Notices of what is lost without a measurement, and of what is not seen.
        self._bypasses = BypassDetector(self._layers)
        self._known_losses = KnownLosses(
            self._layers.find_stepped,
            self._warn,
            lambda name: bool(chosen) and twin_layers.has_twins(name),
        )

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """The number formats for which figures are computed, also those that only rules name."""
        return self._formats.formats

    @property
    def scaling(self) -> Scaling | None:
        """The `scaling` argument the monitor was created with."""
        return self._formats.scaling

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes that are tried out, such as bf16 weights with stochastic rounding.

        A recipe says in which formats weights and optimizer states are stored, and how they are
        stepped. It is tried on a *twin*, a small sample of each layer.
        """
        return self._samples.twins.recipes

    @property
    def twins(self) -> Twins:
        """The samples of layers that are stored and stepped as each recipe says.

        A recipe says in which formats weights and optimizer states are stored. The property
        `checks` of `Twins` says how well a sample that is stepped as the training is agrees with
        the training.
        """
        return self._samples.twins

    @property
    def layers(self) -> Mapping[str, LayerSampling]:
        """The settings of each layer by name: its formats, interval in steps and size of sample."""
        return self._layers.settings.by_name

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are measured, by name."""
        return self._layers.parameters

    @property
    def skipped(self) -> Counter[SkipReason]:
        """The number of steps that were to be observed and moved no weight, by reason."""
        return self._observer.skipped

    @property
    def is_observing(self) -> bool:
        """True while the monitor is attached and no error has ended the observation."""
        return self._observer.is_observing

    @property
    def asking(self) -> Optimizer:
        """The optimizer that is about to step, for use inside of a function `every_n_steps`.

        The function receives only the index of the step. With several optimizers, it finds here
        which of them makes the step.

        Raises:
            RuntimeError: No such function is being called at the moment.
        """
        return self._observer.asking

    @property
    def is_shared(self) -> bool:
        """True if parameters are sharded, so that several ranks observe each step together."""
        return self._sharding.is_shared

    def run_header(self) -> dict[str, Any]:
        """Describe formats, scaling, layers and recipes as plain data: a run file's header.

        `altgrad.report.RunFile` takes the header. Call this method after `attach`: the optimizers
        tell how the run itself is stored, which the header has under ``now``, and of which classes
        they are, under ``optimizers``. Before, these are None and empty. The ``states`` of a layer
        are None until the layer was observed in a step.

        Returns:
            A dict that JSON can hold.
        """
        return write_header(
            self._formats,
            self.recipes,
            self._layers,
            self._observer.optimizers,
            self._steps.last_seen,
        )

    def count_elements(self, name: str) -> int:
        """Return the number of elements of a layer that are measured in a step."""
        return self._layers.count_elements(name)

    def describe(self) -> str:
        """Return a dry run: a table of the layers, with the rule and the settings of each."""
        return describe_layers(self.layers, self._sampling)

    # --- from the first step to the last

    def attach(self, *optimizers: Any, scaler: GradScaler | None = None) -> UpdateMonitor:
        """Start observing the steps of some optimizers.

        If parameters are sharded, all ranks have to call this method, and wait for each other.
        Under DistributedDataParallel, each rank holds all parameters, and the first rank observes.

        Notices say what a run in 16 bits will lose, as dtypes and hyperparameters alone tell: such
        as a weight decay that rounds back, or a second moment that cannot fall.

        Args:
            optimizers: Optimizers of torch, or wrappers of trainers around optimizers.
            scaler: The GradScaler that calls `step` of the optimizers, if there is one.

        Returns:
            The monitor, for ``with UpdateMonitor(…).attach(…):``.

        Raises:
            TypeError: An optimizer neither is nor wraps a torch optimizer, or `scaler` is not a
                GradScaler.
            ValueError: The steps of an optimizer cannot be observed, or ranks differ in layers,
                settings or states.
            RuntimeError: A step of an optimizer is in progress, or ``ALTGRAD_KERNEL=native`` is set
                and the native kernel cannot be compiled.
            LostRankError: A rank has not called this method.
        """
        self._observer.registry.read()  # the module may have been sharded since __init__
        peers = self._sharding.find(self._watch)
        if isinstance(peers, Alone) and self._observer.is_replica:
            return self

        def check() -> Sequence[Optimizer]:
            found = self._observer.check(*optimizers, scaler=scaler)
            if self._layers.measures_on_host:
                native_code.prepare(compiles=True)
            return found

        peers.attach(check)
        self._recorder.begin()
        self._history.begin(peers)
        self._observer.attach(*optimizers, scaler=scaler)
        self._samples.attach(self._observer.optimizers)
        self._bypasses.begin(self._observer.hooks)
        for notice in leave_out_unjudged(
            self._layers,
            self._formats,
            get_stored_formats(optimizers),
            has_recipes=bool(self.recipes),
        ):
            self._warn(notice)
        self._known_losses.check_attached(self._observer.optimizers)
        return self

    def watch_average(
        self,
        averaged: nn.Module,
        name: str = "average",
        *,
        decay: float | None = None,
        part: str | None = None,
    ) -> UpdateMonitor:
        """Have recipes show how an average of the weights would fare, such as an EMA.

        A *twin* is a small sample of the layers that is stored and stepped as a recipe says. From
        now on, each twin keeps an average of its weights, updated and stored as the recipe says.
        Its metrics are ``{name}_ratio``, ``{name}_error`` and ``{name}_zero_frac``. Call this
        method before the first step, and after `averaged` has got a checkpoint. A notice says if
        an average in 16 bits will lag behind the weights.

        Args:
            averaged: The module whose parameters are the average of those that are trained, with
                the same names: an `AveragedModel` of `torch.optim.swa_utils`, or a copy of the
                model that your loop updates after each step.
            name: Name of the average. It stands for the name of a state in `Recipe.states`.
            decay: The decay d of an average that your loop updates, s ← d · s + (1 − d) · w. None
                to find it from the numbers of the average, which must then be float32 or float64.
                An `AveragedModel` is updated by its own function.
            part: Path of the module whose weights are averaged, such as ``"net.q1"``; ``""`` for
                the whole model. None to find it from names and shapes, which several modules may
                share, such as two critics.

        Returns:
            The monitor.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: `averaged` does not have the names of the parameters, or an argument is
                invalid.
        """
        average = RunAverage(name, averaged, self._observer.parameters, decay, part)
        self.twins.check_name(name)
        if isinstance(averaged, AveragedModel):
            notices = describe_lagging_average(averaged)
        else:
            notices = describe_lags(average.find_tensors(), 1.0 if decay is None else decay)
        for notice in notices:  # raises if warnings are errors, before anything is watched
            self._warn(notice)
        self._samples.watch_average(average)
        return self

    def detach(self) -> None:
        """Stop observing. Keep which elements have moved, for `state_dict` and a later `attach`.

        Raises:
            Exception: If `strict`, an error of the last step that no later step has raised.
        """
        self._steps.close()
        notices = self._describe_bypasses()
        if not notices and self.latest is None and self.skipped["no gradients"]:
            notices = self.describe_unseen()
        self._observer.detach()
        self._bypasses.end()
        self._engine.free_arenas()
        self.twins.release()
        for notice in notices:  # last: where warnings are errors, the hooks must be gone
            self._warn(notice)
        error = self._sharding.peers.take_error()
        if error is None:
            return
        if self._is_strict:
            raise error
        self._notices.give(f"had an error in the last step that it observed: {error!r}")

    def warn_about_bypasses(self) -> bool:
        """Warn once of layers that moved although their optimizer called no hook.

        A call reads a few weights of each layer if its optimizer has made a step since the last
        reading, at first in `attach`. Otherwise it compares them with that reading. `detach` warns
        in the same way. Ranks do not wait for each other.

        Returns:
            True if there are such layers.
        """
        notices = self._describe_bypasses()
        for notice in notices:
            self._warn(notice)
        return bool(notices)

    def describe_unseen(self) -> list[str]:
        """Describe layers that have moved since `attach`, and were part of no observed step.

        Returns:
            A notice for each optimizer with such layers, which says why.
        """
        self._steps.end()
        return self._bypasses.describe_unseen(
            self._observer.hooks, self._steps.last_seen, self.skipped
        )

    def __enter__(self) -> UpdateMonitor:  # noqa: PYI034 - typing has Self only from Python 3.11 on
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.detach()
        except Exception:
            if kind is None:  # do not hide the exception that ended the training
                raise

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an UpdateMonitor observes its module in place and cannot be copied or pickled; make "
            "another monitor for the copy, and pass state_dict() to its load_state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: moved elements, scales, intervals, twins.

        A *twin* is a sample of the layers that is stored and stepped as a recipe says.

        If parameters are sharded, all ranks have to call this method, and wait for each other. A
        rank that calls it alone warns and stops observing.

        Returns:
            A dict of plain data and tensors, equal on all ranks. Any number of ranks can restore
            it. Its ``ever_moved`` is empty if other ranks have not called this method.
        """
        self._steps.end()
        return self._checkpoint.state_dict(self._sharding.peers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`, before `attach`.

        If this monitor has other formats, or draws other elements of a layer, the count of elements
        that never moved begins anew, with a notice. If `scaling` differs, each amax (largest
        magnitude of a layer) is computed again.

        Args:
            state: A result of `state_dict`.

        Raises:
            RuntimeError: The monitor is attached.
            ValueError: An entry of the state is missing or damaged. A part of the state may then be
                restored already: make another monitor.
        """
        if self._observer.hooks:
            raise RuntimeError("the monitor is attached; call load_state_dict() before attach()")
        self._checkpoint.load_state_dict(state)

    # --- one step

    def _begin_step(self, index: int) -> bool:
        """Return True if the coming step is to be observed; the observer calls this before it.

        Args:
            index: Number of steps of the optimizer since it was attached, before this one.
        """
        optimizer = self._observer.asking  # the observer passes the index of the step alone
        self._bypasses.note_coming(optimizer)
        return self._steps.begin(optimizer, index)

    def _show(self, optimizer: Optimizer, record: StepRecord) -> None:
        """Keep the record of a training step as the latest, and pass it to `on_record`."""
        self.latest = record
        self._scale_state.step_observed(record)
        self._bypasses.note_step(optimizer, has_moved=record.model["update_rms"] != 0)
        self._known_losses.check_stepped(optimizer)
        if self._on_record is not None:
            with self._sharding.peers.hold_errors():
                self._on_record(record)

    def _count_skip(self, reason: SkipReason) -> None:
        self.skipped[reason] += 1

    # --- notices

    def _describe_bypasses(self) -> list[str]:
        """Return a notice for each optimizer whose layers move without calls of its hooks."""
        changed = [name for name, times in self.twins.resynchronised.items() if times > 1]
        return self._bypasses.describe_bypasses(self._observer.hooks, changed)

    def _leave_out_unseen(self, names: Sequence[str], why: str) -> None:
        """Warn that some layers cannot be observed, and `why`."""
        self._warn(f"leaves out {few(names)}: {why}")

    def _warn(self, message: str) -> None:
        """Warn the user, once for each message and on the first rank alone."""
        # All ranks give the same notices.
        if self._sharding.peers.rank == 0:
            self._notices.give_once(message)
