"""The recipe of one run that says how another run is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from altgrad import Recipe, UpdateMonitor
from altgrad.recipes import get_recipes
from altgrad.recipes.libraries import LIBRARY_RECIPES
from altgrad.report import Header, RecipeInfo, Row, Run, read
from altgrad.report.matching import (
    describe_no_match,
    find_match,
    has_own_figures,
    list_matches,
    list_predicted,
)
from tests.report.confirming import (
    RECIPES,
    info,
    make_adamw,
    make_net,
    make_twin_run,
    share,
    write_trained,
)

BF16 = {"dtype": "bfloat16"}


def predicting(*recipes: RecipeInfo, now: RecipeInfo | None = None) -> Run:
    run = make_twin_run({}, "none", recipes={each.name: each for each in recipes})
    return replace(run, now=now or info())


def real(**now: Any) -> Run:
    return make_twin_run({}, now=info(**now))


# --- real runs


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return read(write_trained(tmp_path_factory.mktemp("fp32"), recipes=RECIPES))


@pytest.mark.parametrize(
    ("recipe", "run"),
    [
        ("bf16-true", {"dtype": torch.bfloat16}),
        ("bf16-true", {"dtype": torch.bfloat16, "make": make_adamw(foreach=True)}),
        ("bf16-true-fused", {"dtype": torch.bfloat16, "make": make_adamw(fused=True)}),
        *(
            (name, {"stored": get_recipes(name)[0]})
            for name in ("bf16", "bf16-sr", "bf16-kahan", "e4m3fn")
        ),
    ],
)
def test_a_real_run_is_matched_by_the_recipe_that_stores_it(
    tmp_path: Path, fp32: Run, recipe: str, run: dict[str, Any]
) -> None:
    low = read(write_trained(tmp_path, steps=6, **run))
    assert has_own_figures(low)
    assert list_matches(fp32, low) == [recipe]
    assert find_match(fp32, low) == (recipe, False)
    assert find_match(low, fp32) == (recipe, True)
    assert describe_no_match(fp32, fp32) == []


@pytest.mark.parametrize(
    "run",
    [
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "make": lambda each: torch.optim.SGD(each, lr=0.1)},
        {"stored": Recipe("mine", weights="e5m2")},
        {"stored": Recipe("mine", weights="bf16", states={"exp_avg_sq": "e5m2"})},
    ],
    ids=["fp16", "SGD", "e5m2", "states"],
)
def test_a_run_that_is_stored_otherwise_is_matched_by_none(
    tmp_path: Path, fp32: Run, run: dict[str, Any]
) -> None:
    low = read(write_trained(tmp_path, steps=6, **run))
    assert find_match(fp32, low) is None
    assert find_match(fp32, low, "bf16-sr") == ("bf16-sr", False)
    (note,) = describe_no_match(fp32, low)
    assert note == (
        "B is stored low, and A tried no recipe that stores it so: to see how far another recipe "
        f"of A predicts it, pass --recipe=NAME ({', '.join(RECIPES)})"
    )


def test_a_file_whose_header_was_made_too_early_is_matched_by_a_named_recipe(
    tmp_path: Path, fp32: Run
) -> None:
    path = write_trained(tmp_path, torch.bfloat16, steps=6, attaches_first=False)
    low = read(path)
    assert low.now is None
    assert find_match(fp32, low) is None
    assert find_match(fp32, low, "bf16-true") == ("bf16-true", False)
    assert (
        "A is stored low, but the file of A does not say how: to see"
        in describe_no_match(low, fp32)[0]
    )


def test_a_run_without_recipes_is_told_to_get_one(tmp_path: Path, fp32: Run) -> None:
    low = read(write_trained(tmp_path, torch.bfloat16, recipes=(), steps=6))
    assert not has_own_figures(low)
    assert list_predicted(low) == []
    assert find_match(fp32, low) is None
    (note,) = describe_no_match(low, fp32)
    assert note.startswith(
        "A is stored low, and was not compared with float32 (it has no frozen_frac"
    )


@pytest.mark.parametrize("name", LIBRARY_RECIPES)
def test_a_run_with_an_optimizer_of_a_library_is_matched_by_its_recipe(name: str) -> None:
    """Recipes for states in 8 bits keep weights in float32, and have no run to be matched."""
    try:
        (recipe,) = get_recipes(name)
    except ImportError as error:
        pytest.skip(str(error))
    described = Header.from_json(UpdateMonitor(make_net(), recipes=name).run_header()).recipes
    net = make_net().to(torch.bfloat16)
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    assert recipe.maker is not None
    optimizer = recipe.maker.make([*net.parameters()], group)
    monitor = UpdateMonitor(net, formats="e4m3fn", recipes=(), warn=lambda _: None)
    with monitor.attach(optimizer):
        now = Header.from_json(monitor.run_header()).now
    low = replace(make_twin_run({}), now=now)
    is_known = name in ("torchao-sr", "optimi-kahan")
    true = info("bf16-true", **BF16)
    assert list_matches(predicting(*described.values(), true), low) == ([name] if is_known else [])


# --- plain numbers


@pytest.mark.parametrize(
    ("recipe", "predicts", "now", "matches"),
    [
        ({"dtype": "bfloat16"}, {}, {"dtype": "bfloat16"}, True),
        ({"dtype": "bfloat16"}, {}, {"dtype": "float16"}, False),
        ({}, {}, {"dtype": "float32"}, True),
        ({}, {"dtype": "float64"}, {"dtype": "float64"}, True),
        ({}, {"dtype": "float64"}, {"dtype": "float32"}, False),
        ({"weights": "bf16"}, {"dtype": "bfloat16"}, {"weights": "bf16"}, True),
        # a fused optimizer rounds weights of 16 bits once, and float32 as others do
        ({"dtype": "bfloat16"}, {"fused": True}, {"dtype": "bfloat16", "fused": True}, True),
        ({"dtype": "bfloat16"}, {"fused": True}, {"dtype": "bfloat16"}, False),
        ({"dtype": "bfloat16", "fused": True}, {}, {"dtype": "bfloat16", "fused": True}, True),
        ({"weights": "bf16"}, {}, {"weights": "bf16", "fused": True}, True),
        ({"weights": "bf16"}, {}, {"weights": "bf16", "rounding": "stochastic"}, False),
        ({"weights": "bf16"}, {}, {"weights": "bf16", "compensation": "kahan"}, False),
        (
            {"weights": "bf16", "states": {"a": "e5m2", "*": "bf16"}},
            {},
            {"weights": "bf16", "states": {"*": "bf16", "a": "e5m2"}},
            True,
        ),
        ({"states": {"a": "e5m2"}}, {}, {"states": {"a": "e4m3fn"}}, False),
        ({"dtype": "bfloat16", "accumulate": "bf16"}, {}, {"dtype": "bfloat16"}, False),
        ({"dtype": "bfloat16"}, {"optimizer": "my.AdamW"}, {"dtype": "bfloat16"}, False),
        ({"dtype": "bfloat16"}, {"optimizer": None}, {"dtype": "bfloat16"}, True),
        ({"dtype": "bfloat16", "optimizer": "torch.optim.AdamW"}, {}, {"dtype": "bfloat16"}, True),
        ({"dtype": "bfloat16", "optimizer": "my.make"}, {}, {"dtype": "bfloat16"}, False),
    ],
)
def test_a_recipe_matches_a_run_that_is_stored_and_stepped_alike(
    recipe: dict[str, Any], predicts: dict[str, Any], now: dict[str, Any], matches: bool
) -> None:
    run = predicting(info("mine", **recipe), now=info(**predicts))
    assert list_matches(run, real(**now)) == (["mine"] if matches else [])


def test_several_matching_recipes_are_an_error_that_names_them() -> None:
    figures = {f"frozen_frac/{name}": 0.5 for name in ("bf16-true", "mine")}
    run = make_twin_run({"a": share(0.5, 0.5)}, "bf16-true")
    both = {name: info(name, **BF16) for name in ("bf16-true", "mine")}
    rows = [replace(row, figures={**row.figures, **figures}) for row in run.rows]
    run = replace(run, recipes=both, rows=rows)
    low = make_twin_run({"a": share(0.5, 0.5)}, letter="b")
    for runs in ((run, low), (low, run)):
        with pytest.raises(ValueError, match=r"predicts bf16-true, mine, and .*by --recipe"):
            find_match(*runs)
        assert find_match(*runs, "mine") == ("mine", runs[0] is low)


def test_the_first_run_predicts_if_both_could() -> None:
    figures = {"frozen_frac/now": 0.5, "frozen_frac/true": 0.5}
    rows = [Row(0, "a", figures, {})]
    recipes = {"true": info("true", **BF16)}
    one, other = (
        make_twin_run({"a": None}, letter=letter, recipes=recipes, rows=rows) for letter in "ab"
    )
    assert find_match(one, other) == find_match(other, one) == ("true", False)


def test_a_recipe_that_no_run_predicts_is_an_error_with_those_that_they_do() -> None:
    run = make_twin_run({"a": share(0.5, 0.5)}, "bf16-true")
    low = make_twin_run({"a": share(0.5, 0.5)}, letter="b")
    with pytest.raises(ValueError, match=r"^--recipe=x: expected a recipe .* predicts: bf16-true$"):
        find_match(low, run, "x")
    with pytest.raises(ValueError, match=r"expected a run with figures of itself, .*WeightStorage"):
        find_match(run, run, "bf16-true")
    assert describe_no_match(low, low) == []
