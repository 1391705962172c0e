"""The verdicts on a layer from its twin: each rule, its threshold, and its reason."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from altgrad import Recipe
from altgrad.report import Advice, Verdict, judge_run
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.twin_rules import (
    classify,
    find_errors,
    has_moved,
    is_stuck,
    judge_twin,
)
from tests.report.twin_runs import (
    NAN,
    draw_gradients,
    make_layers,
    make_tally,
    push_gradients,
    record,
)

LIMITS = calibration().thresholds
FINE, REMEDY = LIMITS.stores_fine, LIMITS.needs_remedy
LITTLE = 1e-4
STILL = {"frozen_frac": 1.0, "progress_kept": 0.0}


# --- plain figures


@pytest.mark.parametrize(
    ("kept", "verdict"),
    [(0.8, Verdict.NEEDS_REMEDY), (0.95, Verdict.WATCH), (1.3, Verdict.OVERSHOOTS)],
)
def test_harm_to_a_layer_has_to_be_more_than_chance(kept: float, verdict: Verdict) -> None:
    limit = FINE if kept < 1 else LIMITS.overshoots
    edge = abs(limit - kept) / 1.96 * math.sqrt(64)  # drift whose interval of 95 % ends there
    wide, narrow = (
        make_tally({"progress_kept": kept, "drift": each * edge}) for each in (1.01, 0.99)
    )
    assert judge_twin(narrow, drawn=64)[0] is verdict
    found, reason = judge_twin(wide, drawn=64)
    assert found is Verdict.UNCERTAIN
    assert reason.endswith("which may be the chance of stochastic rounding")
    assert judge_twin(wide)[0] is verdict


def test_a_layer_that_is_fine_stays_so_whatever_chance_may_do() -> None:
    assert judge_twin(make_tally({"drift": 10.0, "moved_rms": 1e-3}), drawn=64)[0] is (
        Verdict.STORES_FINE
    )


def test_the_error_by_chance_is_that_of_many_draws() -> None:
    """Against 400 runs of 32 weights that are rounded stochastically on a coarse grid."""
    random = torch.Generator().manual_seed(0)
    high = 0.02 * torch.randn(32, generator=random, dtype=torch.float64)  # the way in float32
    found = []
    for _ in range(400):
        low = torch.zeros(32, dtype=torch.float64)
        for _ in range(20):
            wanted = (low + high / 20) * 16
            low = (wanted + torch.rand(32, generator=random, dtype=torch.float64)).floor() / 16
        found.append((float(low @ high / (high @ high)), float((low - high).norm() / high.norm())))
    kept, drift = torch.tensor(found, dtype=torch.float64).unbind(1)
    tally = make_tally({"drift": float(drift.square().mean().sqrt())})
    error = find_errors(tally, 32)["progress_kept"]
    assert error == pytest.approx(float(kept.std()), rel=0.3)
    assert find_errors(tally)["progress_kept"] == 0


def test_no_layer_is_frozen_or_stuck_under_stochastic_rounding() -> None:
    """In a small layer, it is by chance that no weight has moved so far."""
    frozen = make_tally(STILL)
    moved = {"progress_kept": 0.9, "still_frac": 0.0}
    stuck = make_tally(moved, *[{"progress_kept": 0.7, "still_frac": 1.0}] * 3)
    assert judge_twin(frozen)[0] is Verdict.FROZEN
    assert judge_twin(stuck)[0] is Verdict.STUCK
    verdict, reason = judge_twin(frozen, drawn=64)
    assert verdict is Verdict.UNCERTAIN
    assert reason.endswith(
        "but stochastic rounding moves a weight by chance: more steps, or more elements, will tell"
    )
    assert judge_twin(stuck, drawn=64)[0] is Verdict.NEEDS_REMEDY


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ({}, Verdict.STORES_FINE),
        ({"progress_kept": FINE}, Verdict.STORES_FINE),
        ({"progress_kept": FINE - LITTLE}, Verdict.WATCH),
        ({"progress_kept": REMEDY}, Verdict.WATCH),
        ({"progress_kept": REMEDY - LITTLE}, Verdict.NEEDS_REMEDY),
        ({"progress_kept": -0.5}, Verdict.NEEDS_REMEDY),
        ({"progress_kept": LIMITS.overshoots}, Verdict.STORES_FINE),
        ({"progress_kept": LIMITS.overshoots + LITTLE}, Verdict.OVERSHOOTS),
        (STILL, Verdict.FROZEN),
        (STILL | {"frozen_frac": LIMITS.frozen}, Verdict.FROZEN),
        (STILL | {"frozen_frac": LIMITS.frozen - LITTLE}, Verdict.NEEDS_REMEDY),
        (STILL | {"progress_kept": LIMITS.frozen_kept}, Verdict.NEEDS_REMEDY),
        (STILL | {"moved_rms": LIMITS.moved}, Verdict.NEEDS_REMEDY),  # of weights of size 1
        (STILL | {"moved_rms": LIMITS.moved * 1.01}, Verdict.FROZEN),
        (STILL | {"moved_rms": NAN}, Verdict.FROZEN),
        ({"progress_kept": NAN, "frozen_frac": NAN, "still_frac": NAN}, Verdict.NOT_JUDGED),
        ({"twin_nonfinite_frac": 0.01}, Verdict.BREAKS),
    ],
    ids=str,
)
def test_each_verdict_begins_at_its_threshold(figures: dict[str, float], verdict: Verdict) -> None:
    assert judge_twin(make_tally(figures))[0] is verdict


def test_weights_that_are_far_off_are_not_stored_fine() -> None:
    assert classify(1.0, LIMITS.weight_error) is Verdict.STORES_FINE
    assert classify(1.0, LIMITS.weight_error + LITTLE) is Verdict.WATCH
    assert classify(1.0, NAN) is Verdict.STORES_FINE
    far = {"drift": 2 * LIMITS.weight_error, "moved_rms": 1.0}
    verdict, reason = judge_twin(make_tally(far))
    assert verdict is Verdict.WATCH
    assert f"weights are off by {2 * LIMITS.weight_error:.2f} of their size" in reason


def test_a_sample_that_leaves_the_verdict_open_is_uncertain() -> None:
    middle, width = (FINE + REMEDY) / 2, FINE - REMEDY
    for error, verdict in ((width / 5, Verdict.WATCH), (width / 3.8, Verdict.UNCERTAIN)):
        tally = make_tally({"progress_kept": middle}, errors={"progress_kept": error})
        assert judge_twin(tally)[0] is verdict
    verdict, reason = judge_twin(make_tally({}, errors={"progress_kept": NAN}))
    assert verdict is Verdict.UNCERTAIN
    assert "too few of its elements" in reason
    assert "nan" not in reason


def test_range_is_said_where_it_is_given_and_progress_is_lost() -> None:
    lost, kept = make_tally({"progress_kept": FINE - 0.01}), make_tally({})
    verdict, reason = judge_twin(lost, "7 % are stored as 0")
    assert verdict is Verdict.RANGE
    assert reason == f"7 % are stored as 0, and {FINE - 0.01:.3g} of the progress is kept"
    assert judge_twin(kept, "7 % are stored as 0")[0] is Verdict.STORES_FINE
    far = make_tally({"drift": 2 * LIMITS.weight_error, "moved_rms": 1.0})
    assert judge_twin(far, "7 % are stored as 0")[0] is Verdict.RANGE
    over = make_tally({"progress_kept": LIMITS.overshoots + 1})
    assert judge_twin(over, "7 % are stored as 0")[0] is Verdict.OVERSHOOTS
    assert judge_twin(lost)[0] is Verdict.WATCH


def test_a_layer_is_stuck_if_it_loses_by_standing_still() -> None:
    moves, rests = {"still_frac": 0.0}, {"still_frac": 1.0}
    lost = {"progress_kept": 1 - LIMITS.stuck_loss - LITTLE, **rests}
    verdict, reason = judge_twin(make_tally(moves, moves, rests, lost))
    assert verdict is Verdict.STUCK
    assert reason.startswith("stuck since step 10: since then nearly no weight moved")
    little = {"progress_kept": 1 - LIMITS.stuck_loss + LITTLE, **rests}
    assert not is_stuck(make_tally(moves, moves, rests, little))
    assert not is_stuck(make_tally(moves, moves, lost))  # in one window alone
    far = moves | {"progress_kept": 1 + 2 * LIMITS.stuck_loss}
    near = {"progress_kept": 1.0, **rests}
    assert not is_stuck(make_tally(far, far, near, near))  # it was too far, and no longer is
    assert not is_stuck(make_tally(moves, moves, rests, lost, lost | moves))  # moves again
    never = make_tally(*[lost | {"frozen_frac": 1.0, "progress_kept": 0.0}] * 4)
    assert not is_stuck(never)
    assert judge_twin(never)[0] is Verdict.FROZEN


def test_a_sample_that_says_little_of_the_layer_does_not_show_that_it_is_stuck() -> None:
    """Of an embedding whose sample has one word that is used, the word may rest."""
    moves, rests = {"still_frac": 0.0}, {"still_frac": 1.0, "progress_kept": 0.5}
    tally = make_tally(moves, rests, rests, errors={"progress_kept": NAN})
    assert judge_twin(tally)[0] is Verdict.UNCERTAIN


def test_a_run_without_a_twin_is_judged_by_whether_its_weights_move() -> None:
    alone = {"progress_kept": NAN, "frozen_frac": NAN, "moved_rms": NAN, "drift": NAN}
    rests = alone | {"still_frac": 1.0, "moved_since_start_frac": 0.0}
    verdict, reason = judge_twin(make_tally(rests, recipe="now"))
    assert verdict is Verdict.FROZEN
    assert (
        reason == "100 % of the weights with a gradient stood still, and 0 % of all have ever moved"
    )
    moves = rests | {"moved_since_start_frac": 0.5}
    verdict, reason = judge_twin(make_tally(moves, recipe="now"))
    assert verdict is Verdict.NOT_JUDGED
    assert "without a twin" in reason


def test_a_reason_has_the_states_that_are_far_off() -> None:
    far = {"exp_avg_ratio": 1.01, "exp_avg_sq_ratio": 1.5, "exp_avg_sq_zero_frac": 0.12}
    reason = judge_twin(make_tally(far))[1]
    assert reason == (
        "1.00 of the progress is kept; exp_avg_sq is 1.5 times that of float32; "
        "12 % of exp_avg_sq is stored as 0"
    )


def test_a_layer_whose_movement_is_unknown_counts_as_moved() -> None:
    assert has_moved(make_tally({"moved_rms": NAN}))
    assert not has_moved(make_tally({"moved_rms": 0.0}))


# --- real runs


def judge(path: Path, *arguments: object, **settings: object) -> dict[str, dict[str, Advice]]:
    return judge_run(record(path, *arguments, **settings)).by_layer  # type: ignore[arg-type]


def test_an_embedding_of_which_few_words_are_used_is_fine(tmp_path: Path) -> None:
    """The other rows only decay, which bf16 rounds away; what they lose is little."""
    torch.manual_seed(0)
    words = make_layers(words=torch.randn(8000, 1) * 0.02)
    optimizer = torch.optim.AdamW(words.parameters(), 1e-2, weight_decay=0.01)

    def use_some(net: nn.Module, step: int) -> None:
        push_gradients(net, step)
        words["words"].grad[40:] = 0

    found = judge(
        tmp_path,
        words,
        optimizer,
        prepare=use_some,
        formats=["bf16"],
        recipes=["bf16"],
        twin_elements=8000,
    )["words"]["bf16"]
    assert found.figures["frozen_frac"] == pytest.approx(0.995)
    assert found.verdict is Verdict.STORES_FINE
    assert "what they lose is little (rows that no batch uses, for example)" in found.reason


@pytest.mark.parametrize("is_low", [False, True])
def test_a_gain_of_ones_is_frozen_in_bf16(tmp_path: Path, is_low: bool) -> None:
    net = make_layers(torch.bfloat16 if is_low else torch.float32, gain=torch.ones(256))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    found = judge(tmp_path, net, optimizer, formats=["e4m3fn"], recipes=["bf16"])["gain"]
    assert found["bf16"].verdict is Verdict.FROZEN
    assert ("now" in found) is is_low
    if is_low:
        assert found["now"].verdict is Verdict.FROZEN
        assert found["now"].reason == ("100 % of the weights that float32 moved have never moved")


class Schedule:
    """Gradients that push weights at a large learning rate, and later at another one."""

    FIRST = 2**-4  # bf16 keeps these steps

    def __init__(self, net: nn.Module, *, then: float, last: int) -> None:
        self.optimizer = torch.optim.SGD(net.parameters(), lr=self.FIRST)
        self.then, self.last = then, last

    def __call__(self, net: nn.Module, step: int) -> None:
        for layer in net.parameters():
            layer.grad = torch.ones_like(layer)
        is_first = step < 20 or step >= self.last
        self.optimizer.param_groups[0]["lr"] = self.FIRST if is_first else self.then


@pytest.mark.parametrize(
    ("then", "last", "stuck"),
    [
        (1e-3, 300, True),  # below half of the spacing of bf16, 0.002
        (0.0, 300, False),  # float32 does not go on, either
        (1e-3, 275, False),  # moves again
    ],
)
def test_a_layer_that_no_longer_moves_is_stuck_since_a_step(
    tmp_path: Path, then: float, last: int, stuck: bool
) -> None:
    net = make_layers(weights=torch.full((64,), 2.0))
    schedule = Schedule(net, then=then, last=last)
    found = judge(
        tmp_path,
        net,
        schedule.optimizer,
        300,
        prepare=schedule,
        formats=["bf16"],
        recipes=["bf16", "bf16-sr"],
    )["weights"]
    assert (found["bf16"].verdict is Verdict.STUCK) is stuck, found["bf16"].reason
    assert found["bf16-sr"].verdict is not Verdict.STUCK
    if stuck:
        assert found["bf16"].figures["frozen_frac"] == 0
        assert found["bf16"].reason.startswith("stuck since step 19: ")


@pytest.mark.parametrize("library", [pytest.param("torchao", marks=pytest.mark.slow), "optimi"])
def test_an_optimizer_that_makes_up_for_bf16_is_fine_now(tmp_path: Path, library: str) -> None:
    """Most of its steps leave most of its weights where they are, all the same."""
    pytest.importorskip(library)
    torch.manual_seed(0)
    net = make_layers(torch.bfloat16, weights=torch.ones(64, 64))
    settings = {"formats": ["e4m3fn"], "recipes": ["bf16"], "twin_elements": 4096}
    if library == "torchao":
        from torchao.optim import _AdamW  # torchao has no public name

        make: Any

        make = partial(_AdamW, bf16_stochastic_round=True)
    else:
        from optimi import AdamW

        make = partial(AdamW, kahan_sum=True)
    with torch.compiler.set_stance("force_eager"):  # a compiler takes half a minute
        optimizer = make(net.parameters(), 1e-3)
        run = record(tmp_path, net, optimizer, 100, **settings)
    found = judge_run(run).by_layer["weights"]
    rows = [row for row in run.rows if row.layer == "weights"]
    assert min(row.figures["unmoved_frac"] for row in rows) > 0.7
    assert found["bf16"].verdict is Verdict.FROZEN
    assert found["now"].verdict is Verdict.STORES_FINE, found["now"]


def test_fp16_breaks_where_eps_is_0(tmp_path: Path) -> None:
    """Adam divides 0 by 0 where a gradient is 0 and its eps of 1e-8 is 0 in fp16."""
    net = make_layers(weights=torch.ones(256))

    def leave_some_out(net: nn.Module, step: int) -> None:
        draw_gradients(net, step)
        for layer in net.parameters():
            assert layer.grad is not None
            layer.grad[::4] = 0

    found = judge(
        tmp_path,
        net,
        torch.optim.AdamW(net.parameters(), 1e-3),
        prepare=leave_some_out,
        formats=["bf16"],
        recipes=["fp16-true", "bf16-true"],
    )["weights"]
    assert found["fp16-true"].verdict is Verdict.BREAKS
    assert found["fp16-true"].reason == "25 % of the weights would become NaN or inf"
    assert found["bf16-true"].verdict is not Verdict.BREAKS


@pytest.mark.parametrize("format", ["e4m3fn", "fp16"])
def test_a_second_moment_that_is_stored_as_0_overshoots(tmp_path: Path, format: str) -> None:
    net = make_layers(weights=torch.ones(256))
    recipe = Recipe("small", states={"exp_avg_sq": format})
    found = judge(
        tmp_path,
        net,
        torch.optim.Adam(net.parameters(), 1e-3),
        prepare=lambda net, step: push_gradients(net, step, 1e-4),
        formats=["bf16"],
        recipes=[recipe],
        scaling=None,
    )["weights"]["small"]
    assert found.verdict is Verdict.OVERSHOOTS, found
    assert found.kept > 10
    assert "of exp_avg_sq is stored as 0" in found.reason
