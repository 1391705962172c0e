"""Choose for each layer the recipe that keeps most of the progress within a budget of memory.

A *recipe* says how weights and optimizer states are stored, and a twin tells what a layer keeps of
its progress in it. `make_plan` collects the options of each layer, and `choose` picks one of each:
it goes from float32 to smaller options, those first that lose the least progress per byte saved.

Read `memory` and `judging.verdicts` first; `plan_code` writes code that applies a plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from altgrad._messages import few
from altgrad.quantization.block_formats import get_formats
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.tallies import FROZEN
from altgrad.report.judging.verdicts import Advice, Assessment, Verdict
from altgrad.report.memory import format_bytes, list_counted, measure_fp32, measure_layer
from altgrad.report.records.run import Run
from altgrad.report.records.schema import LayerInfo, RecipeInfo

FP32 = "fp32"
_MOVED = "moved_rms"
_TIERS = (
    (Verdict.STORES_FINE,),
    (Verdict.WATCH, Verdict.UNCERTAIN),
    (Verdict.NEEDS_REMEDY,),
)
"""Verdicts with which a layer may be stored. Those of a later line count only if the budget cannot
be met without them; a layer with any other verdict is not stored so."""
_DECISIVE = 2
"""Number of layers for which `choose` tries every option: the 2 with the most bytes in float32, and
the 2 with the highest weight in the progress of the model."""
_SAME, _FEW = 0.01, 2
"""Progress that a simpler plan may lose, and the number of recipes up to which it is simple."""
_FROZEN_LIMIT = calibration().thresholds.frozen


class PlanError(ValueError):
    """An error that says in one sentence why there is no plan, and what to do."""


class Option(NamedTuple):
    """A way to store a layer.

    Attributes:
        recipe: Name of the recipe; ``fp32`` for the layer in float32.
        kept: Share of the layer's progress that is kept.
        bytes: Bytes that the layer takes.
        verdict: The verdict on the layer; None in float32.
    """

    recipe: str
    kept: float
    bytes: float
    verdict: Verdict | None = None

    @property
    def lost(self) -> float:
        """The distance of `kept` from 1: a layer that moves too far is off by as much."""
        return abs(1 - self.kept)


class Planned(NamedTuple):
    """A layer in a plan.

    Attributes:
        layer: Name of the layer.
        option: How it is stored.
        fp32_bytes: Bytes that it takes in float32.
        weight: How much it counts in the progress of the model: the square of the distance that
            float32 moves its weights.
    """

    layer: str
    option: Option
    fp32_bytes: float
    weight: float


@dataclass(frozen=True)
class Plan:
    """A choice of a recipe for each layer, with the memory and the progress that it comes to.

    Attributes:
        budget: Share of float32's bytes that the plan may take.
        layers: The layers, in the order of the run.
        recipes: The chosen recipes by name, without ``fp32``.
        left_out: Recipes of the run that cannot be chosen by layer: the reason by name.
        by_movement: True if layers count by the distance that float32 moves them. False if a
            distance is unknown, and they count by their number of weights.
    """

    budget: float
    layers: Sequence[Planned]
    recipes: Mapping[str, RecipeInfo]
    left_out: Mapping[str, str]
    by_movement: bool

    @property
    def bytes(self) -> float:
        """The bytes that the layers take."""
        return math.fsum(each.option.bytes for each in self.layers)

    @property
    def fp32_bytes(self) -> float:
        """The bytes that the layers take in float32."""
        return math.fsum(each.fp32_bytes for each in self.layers)

    @property
    def kept(self) -> float:
        """The share of the model's progress that is kept, if layers do not depend on each other."""
        weights = math.fsum(each.weight for each in self.layers)
        return math.fsum(each.weight * each.option.kept for each in self.layers) / weights

    @property
    def chosen(self) -> dict[str, str]:
        """The name of the recipe by layer."""
        return {each.layer: each.option.recipe for each in self.layers}


