"""`Twins`: all twins of a run, stepped at every step of its optimizers.

A *twin* is a sample of each layer of the *run*, the training that is watched, stepped and stored as
a recipe says. `capture` is called before each step and `finish` after it. At an observed step, one
whose figures are recorded, a monitor calls `measure`, and then `read` with the result on the host.
Layers are sorted into *lanes*, whose twins are stepped together.

Read `rank_states` first. This is the last file of the room; `altgrad.monitor.monitor` comes next.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.twin_parts import TwinPart, TwinShare
from altgrad.observation.observer import describe_error
from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import get_applied_scaling
from altgrad.recipes.recipe import NOW, Recipe
from altgrad.recipes.rounding_generators import RoundingGenerators
from altgrad.twins.batch_norm import BatchStatistic
from altgrad.twins.generators import may_draw
from altgrad.twins.hyperparameters import Changes, HyperparameterFollower
from altgrad.twins.lane import Lane, LaneSums
from altgrad.twins.lane_pieces import join_pieces
from altgrad.twins.lane_sorter import LaneSorter
from altgrad.twins.layer_plan import Drawing, LaneKind, Stepped
from altgrad.twins.micro_gradients import MicroGradients
from altgrad.twins.run_average import RunAverage
from altgrad.twins.self_check import COUNTS, Check, are_rounded_otherwise, judge
from altgrad.twins.twin_source import TwinSource
from altgrad.twins.twin_state import check_twin_state

_MOST_TRIES = 8
"""Number of steps in which no weight moves, after which twins are checked at observed steps alone.

