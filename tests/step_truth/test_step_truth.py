"""AltGrad shows the step that happened, in every way of training (one row each).

The tables are in plain_modes.py and lightning_modes.py. The truth comes from optimizers that record
what they found, applied and left; all comparisons are exact. Two wrong designs run through the same
rows, and must fail exactly in the rows that name them.
"""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from tests.step_truth.designs import AltGrad, Design, GradientsAfterTheStep, LightningHooks
from tests.step_truth.lightning_modes import LIGHTNING_MODES, NOT_IN_2_4
from tests.step_truth.modes import Mode
from tests.step_truth.plain_modes import PLAIN_MODES
from tests.step_truth.recording import difference

# Two of the rows skip a batch on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.training_step. returned .None.")


def param(mode: Mode, prefix: str = "") -> Any:
    is_old = not hasattr(pl.callbacks, "EMAWeightAveraging")
    reason = NOT_IN_2_4.get(str(mode), "")
    skip = pytest.mark.skipif(is_old and bool(reason), reason=reason)
    return pytest.param(mode, id=f"{prefix}{mode}", marks=skip)


LIGHTNING = [param(mode, "Lightning: ") for mode in LIGHTNING_MODES]
ALL_MODES = [param(mode, "plain: ") for mode in PLAIN_MODES] + LIGHTNING


def keep_quick(params: list[Any], wrong: type[Design]) -> list[Any]:
    """Keep two of the rows in which a design is wrong, and two others, in the quick suite."""
    is_wrong = [wrong in param.values[0].wrong for param in params]
    quick = {params[place].id for word in (True, False) for place in find(is_wrong, word)}
    slow = pytest.mark.slow
    return [
        param
        if param.id in quick
        else pytest.param(*param.values, id=param.id, marks=[*param.marks, slow])
        for param in params
    ]


def find(words: list[bool], word: bool) -> list[int]:
    """Return the first and the last place of a word."""
    places = [place for place, each in enumerate(words) if each is word]
    return [places[0], places[-1]]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_every_step_is_shown_bit_for_bit(mode: Mode, tmp_path: Path) -> None:
    design = AltGrad()
    journal = mode.run(design, tmp_path)
    assert len(journal.steps) == mode.steps
    assert difference(design.seen, journal.steps) is None
    assert +design.skipped == dict(mode.skipped)


def is_wrong(design: Design, mode: Mode, folder: Path) -> bool:
    journal = mode.run(design, folder)
    return difference(design.seen, journal.steps) is not None


@pytest.mark.parametrize("mode", keep_quick(ALL_MODES, GradientsAfterTheStep))
def test_reading_gradients_after_the_step_fails_in_the_rows_that_name_it(
    mode: Mode, tmp_path: Path
) -> None:
    wrong = is_wrong(GradientsAfterTheStep(), mode, tmp_path)
    assert wrong == (GradientsAfterTheStep in mode.wrong)


@pytest.mark.parametrize("mode", keep_quick(LIGHTNING, LightningHooks))
def test_reading_in_lightning_hooks_fails_in_the_rows_that_name_it(
    mode: Mode, tmp_path: Path
) -> None:
    wrong = is_wrong(LightningHooks(), mode, tmp_path)
    assert wrong == (LightningHooks in mode.wrong)
