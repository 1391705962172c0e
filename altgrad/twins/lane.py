"""`Lane`: the twins of the layers whose samples can lie in one tensor (`LaneKind`).

A *twin* is a sample of each layer of the *run*, the training that is watched, stepped and stored as
a recipe says. A lane has one twin for each recipe, and two more. The *reference twin* has the
recipe of the run itself, to check that a sample steps as the run does. The *baseline* is the twin
in float32, with which the others are compared. A run that is in 16 bits itself, or that a
`WeightStorage` rounds, is compared with it, too, under the name `NOW`.

At each step, a lane gathers the sampled gradients once and steps each twin with them. At an
observed step, one whose figures are recorded, it compares the reference twin with the run, and the
others with the baseline.

Read `lane_sums` first, and `layer_plan` and `outside_changes`, which do the work; `twin_state`
comes next.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.measurement.catalogue import NOW
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.twin_sums import TwinStack
from altgrad.recipes.recipe import Recipe
from altgrad.twins.batch_norm import BatchStatistic
from altgrad.twins.element_scales import ElementScales
from altgrad.twins.fused_sgd import describe_fused_sgd
from altgrad.twins.hyperparameters import Changes
from altgrad.twins.lane_averages import LaneAverages
from altgrad.twins.lane_sums import LaneSums, compare_twins
from altgrad.twins.lane_twins import LaneTwins, describe_failure
from altgrad.twins.layer_plan import LaneKind, LayerPlan, SampledNow, Stepped
from altgrad.twins.micro_gradients import MicroGradients
from altgrad.twins.outside_changes import OutsideChanges
from altgrad.twins.run_average import RunAverage
from altgrad.twins.run_states import find_whole_states, gather_states
from altgrad.twins.run_weights import RunWeights, make_mask
from altgrad.twins.sampled_gradients import SampledGradients
from altgrad.twins.self_check import COUNTS
from altgrad.twins.stored_layers import find_spacings
from altgrad.twins.twin import Arrangement
from altgrad.twins.twin_source import TwinSource


class Lane:
    """The twins of layers with one dtype, gradient dtype, device and block size.

    A *twin* is a sample of each layer that is stepped as a recipe says. One for each recipe is
    compared with the *baseline*, a twin in float32. The *reference twin* steps just as the training
    does, to check that a sample steps alike. If the training itself stores numbers in less than
    float32, it is compared with the baseline, too.

    Args:
        kind: The properties that the layers share.
        recipes: The recipes whose twins are stepped.
        source: The layers of the training, with their samples and scales.
        shows_run: If True, the training itself is measured as twins are, under the name `NOW`, if
            it stores numbers in less than float32.
        averages: The averages that the training keeps of its weights, and the running statistics of
            BatchNorm; more may be added later.

    Attributes:
        rounds_itself: True if the training rounds weights otherwise than the reference twin, which
            steps as it does: at random, or in compiled code.
        has_new_states: True if layers have joined whose states `find_names` did not see yet. The
            caller sets it to False.
    """

    def __init__(
        self,
        kind: LaneKind,
        recipes: Sequence[Recipe],
        source: TwinSource,
        *,
        shows_run: bool = True,
        averages: Sequence[RunAverage | BatchStatistic] = (),
    ) -> None:
        self._kind = kind
        self._recipes = frozenset(each.name for each in recipes)
        self._source = source
        self._warn = source.warn
        self._scales = ElementScales(source.scaling, source.find_amaxes)
        self._plan = LayerPlan(kind, source)
        self._run = RunWeights(kind)
        self._changes = OutsideChanges(self._plan, self._run)
        self._gradients = SampledGradients(kind)
        self._averages = LaneAverages(kind, averages, source.warn)
        self._twins = LaneTwins(kind, recipes, self._scales, source.seed, source.warn)
        self.rounds_itself = self.has_new_states = False
        self._shows_run = shows_run and kind.is_low
        self._is_checked = False  # in the running step
        self._counts = torch.zeros((0, len(COUNTS)), dtype=torch.float64, device=kind.device)
        self._has_new_layers = False  # since the last step
        self._late: Changes = {}  # changes of hyperparameters while the run last stepped
        self._stepped: Sequence[Stepped] = ()

    @property
    def recipes(self) -> frozenset[str]:
        """Names of all recipes of the lane, even of those whose twins have ended after an error.

        A *recipe* says how weights and optimizer states are stored and stepped. A *twin* is a
        sample of the lane's layers that is stepped as its recipe says.
        """
        return self._recipes

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, in the order of all results."""
        return tuple(self._plan.layers)

    def find_names(self) -> dict[str, set[str]]:
        """Return the names of states and averages that twins have, for recipes that name some.

        A *twin* is a sample of the layers that is stepped and stored as a recipe says. Those
        without any state, which may have had no gradient yet, are left out.

        Returns:
            The names, by name of the recipe.
        """
        return self._twins.find_names()

    @property
    def summing(self) -> list[Recipe]:
        """The recipes with `accumulate`, the format in which their twins add up gradients.

        A *twin* is a sample of the layers that is stepped as a recipe says. Recipes whose twins
        have ended after an error are left out.
        """
        return self._twins.summing

    @property
    def is_empty(self) -> bool:
        """True if nothing is left to step or measure, as the twins of all recipes have ended.

        A *twin* is a sample of the lane's layers that is stepped as a recipe says; it ends after an
        error. A lane that measures the training itself, too, is never empty.
        """
        return not (self._twins.by_recipe or self._shows_run)

    @property
    def follows_updates(self) -> bool:
        """True if the training's updates are added to the weights of the twins after each step.

        A *twin* is a sample of the layers that is stored as a recipe says. It is fed so if the
        training's optimizer cannot run on a sample; otherwise it steps an optimizer of its own.
        """
        return self._twins.follows_updates

    @property
    def _records_run(self) -> bool:
        """True if the reference twin takes over the training's weights after each step.

        That twin is a sample of the layers that is stepped as the training is. Its own steps do not
        reach the same weights if the training rounds at random, or after the step.
        """
        is_rounded = self._kind.is_stored or self.rounds_itself
        return self._kind.is_low and is_rounded and not self.follows_updates

    # --- before a step of the run

    def capture(
        self,
        optimizer: Optimizer,
        stepped: Sequence[Stepped],
        *,
        is_checked: bool,
        is_checkable: bool,
        micro: MicroGradients | None = None,
    ) -> None:
        """Prepare all twins of the lane for a step of the training, and gather sampled gradients.

        A *lane* is a set of layers that are sampled together. A *twin* is such a sample, stepped
        beside the training as a recipe says. Twins take over new layers, and weights and states
        that something other than a step has changed in the training.

        Args:
            optimizer: The training's optimizer.
            stepped: The layers of this lane that the optimizer steps, with a gradient or without;
                the same object as in the last step if none has changed.
            is_checked: True if the reference twin, a sample that is stepped as the training is, is
                compared with the training after the step.
            is_checkable: False if the reference twin cannot equal the training, since the
                training's optimizer rounds at random.
            micro: The gradients of single backward passes since the last step, for recipes that add
                them up themselves; None if there is no such recipe.
        """
        self._is_checked = is_checked
        written, changed = self._changes.find(optimizer, stepped, self._twins.reference)
        if stepped is not self._stepped or changed:
            self._follow_averages()  # while each layer is where it was
            written.update(self._arrange(optimizer, stepped, changed))
            self._stepped = stepped
        self._changes.forget_loaded()
        self._gradients.gather(optimizer)
        if micro is not None:
            self._take_sums(micro)
        if written or is_checked or self._run.is_watching:
            reference = self._twins.reference.tensors
            outside = self._run.find_changed(reference, written, is_checkable=is_checkable)
            self._twins.replace_weights(outside, self._run.values)
        # Last: weights that were clipped after a step were clipped before the average, too.
        self._follow_averages()

    def _follow_averages(self) -> None:
        """Update the twins' averages of weights where the training has updated its own averages.

        A *twin* is a sample of the layers that is stepped as a recipe says.
        """
        twins = self._twins
        self._averages.follow(twins.reference, twins.fp32, twins.all)
        self._averages.drop_ended(twins.all)

    def _take_sums(self, micro: MicroGradients) -> None:
        """Take the gradients that recipes with `accumulate` have added up in their own formats.

        Each recipe has a *twin*, a sample of the layers that is stored and stepped as the recipe
        says. After an error, the twins of these recipes end with a notice.

        Args:
            micro: The sums of the gradients of single backward passes.

        Raises:
            Warning: The user made warnings errors.
        """
        gradients, layout = self._gradients, self._plan.layout
        try:
            sums = micro.take_sums(layout, gradients.now.values, gradients.names, self._run)
        except Warning:  # the user made warnings errors
            raise
        except Exception as error:  # noqa: BLE001 - ends a part of the twins, and never training
            for recipe in self.summing:
                self._twins.end(recipe.name, error)
        else:
            gradients.now = gradients.now._replace(sums=sums)

    def _arrange(
        self,
        optimizer: Optimizer,
        stepped: Sequence[Stepped],
        changed: Collection[str],
    ) -> list[str]:
        """Note which layers have a gradient, and give each layer its place in the twins' tensors.

        A *twin* is a sample of the layers that is stepped as a recipe says: flat tensors with the
        elements of one layer after another. These are made anew if layers are new or gone, or
        if layers that step together begin to differ. A change of states outside of steps has the
        same effect.

        Args:
            optimizer: The optimizer of the training.
            stepped: The layers that it is about to step.
            changed: Names of the layers whose optimizer states were changed between two steps.

        Returns:
            Names of the layers whose parameter is another object than before.
        """
        present = [each for each in stepped if each.parameter.grad is not None]
        names, replaced = {each.name for each in present}, []
        with self._following_updates_after_an_error(optimizer):
            if self._plan.arrange(optimizer, stepped, names, changed):
                replaced = self._rearrange(optimizer)
        recipes = [twin.recipe for twin in self._twins.by_recipe.values()]
        kind = self._kind
        if notice := describe_fused_sgd(optimizer, recipes, kind.dtype, kind.device):
            self._warn(notice)
        self._gradients.arrange(self._plan, present)
        return replaced

    def _rearrange(self, optimizer: Optimizer) -> list[str]:
        """Give weights, scales and twins the new places of the layers in their flat tensors.

        Returns:
            Names of the layers whose parameter is another object than before.
        """
        layers, layout = self._plan.layers, self._plan.layout
        self._has_new_layers = True
        replaced = self._run.rearrange(layers, layout, self._plan.begun)
        self._scales.read(layout, layers, self._kind.device, self._plan.renewed)
        self._twins.rearrange(self._describe_run(optimizer))
        self._averages.rearrange(layers, layout)
        return replaced

    def _describe_run(self, optimizer: Optimizer) -> Arrangement:
        plan = self._plan
        return Arrangement(
            optimizer,
            plan.layout,
            self._run.values,
            plan.layers,
            plan.renewed,
            plan.begun,
            self._kind.gradient_dtype,
        )

    # --- after a step of the run

    def step(
        self, optimizer: Optimizer, changes: Changes, late: Changes, *, draws: bool = False
    ) -> None:
        """Step all twins with the gathered gradients, now that the training has stepped.

        A *twin* is a sample of the layers that is stepped as a recipe says. If `follows_updates`,
        twins add the training's update instead.

        Args:
            optimizer: The training's optimizer.
            changes: Hyperparameters that were changed from outside between the last step and this.
            late: Hyperparameters that changed while the training stepped. Before their next step,
                twins take over those that the reference twin has not changed in its own step, such
                as those of a hook. Factories, functions that make optimizers, get all of them.
            draws: True if the training's optimizer draws random numbers in its steps.
        """
        missed = self._twins.find_missed(self._late)
        own, by_factory = _join(missed, changes), _join(self._late, changes)
        self._late = late
        self.rounds_itself |= draws
        reference = self._twins.reference.tensors
        moved = reference.moved_in_window.clone() if self._records_run else None
        now = self._gradients.now
        if self.follows_updates:
            self._twins.follow(self._run.gather())
            if self._shows_run:
                self._run.note_gradients(now.values, now.found_inf)
        else:
            with self._following_updates_after_an_error(optimizer):
                if has_new_layers := self._has_new_layers:
                    self._read_states(optimizer, self._scales.find_unread())
                    self._has_new_layers = False
                self._twins.step(now, own, by_factory)
                self.has_new_states |= has_new_layers
        self._compare_with_run(optimizer)
        # Between two steps, a write would otherwise be taken for a part of the next step.
        self._run.is_watching |= self._records_run
        self._changes.remember(optimizer, self._stepped)
        if moved is not None and self._records_run:
            reference.replace_step(self._run.values, moved)

    def _compare_with_run(self, optimizer: Optimizer) -> None:
        """Count how the reference twin differs from the training, if this step is checked.

        The *reference twin* is a sample of the layers that is stepped just as the training is.
        """
        if not self._is_checked:
            return
        spacings = None
        if self._kind.is_stored:
            layers, weights = self._plan.layers, self._run.gather()
            # Scales of MX formats let the largest numbers clip, by up to two spacings.
            spacings = 2 * find_spacings(optimizer, layers, self._plan.layout, weights)
        self._counts = self._run.check(self._twins.reference.tensors, spacings)

    def take_counts(self) -> Tensor:
        """Return by how much the reference twin differed from the training in the last check.

        The reference twin is a sample that is stepped as the training is.

        Returns:
            float64 (layers, counts): the differences in each layer,
            `altgrad.twins.self_check.COUNTS`, on the device. Counts of weights that were taken over
            are 0 in a second call, as the first one has reported them.
        """
        counts, compared = self._counts, len(COUNTS) - 2
        self._counts = torch.cat(
            [counts[:, :compared], torch.zeros_like(counts[:, compared:])], dim=1
        )
        return counts

    def _read_states(self, optimizer: Optimizer, names: Collection[str]) -> None:
        """Read the largest magnitudes of the training's optimizer states, from which scales follow.

        Only states for which a recipe has a format are read, and averages of weights likewise.
        These scales are used where *twins*, samples stepped as recipes say, store states.

        Args:
            optimizer: The training's optimizer.
            names: Names of the layers whose states are read.
        """
        recipes = [twin.recipe for twin in self._twins.by_recipe.values()]
        wanted = {name for recipe in recipes for name in recipe.state_formats}
        if not wanted:
            return
        layers = {name: self._plan.layers[name] for name in names}
        states = find_whole_states(optimizer, layers, wanted)
        for key, name, average in self._averages.iterate_whole():
            if name in names and not wanted.isdisjoint((key, "*")):
                states.setdefault(key, {})[name] = average.detach()
        self._scales.read_states(states)

    def measure(self, optimizer: Optimizer, shown: Collection[str]) -> LaneSums:
        """Measure by how much twins differ from training in float32, and begin another window.

        It is called after an observed step, one whose figures are recorded.

        A window is the time since the last observed step; some figures are about it alone. A *twin*
        is a sample of the layers, stepped as a recipe says.

        Args:
            optimizer: The training's optimizer.
            shown: Names of the layers whose figures this step reports. Windows of others go on.

        Returns:
            The sums of all twins and the counts of the self-check, on the device.
        """
        self._follow_averages()
        self._read_states(optimizer, self.names)
        rows, reference = self._run.rows, self._twins.reference
        checks = self._averages.check(reference, rows, self._run.mask)
        counts = torch.cat([self.take_counts(), *checks], dim=1)
        stacks = {NOW: self._stack_run(optimizer)} if self._shows_run else {}
        stacks |= self._twins.stack(rows)
        states, values, bins = compare_twins(
            self._run,
            self._twins.fp32.stack(rows),
            stacks,
            is_alone=self.follows_updates and self._kind.is_low,
            most_elements=self._source.most_elements if self._source.is_shared else None,
        )
        is_shown = self._find_shown(shown)
        self._run.begin_window(is_shown)
        self._twins.begin_window(is_shown)
        layers = self._plan.layers.values()
        sizes = tuple(each.size for each in layers)
        populations = tuple(each.parameter.numel() for each in layers)
        return LaneSums(
            layers=self.names,
            recipes=tuple(stacks),
            states=states,
            values=values,
            counts=counts,
            sizes=sizes,
            populations=populations,
            blocks=self._run.block_counts,
            bins=bins,
        )

    def _stack_run(self, optimizer: Optimizer) -> TwinStack:
        """Return weights and states of the training itself, with a row for each layer."""
        if self._records_run:
            reference, layers = self._twins.reference, self._plan.layers
            weights = reference.tensors.weights
            states = gather_states(optimizer, layers, self._plan.layout, weights)
            return reference.tensors.stack(self._run.rows, {**reference.averages, **states})
        return self._twins.reference.stack(self._run.rows)

    def read_averages(self, counts: Numbers) -> None:
        """Correct or end the averages of weights that differ from the training's own.

        The *reference twin*, a sample that is stepped as the training is, keeps each average that
        the training keeps of its weights. `measure` compares the two. If they differ, twins take
        the training's average over; after a second time in a row, they keep it no longer.

        Args:
            counts: By how much they differ, on the host: four numbers for each average, float64
                (layers, 4 · averages), which `measure` appends to the counts of the weights.
        """
        self._averages.read(self._twins.reference, self.names, counts)

    def find_missing(self) -> dict[str, Collection[str]]:
        """Return for each recipe the layers with elements on this rank that no twin steps.

        A *twin* is a sample of the layers that is stepped as the recipe says. All layers miss the
        recipes whose twins have ended; all recipes miss the layers beyond the limits of a lane.

        Returns:
            Names of layers by name of the recipe.
        """
        ended, left_out = self._recipes - self._twins.by_recipe.keys(), self._plan.left_out
        every = {*self._recipes, NOW} if self._shows_run else self._recipes
        return {
            name: [*left_out, *(self.names if name in ended else ())]
            for name in (every if left_out else ended)
        }

    def _find_shown(self, names: Collection[str]) -> Tensor:
        """Return a mask, bool (elements): True for the sampled elements of the named layers.

        It is False everywhere if a GradScaler skipped the step.
        """
        flags = make_mask([name in names for name in self.names], self._kind.device)
        shown = flags[self._run.layer_rows]
        found_inf = self._gradients.now.found_inf
        return shown if found_inf is None else shown & (found_inf == 0)

    # --- endings

    def note_check(self, *, is_suspected: bool, are_found: bool) -> None:
        """Start or stop watching weights for writes that torch does not count, after a self-check.

        Args:
            is_suspected: True if the reference twin, which steps as the training does, differed
                from it before the step without a write that torch had counted.
            are_found: True if twins took over any weights of the training since the check before.
        """
        can_rest = not are_found and not self._records_run
        self._changes.note_check(is_suspected=is_suspected, can_rest=can_rest)

    def end_probe(self) -> bool:
        """Return False if the training's optimizer turns out to be unable to run on a sample.

        A *probe* is a twin (a sample of the layers) that has stepped beside another one, with
        other numbers at every second element. If this has changed the steps of the rest, the
        optimizer looks at whole tensors. The probe is dropped: a second call returns True. So does
        a call if there was no probe, or if twins have no optimizer.
        """
        return self.follows_updates or self._twins.end_probe()

    def begin_recording(self) -> None:
        """Have the reference twin copy the training's weights, now and after each step.

        The *reference twin* is a sample that an optimizer steps as it does the training. If the
        training rounds its weights otherwise than that optimizer, as compiled code may, the twin
        cannot reach the same weights by its own steps. This is called once that has been seen.
        """
        self.rounds_itself = self._run.is_watching = True
        reference = self._twins.reference.tensors
        reference.replace_step(self._run.gather(), torch.zeros_like(reference.moved_in_window))

    def follow_updates(
        self, optimizer: Optimizer, reason: str, *, is_measured: bool = False
    ) -> None:
        """Add the training's updates to the twins from now on, instead of stepping them.

        A *twin* is a sample of the layers that is stepped and stored as a recipe says. It cannot be
        stepped if the training's optimizer cannot run on a sample; then it is fed so, or ends.

        Args:
            optimizer: The training's optimizer.
            reason: The reason why the optimizer cannot run on a sample, for the notice.
            is_measured: True after `measure`, where another window has begun.
        """
        if self.follows_updates:
            return
        self._run.gather()
        if self._shows_run and not is_measured:
            now = self._gradients.now
            self._run.note_gradients(now.values, now.found_inf)
        # Last: where warnings are errors, all must be ready for the next step.
        self._twins.follow_updates(self._describe_run(optimizer), reason, is_measured=is_measured)

    @contextmanager
    def _following_updates_after_an_error(self, optimizer: Optimizer) -> Iterator[None]:
        """Run the code inside; after an error in it, call `follow_updates`.

        The twins, samples that are stepped as recipes say, then get the training's updates added to
        their weights, and step no optimizer. A later error is raised.

        Raises:
            Warning: The user made warnings errors.
        """
        try:
            yield
        except Warning:  # the user made warnings errors
            raise
        except Exception as error:
            if self.follows_updates:
                raise
            kind = type(optimizer).__name__
            self.follow_updates(
                optimizer, f"{kind} cannot run on a sample: {describe_failure(error)}"
            )

    # --- scales, memory, state

    def scales_changed(self) -> None:
        """Compute scales anew when next needed, since the amax (largest magnitude) has changed."""
        self._scales.forget_amaxes()
        self._twins.forget_amaxes()

    def nbytes(self) -> int:
        """Return the memory of the lane in bytes: samples, gradients and twins."""
        indices = sum(each.indices.nbytes for each in self._plan.layers.values())
        own = self._gradients.now.values.nbytes + self._run.nbytes()
        return indices + own + self._twins.nbytes()

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state that a resumed run needs to continue exactly.

        Args:
            optimizer: The training's optimizer.

        Returns:
            A dict of plain data and tensors: samples, twins, the amaxes from which scales follow,
            and names of layers that something besides the optimizer has written to.
        """
        changes = self._changes.state_dict(optimizer, self._stepped, self._twins.reference)
        self._follow_averages()
        return {
            **self._plan.state_dict(optimizer),
            "recipes": sorted(self.recipes),
            "rounds_itself": self.rounds_itself,
            "late": copy.deepcopy(self._late),
            **changes,
            "run": self._run.state_dict(),
            "state_amaxes": self._scales.state_dict(),
            "averages": self._averages.state_dict(),
            **self._twins.state_dict(),
        }

    def describe_samples(
        self, optimizer: Optimizer, stepped: Sequence[Stepped]
    ) -> dict[str, SampledNow]:
        """Return the elements of each layer that this rank is going to step, by name.

        Args:
            optimizer: The training's optimizer.
            stepped: The layers of this lane.

        Returns:
            The elements by name of the layer.
        """
        return self._plan.describe_samples(optimizer, stepped)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the samples of the lane's layers and all twins, before the first step.

        A *twin* is such a sample, stepped and stored as a recipe says. It ends after an error;
        twins that had ended when the state was saved stay ended.

        Args:
            state: A result of `state_dict` whose recipes include those of this lane.
        """
        self._changes.load_state_dict(state)
        self._late = copy.deepcopy(state["late"])
        self.rounds_itself = state["rounds_itself"]
        self._plan.load_state_dict(state)
        self._scales.load_state_dict(state["state_amaxes"])
        self._averages.load_state_dict(state["averages"])
        self._run.load_state_dict(state["run"], self._plan.layout)
        self._twins.load_state_dict(state, self._plan.layout)


def _join(earlier: Changes, later: Changes) -> Changes:
    """Return two sets of hyperparameter changes as one; the later value wins."""
    if not earlier:
        return later
    return {
        number: {**earlier.get(number, {}), **later.get(number, {})}
        for number in (*earlier, *later)
    }