Each check copies counts to the host.
"""


class Twins:
    """The twins of all layers of a training, in lanes by dtype, device and block size.

    A *twin* is a small sample of the layers that is stepped as a recipe says, to compare recipes. A
    *lane* is a set of layers whose samples are stepped together.

    A monitor gives the twins to its `StepObserver`, which calls `capture` and `finish` in each
    step. Two threads may step two optimizers.

    Args:
        recipes: The recipes, each of which has a twin in each lane.
        source: The layers of the training, with their samples and scales.
        lock: Lock that `capture` and `finish` take. The owner must hold it to call another method.
        strict: If True, raise errors; otherwise end all twins with one notice.

    Attributes:
        recipes: The `recipes` argument.
        resynchronised: How often twins took over weights that something other than a step had
            changed, by name of the layer.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        source: TwinSource,
        lock: AbstractContextManager[object],
        *,
        strict: bool = False,
    ) -> None:
        self.recipes = tuple(recipes)
        self._checks: dict[str, dict[str, Check]] = {}  # by kind of lane, then by layer
        self.resynchronised: Counter[str] = Counter()
        self._source = source
        self._lock = lock
        self._strict = strict
        self._averages: list[RunAverage | BatchStatistic] = []
        self._loaded: list[Mapping[str, Any]] = []  # lanes of a checkpoint, until their first step
        self._recipes: dict[Drawing, tuple[Recipe, ...]] = {}
        for recipe in recipes:
            drawing = find_drawing(recipe, source.scaling)
            self._recipes[drawing] = (*self._recipes.get(drawing, ()), recipe)
        self._rounding = {  # of sums of gradients
            each.name: RoundingGenerators(_derive_seed(source.seed, each.name))
            for each in recipes
            if each.accumulate is not None
        }
        self._runs: WeakKeyDictionary[Optimizer, _Run] = WeakKeyDictionary()
        self._missing: set[tuple[str, str]] = set()  # recipe and layer, in the last observed step
        self._attached: WeakSet[Optimizer] = WeakSet()
        self._unnamed: dict[str, set[str]] = {}  # by recipe: states of which it stores nothing
        self._is_ended = not recipes

    @property
    def checks(self) -> dict[str, Check]:
        """The result of the last self-check of each layer, by name.

        The check compares the reference twin, a sample that is stepped as the training is, with the
        training itself. A layer may have several samples, such as one of whole blocks, and several
        ranks may step a part; the worst result counts.
        """
        return _find_worst(self._checks.values())

    @property
    def _own_checks(self) -> dict[str, Check]:
        """The worst result of this rank's self-checks of each layer, by name.

        A self-check compares a sample that is stepped as the training is with the training.
        """
        return _find_worst([each for kind, each in self._checks.items() if kind != _RANKS])

    @property
    def lanes(self) -> list[Lane]:
        """The lanes of all optimizers: sets of layers whose samples are stepped together."""
        return [lane for run in self._runs.values() for lane in run.lanes.values()]

    def watch_average(self, average: RunAverage | BatchStatistic) -> None:
        """Have twins keep an average, as the training keeps one of its own.

        A *twin* is a sample of the layers that is stepped as a recipe says.

        Args:
            average: The average of the training's weights, or a running statistic of BatchNorm.

        Raises:
            ValueError: Another average has the same name.
        """
        self.check_name(average.name)
        self._averages.append(average)

    def check_name(self, name: str) -> None:
        """Check that no average that is watched has this name.

        Raises:
            ValueError: One has.
        """
        if any(each.name == name for each in self._averages):
            raise ValueError(
                f"name={name!r}: expected another name than that of an average that is watched "
                "already; pass name="
            )

    def find_averaged(self) -> dict[str, Collection[str]]:
        """Return the names of the layers that have each average, by its name."""
        return {each.name: each.find_tensors().keys() for each in self._averages}

    def note_batches(self) -> None:
        """Note how many batches each BatchNorm module has got so far, before the first step.

        *Twins*, samples of the layers, keep running statistics of their own. Only later batches
        move these. After an error they keep none, and a notice says so.
        """
        for each in [one for one in self._averages if isinstance(one, BatchStatistic)]:
            self._note_batches(each)

    def _note_batches(self, statistic: BatchStatistic) -> None:
        try:
            statistic.note_batches()
        except Exception as error:
            if self._strict:
                raise
            self._averages.remove(statistic)
            self._source.warn(f"has no figures of {statistic.name}: {describe_error(error)}")

    # --- one step

    @torch.inference_mode(mode=False)
    def attach(self, optimizers: Collection[Optimizer]) -> None:
        """Put hooks on the layers that see each backward pass's gradient, if a recipe needs them.

        A recipe with `accumulate` says in which format the gradients of several backward passes are
        added up. Its twin, a sample of the layers, therefore needs each gradient. Without this
        call, the hooks come after the first step, for which the training's sum is rounded once.

        Args:
            optimizers: The optimizers of the training that are observed from now on.
        """
        self._attached = WeakSet(optimizers)
        if self._is_ended or not self._rounding:
            return
        with self._lock, self._ending_after_an_error():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                self._warn_about_ranks(torch.distributed.get_world_size())
            for optimizer in optimizers:
                run = self._get_run(optimizer)
                run.stepped = run.sorter.sort(optimizer)
                self._watch_gradients(run)

    def _warn_about_ranks(self, ranks: int) -> None:
        """Warn, if there are several ranks, that rounding errors of the other ranks are missed.

        A recipe with `accumulate` rounds the sum of gradients after each backward pass. Its twin, a
        sample of the layers, sees only the gradients of this rank before they are added up.

        Args:
            ranks: Number of ranks.
        """
        if ranks > 1:
            names = few([*self._rounding])
            self._source.warn(
                f"adds up the gradients of this rank alone in the twins of {names}: rounding "
                "errors of the other ranks are missing, so that their figures are too good"
            )

    def _get_run(self, optimizer: Optimizer) -> _Run:
        if optimizer not in self._runs:
            sorter = LaneSorter(self._source, self._recipes)
            self._runs[optimizer] = _Run(optimizer, sorter)
        return self._runs[optimizer]

    def _watch_gradients(self, run: _Run) -> None:
        """Put hooks on layers for recipes that add up gradients themselves; remove those in vain.

        A recipe with `accumulate` says in which format the gradients of several backward passes are
        added up. The hooks show each gradient. Layers have none if no such recipe is left.

        Args:
            run: What is known of one optimizer: its layers, in sets that are stepped together.
        """
        for kind in run.micro.keys() - run.stepped.keys():
            run.micro.pop(kind).remove()
        for kind in run.stepped:
            self._watch_lane(run, kind)

    def _watch_lane(self, run: _Run, kind: LaneKind) -> MicroGradients | None:
        """Put hooks on the layers of one lane if a recipe needs each backward pass's gradient.

        A *lane* is a set of layers whose samples are stepped together. Hooks that the layers have
        are kept if the layers and recipes are the same as before, and replaced or removed if not.

        Returns:
            The sums of the gradients that the hooks see; None if no recipe adds up gradients.
        """
        stepped, lane, micro = run.stepped[kind], run.lanes.get(kind), run.micro.get(kind)
        recipes = [each for each in self._recipes[kind.drawing] if each.name in self._rounding]
        if lane is not None:
            recipes = [each for each in recipes if each in lane.summing]
        if micro is not None and micro.recipes == tuple(recipes) and micro.covers(stepped):
            return micro
        if micro is not None:
            run.micro.pop(kind).remove()
        if not recipes:
            return None
        run.micro[kind] = MicroGradients(kind, stepped, self._source, recipes, self._rounding)
        return run.micro[kind]

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def capture(self, optimizer: Optimizer, *, is_observed: bool) -> None:
        """Gather the gradients of a step that is about to happen, at the sampled elements.

        A *twin* is a sample of the layers that is stepped as a recipe says.

        Args:
            optimizer: The training's optimizer.
            is_observed: True if the step is observed, so that the twins are measured after it.
        """
        if self._is_ended:
            return
        with self._lock, self._ending_after_an_error():
            self._capture(optimizer, self._get_run(optimizer), is_observed=is_observed)

    def _capture(self, optimizer: Optimizer, run: _Run, *, is_observed: bool) -> None:
        """Have each lane of an optimizer gather its gradients; make lanes that are new.

        A *lane* is a set of layers whose samples are stepped together.
        """
        run.changes = run.follower.find_changes()
        run.follower.remember()
        run.captured = []
        run.stepped = run.sorter.sort(optimizer)
        for kind, stepped in run.stepped.items():
            lane = run.lanes.get(kind)
            if lane is None:
                if all(each.parameter.grad is None for each in stepped):
                    continue
                is_first = kind.drawing == min(self._recipes, key=_rank)
                lane = Lane(
                    *(kind, self._recipes[kind.drawing], self._source),
                    shows_run=is_first,
                    averages=self._averages,
                )
                run.lanes[kind] = lane
                if self._restore(lane, kind, optimizer, stepped):
                    run.checked.add(kind)
                    run.draws |= lane.rounds_itself and run.may_draw
            if lane.is_empty:
                continue
            is_checked = is_observed or kind not in run.checked
            lane.capture(
                optimizer,
                stepped,
                is_checked=is_checked,
                is_checkable=not run.draws,
                micro=run.micro.get(kind) or self._watch_lane(run, kind),
            )
            if is_checked and run.may_draw:
                run.random_states[kind.device] = _get_random_state(kind.device)
            run.captured.append(kind)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def finish(self, optimizer: Optimizer, unseen: str = "") -> None:
        """Step the twins, now that the training has stepped.

        A *twin* is a sample of the layers that is stepped as a recipe says. After its first step, a
        twin that is stepped as the training is must equal it: this is checked at once, which copies
        counts to the host.

        Args:
            optimizer: The training's optimizer.
            unseen: The reason why `capture` was not called in this step; empty if it was.

        Raises:
            RuntimeError: `capture` was not called, and `strict` is True.
        """
        if self._is_ended:
            return
        with self._lock, self._ending_after_an_error():
            if unseen:
                raise RuntimeError(unseen)
            if optimizer in self._runs:
                self._finish(optimizer, self._runs[optimizer])

    def _finish(self, optimizer: Optimizer, run: _Run) -> None:
        """Step the twins for which `_capture` gathered gradients, after the training's own step.

        A *twin* is a sample of the layers that is stepped as a recipe says. At first, the
        *reference twin*, which is stepped as the training is, is compared with the training. It
        cannot equal a training whose optimizer draws random numbers, which is therefore noted.
        """
        late = run.follower.find_changes()
        for kind in run.captured:
            lane = run.lanes[kind]
            if (state := run.random_states.pop(kind.device, None)) is not None:
                run.draws |= not torch.equal(state, _get_random_state(kind.device))
            lane.step(optimizer, run.changes, late, draws=run.draws)
            if lane.follows_updates:
                self._note_checks(kind, dict.fromkeys(lane.names, Check.DIFFERENT))
            if kind not in run.checked:
                counts = lane.take_counts().cpu().numpy()
                self._read_counts(optimizer, kind, lane.names, counts)
        if self._rounding:
            self._watch_gradients(run)
        run.follower.remember()
        self._warn_about_names()

    def _warn_about_names(self) -> None:
        """Warn of recipes that name a format for a state that none of their twins has.

        A *twin* is a sample of the layers that is stepped as a recipe says. Another optimizer may
        have the state, so that all must have stepped.
        """
        lanes = self.lanes
        have_all_stepped = all(
            each in self._runs and self._runs[each].lanes for each in self._attached
        )
        if not have_all_stepped or not any(lane.has_new_states for lane in lanes):
            return
        found: dict[str, set[str]] = {}
        for lane in lanes:
            lane.has_new_states = False
            for name, states in lane.find_names().items():
                found.setdefault(name, set()).update(states)
        for recipe in self.recipes:
            named = recipe.state_formats.keys() - {"*"}
            has = found.get(recipe.name, named)
            missing, before = named - has, self._unnamed.get(recipe.name)
            if missing and missing != before:
                self._unnamed[recipe.name] = missing
                self._source.warn(
                    f"stores nothing of {few(sorted(missing))} in the twin of {recipe.name}: "
                    + self._explain_missing(missing, has)
                )

    def _explain_missing(self, missing: Collection[str], has: Collection[str]) -> str:
        low = [
            each.name
            for each in self._averages
            if each.name in missing and isinstance(each, BatchStatistic) and each.is_low
        ]
        if low:
            return (
                f"expected BatchNorm with {few(low)} in float32, and the run has 16 bits; keep "
                "BatchNorm in float32"
            )
        names = ", ".join(map(repr, sorted(has))) or "none"
        return f"expected names of states of its optimizer, which has {names}"

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def measure(self, optimizer: Optimizer, shown: Collection[str]) -> list[LaneSums]:
        """Measure by how much twins differ from training in float32, after an observed step.

        A *twin* is a sample of the layers that is stepped as a recipe says. An *observed step* is
        one whose figures are recorded.

        Args:
            optimizer: The training's optimizer.
            shown: Names of the layers whose figures this step reports. A new window begins for
                them, the time until the next observed step.

        Returns:
            For each lane, a set of layers, the sums from which figures are computed, on its device;
            empty after an error.
        """
        run = self._runs.get(optimizer)
        lanes = [] if run is None else [run.lanes[kind] for kind in run.captured]
        with self._ending_after_an_error():
            return [lane.measure(optimizer, shown) for lane in lanes]
        return []

    def read(
        self, optimizer: Optimizer, sums: Sequence[LaneSums], numbers: Sequence[Numbers]
    ) -> TwinShare:
        """Return the sums of the twins, from what `measure` returned, and act on the self-check.

        A *twin* is a sample of the layers that is stepped as a recipe says. The self-check compares
        a sample that is stepped as the training is with the training. Where these two differ,
        twins step no optimizer from then on: they end, or the training's updates are added to them.

        Args:
            optimizer: The training's optimizer.
            sums: The result of `measure`.
            numbers: `LaneSums.tensors` of each lane in turn, on the host; empty after an error.

        Returns:
            The sums from which figures follow; where ranks share layers, also the layers that this
            rank does not step, and its self-checks.
        """
        run, parts = self._runs.get(optimizer), []
        missing = self._find_missing(optimizer) if self._source.is_shared else {}
        if run is not None and numbers:
            following = iter(numbers)
            for kind, each in zip(run.captured, sums, strict=True):
                values, counts, *bins = (next(following) for _ in each.tensors)
                followed = run.lanes[kind].follows_updates
                self._read_counts(optimizer, kind, each.layers, counts, is_measured=True)
                if not run.draws:
                    run.lanes[kind].read_averages(counts[:, len(COUNTS) :])
                if followed == run.lanes[kind].follows_updates:
                    parts.append(_read_part(each, values, *bins))
                    continue
                # Twins that turn out to be wrong have no figures in this record.
                for recipe in each.recipes:
                    missing.setdefault(recipe, set()).update(each.layers)
        own = {name: [*Check].index(check) for name, check in self._own_checks.items()}
        return TwinShare(parts, missing, own if self._source.is_shared else {})

    def _find_missing(self, optimizer: Optimizer) -> dict[str, set[str]]:
        """Return for each recipe the layers of which this rank should step a part, but does not.

        A *twin*, the sample that is stepped as a recipe says, may have ended after an error, or
        layers are beyond the limits of a lane. The result is names of layers by name of the recipe.
        """
        missing: dict[str, set[str]] = {recipe.name: set() for recipe in self.recipes}
        if self._is_ended:
            stepped = self._source.find_stepped(optimizer)
            wanted = {n: p.dtype for n, p in stepped if self._source.has_twins(n)}
            low = {name for name, dtype in wanted.items() if dtype.itemsize < 4}
            return {**{recipe: {*wanted} for recipe in missing}, NOW: low}
        run = self._runs.get(optimizer)
        for lane in () if run is None else run.lanes.values():
            for recipe, names in lane.find_missing().items():
                missing.setdefault(recipe, set()).update(names)
        return missing

    def note_ranks(self, share: TwinShare) -> None:
        """Note the results of all ranks' self-checks, and warn of layers that a rank does not step.

        A self-check compares a sample that is stepped as the training is with the training.

        Args:
            share: The sums of all ranks, with the worst result of each self-check, and the layers
                that a rank does not step.
        """
        others = {name: [*Check][place] for name, place in share.checks.items()}
        self._checks[_RANKS] = others
        own = self._own_checks
        if wrong := [
            name
            for name, check in others.items()
            if check is Check.DIFFERENT and own.get(name) is not check
        ]:
            self._source.warn(
                f"has twins that differ from the run in {few(wrong)} on another rank: the "
                "optimizer does not work element by element there"
            )
        missing = {(recipe, name) for recipe, names in share.missing.items() for name in names}
        again, self._missing = missing & self._missing, missing
        by_layers: dict[tuple[str, ...], list[str]] = {}
        for recipe in share.missing:
            if names := tuple(sorted(name for each, name in again if each == recipe)):
                by_layers.setdefault(names, []).append(recipe)
        for absent, recipes in by_layers.items():
            self._source.warn(
                f"has no figures of the twins of {few(recipes)} in {few(absent)}: a rank steps no "
                "more of its elements"
            )

    @contextmanager
    def _ending_after_an_error(self) -> Iterator[None]:
        """Run the code inside; after an error in it, end all twins with a notice.

        A *twin* is a sample of the layers that is stepped as a recipe says, beside the training. An
        ended one is not stepped again; the training goes on. If `strict`, the error is raised, too.

        Raises:
            Warning: The user made warnings errors.
        """
        try:
            yield
        except Warning:  # the user made warnings errors
            raise
        except Exception as error:
            self._is_ended = True
            self._forget_runs()
            if self._strict:
                raise
            self._source.warn_here(f"ends all twins after an error: {describe_error(error)}")

    def stop(self) -> None:
        """Remove the hooks on layers, since no further step will be observed.

        The hooks are there for recipes that add up the gradients of single backward passes.
        """
        with self._lock:
            for run in self._runs.values():
                for micro in run.micro.values():
                    micro.remove()
                run.micro.clear()

    def _forget_runs(self) -> None:
        """Drop all twins, samples that are stepped as recipes say, and the hooks on layers."""
        self.stop()
        self._runs.clear()

    def _read_counts(
        self,
        optimizer: Optimizer,
        kind: LaneKind,
        names: Sequence[str],
        counts: Numbers,
        *,
        is_measured: bool = False,
    ) -> None:
        """Note the result of a self-check: whether the reference twin equals the training.

        The *reference twin* is a sample of the layers that is stepped as the training is. If it is
        not equal, all twins step no optimizer from then on: they end, or get the training's
        updates.

        Args:
            optimizer: The training's optimizer.
            kind: The kind of the lane, a set of layers, that was checked.
            names: Names of its layers.
            counts: Its counts, float64 (layers, counts) on the host, in the order of
                `altgrad.twins.self_check.COUNTS`.
            is_measured: True after `measure`.
        """
        run = self._runs[optimizer]
        lane = run.lanes[kind]
        times = zip(names, counts[:, 4].astype(int).tolist(), strict=True)
        self.resynchronised.update({name: count for name, count in times if count})
        lane.watch_writes(is_suspected=bool(counts[:, 5].any()), are_found=bool(counts[:, 4].any()))
        if lane.follows_updates:
            return
        is_first = run.is_first_check(kind, has_moved=bool(counts[:, 2].any()))
        draws = run.draws or kind.is_stored or lane.rounds_itself
        found = judge(counts, draws=draws, is_first=is_first)
        if is_first and kind.is_low and Check.DIFFERENT in found and are_rounded_otherwise(counts):
            lane.begin_recording()
            found, draws = judge(counts, draws=True, is_first=True), True
        reason = _describe_differences(names, found, counts)
        # Where the run rounds, a wrong step may be hidden by the rounding.
        is_hidden = draws and not reason and {*found} != {Check.EQUAL}
        if is_first and not lane.end_probe() and is_hidden:
            found = [Check.DIFFERENT] * len(found)
            reason = "an element steps otherwise if other elements of its tensor differ"
        if reason:
            lane.follow_updates(optimizer, reason, is_measured=is_measured)
        self._note_checks(kind, dict(zip(names, found, strict=True)))

    def _note_checks(self, kind: LaneKind, checks: Mapping[str, Check]) -> None:
        self._checks.setdefault(str(kind.describe()), {}).update(checks)

    # --- state

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to continue every figure exactly.

        Returns:
            A dict of the states of all lanes, which are sets of layers, of `resynchronised`, and of
            the random numbers by which sums of gradients are rounded.
        """
        lanes = [
            {"kind": kind.describe(), **lane.state_dict(optimizer)}
            for optimizer, run in self._runs.items()
            for kind, lane in run.lanes.items()
        ]
        return {
            "lanes": lanes + self._loaded,
            "resynchronised": dict(self.resynchronised),
            "sum_rounding": {name: each.state_dict() for name, each in self._rounding.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all twins from a checkpoint, before the first step.

        A *twin* is a sample of the layers that is stepped and stored as a recipe says. Weights and
        optimizer states are taken over when the training first steps these layers.

        Args:
            state: A result of `state_dict`.

        Raises:
            ValueError: An entry of the state is missing or damaged.
        """
        check_twin_state(state)
        self._loaded = copy.deepcopy(state["lanes"])
        self.resynchronised = Counter(state["resynchronised"])
        for name in self._rounding.keys() & state["sum_rounding"].keys():
            self._rounding[name].load_state_dict(copy.deepcopy(state["sum_rounding"][name]))

    def _restore(
        self, lane: Lane, kind: LaneKind, optimizer: Optimizer, stepped: Sequence[Stepped]
    ) -> bool:
        """Restore a lane, a set of layers, from loaded ones of its kind with some of these layers.

        There are several loaded ones if several ranks shared the layers.

        Returns:
            True if there is such a lane, and it was restored.
        """
        names = {each.name for each in stepped}
        pieces = [
            each
            for each in self._loaded
            if each["kind"] == kind.describe() and not names.isdisjoint(each["samples"])
        ]
        self._loaded = [each for each in self._loaded if not any(each is one for one in pieces)]
        if len(pieces) == 1 and not self._source.is_shared:
            return self._load_lane(lane, pieces[0])
        if not pieces:
            return False
        wanted = lane.describe_samples(optimizer, stepped)
        state = join_pieces(pieces, wanted)
        known = {name for each in pieces for name in each["samples"]}
        if lost := [n for n in wanted if n in known and (not state or n not in state["samples"])]:
            self._source.warn(
                f"has the twins of {few(lost)} begin anew: the restored state has other elements, "
                "since another number of ranks held the layers"
            )
        return state is not None and self._load_lane(lane, state)

    def _load_lane(self, lane: Lane, state: Mapping[str, Any]) -> bool:
        """Restore a lane, a set of layers, unless it has recipes that are not in the state.

        The twins of these recipes would start later than the others.

        Returns:
            True if it was restored.
        """
        if new := sorted(lane.recipes - set(state["recipes"])):
            self._source.warn(
                f"has all twins begin anew: the restored state has no recipe {few(new)}"
            )
            return False
        lane.load_state_dict(state)
        return True

    # --- lanes

    def scales_changed(self) -> None:
        """Compute scales anew when next needed, since the amax (largest magnitude) has changed."""
        for lane in self.lanes:
            lane.scales_changed()

    def release(self) -> None:
        """Drop all twins, and keep only the copy of their state that `state_dict` returns.

        A *twin* is a sample of the layers that is stepped as a recipe says. If steps follow, twins
        go on from that copy. Gathered gradients and the hooks on layers go.
        """
        self._loaded = self.state_dict()["lanes"]
        self._forget_runs()

    def nbytes(self) -> int:
        """Return the memory of all twins in bytes, including samples and gathered gradients."""
        sums = [each for run in self._runs.values() for each in run.micro.values()]
        return sum(lane.nbytes() for lane in self.lanes) + sum(each.nbytes() for each in sums)


