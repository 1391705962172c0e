"""Tallies of the observed steps of a layer: last figures of twins, and means of single steps."""

import json
import math
from typing import Any

import pytest
import torch

from altgrad.measurement.layer_columns import LayerRow, gather_columns
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.tallies import (
    KEPT,
    NEVER_MOVED,
    STALL,
    StepTally,
    TwinTally,
    add_format_step,
)
from altgrad.report.records.schema import LayerInfo
from tests.report import runs
from tests.report.twin_runs import NAN, add_twin_step, figures, make_tally

FROZEN = calibration().thresholds.frozen
MOVES, RESTS = {"still_frac": 0.5}, {"still_frac": 1.0}


def add_step(
    tally: StepTally, figures: dict[str, float], errors: dict[str, float], name: str
) -> None:
    (columns,) = gather_columns([LayerRow("layer", figures, errors)])
    add_format_step([tally], columns, name)


def add_steps(*steps: dict[str, float], errors: dict[str, float] | None = None) -> StepTally:
    tally = StepTally()
    for step in steps:
        add_step(tally, runs.figures(**step) | {"update_rms": 1.0}, errors or {}, "bf16")
    return tally


# --- twins


def test_the_last_figures_of_a_twin_count() -> None:
    tally = make_tally({"progress_kept": 0.2}, {"progress_kept": 0.7, "moved_rms": 3.0})
    assert (tally.step, tally.figures["progress_kept"], tally.figures["moved_rms"]) == (10, 0.7, 3)
    assert tally.weight_rms == 1


def test_a_twin_has_the_figures_of_its_own_recipe_and_states() -> None:
    tally = TwinTally("bf16")
    own = figures() | {"exp_avg_ratio/bf16": 1.1, "exp_avg_zero_frac/bf16": 0.2}
    other = figures("bf16-sr", progress_kept=0.5) | {"exp_avg_ratio/bf16-sr": 7.0}
    of_format = {"kept_update_ratio/bf16": 0.3}
    add_twin_step(tally, 0, own | other | of_format, {"progress_kept/bf16-sr": 0.1})
    assert tally.figures["progress_kept"] == 1
    assert tally.figures["exp_avg_ratio"] == 1.1
    assert tally.figures["exp_avg_zero_frac"] == 0.2
    assert "kept_update_ratio" not in tally.figures  # it ends like the ratio of a state
    assert all(math.isnan(error) for error in tally.errors.values())


def test_the_step_since_which_a_layer_stands_still_is_the_last_one_before() -> None:
    tally = make_tally({**MOVES, "progress_kept": 0.9}, RESTS, RESTS)
    assert (tally.still_since, tally.still_steps, tally.kept_before) == (0, 2, 0.9)


def test_a_layer_that_moves_again_no_longer_stands_still() -> None:
    tally = make_tally(MOVES, RESTS, RESTS, MOVES)
    assert (tally.still_since, tally.still_steps) == (None, 0)
    tally = make_tally(MOVES, RESTS, MOVES, {"progress_kept": 0.5} | MOVES, RESTS)
    assert (tally.still_since, tally.still_steps, tally.kept_before) == (30, 1, 0.5)


def test_a_window_in_which_float32_moves_nothing_says_nothing() -> None:
    assert make_tally(MOVES, *[{"still_frac": NAN}] * 3).still_since is None
    tally = make_tally(MOVES, RESTS, {"still_frac": NAN}, RESTS)
    assert (tally.still_since, tally.still_steps) == (0, 2)


def test_a_layer_that_never_moved_has_no_progress_before() -> None:
    tally = make_tally(RESTS, RESTS, RESTS)
    assert tally.still_since == -1
    assert math.isnan(tally.kept_before)


@pytest.mark.parametrize(("share", "stands"), [(FROZEN, True), (FROZEN - 1e-6, False)])
def test_a_layer_stands_still_from_the_threshold_of_frozen_on(share: float, stands: bool) -> None:
    assert (make_tally(MOVES, {"still_frac": share}).still_since is not None) is stands