def make_plan(run: Run, assessment: Assessment, budget: float) -> Plan:
    """Choose for each layer the recipe that keeps most of the progress within a budget.

    A layer is not stored by a recipe in which it freezes, gets stuck, moves too far or becomes NaN,
    nor if its sample leaves open that it freezes. Recipes whose verdict on a layer is worse than
    *fine* are used only if the budget cannot be met without, *remedy* last. One or two recipes
    are preferred to many if they keep as much of the progress, but for 0.01.

    Args:
        run: The run, which tried recipes on samples of its layers.
        assessment: Verdicts on its layers.
        budget: Share, above 0 and up to 1, of the bytes of weights and states in float32.

    Returns:
        The plan.

    Raises:
        PlanError: The budget is out of range or too small, or the run lacks what a plan needs.
    """
    if not 0 < budget <= 1:
        raise PlanError(f"budget={budget:g}: expected a share above 0, at most 1; pass 0.6")
    if not run.recipes:
        raise PlanError(f"{run.path}: expected a run with recipes; train with recipes=[…]")
    left_out = {name: why for name, each in run.recipes.items() if (why := explain_left_out(each))}
    recipes = {name: each for name, each in run.recipes.items() if name not in left_out}
    counted = list_counted(run.layers)
    layers = {name: _list_options(run, assessment, name, recipes) for name in counted}
    fp32 = {name: options[0].bytes for name, options in layers.items()}
    if not layers or any(map(math.isnan, fp32.values())):
        raise PlanError(
            f"{run.path}: the sizes of optimizer states are unknown; observe a step with "
            "altgrad.watch, PrecisionMonitor or PrecisionCallback, which write them"
        )
    if not any(math.prod(layer.shape) for layer in counted.values()):
        raise PlanError(f"{run.path}: expected a layer with weights; all are of size 0")
    weights, by_movement = _weigh(run, counted)
    most = budget * math.fsum(fp32.values())
    chosen = _choose_by_tiers([*layers.values()], [*weights.values()], most)
    size = _count_bytes(chosen)
    if size > most:
        raise PlanError(
            f"budget={budget:g}: expected at least {_round_up(size / math.fsum(fp32.values())):g}, "
            f"the smallest possible ({format_bytes(size)}), with the recipes that this run tried "
            "and without layers that freeze; pass that, or train with smaller recipes"
        )
    planned = [
        Planned(name, option, fp32[name], weights[name])
        for name, option in zip(layers, chosen, strict=True)
    ]
    used = {each.recipe for each in chosen}
    kept = {name: each for name, each in recipes.items() if name in used}
    return Plan(budget, planned, kept, left_out, by_movement)


def explain_left_out(recipe: RecipeInfo) -> str:
    """Return why a recipe cannot be chosen for single layers; empty if it can.

    Formats of weights and states are chosen by layer, by a `WeightStorage` for each way to round.
    Parameters in bfloat16 can stand beside others in float32, if the forward pass runs under
    autocast. What replaces or changes the optimizer changes it for all layers.

    Args:
        recipe: The recipe.
    """
    if recipe.optimizer is not None or recipe.fused:
        return "it replaces the optimizer of all layers"
    if recipe.accumulate is not None:
        return "gradients are added up in one format for all layers"
    if recipe.dtype not in (None, "bfloat16", "float32"):
        return f"autocast does not mix parameters in {recipe.dtype} with others"
    if recipe.dtype is not None and (recipe.weights or recipe.states):
        return "it has formats beside a dtype"
    names = {recipe.weights, *recipe.states.values()} - {None}
    if unknown := [name for name in names if name is not None and not _is_known(name)]:
        return f"the format {few(unknown)} is not one of AltGrad's"
    return ""


def _is_known(format: str) -> bool:
    try:
        get_formats(format)
    except ValueError:
        return False
    return True


def choose(
    layers: Sequence[Sequence[Option]], weights: Sequence[float], most_bytes: float
) -> list[Option]:
    """Choose one option for each layer: much progress in at most some number of bytes.

    `_descend` chooses greedily, which is far from the best only if one layer decides whether the
    bytes fit. It is therefore repeated with each option of the layers that are the largest or count
    the most, and the best choice is taken. If nothing fits, the result is the smallest possible.

    Args:
        layers: The options of each layer; the first of each keeps all.
        weights: How much each layer counts in the progress.
        most_bytes: Largest number of bytes.

    Returns:
        An option for each layer, in order.
    """
    choices = [_descend(layers, weights, most_bytes)]
    by_size = sorted(range(len(layers)), key=lambda k: -layers[k][0].bytes)
    by_weight = sorted(range(len(layers)), key=lambda k: -weights[k])
    for place in {*by_size[:_DECISIVE], *by_weight[:_DECISIVE]}:
        for option in layers[place]:
            fixed = [*layers[:place], [option], *layers[place + 1 :]]
            choices.append(_descend(fixed, weights, most_bytes))
    fitting = [each for each in choices if _count_bytes(each) <= most_bytes]
    return min(fitting, key=lambda each: _find_lost(each, weights), default=choices[0])