_RANKS = "ranks"
"""The key of the self-checks of all ranks together, beside those of each kind of lane."""


def _find_worst(each: Iterable[Mapping[str, Check]]) -> dict[str, Check]:
    """Return the worst result of several self-checks of each layer, by name."""
    worst: dict[str, Check] = {}
    for checks in each:
        for name, check in checks.items():
            worst[name] = max(check, worst.get(name, check), key=[*Check].index)
    return worst


def _read_part(sums: LaneSums, values: Numbers, bins: Numbers | None = None) -> TwinPart:
    """Return the sums of a lane, a set of layers, with the measurements on the host.

    Args:
        sums: The measurements on the device.
        values: `LaneSums.values` on the host.
        bins: `LaneSums.bins` on the host.
    """
    return TwinPart(
        sums.layers,
        sums.recipes,
        sums.states,
        values,
        sums.sizes,
        sums.populations,
        sums.blocks,
        bins,
    )


def find_drawing(recipe: Recipe, scaling: Scaling | None) -> Drawing:
    """Return how many neighbouring elements to draw together, so that blocks are whole.

    The elements of a block share a scale in a format of the recipe, or in the states of its
    optimizer. The least common multiple of several sizes is drawn.

    Args:
        recipe: The recipe.
        scaling: The elements that share a scale, as in `altgrad.measure`.

    Raises:
        ValueError: A format and the states of the optimizer have blocks.
    """
    formats = [
        each for each in (recipe.weights_format, *recipe.state_formats.values()) if each is not None
    ]
    applied = [get_applied_scaling(format, scaling) for format in formats]
    block = math.lcm(*(each[1] for each in applied if isinstance(each, tuple)))
    packed = None if recipe.maker is None else recipe.maker.packed
    if packed is not None and block > 1:
        raise ValueError(
            f"the recipe {recipe.name} has formats with scales for blocks of {block}, and an "
            f"optimizer with packed states: expected blocks in one of both; leave out weights= and "
            "states=, or choose another scaling="
        )
    return Drawing(block, packed)


