"""`LaneTwins`: the twins of a lane, and what happens when one of them fails.

A *twin* is a sample of the layers of the *run*, the training that is watched, stepped and stored as
a recipe says. A *lane* is a set of layers whose samples lie in one tensor. It has a twin for each
recipe, and two more: the *reference twin* steps as the run does, and the *baseline* in float32. A
twin that raises an error ends. If the reference twin cannot step as the run does, no twin can: all
add the updates of the run from then on, or end.

Where the run rounds by itself, a reference twin of an unsuitable optimizer may look right. There, a
*probe* steps beside the baseline: a second twin in float32, with every second weight and gradient
doubled. If an element that was not doubled steps otherwise than in the baseline, the optimizer
looks at whole tensors, and cannot run on a sample.

Read `stored_layers` first; `lane_sums` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from altgrad._messages import few
from altgrad.measurement.twin_sums import TwinStack
from altgrad.observation.observer import describe_error
from altgrad.recipes.optimizer_maker import CannotMakeError
from altgrad.recipes.recipe import Recipe
from altgrad.twins.element_scales import ElementScales
from altgrad.twins.flat_state import NotElementwiseError
from altgrad.twins.hyperparameters import Changes
from altgrad.twins.layer_plan import LaneKind
from altgrad.twins.layout import Layout
from altgrad.twins.optimizer_copy import CannotCopyError
from altgrad.twins.optimizer_twin import Gradients, OptimizerTwin
from altgrad.twins.twin import Arrangement, Twin, UpdateTwin


class LaneTwins:
    """The twins of layers with one dtype, gradient dtype, device and block size.

    A *twin* is a sample of the layers that is stepped as a recipe says.

    Args:
        kind: The properties that the layers share.
        recipes: The recipes, each of which has a twin.
        scales: The scales of the sampled elements, for formats that have scales.
        seed: Seed of stochastic rounding, and of all that optimizers draw.
        warn: Function that is called with each notice for the user.

    Attributes:
        by_recipe: The twins that have not ended, by name of the recipe.
        reference: The *reference twin*, which steps as the training does.
        follows_updates: True if each twin gets the updates of the training added to its weights,
            and steps no optimizer.
    """

    def __init__(
        self,
        kind: LaneKind,
        recipes: Sequence[Recipe],
        scales: ElementScales,
        seed: int,
        warn: Callable[[str], None],
    ) -> None:
        self._kind = kind
        self._warn = warn
        self._make = (kind.dtype, scales, seed)  # what each twin is made of
        self.reference: Twin = OptimizerTwin(Recipe("run", dtype=kind.dtype), *self._make)
        self._baseline: Twin | None = None  # unless the run is low, the reference stands for it
        self._probe: Twin | None = None  # until the first check
        if kind.is_low:
            # Of one name, as the seeds of random numbers follow from names.
            self._baseline, self._probe = (
                OptimizerTwin(Recipe("fp32"), *self._make) for _ in range(2)
            )
        self.by_recipe: dict[str, Twin] = {r.name: OptimizerTwin(r, *self._make) for r in recipes}
        self.follows_updates = False

    @property
    def fp32(self) -> Twin:
        """The *baseline*: the twin in float32, with which the twins of all recipes are compared.

        A *twin* is a sample of the layers that is stepped and stored as a recipe says. Unless the
        training itself stores numbers in less than float32, the baseline is the twin that steps as
        the training does.
        """
        return self._baseline or self.reference

    @property
    def all(self) -> list[Twin]:
        """The reference twin, the baseline if there is one, and the twins of the recipes.

        The reference twin steps as the training does; the baseline steps in float32.
        """
        others = [] if self._baseline is None else [self._baseline]
        return [self.reference, *others, *self.by_recipe.values()]

    @property
    def summing(self) -> list[Recipe]:
        """The recipes with `accumulate`, the format in which their twins add up gradients.

        A *twin* is a sample of the layers that is stepped as a recipe says. Recipes whose twins
        have ended after an error are left out.
        """
        recipes = [twin.recipe for twin in self.by_recipe.values()]
        return [each for each in recipes if each.accumulate is not None]

    # --- one step

    def rearrange(self, new: Arrangement) -> None:
        """Give all twins, samples stepped as recipes say, other places in their flat tensors.

        Args:
            new: The places, and the state of the training.
        """
        for twin in self.all:
            self._try(twin, partial(twin.rearrange, new))
        if self._probe is not None:
            self._probe.rearrange(new._replace(weights=_change_every_second(new.weights)))

    def replace_weights(self, changed: Tensor, weights: Tensor) -> None:
        """Let all twins, samples stepped as recipes say, take over some weights of the training.

        Args:
            changed: True for the weights that are taken over, bool (elements).
            weights: The weights of the training, (elements).
        """
        for twin in self.all:
            twin.replace_weights(changed, weights)

    def step(self, gradients: Gradients, own: Changes, by_factory: Changes) -> None:
        """Step the optimizers of all twins, samples of the layers, with the sampled gradients.

        Args:
            gradients: The gradients of the training.
            own: Hyperparameters that were changed, for optimizers of the training's class.
            by_factory: The same for optimizers that the function in a recipe makes.
        """
        for twin in self.all:
            changes = own if twin.recipe.optimizer is None else by_factory
            self._try(twin, partial(_step, twin, gradients, changes))
        if self._probe is not None:
            others = gradients._replace(values=_change_every_second(gradients.values))
            _step(self._probe, others, own)

    def end_probe(self) -> bool:
        """Find out whether the training's optimizer can run on a sample of a layer; drop the probe.

        A *probe* is a twin (a sample of the layers) that has stepped beside the twin in float32,
        with other numbers at every second element. If this has changed the steps of the other
        elements, the optimizer looks at whole tensors. The host waits for the device.

        Returns:
            False if a step depends on other elements. True if not, or if there is no probe, as
            after the first call, or in a training that keeps all that float32 does.
        """
        probe, self._probe = self._probe, None
        if probe is None:
            return True
        differ = probe.tensors.weights != self.fp32.tensors.weights
        both_nan = probe.tensors.weights.isnan() & self.fp32.tensors.weights.isnan()
        return not (differ & ~both_nan)[::2].any().item()

    def follow(self, weights: Tensor) -> None:
        """Add the update of the training's last step to all twins, samples of the layers.

        Args:
            weights: The weights of the training after the step, (elements).
        """
        reference = self.reference.tensors
        update = weights - reference.weights
        for twin in self.all:
            assert isinstance(twin, UpdateTwin)
            twin.take_update(update)
        reference.weights.copy_(weights)  # w + (v − w) may differ from v

    def find_missed(self, late: Changes) -> Changes:
        """Return hyperparameters that a step of the training changed, but that of its copy did not.

        The copy is the optimizer of the *reference twin*, a sample of the layers that is stepped as
        the training is. What it did not change, a hook has changed.

        Args:
            late: All that were changed while the training stepped.
        """
        if not late or not isinstance(self.reference, OptimizerTwin):
            return {}
        return self.reference.find_unmade(late)

    def begin_window(self, shown: Tensor) -> None:
        """Begin another window in all twins, the time between two steps that are recorded.

        A *twin* is a sample of the layers.

        Args:
            shown: bool (elements), False for layers whose window goes on.
        """
        for twin in self.all:
            twin.tensors.begin_window(shown)

    def stack(self, rows: Tensor) -> dict[str, TwinStack]:
        """Return weights, averages and optimizer states of the twin of each recipe, as matrices.

        A *twin* is a sample of the layers that is stepped as a recipe says. A twin whose states
        cannot be read ends with a notice.

        Args:
            rows: Positions of the elements in the flat tensors, int64 (layers, width).

        Returns:
            The matrices, (layers, width), by name of the recipe.
        """
        stacks: dict[str, TwinStack] = {}

        def add(twin: Twin) -> None:
            stacks[twin.recipe.name] = twin.stack(rows)

        for twin in [*self.by_recipe.values()]:
            self._try(twin, partial(add, twin))
        return stacks

    def find_names(self) -> dict[str, set[str]]:
        """Return the names of states and averages that twins have, for recipes that name some.

        A *twin* is a sample of the layers that is stepped and stored as a recipe says. One without
        any state may have had no gradient yet, and is left out, unless its recipe has an optimizer
        of its own.

        Returns:
            The names, by name of the recipe.
        """
        found: dict[str, set[str]] = {}

        def add(twin: Twin) -> None:
            if twin.states or twin.recipe.optimizer is not None:
                found[twin.recipe.name] = twin.states.keys() | twin.averages.keys()

        for twin in [*self.by_recipe.values()]:
            if twin.recipe.state_formats.keys() - {"*"}:
                self._try(twin, partial(add, twin))
        return found

    # --- endings

    def follow_updates(self, new: Arrangement, reason: str, *, is_measured: bool = False) -> None:
        """Replace the twins by some that add the training's updates, and need no optimizer.

        A *twin* is a sample of the layers that is stepped and stored as a recipe says. It cannot be
        stepped if the training's optimizer cannot run on a sample.

        Twins end if their recipes say more than how weights are stored. All twins end if the
        training itself stores numbers in less than float32: the one to compare them with ends, too.

        Args:
            new: The places of the sampled elements, with the weights of the training now.
            reason: The reason why the training's optimizer cannot run on a sample, for the notice.
            is_measured: True after a step whose figures were computed, when another window has
                begun, the time until the next such step.
        """
        names, reference = self._choose_followers(), self.reference
        gone = sorted(self.by_recipe.keys() - {*names})
        if self._baseline is not None:
            gone.append(self._baseline.recipe.name)
        self._make_followers(names)
        for twin in self.all:
            twin.rearrange(new)
        if self._kind.is_low and reference.layout == new.layout:
            # The training itself is compared with its start, which is that of the earlier twin.
            tensors = self.reference.tensors = reference.tensors
            if is_measured:
                tensors.window.copy_(new.weights)
                tensors.before.copy_(new.weights)
            tensors.replace_step(new.weights, tensors.window != new.weights)
        # Last: where warnings are errors, the twins must be ready for the next step.
        if gone:
            self._warn(f"ends the twins of {few(gone)}: {reason}")
        if names:
            self._warn(f"feeds the twins of {few(names)} with the updates of the run: {reason}")

    def _choose_followers(self) -> list[str]:
        """Return the names of the recipes whose twins can add the training's updates instead.

        A *twin* is a sample of the layers that is stepped as a recipe says. Without an optimizer of
        its own, it can go on if the recipe says only how weights are stored. None can if the
        training itself stores numbers in less than float32.
        """
        if self._kind.is_low:  # the run has no weights in float32 to compare with
            return []
        return [name for name, twin in self.by_recipe.items() if twin.recipe.only_weights]

    def _make_followers(self, names: Sequence[str]) -> None:
        """Replace all twins by `UpdateTwin`s, to which the training's updates are added.

        A *twin* is a sample of the layers that is stored as a recipe says. The new ones step no
        optimizer. Twins of other recipes, and that in float32, are dropped.

        Args:
            names: Names of the recipes whose twins go on.
        """
        recipes = [self.by_recipe[name].recipe for name in names]
        self.by_recipe = {each.name: UpdateTwin(each, *self._make) for each in recipes}
        self.reference = UpdateTwin(Recipe("run", dtype=self._kind.dtype), *self._make)
        self._baseline = self._probe = None
        self.follows_updates = True

    def _try(self, twin: Twin, act: Callable[[], object]) -> None:
        """Call a function that acts on a twin; after an error, end that twin with a notice.

        A *twin* is a sample of the layers that is stepped as a recipe says.

        Errors of the reference twin and the baseline are raised, since all others need these.

        Raises:
            Warning: The user made warnings errors.
        """
        try:
            act()
        except Warning:  # the user made warnings errors
            raise
        except Exception as error:
            if twin is self.reference or twin is self._baseline:
                raise
            self.end(twin.recipe.name, error)

    def end(self, name: str, error: Exception) -> None:
        """End the twin of a recipe, a sample of the layers, with a notice of its error.

        Args:
            name: Name of the recipe.
            error: The error.
        """
        self.by_recipe.pop(name, None)
        self._warn(f"ends the twin of {name}: {describe_failure(error)}")

    # --- scales, memory, state

    def forget_amaxes(self) -> None:
        """Drop the largest magnitudes from which twins compute scales, to be read anew when needed.

        A *twin* is a sample of the layers; a scale is the factor between stored numbers and values.
        """
        for twin in self.all:
            twin.forget_amaxes()

    def nbytes(self) -> int:
        """Return the memory of all twins, samples of the layers, in bytes."""
        return sum(twin.nbytes() for twin in self.all)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all twins, samples stepped as recipes say, for a checkpoint."""
        return {
            "follows_updates": self.follows_updates,
            "reference": self.reference.state_dict(),
            "baseline": None if self._baseline is None else self._baseline.state_dict(),
            "twins": {name: twin.state_dict() for name, twin in self.by_recipe.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], layout: Layout) -> None:
        """Restore all twins from a checkpoint, before the first step.

        A *twin* is a sample of the layers that is stepped and stored as a recipe says. It ends
        after an error; twins that had ended when the state was saved stay ended.

        Args:
            state: A dict with the entries of a result of `state_dict`, and perhaps others.
            layout: The places of the samples in flat tensors when the state was saved.
        """
        twins, self._probe = state["twins"], None
        self.by_recipe = {name: each for name, each in self.by_recipe.items() if name in twins}
        if state["follows_updates"]:
            self._make_followers(self._choose_followers())
        saved = [(self.reference, state["reference"]), (self._baseline, state["baseline"])]
        saved += [(twin, twins[name]) for name, twin in self.by_recipe.items()]
        for twin, each in saved:
            if twin is not None and each is not None:
                twin.load_state_dict(layout, each, self._kind.device)


def describe_failure(error: Exception) -> str:
    """Return the text of an error for a notice, with type and place unless it names a remedy."""
    has_remedy = isinstance(error, (CannotCopyError, CannotMakeError, NotElementwiseError))
    return str(error) if has_remedy else describe_error(error)


def _change_every_second(numbers: Tensor) -> Tensor:
    """Return a copy in which each second element is twice as large, from (elements)."""
    changed = numbers.clone()
    changed[1::2] *= 2
    return changed


def _step(twin: Twin, gradients: Gradients, changes: Changes) -> None:
    assert isinstance(twin, OptimizerTwin)
    twin.follow(changes)
    twin.step(gradients)