def _descend(
    layers: Sequence[Sequence[Option]], weights: Sequence[float], most_bytes: float
) -> list[Option]:
    """Choose one option for each layer greedily.

    Starting from the first options, the layer changes next that loses the least progress per byte
    saved, until the bytes fit. Then layers get back better options that still fit, those first
    that win the most.

    Args:
        layers: The options of each layer; the first of each keeps all.
        weights: How much each layer counts in the progress.
        most_bytes: Largest number of bytes.

    Returns:
        An option for each layer, in order.
    """
    chosen = [options[0] for options in layers]
    size = _count_bytes(chosen)
    steps = [step for k, options in enumerate(layers) for step in _list_steps(k, options, weights)]
    for _, place, option in sorted(steps, key=lambda step: step[0]):
        if size <= most_bytes:
            break
        size += option.bytes - chosen[place].bytes
        chosen[place] = option
    return _give_back(layers, weights, chosen, most_bytes)


def _list_steps(
    place: int, options: Sequence[Option], weights: Sequence[float]
) -> list[tuple[float, int, Option]]:
    """Return the steps of a layer from its first option to its smallest, by what each costs.

    The options of these steps are the lower convex hull over bytes and lost progress: each costs
    more per byte than the one before, so that sorting steps of all layers keeps their order.

    Args:
        place: Number of the layer.
        options: The layer's options.
        weights: How much each layer counts.

    Returns:
        For each step the progress lost per byte saved, the number of the layer, and the option.
    """
    steps: list[tuple[float, int, Option]] = []
    now = options[0]
    while smaller := [each for each in options if each.bytes < now.bytes]:
        rates = [weights[place] * (o.lost - now.lost) / (now.bytes - o.bytes) for o in smaller]
        rate = min(rates)
        # Of options that cost the same per byte, the smallest makes the fewest steps.
        now = min(
            (o for o, each in zip(smaller, rates, strict=True) if each == rate),
            key=lambda option: option.bytes,
        )
        steps.append((rate, place, now))
    return steps


def _give_back(
    layers: Sequence[Sequence[Option]],
    weights: Sequence[float],
    chosen: list[Option],
    most_bytes: float,
) -> list[Option]:
    """Give layers better options as long as the bytes fit, those first that win the most."""
    size = _count_bytes(chosen)
    wins = [
        (weights[k] * (now.lost - each.lost), k, each)
        for k, (options, now) in enumerate(zip(layers, chosen, strict=True))
        for each in options
        if each.lost < now.lost
    ]
    given = [*chosen]
    for _, place, option in sorted(wins, key=lambda win: -win[0]):
        now = given[place]
        if option.lost < now.lost and size - now.bytes + option.bytes <= most_bytes:
            size += option.bytes - now.bytes
            given[place] = option
    return given


def _choose_by_tiers(
    layers: Sequence[Sequence[Option]], weights: Sequence[float], most_bytes: float
) -> list[Option]:
    """Choose options with the best verdicts with which the bytes fit; else the smallest."""
    chosen: list[Option] = []
    for number in range(1, len(_TIERS) + 1):
        allowed = {None, *(verdict for tier in _TIERS[:number] for verdict in tier)}
        options = [[each for each in own if each.verdict in allowed] for own in layers]
        chosen = choose(options, weights, most_bytes)
        if _count_bytes(chosen) <= most_bytes:
            return _simplify(options, weights, most_bytes, chosen)
    return chosen