def test_what_broke_in_the_run_itself_is_not_held_against_a_recipe() -> None:
    broken = {"twin_nonfinite_frac": 0.25}
    itself = broken | {"nonfinite_frac": 0.5}
    by_recipe = make_tally({}, broken, {"twin_nonfinite_frac": NAN})
    assert (by_recipe.broken, by_recipe.nonfinite) == (0.25, 0)
    by_run = make_tally({}, itself)
    assert (by_run.broken, by_run.nonfinite) == (0, 0.5)
    assert make_tally(broken, itself).broken == 0.25  # the recipe broke before the run
    now = make_tally({}, itself, recipe="now")
    assert (now.broken, now.nonfinite) == (0.25, 0.5)
    assert make_tally(broken, recipe="now").nonfinite == 0.25


def test_the_error_of_weights_is_their_distance_over_their_size() -> None:
    """Against the weights themselves: those in float32, and those that stayed behind."""
    torch.manual_seed(0)
    start = torch.randn(1000, dtype=torch.float64)
    high, low = start + 0.1 * torch.randn(1000), start + 0.05 * torch.randn(1000)
    way = (high - start).square().mean().sqrt()
    drift = (low - high).norm() / (high - start).norm()
    tally = TwinTally("bf16")
    own = figures(drift=float(drift), moved_rms=float(way))
    add_twin_step(tally, 0, own | {"weight_rms": float(high.square().mean().sqrt())}, {})
    assert tally.weight_error == pytest.approx(float((low - high).norm() / high.norm()))
    assert math.isnan(make_tally({"drift": NAN}).weight_error)
    add_twin_step(tally, 0, own | {"weight_rms": 0.0}, {})
    assert math.isnan(tally.weight_error)


def test_a_checkpoint_holds_a_twin_as_plain_numbers() -> None:
    steps = [MOVES, {"exp_avg_ratio": 2.0} | RESTS, {"twin_nonfinite_frac": 0.1} | RESTS]
    tally = make_tally(*steps)
    again = TwinTally.from_state(json.loads(json.dumps(tally.state_dict())))
    assert again.state_dict() == tally.state_dict()
    assert (again.figures, again.errors) == (tally.figures, tally.errors)
    assert (again.weight_rms, again.weight_error) == (1, 0)
    for each in (tally, again):
        add_twin_step(each, 30, figures(still_frac=1.0), {})
    assert (again.broken, again.still_since, again.still_steps) == (0.1, 0, 3)
    assert (tally.broken, tally.still_since, tally.still_steps) == (0.1, 0, 3)


# --- single steps


def test_figures_of_steps_are_means_but_for_the_last_never_moved_frac() -> None:
    tally = add_steps(
        {"kept_update_ratio": 1.0, "stall_frac": 0.0, "never_moved_frac": 1.0},
        {"kept_update_ratio": NAN, "stall_frac": NAN, "never_moved_frac": NAN},
        {"kept_update_ratio": 0.5, "stall_frac": 0.5, "never_moved_frac": 0.25},
    )
    found = tally.find_figures()
    assert (found[KEPT], found[STALL], found[NEVER_MOVED]) == (0.75, 0.25, 0.25)


def test_the_size_of_updates_is_that_of_all_steps() -> None:
    tally = StepTally()
    sizes = (3.0, 1.0, 0.5, NAN)
    for size in sizes:
        add_step(tally, runs.figures() | {"update_rms": size}, {}, "bf16")
    assert tally.update_rms == pytest.approx(math.sqrt(10.25 / 3))
    assert math.isnan(StepTally().update_rms)


def test_errors_stay_the_same_over_many_steps() -> None:
    errors = {"kept_update_ratio/bf16": 0.02, "stall_frac/bf16": 0.01}
    found = add_steps(*[{"kept_update_ratio": 0.8}] * 100, errors=errors).find_errors(None)
    assert found[KEPT] == pytest.approx(0.02)
    assert found[STALL] == pytest.approx(0.01)
    assert found[NEVER_MOVED] == 0  # without an error, all elements are measured


def test_an_error_that_is_nan_in_most_steps_is_nan() -> None:
    for known, expected in ((1, NAN), (2, 0.001)):
        tally = StepTally()
        for number in range(3):
            error = 0.001 if number < known else NAN
            add_step(tally, runs.figures(), {"kept_update_ratio/bf16": error}, "bf16")
        assert tally.find_errors(None)[KEPT] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("share", ["underflow_frac", "saturated_frac"])
