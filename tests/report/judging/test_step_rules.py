"""The verdicts on a layer in a format from single steps, each at its threshold."""

import math
import re

import pytest

from altgrad.measurement.intervals import find_interval
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.step_rules import LEAST_UNANIMOUS, judge_steps, reaches
from altgrad.report.judging.tallies import STEP_METRICS
from altgrad.report.judging.verdicts import Verdict

NAN = math.nan
LIMITS = calibration().step_thresholds
FINE, REMEDY = LIMITS.stores_fine, LIMITS.needs_remedy
FROZEN, ZERO, TOP = LIMITS.frozen, LIMITS.underflow, LIMITS.saturated
LITTLE = 1e-4


def judge(
    errors: dict[str, float] | None = None, *, needs_scale: bool = False, **figures: float
) -> tuple[Verdict, str]:
    """Judge a layer that is stored fine, with some figures and errors changed."""
    fine = dict.fromkeys(STEP_METRICS, 0.0) | {"kept_update_ratio": 1.0}
    own = fine | figures
    intervals = {m: find_interval(m, own[m], (errors or {}).get(m, 0.0)) for m in own}
    return judge_steps(own, intervals, needs_scale=needs_scale)


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ({}, Verdict.STORES_FINE),
        ({"kept_update_ratio": FINE}, Verdict.STORES_FINE),
        ({"kept_update_ratio": 1.7}, Verdict.STORES_FINE),  # overshoot
        ({"kept_update_ratio": FINE - LITTLE}, Verdict.WATCH),
        ({"kept_update_ratio": REMEDY}, Verdict.WATCH),
        ({"kept_update_ratio": REMEDY - LITTLE}, Verdict.NEEDS_REMEDY),
        ({"kept_update_ratio": -0.2}, Verdict.NEEDS_REMEDY),
        ({"kept_update_ratio": 0.0, "never_moved_frac": FROZEN}, Verdict.FROZEN),
        ({"kept_update_ratio": 0.0, "never_moved_frac": FROZEN - LITTLE}, Verdict.NEEDS_REMEDY),
        ({"kept_update_ratio": NAN, "stall_frac": NAN}, Verdict.NOT_JUDGED),
    ],
    ids=str,
)
def test_each_verdict_begins_at_its_threshold(figures: dict[str, float], verdict: Verdict) -> None:
    for needs_scale in (False, True):
        assert judge(needs_scale=needs_scale, **figures)[0] is verdict


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ({"underflow_frac": ZERO}, Verdict.RANGE),
        ({"underflow_frac": ZERO - LITTLE}, Verdict.WATCH),
        ({"saturated_frac": TOP}, Verdict.RANGE),
        ({"saturated_frac": TOP - LITTLE}, Verdict.WATCH),
        ({"underflow_frac": 0.5, "kept_update_ratio": FINE}, Verdict.STORES_FINE),
    ],
    ids=str,
)
def test_range_is_said_only_where_a_scale_would_help(
    figures: dict[str, float], verdict: Verdict
) -> None:
    own = {"kept_update_ratio": FINE - LITTLE, **figures}
    assert judge(needs_scale=True, **own)[0] is verdict
    kept = Verdict.WATCH if own["kept_update_ratio"] < FINE else Verdict.STORES_FINE
    assert judge(needs_scale=False, **own)[0] is kept


@pytest.mark.parametrize(
    ("share", "error", "verdict"),
    [
        (2 * TOP, 0.0, Verdict.RANGE),
        (2 * TOP, TOP / 5, Verdict.RANGE),
        (2 * TOP, TOP, Verdict.UNCERTAIN),
        (2 * TOP, NAN, Verdict.UNCERTAIN),
        (TOP / 5, TOP / 20, Verdict.WATCH),
        (0.0, TOP, Verdict.WATCH),  # no sampled element lies beyond the top
    ],
)
def test_range_takes_the_error_of_a_sample_into_account(
    share: float, error: float, verdict: Verdict
) -> None:
    kept = (FINE + REMEDY) / 2
    errors = {"saturated_frac": error}
    assert judge(errors, needs_scale=True, kept_update_ratio=kept, saturated_frac=share)[0] is (
        verdict
    )


