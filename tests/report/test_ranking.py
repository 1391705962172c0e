"""The order of layers in tables: those that stand still or are NaN first."""

import math

from altgrad.report import Advice, Assessment, Verdict, find_frozen, list_lost, rank_layers
from tests.report.twin_runs import make_run_advice

FINE, FROZEN, STUCK = Verdict.STORES_FINE, Verdict.FROZEN, Verdict.STUCK


def assess(**layers: dict[str, tuple[Verdict, float]]) -> Assessment:
    """Make the verdicts of layers, each given by recipe with the share that is kept."""
    advice = [
        Advice(layer, recipe, verdict, {"progress_kept": kept}, {}, "")
        for layer, by_recipe in layers.items()
        for recipe, (verdict, kept) in by_recipe.items()
    ]
    runs = {each.recipe: make_run_advice(each.recipe, each.verdict) for each in advice}
    return Assessment(runs, advice, {}, "")


def test_a_layer_that_stands_still_is_before_one_that_keeps_less() -> None:
    found = assess(
        slow={"bf16": (Verdict.NEEDS_REMEDY, 0.1)},
        stuck={"bf16": (STUCK, 0.6)},
        broken={"bf16": (Verdict.BREAKS, math.nan)},
        fine={"bf16": (FINE, 1.0)},
    )
    assert [*rank_layers(found)] == ["stuck", "broken", "slow", "fine"]
    assert list_lost(found) == ["stuck", "broken"]


def test_of_a_run_that_is_stored_low_only_what_it_loses_now_puts_a_layer_first() -> None:
    found = assess(
        later={"now": (FINE, 1.0), "e5m2": (FROZEN, 0.0)},
        slow={"now": (Verdict.NEEDS_REMEDY, 0.1), "e5m2": (FINE, 1.0)},
        stuck={"now": (STUCK, 0.6), "e5m2": (FINE, 1.0)},
    )
    assert [*rank_layers(found)] == ["stuck", "slow", "later"]
    assert list_lost(found) == ["stuck"]


def test_the_verdicts_of_each_layer_are_kept() -> None:
    found = assess(a={"bf16": (FINE, 1.0), "e5m2": (FROZEN, 0.0)}, b={"bf16": (FINE, 0.99)})
    assert rank_layers(found) == found.by_layer


def test_the_frozen_layers_are_those_of_one_recipe_that_never_moved() -> None:
    found = assess(
        a={"bf16": (FROZEN, 0.0), "e5m2": (FINE, 1.0)},
        b={"bf16": (STUCK, 0.5), "e5m2": (FROZEN, 0.0)},
        c={"bf16": (FINE, 1.0)},
    )
    assert (find_frozen(found, "bf16"), find_frozen(found, "e5m2")) == ({"a"}, {"b"})
    assert find_frozen(found, "mxfp8") == set()