def _simplify(
    layers: Sequence[Sequence[Option]],
    weights: Sequence[float],
    most_bytes: float,
    chosen: list[Option],
) -> list[Option]:
    """Return a choice of fewer recipes that loses hardly more progress than `chosen`, or that.

    Samples hardly tell recipes apart that keep nearly the same, and each recipe more is code more.
    """
    most_lost = _find_lost(chosen, weights) + _SAME * math.fsum(weights)
    recipes = [*dict.fromkeys(each.recipe for own in layers for each in own[1:])]
    used = len({each.recipe for each in chosen} - {FP32})
    for count in range(min(used, _FEW + 1)):
        found = []
        for names in itertools.combinations(recipes, count):
            options = [[o for o in own if o is own[0] or o.recipe in names] for own in layers]
            simple = _descend(options, weights, most_bytes)
            if _count_bytes(simple) <= most_bytes and _find_lost(simple, weights) <= most_lost:
                found.append(simple)
        if found:
            return min(found, key=lambda each: _find_lost(each, weights))
    return chosen


def _count_bytes(options: Iterable[Option]) -> float:
    return math.fsum(each.bytes for each in options)


def _find_lost(options: Sequence[Option], weights: Sequence[float]) -> float:
    """Return the progress of the model that is lost if each layer has this option."""
    return math.fsum(w * each.lost for w, each in zip(weights, options, strict=True))


def _list_options(
    run: Run, assessment: Assessment, name: str, recipes: Mapping[str, RecipeInfo]
) -> list[Option]:
    """Return the options of a layer: float32 first, then recipes in which it goes on to move."""
    layer, advice = run.layers[name], assessment.by_layer.get(name, {})
    return [
        Option(FP32, 1.0, measure_fp32(layer).total),
        *(
            Option(recipe, advice[recipe].kept, measure_layer(layer, info).total, verdict)
            for recipe, info in recipes.items()
            if recipe != FP32 and recipe in advice
            if can_be_stored(advice[recipe])
            for verdict in [advice[recipe].verdict]
        ),
    ]


def can_be_stored(advice: Advice) -> bool:
    """Return True if a layer may be stored as a recipe says, by the verdict on both.

    The layer must not be frozen, stuck, NaN, out of range or move too far. If its sample cannot
    tell, the interval of `frozen_frac` must end below the threshold for *frozen*.
    """
    if not advice.has_twin or math.isnan(advice.kept):
        return False
    if advice.verdict is Verdict.UNCERTAIN:
        high = advice.interval(FROZEN)[1] if FROZEN in advice.errors else math.nan
        return high < _FROZEN_LIMIT
    return any(advice.verdict in tier for tier in _TIERS)


def _weigh(run: Run, layers: Mapping[str, LayerInfo]) -> tuple[dict[str, float], bool]:
    """Return how much each layer counts in the progress of the model, and whether by movement.

    The model's progress_kept is Σ ⟨moved, moved in fp32⟩ / Σ ‖moved in fp32‖², so that a layer
    counts by the square of the distance that float32 moves its weights. A layer without a twin has
    no distance and no options: it counts nothing, and stays in float32.

    Args:
        run: The run.
        layers: The layers that count.
    """
    sizes = {name: math.prod(layer.shape) for name, layer in layers.items()}
    moved = {name: _find_moved(run, name) for name in layers}
    weights = {
        name: 0.0 if math.isnan(moved[name]) else size * moved[name] ** 2
        for name, size in sizes.items()
    }
    if 0 < math.fsum(weights.values()) < math.inf:
        return weights, True
    return {name: float(size) for name, size in sizes.items()}, False


def _find_moved(run: Run, layer: str) -> float:
    """Return the root mean square of how far float32 has moved a layer's weights, at the end."""
    for recipe in run.recipes:
        if series := run.series(f"{_MOVED}/{recipe}", layer):
            return [*series.values()][-1]
    return math.nan


def _round_up(share: float) -> float:
    """Return a share rounded up to three decimals, so that a budget of it suffices."""
    return math.ceil(share * 1000) / 1000


def count_recipes(plan: Plan) -> dict[str, list[Planned]]:
    """Group the layers of a plan by recipe: by how weights and optimizer states are stored.

    Returns:
        The layers by name of the recipe: float32 first, then in the order of the run.
    """
    names: Iterable[str] = (FP32, *plan.recipes)
    groups = {name: [each for each in plan.layers if each.option.recipe == name] for name in names}
    return {name: each for name, each in groups.items() if each}