@pytest.mark.parametrize(
    ("kept", "error", "verdict"),
    [
        ((FINE + REMEDY) / 2, (FINE - REMEDY) / 5, Verdict.WATCH),
        ((FINE + REMEDY) / 2, (FINE - REMEDY) / 3.8, Verdict.UNCERTAIN),
        (FINE - 0.01, 0.011, Verdict.UNCERTAIN),
        (REMEDY / 2, REMEDY / 10, Verdict.NEEDS_REMEDY),
        (FINE + 0.005, 0.001, Verdict.STORES_FINE),
        (FINE + 0.005, NAN, Verdict.UNCERTAIN),  # few elements carry the update
    ],
)
def test_an_interval_that_contains_a_threshold_is_uncertain(
    kept: float, error: float, verdict: Verdict
) -> None:
    found, reason = judge({"kept_update_ratio": error}, kept_update_ratio=kept)
    assert found is verdict
    if error > 0:
        assert f"± {1.96 * error:.1g}" in reason


@pytest.mark.parametrize(
    ("never_moved", "error", "verdict"),
    [
        (FROZEN - 0.005, 0.004, Verdict.UNCERTAIN),
        (FROZEN + 0.005, 0.004, Verdict.UNCERTAIN),
        (FROZEN + 0.009, 0.001, Verdict.FROZEN),
        (FROZEN - 0.01, 0.004, Verdict.NEEDS_REMEDY),
        (1.0, 0.0, Verdict.FROZEN),  # all elements are measured, and none ever moved
        (1.0, 0.0002, Verdict.FROZEN),  # of 4,096 sampled elements none ever moved
        (1.0, 0.0075, Verdict.FROZEN),  # of 128 sampled blocks none ever moved
        (1.0, 0.168, Verdict.UNCERTAIN),  # of 2 sampled elements none ever moved
        (1.0, NAN, Verdict.UNCERTAIN),
        (0.5, NAN, Verdict.NEEDS_REMEDY),
    ],
)
def test_frozen_takes_the_error_of_a_sample_into_account(
    never_moved: float, error: float, verdict: Verdict
) -> None:
    found, reason = judge(
        {"never_moved_frac": error}, kept_update_ratio=0.1, never_moved_frac=never_moved
    )
    assert found is verdict
    if verdict is Verdict.UNCERTAIN and not math.isnan(error):
        assert "never have moved, which could be “frozen” or not" in reason
        assert " to " in reason


def test_a_share_reaches_a_limit_unless_its_sample_leaves_that_open() -> None:
    assert reaches(0.995, (0.992, 0.998), 0.99) is True
    assert reaches(0.5, (0.4, 0.6), 0.99) is False
    assert reaches(0.995, (0.98, 0.999), 0.99) is None
    assert reaches(0.98, (0.97, 0.995), 0.99) is None
    assert reaches(1.0, (LEAST_UNANIMOUS, 1.0), 0.99) is True
    assert reaches(1.0, (LEAST_UNANIMOUS - 0.01, 1.0), 0.99) is None
    assert reaches(1.0, (NAN, NAN), 0.99) is None
    assert reaches(0.5, (NAN, NAN), 0.99) is False
    assert reaches(NAN, (NAN, NAN), 0.99) is False


def test_a_reason_has_the_figures_it_rests_on() -> None:
    assert judge(kept_update_ratio=0.0, never_moved_frac=0.996)[1].startswith(
        ">99 % of the weights"
    )
    kept = (FINE + REMEDY) / 2
    assert judge(kept_update_ratio=kept, stall_frac=0.004)[1] == (
        f"{kept:.2f} of the update is kept and <1 % of updates stall on average"
    )


@pytest.mark.parametrize("limit", [FINE, REMEDY])
@pytest.mark.parametrize("error", [0.0, 1e-9, NAN])
def test_a_share_in_a_reason_is_not_rounded_to_the_threshold_above_it(
    limit: float, error: float
) -> None:
    reason = judge({"kept_update_ratio": error}, kept_update_ratio=limit - 1e-5)[1]
    (shown,) = re.findall(r"-?\d\.\d\d", reason.partition(" of the update")[0])
    assert limit - 0.011 < float(shown) < limit


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"stall_frac": NAN}, "an unknown share of updates stall"),
        (
            {"underflow_frac": NAN, "saturated_frac": 0.9},
            "an unknown share of the weights are stored as 0 and 90 % lie beyond the top",
        ),
    ],
)
def test_a_share_without_a_value_is_unknown_in_the_reason(
    figures: dict[str, float], reason: str
) -> None:
    kept = (FINE + REMEDY) / 2
    assert reason in judge(needs_scale=True, kept_update_ratio=kept, **figures)[1]