def _rank(drawing: Drawing) -> tuple[bool, int]:
    """Return a key that sorts samples of single elements first, and those of packed states last."""
    return drawing.packed is not None, drawing.block


def _describe_differences(names: Sequence[str], found: Sequence[Check], counts: Numbers) -> str:
    """Return the reason why a self-check has failed; empty if it has not.

    Args:
        names: Names of the layers.
        found: The result of each.
        counts: Their counts, in the order of `altgrad.twins.self_check.COUNTS`.
    """
    wrong = [k for k, check in enumerate(found) if check is Check.DIFFERENT]
    if not wrong:
        return ""
    most = max(counts[k, 3] for k in wrong)
    return (
        f"the optimizer on a sample differs from the run in {few([names[k] for k in wrong])}, by "
        f"up to {most:.3g} spacings of the dtype"
    )


def _derive_seed(seed: int, name: str) -> int:
    """Return the seed by which a recipe rounds sums of gradients, another one for each recipe."""
    digest = sha256(f"{seed} {name} accumulate".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _get_random_state(device: torch.device) -> Tensor:
    """Return the state of the generator from which operations on a device draw."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)  # type: ignore[no-any-return]


class _Run:
    """The lanes of one optimizer of the training, and what is known of it between two steps.

    A *lane* is a set of layers whose samples are stepped together.
    """

    def __init__(self, optimizer: Optimizer, sorter: LaneSorter) -> None:
        self.sorter = sorter
        self.follower = HyperparameterFollower(optimizer)
        self.changes: Changes = {}  # of hyperparameters, before the running step
        self.lanes: dict[LaneKind, Lane] = {}
        self.stepped: Mapping[LaneKind, Sequence[Stepped]] = {}  # layers, by lane
        self.micro: dict[LaneKind, MicroGradients] = {}  # for recipes that add up gradients
        self.captured: list[LaneKind] = []  # lanes that take part in the running step
        self.checked: set[LaneKind] = set()  # lanes with a self-check so far
        self.may_draw = may_draw(type(optimizer))
        self.draws = False  # until its step is seen to draw random numbers
        self.random_states: dict[torch.device, Tensor] = {}  # before a checked step
        self._tries: Counter[LaneKind] = Counter()  # checks of a lane before any weight moved

    def is_first_check(self, kind: LaneKind, *, has_moved: bool) -> bool:
        """Return True for each self-check of some layers up to the first at which weights moved.

        The self-check compares the training with a sample that the same optimizer steps. At a
        learning rate of 0, as in the first step of a warm-up, no weight moves, and every optimizer
        looks right. After 8 checks without a moved weight, the result is False, too.

        Args:
            kind: The properties of the layers, whose samples lie in one tensor (a *lane*).
            has_moved: True if a weight of these layers has moved since their start.
        """
        is_first = kind not in self.checked
        self._tries[kind] += 1
        if has_moved or self._tries[kind] >= _MOST_TRIES:
            self.checked.add(kind)
        return is_first