def test_the_error_of_a_share_out_of_range_is_estimated_if_a_file_lacks_it(share: str) -> None:
    """The sample is the only one known of a file of version 0.1.0, which states no error of it.

    The oracle draws such samples from a layer with this share.
    """
    tally = add_steps({share: 0.04})
    layer = LayerInfo((100, 100), "float32", 500, ("bf16",))
    random = torch.Generator().manual_seed(0)
    flags = torch.arange(10_000) < 400
    drawn = torch.stack(
        [flags[torch.randperm(10_000, generator=random)[:500]] for _ in range(1000)]
    )
    spread = float(drawn.double().mean(1).std())
    assert tally.find_errors(layer)[share] == pytest.approx(spread, rel=0.1)
    assert tally.find_errors(None)[share] == 0
    whole = LayerInfo((100, 100), "float32", 10_000, ("bf16",))
    assert tally.find_errors(whole)[share] == 0
    assert add_steps({share: 0.04}, errors={f"{share}/bf16": 0.3}).find_errors(layer)[
        share
    ] == pytest.approx(0.3)


def test_the_largest_share_of_non_finite_elements_is_kept() -> None:
    tally = StepTally()
    for share in (0.0, 0.5, 0.25, NAN):
        add_step(tally, runs.figures() | {"nonfinite_frac": share}, {}, "bf16")
    assert tally.broken == 0.5


def test_a_checkpoint_holds_steps_as_plain_numbers() -> None:
    steps = [{"kept_update_ratio": 0.9}, {"kept_update_ratio": 0.3, "never_moved_frac": 0.5}]
    errors = {"kept_update_ratio/bf16": 0.02, "stall_frac/bf16": 0.01}
    tally, whole = add_steps(steps[0], errors=errors), add_steps(*steps, errors=errors)
    again = StepTally.from_state(json.loads(json.dumps(tally.state_dict())))
    add_step(again, runs.figures(**steps[1]) | {"update_rms": 1.0}, errors, "bf16")
    assert again == whole


OLD: dict[str, Any] = {
    "sums": {KEPT: 1.8, STALL: 0.2, "underflow_frac": 0.1, "saturated_frac": 0.0}
    | {f"error of {KEPT}": 0.04, f"error of {STALL}": 0.02},
    "counts": {KEPT: 2, STALL: 2, "underflow_frac": 2, "saturated_frac": 2}
    | {f"error of {KEPT}": 2, f"error of {STALL}": 2},
    "never_moved": 0.25,
    "never_moved_error": 0.01,
}
"""What version 0.1.0 saved of a layer in a format, after two steps."""


def test_a_tally_of_version_0_1_0_goes_on() -> None:
    tally = StepTally.from_old_state(OLD)
    step = runs.figures(kept_update_ratio=0.6, stall_frac=0.4, never_moved_frac=0.2)
    found, errors = tally.find_figures(), tally.find_errors(None)
    assert (found[KEPT], found[STALL], found[NEVER_MOVED]) == (0.9, 0.1, 0.25)
    assert (errors[KEPT], errors[STALL], tally.broken) == (0.02, 0.01, 0)
    add_step(tally, step | {"update_rms": 1e-5}, {"stall_frac/bf16": 0.04}, "bf16")
    found, errors = tally.find_figures(), tally.find_errors(None)
    assert (found[KEPT], found[NEVER_MOVED]) == (pytest.approx(0.8), 0.2)
    assert (found[STALL], errors[STALL]) == (pytest.approx(0.2), pytest.approx(0.02))
    assert (tally.update_rms, tally.find_figures()["underflow_frac"]) == (
        1e-5,
        pytest.approx(0.1 / 3),
    )
    assert StepTally.from_old_state({**OLD, "nonfinite": 0.5}).broken == 0.5


def test_of_a_run_that_becomes_nan_the_last_figures_count() -> None:
    lost = {"progress_kept": NAN, "frozen_frac": NAN, "nonfinite_frac": 1.0}
    tally = make_tally({"progress_kept": 0.5}, {"progress_kept": 0.25}, lost, lost)
    assert (tally.step, tally.figure("progress_kept"), tally.nonfinite) == (10, 0.25, 1.0)
    assert tally.broken == 0  # no recipe has broken it
    from_start = make_tally(lost)
    assert (from_start.step, math.isnan(from_start.figure("progress_kept"))) == (0, True)
    still = make_tally({"progress_kept": 0.5}, {"progress_kept": NAN})  # nothing is NaN or inf
    assert still.step == 10
