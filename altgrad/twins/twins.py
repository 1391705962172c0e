"""`Twins`: all twins of a run, stepped at every step of its optimizers.

A *twin* is a sample of each layer of the *run*, the training that is watched, stepped and stored as
a recipe says. `capture` is called before each step and `finish` after it. At an observed step, one
whose figures are recorded, a monitor calls `measure`, and then `read` with the result on the host.
Layers are sorted into *lanes*, whose twins are stepped together.

Read `twin_checks` first. This is the last file of the room; `altgrad.monitor.monitor` comes next.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.measurement.catalogue import NOW
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.twin_parts import TwinPart, TwinShare
from altgrad.observation.observer import describe_error
from altgrad.recipes.recipe import Recipe
from altgrad.recipes.rounding_generators import RoundingGenerators
from altgrad.twins.batch_norm import BatchStatistic
from altgrad.twins.drawing import Drawing, find_drawing, rank_drawing
from altgrad.twins.lane import Lane
from altgrad.twins.lane_sorter import LaneSorter
from altgrad.twins.lane_sums import LaneSums
from altgrad.twins.layer_plan import LaneKind, Stepped
from altgrad.twins.loaded_lanes import LoadedLanes
from altgrad.twins.micro_gradients import MicroGradients
from altgrad.twins.optimizer_run import OptimizerRun, get_random_state
from altgrad.twins.run_average import RunAverage
from altgrad.twins.self_check import COUNTS, Check
from altgrad.twins.twin_checks import TwinChecks
from altgrad.twins.twin_source import TwinSource
from altgrad.twins.twin_state import check_twin_state


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
        self._source = source
        self._lock = lock
        self._strict = strict
        self._averages: list[RunAverage | BatchStatistic] = []
        self._checks = TwinChecks(source.warn)
        self._loaded = LoadedLanes(source)
        self._recipes: dict[Drawing, tuple[Recipe, ...]] = {}
        for recipe in recipes:
            drawing = find_drawing(recipe, source.scaling)
            self._recipes[drawing] = (*self._recipes.get(drawing, ()), recipe)
        self._rounding = {  # of sums of gradients
            each.name: RoundingGenerators(_derive_seed(source.seed, each.name))
            for each in recipes
            if each.accumulate is not None
        }
        self._runs: WeakKeyDictionary[Optimizer, OptimizerRun] = WeakKeyDictionary()
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
        return self._checks.find_worst()

    @property
    def resynchronised(self) -> Counter[str]:
        """The number of times that twins took over weights, by name of the layer.

        Something other than a step had changed these. A *twin* is a sample of the layer that is
        stepped as a recipe says.
        """
        return self._checks.resynchronised

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

    def _get_run(self, optimizer: Optimizer) -> OptimizerRun:
        if optimizer not in self._runs:
            sorter = LaneSorter(self._source, self._recipes)
            self._runs[optimizer] = OptimizerRun(optimizer, sorter)
        return self._runs[optimizer]

    def _watch_gradients(self, run: OptimizerRun) -> None:
        """Put hooks on layers for recipes that add up gradients; remove hooks that none needs.

        A recipe with `accumulate` says in which format the gradients of several backward passes are
        added up. The hooks show each gradient. Layers have none if no such recipe is left.

        Args:
            run: What is known of one optimizer: its layers, in sets that are stepped together.
        """
        for kind in run.micro.keys() - run.stepped.keys():
            run.micro.pop(kind).remove()
        for kind in run.stepped:
            self._watch_lane(run, kind)

    def _watch_lane(self, run: OptimizerRun, kind: LaneKind) -> MicroGradients | None:
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

    def _capture(self, optimizer: Optimizer, run: OptimizerRun, *, is_observed: bool) -> None:
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
                is_first = kind.drawing == min(self._recipes, key=rank_drawing)
                lane = Lane(
                    *(kind, self._recipes[kind.drawing], self._source),
                    shows_run=is_first,
                    averages=self._averages,
                )
                run.lanes[kind] = lane
                if self._loaded.restore(lane, kind, optimizer, stepped):
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
                for device in _find_devices(stepped):
                    run.random_states[device] = get_random_state(device)
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

    def _finish(self, optimizer: Optimizer, run: OptimizerRun) -> None:
        """Step the twins for which `_capture` gathered gradients, after the training's own step.

        A *twin* is a sample of the layers that is stepped as a recipe says. At first, the
        *reference twin*, which is stepped as the training is, is compared with the training. It
        cannot equal a training whose optimizer draws random numbers, which is therefore noted.
        """
        late = run.follower.find_changes()
        for kind in run.captured:
            lane = run.lanes[kind]
            for device in _find_devices(run.stepped[kind]) & run.random_states.keys():
                state = run.random_states.pop(device)
                run.draws |= not torch.equal(state, get_random_state(device))
            lane.step(optimizer, run.changes, late, draws=run.draws)
            if lane.follows_updates:
                self._checks.note(kind, dict.fromkeys(lane.names, Check.DIFFERENT))
            if kind not in run.checked:
                counts = lane.take_counts().cpu().numpy()
                self._checks.read_counts(run, optimizer, kind, lane.names, counts)
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
                self._checks.read_counts(
                    run, optimizer, kind, each.layers, counts, is_measured=True
                )
                if not run.draws:
                    run.lanes[kind].read_averages(counts[:, len(COUNTS) :])
                if followed == run.lanes[kind].follows_updates:
                    parts.append(_read_part(each, values, *bins))
                    continue
                # Twins that turn out to be wrong have no figures in this record.
                for recipe in each.recipes:
                    missing.setdefault(recipe, set()).update(each.layers)
        own = {name: [*Check].index(check) for name, check in self._checks.find_own().items()}
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
        self._checks.note_ranks(share)

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
            "lanes": lanes + self._loaded.states,
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
        self._loaded.states = copy.deepcopy(state["lanes"])
        self._checks.resynchronised = Counter(state["resynchronised"])
        for name in self._rounding.keys() & state["sum_rounding"].keys():
            self._rounding[name].load_state_dict(copy.deepcopy(state["sum_rounding"][name]))

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
        self._loaded.states = self.state_dict()["lanes"]
        self._forget_runs()

    def nbytes(self) -> int:
        """Return the memory of all twins in bytes, including samples and gathered gradients."""
        sums = [each for run in self._runs.values() for each in run.micro.values()]
        return sum(lane.nbytes() for lane in self.lanes) + sum(each.nbytes() for each in sums)


def _find_devices(stepped: Sequence[Stepped]) -> set[torch.device]:
    """Return the devices on which the training has some layers."""
    return {each.parameter.device for each in stepped}


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


def _derive_seed(seed: int, name: str) -> int:
    """Return the seed by which a recipe rounds sums of gradients, another one for each recipe."""
    digest = sha256(f"{seed} {name} accumulate".encode()).digest()
    return int.from_bytes(digest[:4], "big")
