"""`OutsideChanges`: layers that something other than a step has written to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from altgrad.recipes.recipe import Recipe
from altgrad.twins.element_scales import ElementScales
from altgrad.twins.outside_changes import OutsideChanges
from altgrad.twins.run_weights import RunWeights
from altgrad.twins.twin import Twin
from tests.twins.planned import KIND, Planned


class Run(Planned):
    """Two layers after two steps of AdamW, remembered."""

    def __init__(self) -> None:
        super().__init__(torch.optim.AdamW)
        self.weights = RunWeights(KIND)
        scales = ElementScales(None, lambda *_: pytest.fail("no format has scales"))
        self.reference = Twin(Recipe("run"), torch.float32, scales, 0)
        self.arrange("a", "b")
        self.weights.rearrange(self.plan.layers, self.plan.layout)
        self.changes = OutsideChanges(self.plan, self.weights)
        for _ in range(2):
            self.step()

    def step(self) -> None:
        self.set_gradients("a", "b")
        self.optimizer.step()
        self.changes.remember(self.optimizer, self.stepped)

    def find(self) -> tuple[set[str], set[str]]:
        return self.changes.find(self.optimizer, self.stepped, self.reference)


def write_weights(run: Run) -> None:
    with torch.no_grad():
        run.net["b"].mul_(2)


def reset_moments(run: Run) -> None:
    run.optimizer.state[run.net["a"]]["exp_avg"].zero_()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda _: None, (set(), set())),
        (write_weights, ({"b"}, set())),
        (reset_moments, (set(), {"a"})),
    ],
    ids=["nothing", "weights", "states"],
)
def test_changes_between_two_steps_are_found_once(
    change: Callable[[Run], None], found: tuple[set[str], set[str]]
) -> None:
    run = Run()
    change(run)
    assert run.find() == found
    run.step()
    assert run.find() == (set(), set())


def test_changes_before_a_checkpoint_are_found_after_it() -> None:
    run, resumed = Run(), Run()
    write_weights(run)
    reset_moments(run)
    state = run.changes.state_dict(run.optimizer, run.stepped, run.reference)
    assert state == {"written": ["b"], "changed": ["a"], "suspicions": 0}
    resumed.changes.load_state_dict(state)
    assert resumed.find() == ({"b"}, {"a"})
    resumed.changes.forget_loaded()
    assert resumed.find() == (set(), set())


def test_the_first_suspicion_watches_until_a_check_without_a_write_the_second_for_good() -> None:
    run, watched = Run(), []
    for is_suspected, can_rest in [(0, 1), (1, 1), (0, 0), (0, 1), (1, 1), (0, 1)]:
        run.changes.note_check(is_suspected=bool(is_suspected), can_rest=bool(can_rest))
        watched.append(run.weights.is_watching)
    assert watched == [False, True, True, False, True, True]
    assert run.changes.state_dict(run.optimizer, run.stepped, run.reference)["suspicions"] == 2
