"""`UpdateMonitor`: judge formats step by step, in any training loop.

A monitor has no logic beyond the order of calls. At each step of an optimizer, a `StepObserver`
calls these methods:

1. `_is_due`, before the step: ask `policy`, and compute each amax that is due (`scale_state`).
2. `_should_copy`, `_elements` and `_memory`: choose layers, elements, and memory for their copies
   (`engine`).
3. `_finish`, after the step: measure the copies (`engine`), add up the sums of all ranks
   (`altgrad.distributed.peers`), and make the record.

The observer also steps the twins (`altgrad.twins.twins`), at every step.

This is the first file to read of this room. Read `policy` next, for 1, then `engine` and `arena`,
for 2 and 3.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from altgrad._messages import Notices, few
from altgrad.distributed.host_group import LostRankError
from altgrad.distributed.peers import Alone, Peers, StepSums
from altgrad.distributed.together import Together
from altgrad.distributed.twin_message import TwinPlan
from altgrad.measurement.catalogue import NOW
from altgrad.measurement.ever_moved import EverMovedStore, PackedBits, check_packed_bits
from altgrad.measurement.measure import DEFAULT_FORMATS
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.native_code import native_code
from altgrad.measurement.step_record import StepRecord, step_record
from altgrad.measurement.twin_figures import TwinValues
from altgrad.measurement.twin_parts import TwinShare
from altgrad.monitor.backward_steps import (
    BackwardSteps,
    find_due,
    has_gradients,
    is_accumulating,
)
from altgrad.monitor.bypass import BypassDetector
from altgrad.monitor.describe import describe_layers
from altgrad.monitor.engine import Engine
from altgrad.monitor.header import describe_layer, describe_recipe, describe_run
from altgrad.monitor.known_losses import KnownLosses
from altgrad.monitor.lagging_average import describe_lagging_average, describe_lags
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.policy import StepPolicy
from altgrad.monitor.run_storage import count_classes, describe_storage
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.schedule import StepSchedule
from altgrad.monitor.start_weights import StartWeights
from altgrad.monitor.state_sizes import find_owners, measure_states
from altgrad.monitor.twin_layers import TwinLayers, count_most_sampled
from altgrad.monitor.unjudged import leave_out_unjudged
from altgrad.monitor.watch import Watch
from altgrad.observation import SkipReason, StepObserver, StepOutcome
from altgrad.observation.dtensor import is_sharded
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.observation.rules import TWIN_ELEMENTS, LayerSampling, SamplingRule
from altgrad.observation.snapshots import Copies, Memory, Request
from altgrad.observation.step_hooks import find_backward_pass
from altgrad.observation.stored import get_stored_formats
from altgrad.quantization.block_formats import Formats, get_formats
from altgrad.quantization.devices import find_exact_device
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import NumberFormat
from altgrad.recipes.names import find_default_recipes, get_recipes
from altgrad.recipes.recipe import Recipe
from altgrad.twins.batch_norm import BatchStatistic
from altgrad.twins.rank_states import join_states, pack_state
from altgrad.twins.run_average import RunAverage
from altgrad.twins.twins import Twins

_logger = logging.getLogger("altgrad")

DEFAULT_MAX_ELEMENTS = 1024
"""Default number of sampled elements of a layer; a share then has a standard error of up to 0.016.

