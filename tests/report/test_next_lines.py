"""Which recipes are proposed, in which order, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from altgrad import Recipe
from altgrad.report import Assessment, NextLine, RunReport, Verdict, list_next_lines
from altgrad.report.next_lines import write_next
from tests.report.next_runs import (
    FINE,
    REMEDY,
    WATCH,
    list_dtypes,
    make_advice,
    make_net,
    make_report,
    run_code,
    train,
)
from tests.report.runs import make_rows, make_run

NORMS = ["blocks.0.norm.weight", "blocks.1.norm.weight", "norm.weight"]


def list_recipes(report: RunReport) -> list[str]:
    return [*dict.fromkeys(line.recipe for line in list_next_lines(report))]


def list_titles(report: RunReport, recipe: str) -> list[str]:
    return [line.title for line in list_next_lines(report) if line.recipe == recipe]


def find_why(report: RunReport, recipe: str) -> str:
    (why,) = {line.why for line in list_next_lines(report) if line.recipe == recipe}
    return why


def test_the_recipe_with_the_fewest_bytes_comes_first_and_master_weights_last() -> None:
    report = make_report(*map(make_advice, ["bf16-sr", "bf16-true", "torchao-8bit"]))
    assert list_recipes(report) == ["bf16-true", "torchao-8bit", "bf16-sr", "fp32"]
    assert find_why(report, "bf16-true") == (
        "bf16-true: fine, keeps 1.00 of the progress in 6 bytes per parameter."
    )
    assert list_titles(report, "fp32") == ["PyTorch", "Lightning", "FSDP2"]


def write_first(report: RunReport) -> str:
    return write_next(report.run, report.assessment.runs)


def test_the_next_recipe_is_a_phrase_for_the_first_screen() -> None:
    saving = make_advice("bf16-true", saved_share=0.5)
    assert write_first(make_report(saving)) == ("bf16-true: fine, keeps 1.00, saves 50 %")
    unknown = make_report(make_advice("bf16-sr"))
    assert write_first(unknown) == "bf16-sr: fine, keeps 1.00"
    beside = make_advice("bf16-true", frozen=NORMS, frozen_share=0.01, saved_share=0.5)
    assert write_first(make_report(beside)) == (
        "bf16-true with 3 layers in float32: fine, keeps 1.00, saves 50 %"
    )
    lost = make_report(make_advice("e4m3fn", REMEDY))
    assert write_first(lost).startswith("fp32: master weights")
    assert write_first(RunReport(make_run([]), Assessment({}, [], {}, ""))) == ""


def test_of_as_many_bytes_the_one_that_keeps_most_comes_first() -> None:
    report = make_report(
        make_advice("bf16-true", kept=1.03), make_advice("bf16-true-fused", kept=0.99)
    )
    assert list_recipes(report) == ["bf16-true-fused", "bf16-true", "fp32"]


def test_recipes_that_only_a_simulation_has_come_after_those_of_libraries() -> None:
    report = make_report(*map(make_advice, ["e4m3fn-sr", "bf16-sr"]))
    assert list_recipes(report) == ["bf16-sr", "e4m3fn-sr", "fp32"]
    assert list_titles(report, "e4m3fn-sr") == ["Simulation", "Simulation with Lightning"]
    assert "No known library stores weights and states so." in find_why(report, "e4m3fn-sr")
    assert list_titles(report, "bf16-sr")[0] == "torchao"


def test_recipes_that_are_not_fine_are_not_proposed() -> None:
    advice = [make_advice("bf16", REMEDY, kept=0.1), make_advice("bf16-true", WATCH, kept=0.95)]
    report = make_report(*advice, make_advice("bf16-sr"))
    assert list_recipes(report) == ["bf16-sr", "fp32"]


def test_without_a_fine_recipe_those_to_watch_are_proposed() -> None:
    advice = [make_advice("bf16", REMEDY, kept=0.1), make_advice("bf16-sr", WATCH, kept=0.95)]
    report = make_report(*advice)
    assert list_recipes(report) == ["bf16-sr", "fp32"]
    assert find_why(report, "bf16-sr").startswith("bf16-sr: watch, keeps 0.95 of")


def test_without_any_recipe_master_weights_are_proposed() -> None:
    report = make_report(make_advice("bf16", REMEDY, kept=0.1))
    assert list_recipes(report) == ["fp32"]
    assert find_why(report, "fp32").endswith("No recipe that was tried is known to be fine.")


def test_a_fine_recipe_without_lines_is_not_denied() -> None:
    added_up = Recipe("sums", accumulate="bf16")
    report = make_report(make_advice("sums"), recipes=[added_up])
    assert list_recipes(report) == ["fp32"]
    assert find_why(report, "fp32").endswith(
        "No lines are known for sums, which is fine: write them as you wrote the recipe."
    )


def test_modules_whose_layers_freeze_are_kept_in_float32() -> None:
    report = make_report(make_advice("bf16-true", frozen=NORMS, frozen_share=0.01))
    assert find_why(report, "bf16-true").endswith(
        "; 3 layers freeze: keep their modules in float32."
    )
    code = next(line.code for line in list_next_lines(report) if line.title == "PyTorch")
    assert 'kept = ["blocks.*.norm", "norm"]' in code
    net = make_net()
    optimizer = run_code(code, net)["optimizer"]
    with torch.autocast("cpu", torch.bfloat16):
        train(net, optimizer)
    low = {name for name, dtype in list_dtypes(net).items() if dtype is torch.bfloat16}
    assert low == {name for name in list_dtypes(net) if "norm" not in name}
    one = make_report(make_advice("bf16-true", frozen=NORMS[:1]))
    assert "1 layer freezes: keep its module in float32." in find_why(one, "bf16-true")


def test_a_format_that_was_no_recipe_is_a_simulation_alone() -> None:
    rows = make_rows({"w.weight": {"bf16": 1.0, "e5m2": 0.1}})
    report = RunReport.from_run(make_run(rows))
    assert list_recipes(report) == ["bf16", "fp32"]
    assert list_titles(report, "bf16") == ["Simulation", "Simulation with Lightning"]
    assert "not tried over many steps" in find_why(report, "bf16")
    tried = make_report(make_advice("bf16-sr"), make_advice("e4m3fn", has_twin=False))
    assert list_recipes(tried) == ["bf16-sr", "fp32"]


@pytest.mark.parametrize(
    ("nearly", "exact", "title"),
    [("bf16-sr", "torchao-sr", "torchao"), ("bf16-kahan", "optimi-kahan", "optimi")],
)
def test_a_library_is_proposed_by_its_own_verdict(nearly: str, exact: str, title: str) -> None:
    assert title in list_titles(make_report(make_advice(nearly)), nearly)
    both = make_report(make_advice(nearly), make_advice(exact))
    assert list_recipes(both) == [exact, nearly, "fp32"]
    assert list_titles(both, exact) == [title]
    assert title not in list_titles(both, nearly)
    assert f"{exact} is what a library has" in find_why(both, nearly)
    bad = make_report(make_advice(nearly), make_advice(exact, REMEDY, kept=0.2))
    assert title not in [line.title for line in list_next_lines(bad)]


def test_both_in_one_optimizer_are_proposed_if_each_is_fine() -> None:
    both = make_report(make_advice("torchao-sr"), make_advice("torchao-8bit"))
    assert list_titles(both, "torchao-8bit") == ["torchao", "torchao, both"]
    assert list_titles(make_report(make_advice("torchao-8bit")), "torchao-8bit") == ["torchao"]


@pytest.mark.parametrize("name", ["sgd.SGD", "_muon.Muon", "_adafactor.Adafactor"])
def test_an_optimizer_that_no_library_has_is_simulated(name: str) -> None:
    report = make_report(make_advice("bf16-sr"), optimizers={f"torch.optim.{name}": 1})
    assert list_titles(report, "bf16-sr") == ["Simulation", "Simulation with Lightning"]
    assert find_why(report, "bf16-sr").endswith(
        f"torchao rounds stochastically in Adam and AdamW alone, and this run has "
        f"{name.rpartition('.')[2]}."
    )


def test_a_recipe_without_a_twin_is_not_proposed_as_if_it_had_been_tried() -> None:
    report = make_report(make_advice("bf16-true", has_twin=False), recipes=["bf16-true"])
    assert list_recipes(report) == ["fp32"]
    ended = make_report(make_advice("bf16", has_twin=False), recipes=["bf16"])
    assert "not tried over many steps" in find_why(ended, "bf16")


# --- a run that is stored low


def make_low(verdict: Any, *advice: Any, kept: float = 1.0) -> RunReport:
    return make_report(make_advice("now", verdict, kept=kept), *advice, dtype="bfloat16")


def test_a_run_that_loses_updates_gets_remedies_and_master_weights() -> None:
    report = make_low(REMEDY, make_advice("bf16-sr"), kept=0.2)
    assert list_recipes(report) == ["bf16-sr", "fp32"]
    (plain, *_) = (line for line in list_next_lines(report) if line.recipe == "fp32")
    assert "model.float()\n" in plain.code
    simulation = next(x for x in list_next_lines(report) if x.title == "Simulation")
    assert "model.float()" in simulation.code


def test_a_run_that_is_fine_gets_only_recipes_with_fewer_bytes() -> None:
    assert list_next_lines(make_low(FINE, make_advice("bf16-sr"))) == []
    small = Recipe("small", weights="bf16", states={"*": "e5m2"})
    advice = [make_advice("small"), make_advice("bf16-sr")]
    now = make_advice("now")
    report = make_report(now, *advice, recipes=[small, "bf16-sr"], dtype="bfloat16")
    assert small.bytes_per_parameter == 4
    assert list_recipes(report) == ["small"]


def test_the_recipe_fp32_is_the_one_of_master_weights() -> None:
    report = make_low(REMEDY, make_advice("fp32"), kept=0.2)
    assert list_titles(report, "fp32") == ["PyTorch", "Lightning", "FSDP2"]


# --- what is unknown


def test_without_verdicts_there_are_no_lines() -> None:
    assert list_next_lines(make_report()) == []
    unknown = [
        make_advice("now", Verdict.BREAKS, kept=math.nan),
        make_advice("bf16", Verdict.NOT_JUDGED, kept=math.nan),
    ]
    assert list_next_lines(make_report(*unknown)) == []
    assert list_next_lines(make_report(*unknown, make_advice("bf16-sr")))[0].recipe == "bf16-sr"


def test_unknown_figures_are_left_out() -> None:
    report = make_report(make_advice("bf16-sr", kept=math.nan))
    assert find_why(report, "bf16-sr") == "bf16-sr: fine in 10 bytes per parameter."


def check_python(lines: Sequence[NextLine]) -> None:
    for line in lines:
        compile(line.code, line.title, "exec")


@pytest.mark.parametrize("optimizers", [{}, {"torch.optim.sgd.SGD": 9}, {"a.b": 1, "c.d": 2}])
def test_all_lines_are_python(optimizers: dict[str, int]) -> None:
    names = ["bf16", "bf16-sr", "bf16-true", "bf16-true-fused", "torchao-8bit", "optimi-kahan"]
    lines = list_next_lines(make_report(*map(make_advice, names), optimizers=optimizers))
    assert {line.recipe for line in lines} >= {"bf16", "bf16-sr", "bf16-true", "fp32"}
    check_python(lines)