That is sqrt(0.5 · 0.5 / 1024); benchmarks/README.md has measurements.
"""

_STATE = ("formats", "ever_moved", "scales", "last_seen", "skipped", "budgets")
"""Entries of `UpdateMonitor.state_dict` that each version of AltGrad has written."""

_UNKNOWN = (math.nan, math.nan)
"""The time to observe a step and the mean time of a training step, in seconds, if unknown."""

_NO_TWINS: Mapping[str, Any] = {"lanes": [], "resynchronised": {}, "sum_rounding": {}}
"""The state of twins, samples that are stepped as recipes say, that begin anew."""


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
        own_formats = get_formats(formats)
        rule_formats = [format for rule in sampling for format in get_formats(rule.formats or ())]
        self._formats = FormatSet([*own_formats, *rule_formats], scaling)
        self._policy = StepPolicy(every_n_steps, overhead_budget)
        registry = ParameterRegistry(module)
        self._sampling = tuple(sampling)
        self._settings = LayerSettings(
            [*registry.names.values()],
            sampling,
            self._formats,
            own_formats,
            every_n_steps=self._policy.every_n_steps,
            max_elements=max_elements,
            seed=seed,
            twin_elements=twin_elements,
        )
        chosen = find_default_recipes(self.formats) if recipes is None else get_recipes(recipes)
        weights = (recipe.weights_format for recipe in chosen)
        stored = [format for format in weights if format is not None]
        self._scale_state = ScaleState(FormatSet([*self.formats, *stored], scaling))
        self._scales_twins = FormatSet(stored, scaling).needs_amax
        self._ever_moved = EverMovedStore(self._warn)
        self._engine = Engine(
            Measurer(self._formats), self._settings, self._scale_state, self._ever_moved
        )
        self._peers: Peers = Alone()
        self._loaded: Mapping[str, PackedBits] | None = None  # until ranks know their local shards
        self._last_seen: dict[str, int] = {}  # by layer, the index of its last observed step
        self._lock = threading.RLock()  # two threads may step two optimizers
        most = count_most_sampled(
            [twin_elements, *(rule.twin_elements or 0 for rule in sampling)], chosen, scaling
        )
        layers = TwinLayers(
            registry,
            self._settings,
            self._scale_state,
            lambda: self._peers,
            self._warn,
            warn_here=self._notices.give_once,
            most_elements=most,
            warns_about_omissions=bool(recipes),
        )
        self._twins = Twins(chosen, layers, self._lock, strict=strict)
        self._starts = StartWeights(layers)  # of use without twins
        if registry.module is not None:
            for name in ("running_mean", "running_var"):
                self._twins.watch_average(BatchStatistic(name, registry.module, registry.names))
        self._observer = StepObserver(
            registry,
            on_outcome=self._finish,
            should_observe=self._is_due,
            elements=self._elements,
            memory=self._memory,
            should_copy=self._should_copy if sampling else None,
            leave_out=self._leave_out_unseen,
            every_step=self._twins if chosen else None,
            read_found_inf=False,
            strict=strict,
            warn=self._notices.give,
        )
        self._watch = Watch(
            registry,
            self._settings,
            self._formats,
            self._decides,
            self._warn,
            TwinPlan([*(recipe.name for recipe in chosen), NOW] if chosen else (), most),
        )
        self._backward = BackwardSteps()
        self._bypasses = BypassDetector(registry, self._watch.find_stepped, lambda: self.parameters)
        self._known_losses = KnownLosses(
            self._watch.find_stepped,
            self._warn,
            lambda name: bool(chosen) and layers.has_twins(name),
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
        return self._twins.recipes

    @property
    def twins(self) -> Twins:
        """The samples of layers that are stored and stepped as each recipe says.

        A recipe says in which formats weights and optimizer states are stored. The property
        `checks` of `Twins` says how well a sample that is stepped as the training is agrees with
        the training.
        """
        return self._twins

    @property
    def layers(self) -> Mapping[str, LayerSampling]:
        """The settings of each layer by name: its formats, interval in steps and size of sample."""
        return self._settings.by_name

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are measured, by name."""
        return self._settings.measured(self._observer.parameters)

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
        return self._peers.size > 1

    def run_header(self) -> dict[str, Any]:
        """Describe formats, scaling, layers and recipes as plain data: a run file's header.

        `altgrad.report.RunFile` takes the header. Call this method after `attach`: the optimizers
        tell how the run itself is stored, which the header has under ``now``, and of which classes
        they are, under ``optimizers``. Before, these are None and empty. The ``states`` of a layer
        are None until the layer was observed in a step.

        Returns:
            A dict that JSON can hold.
        """
        # A layer that was observed may be frozen at the moment, as in an alternating GAN.
        described = {*self.parameters, *self._last_seen}
        owners = find_owners(self._observer.optimizers)
        layers = {
            name: describe_layer(
                parameter,
                self._settings.get(name),
                self._settings.count_measured(name, parameter.shape),
                measure_states(
                    owners.get(parameter), parameter, has_stepped=name in self._last_seen
                ),
            )
            for name, parameter in self._observer.parameters.items()
            if name in described
        }
        return describe_run(self.formats, self.scaling, layers, self.recipes) | {
            "versions": {"torch": torch.__version__},
            "now": describe_storage(self._observer.optimizers, self.parameters.values()),
            "optimizers": count_classes(self._observer.optimizers),
            "kernel": native_code.describe() if self._measures_on_host else "eager",
        }

    @property
    def _measures_on_host(self) -> bool:
        """True if the CPU measures some of the layers."""
        parameters = self._observer.parameters.values()
        return any(find_exact_device(each.device).type == "cpu" for each in parameters)

    def count_elements(self, name: str) -> int:
        """Return the number of elements of a layer that are measured in a step."""
        return self._settings.count_measured(name, self._observer.parameters[name].shape)

    def _list_own_figures(self) -> list[str]:
        """Return the figures that tell what a run in 16 bits loses, as far as it has them."""
        if not any(each.twin_elements for each in self.layers.values()):
            return ["unmoved_frac"]
        return ["moved_since_start_frac/now", *(["progress_kept/now"] if self.recipes else [])]

    def _is_whole(self, name: str) -> bool:
        """Return True if all elements of a layer are measured, and not a sample."""
        parameter = self._observer.parameters.get(name)
        if parameter is None or not self._settings.is_measured(name, parameter):
            return False
        return self.count_elements(name) == parameter.shape.numel()

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
        peers = self._find_peers()
        if not self._is_sharded and self._observer.is_replica:
            return self

        def check() -> Sequence[Optimizer]:
            if self._measures_on_host:
                native_code.prepare(compiles=True)
            return self._observer.check(*optimizers, scaler=scaler)

        peers.attach(check)
        if peers.size > 1 and self._scales_twins:
            self._scale_state.begin(self._stepped(), peers)  # twins make every step from now on
        if self._loaded is not None:
            names = self._settings.measured_names(self._observer.names, self._observer.parameters)
            parts = peers.parts(names)
            self._ever_moved.load_state_dict(self._loaded, parts)
            self._loaded = None
        self._observer.attach(*optimizers, scaler=scaler)
        self._twins.attach(self._observer.optimizers)
        if not self.recipes:
            self._starts.begin(self._observer.optimizers)
        self._twins.note_batches()
        self._bypasses.begin(self._observer.hooks)
        for notice in leave_out_unjudged(
            self._watch,
            self._settings,
            get_stored_formats(optimizers),
            self._list_own_figures(),
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
        self._twins.check_name(name)
        if isinstance(averaged, AveragedModel):
            notices = describe_lagging_average(averaged)
        else:
            notices = describe_lags(average.find_tensors(), 1.0 if decay is None else decay)
        for notice in notices:  # raises if warnings are errors, before anything is watched
            self._warn(notice)
        with self._lock:
            self._twins.watch_average(average)
        return self

    def detach(self) -> None:
        """Stop observing. Keep which elements have moved, for `state_dict` and a later `attach`.

        Raises:
            Exception: If `strict`, an error of the last step that no later step has raised.
        """
        self._end_backward_step()
        self._backward = BackwardSteps()
        bypasses = self._describe_bypasses() or self._describe_skipped()
        self._observer.detach()
        self._bypasses.end()
        self._engine.free_arenas()
        self._twins.release()
        for notice in bypasses:  # last: where warnings are errors, the hooks must be gone
            self._warn(notice)
        error = self._peers.take_error()
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
        self._end_backward_step()
        hooks, parameters = self._observer.hooks, self._observer.parameters
        unseen = self._bypasses.find_unseen(hooks, parameters, self._last_seen, self.skipped)
        return [f"never observed {few(names)}: {reason}" for names, reason in unseen]

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

        If parameters are sharded, all ranks have to call this method, and wait for each other. A
        rank that calls it alone warns and stops observing.

        Returns:
            A dict of plain data and tensors, equal on all ranks. Any number of ranks can restore
            it. Its ``ever_moved`` is empty if other ranks have not called this method.
        """
        self._end_backward_step()
        return {
            "formats": self._formats.names,
            "ever_moved": self._history() if self._loaded is None else dict(self._loaded),
            "samples": self._settings.describe_samples(),
            "scales": self._scale_state.state_dict(),
            "last_seen": dict(self._last_seen),
            "skipped": dict(self.skipped),
            "budgets": self._policy.state_dict(),
            "twins": self._gather_twins(),
            "starts": self._starts.state_dict(),
        }

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
        _check_state(state)
        self._engine.free_arenas()
        is_alike = tuple(state["formats"]) == self._formats.names
        self._loaded = dict(state["ever_moved"]) if is_alike else {}
        if not is_alike:
            self._warn(
                f"restores a run with formats {tuple(state['formats'])}, and judges "
                f"{self._formats.names}: never_moved_frac begins anew"
            )
        others = self._settings.find_other_samples(self._loaded, state.get("samples"))
        if others := [name for name in others if not self._is_whole(name)]:
            self._loaded = {n: flags for n, flags in self._loaded.items() if n not in others}
            self._warn(
                f"has never_moved_frac of {few(others)} begin anew: the run before drew other "
                "elements, by another seed, block size or version"
            )
        self._scale_state.load_state_dict(state["scales"])
        self._last_seen = dict(state["last_seen"])
        self.skipped.clear()
        self.skipped.update(state["skipped"])
        self._policy.load_state_dict(state["budgets"])
        if "twins" in state:  # states of version 0.1.0 have none
            self._twins.load_state_dict(state["twins"])
        if not self.recipes:
            self._starts.load_state_dict(state.get("starts", {}))

    # --- one step

    def _is_due(self, index: int) -> bool:
        """Return True if the coming step is to be observed, and prepare for the observation.

        The observer calls this before the step. To prepare is to compute the largest magnitude of
        each layer whose scales are due, in `ScaleState`.

        Args:
            index: Number of steps of the optimizer since it was attached, before this one.
        """
        optimizer = self._observer.asking  # the observer passes the index of the step alone
        self._bypasses.note_coming(optimizer)
        if not self._decide(optimizer, index):
            return False
        self._check_sharding(optimizer)
        with self._lock, self._policy.observing():
            are_new = self._peers.before_step(optimizer)
            if self._scale_state.prepare(self._stepped, self._peers, are_new=are_new):
                self._change_scales()
            if not self.recipes:
                self._starts.begin([optimizer])  # layers that it has got since `attach`
        return True

    def _check_sharding(self, optimizer: Optimizer) -> None:
        """Raise an error if the layers of an optimizer were sharded after `attach`.

        accelerate, for example, gives an optimizer sharded parameters in ``prepare``.

        Raises:
            RuntimeError: The layers were sharded.
        """
        groups = optimizer.param_groups if isinstance(self._peers, Alone) else ()
        if not any(is_sharded(parameter) for group in groups for parameter in group["params"]):
            return
        stepped = self._watch.find_stepped([optimizer])  # of which others are not observed
        if sharded := [name for name, parameter in stepped.items() if is_sharded(parameter)]:
            raise RuntimeError(
                f"{few(sharded)}: sharded after attach(); shard the module first, as by "
                "fully_shard or accelerate's prepare(), then call attach()"
            )

    def _decide(self, optimizer: Optimizer, index: int) -> bool:
        """Return True if the coming step is to be observed.

        All steps of one training step inside a backward pass get the same answer. Steps that only
        accumulate gradients are no part of any.

        Args:
            optimizer: The optimizer that is about to step.
            index: Number of its steps before this one.
        """
        steps = self._backward
        if find_backward_pass() is None:
            # After its steps in backward, the step of an optimizer that loops call does nothing.
            if steps.has(optimizer) and not has_gradients(optimizer):
                return False
            steps.leave(optimizer)
            self._end_backward_step()
            return self._is_affordable(optimizer, index)
        if is_accumulating(optimizer):
            return False
        layers = find_due(optimizer)
        with self._lock:
            if steps.begins(optimizer, layers):
                self._end_backward_step()
                steps.begin(optimizer)
                steps.is_observed = self._is_affordable(steps.leader or optimizer, steps.index)
                steps.expect(self._find_expected() if steps.is_observed else {})
            steps.join(optimizer, layers)
        return steps.is_observed

    def _find_expected(self) -> dict[str, Tensor]:
        """Return the layers that are due and may get a gradient, by name."""
        stepped = self._watch.find_stepped(self._observer.optimizers)
        return {
            name: parameter
            for name, parameter in stepped.items()
            if parameter.requires_grad and self._should_copy(name, self._backward.index)
        }

    def _is_affordable(self, optimizer: Optimizer, index: int) -> bool:
        """Return True if the schedule includes a step, and the overhead budget allows it."""
        # If the schedule raises, observe the step: its end is where errors of ranks are combined.
        wanted = True
        with self._peers.hold_errors():
            wanted = self._policy.is_wanted(index)
        # A step beyond the overhead budget involves no other rank: all ranks decide this alike.
        return wanted and self._policy.is_paid_for(optimizer, index)

    def _should_copy(self, name: str, index: int) -> bool:
        """Return True if the interval of a layer has passed, so that the step measures it."""
        if find_backward_pass() is not None:
            index = self._backward.index
        return self._settings.is_due(name, index, self._last_seen.get(name, index))

    def _elements(self, name: str, parameter: Tensor) -> Tensor | None:
        """Choose the elements of a layer that are copied, int64 (elements); None for all."""
        return self._engine.choose_elements(name, parameter, self._peers)

    def _memory(self, optimizer: Optimizer) -> Memory:
        """Return a function that assigns memory for the copies of an optimizer's layers."""
        reference = weakref.ref(optimizer)  # the observer holds this function, and no optimizer

        def assign(requests: Sequence[Request]) -> Sequence[Copies | None]:
            alive = reference()
            assert alive is not None, "it is being stepped"
            return self._engine.lay_out(alive, requests, self._peers)

        return assign

    def _finish(self, outcome: StepOutcome) -> None:
        """Measure a step that the optimizer has just made, and pass its record to `on_record`.

        The sums that were measured, such as that of the squared updates of each layer, are added up
        over all ranks. A step that was skipped, or had an error, ends here, too.
        """
        optimizer, index, steps = outcome.optimizer, outcome.index, self._backward
        is_part = steps.has(optimizer)  # of a training step
        with self._lock, self._policy.observing(outcome.copy_seconds):
            # Before this step adds to them. A training step in backward has its own, at its end.
            seconds = _UNKNOWN if is_part else self._policy.seconds(optimizer, index)
            if self._scale_state.settle(self._stepped, self._peers):
                self._change_scales()
            local = self._measure(outcome, seconds)
            record = self._record(index, self._peers.combine(optimizer, index, local))
            if record is None:
                return
            if is_part:
                steps.add(record)
            else:
                steps.note_outside(record)
                self._show(optimizer, record)
        if not is_part:
            self._policy.mark_end(optimizer, index)
        elif steps.is_complete:
            self._end_backward_step()

    def _end_backward_step(self) -> None:
        """Show the steps that were observed in the current backward pass as one record."""
        steps = self._backward
        if steps.leader is None:
            return
        with self._lock, self._policy.observing():
            seconds = self._policy.seconds(steps.leader, steps.index)
            record = steps.take_record(self._observer.names, seconds)
            if record is None:
                return
            self._show(steps.leader, record)
        self._policy.mark_end(steps.leader, steps.index)

    def _show(self, optimizer: Optimizer, record: StepRecord) -> None:
        """Note the record of a training step, and pass it to `on_record`."""
        self._note(optimizer, record)
        if self._on_record is not None:
            with self._peers.hold_errors():
                self._on_record(record)

    def _measure(self, outcome: StepOutcome, seconds: tuple[float, float]) -> StepSums:
        """Return the sums of a step on this rank, with one copy to the host, or its error.

        Args:
            outcome: The step.
            seconds: Time to observe the last observed step and mean time of a training step, in
                seconds.
        """
        optimizer, shown, twins, moves = outcome.optimizer, outcome.shown, [], []
        with self._peers.hold_errors():
            twins = self._twins.measure(optimizer, shown) if shown else []
            moves = self._starts.measure(optimizer, shown)
        others = [numbers for each in twins for numbers in each.tensors]
        others += [each.values for each in moves]
        local = self._engine.measure(outcome, seconds, others)
        share = TwinShare()
        with self._peers.hold_errors():
            if moves:
                share = self._starts.read(moves, local.others)
            else:
                share = self._twins.read(optimizer, twins, local.others)
        return local._replace(twins=share)

    def _record(self, index: int, step: StepSums) -> StepRecord | None:
        """Return the figures of a step; None for one that moved no weight, which is counted."""
        if self.is_shared:
            self._twins.note_ranks(step.twins)
        if not step.names:
            if step.skipped is not None:
                self.skipped[step.skipped] += 1
            return None
        judged = self._settings.judged(step.names)
        record = step_record(
            self._formats.names,
            judged,
            step.vectors,
            index,
            step.seconds,
            twins=TwinValues.read_parts(step.twins.parts, self._twins.find_averaged()),
        )
        # A fused optimizer reads found_inf on its device, and skips the step without the host.
        if step.found_inf and not record.model["update_rms"] > 0:
            self.skipped["inf"] += 1
            return None
        return record

    def _note(self, optimizer: Optimizer, record: StepRecord) -> None:
        """Keep the record of a step as the latest; update what decides on later steps."""
        self._last_seen |= dict.fromkeys(record.layers, record.index)
        self._scale_state.step_observed(record)
        seconds = record.own_seconds, record.training_seconds
        self._policy.charge(optimizer, record.index, seconds)
        self.latest = record
        self._bypasses.note_step(optimizer, has_moved=record.model["update_rms"] != 0)
        self._known_losses.check_stepped(optimizer)

    def _change_scales(self) -> None:
        self._engine.scales_changed()
        self._twins.scales_changed()

    # --- peers

    @property
    def _is_sharded(self) -> bool:
        return any(map(is_sharded, self._observer.parameters.values()))

    def _find_peers(self) -> Peers:
        """Return the ranks that share the parameters; find them anew if sharding is new."""
        if isinstance(self._peers, Alone) and self._is_sharded:
            self._peers = Together(self._watch)
        return self._peers

    def _stepped(self) -> dict[str, Tensor]:
        """Return the parameters that any observed optimizer steps, by name."""
        return self._peers.agreed(lambda: self._watch.find_stepped(self._observer.optimizers))

    def _decides(self) -> dict[str, dict[str, object]]:
        """Return arguments and state that decide what is observed next, for ranks to compare.

        Arguments are under ``"setting"`` and state under ``"state"``, each by name.
        """
        return {
            "setting": {
                "formats": self._formats.formats,
                "scaling": self._formats.scaling,
                "seed": self._settings.seed,
                "overhead_budget": self._policy.overhead_budget,
                "recipes": {
                    each.name: describe_recipe(each, self.scaling) for each in self.recipes
                },
            },
            "state": {
                "scales": self._scale_state.description(),
                "last_seen": sorted(self._last_seen.items()),
                "budgets": self._policy.state_dict(),
            },
        }

    def _history(self) -> Mapping[str, PackedBits]:
        """Return which elements have moved on any rank: packed flags, by name of the layer."""
        here = self._ever_moved.state_dict(self._engine.flags())
        names = self._settings.measured_names(self._observer.names, self._observer.parameters)
        try:
            return self._peers.whole_history(here, names, 1 + len(self._formats))
        except LostRankError as error:
            if self._is_strict:
                raise
            self._notices.give_once(
                "state_dict() was not called on every rank, so that never_moved_frac and twins "
                f"will begin anew: {error}"
            )
            return {}

    def _gather_twins(self) -> Mapping[str, Any]:
        """Return the state of the twins on all ranks: of samples that are stepped as recipes say.

        It is empty if a rank does not answer, of which `_history` has warned.

        Raises:
            LostRankError: A rank does not answer, and `strict` is True.
        """
        own = self._twins.state_dict()
        if not (self.is_shared and self.recipes):
            return own
        try:
            return join_states(self._peers.exchange(pack_state(own)))
        except LostRankError:
            if self._is_strict:
                raise
            return _NO_TWINS

    # --- notices

    def _describe_bypasses(self) -> list[str]:
        """Return a notice for each optimizer whose layers move without calls of its hooks."""
        try:
            self._observer.registry.read()  # the module may have been sharded since `attach`
            changed = [name for name, times in self._twins.resynchronised.items() if times > 1]
            found = self._bypasses.find_bypasses(
                self._observer.hooks, self._observer.parameters, changed
            )
        except Exception as error:  # noqa: BLE001 - such as an error of a failed device
            _logger.debug("weights could not be compared: %r", error)
            return []
        return [f"cannot see what moves {few(names)}: {reason}" for names, reason in found]

    def _describe_skipped(self) -> list[str]:
        """Return notices of layers that moved although all steps were skipped without gradients."""
        if self.latest is not None or not self.skipped["no gradients"]:
            return []
        try:
            return self.describe_unseen()
        except Exception as error:  # noqa: BLE001 - such as an error of a failed device
            _logger.debug("weights could not be compared: %r", error)
            return []

    def _leave_out_unseen(self, names: Sequence[str], why: str) -> None:
        """Warn that some layers cannot be observed, and `why`."""
        self._warn(f"leaves out {few(names)}: {why}")

    def _warn(self, message: str) -> None:
        """Warn the user, once for each message and on the first rank alone."""
        # All ranks give the same notices.
        if self._peers.rank == 0:
            self._notices.give_once(message)


def _check_state(state: Mapping[str, Any]) -> None:
    """Raise an error if entries of a monitor's state are missing."""
    if missing := [name for name in _STATE if name not in state]:
        raise ValueError(
            f"state={sorted(state)}: expected the entries of UpdateMonitor.state_dict(), of which "
            f"{missing} are missing; leave out load_state_dict() to begin anew"
        )
    check_packed_bits(state["ever_moved"])
