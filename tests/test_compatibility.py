"""The compatibility page: its rows are run, and have the results that it says."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compatibility import page, trial
from benchmarks.compatibility.trial import (
    EXACT,
    NOT_RUN,
    NOT_SEEN,
    REFUSED,
    WRONG,
    Finding,
    Row,
)
from tests.step_truth.plain_modes import loop
from tests.step_truth.recording import Entry, Journal

# Classes of other libraries use what torch deprecates, and say so when they are imported.
pytestmark = pytest.mark.filterwarnings("ignore")

ON_PAGE = page.read_page((Path(__file__).parents[1] / "docs" / "compatibility.md").read_text())

UNUSUAL = "Steps that the attached optimizer does not make"
PART = {
    "Two processes": ("tensor parallel", "FSDP1", "FSDP2, Trainer of Hugging Face"),
    "Plain loop, `UpdateMonitor`": ("AdamW", "GradScaler, fused inf", "optimizers in backward"),
    "Adapters": ("`altgrad.watch`", "accelerate, before `prepare`", "Fabric, after `setup`"),
    "Trainer of Lightning": ("automatic", "16-mixed, inf"),
    "Trainer of Hugging Face, by `optim`": ("`adafactor`", "`adamw_torch_xla`"),
    UNUSUAL: ("a second optimizer, not attached", "weights clamped between steps"),
    "Optimizers of torch.optim": ("`AdamW`", "`LBFGS`", "`Muon`", "`SparseAdam`"),
    "Optimizers of torchao.optim": ("`AdamW8bit`",),
    "Optimizers of optimi": ("`Lion`",),
    "Optimizers of bitsandbytes.optim": ("`AdamW8bit`", "`SGD`"),
    "Parameter kinds": ("float16", "complex64 beside float32", "`weight_norm`"),
}


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {(row.group, row.name): row for row in page.list_rows()}


@pytest.mark.parametrize("key", [(group, name) for group, names in PART.items() for name in names])
def test_a_row_has_the_result_that_the_page_says(rows: Any, key: tuple[str, str]) -> None:
    if (key[0], "all") in rows:
        pytest.skip(rows[key[0], "all"].attempt().note)
    found = rows[key].attempt()
    assert found.result == ON_PAGE[key], found.note


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted({group for group, _ in ON_PAGE}))
def test_the_other_rows_of_a_group_have_the_results_that_the_page_says(
    rows: Any, group: str
) -> None:
    others = [key for key in rows if key[0] == group and key[1] not in PART.get(group, ())]
    found = {key: rows[key].attempt() for key in others}
    run = {key: each for key, each in found.items() if each.result != NOT_RUN}
    assert {key: each for key, each in run.items() if each.result != ON_PAGE[key]} == {}
    assert run or not others or (group, "all") in rows


def test_the_page_has_more_than_200_rows() -> None:
    assert sum(result != NOT_RUN for result in ON_PAGE.values()) > 200


def test_the_page_has_all_rows_and_nothing_wrong(rows: Any) -> None:
    assert {key for key in rows if key not in ON_PAGE and key[1] != "all"} == set()
    assert WRONG not in ON_PAGE.values()
    assert NOT_SEEN not in ON_PAGE.values()


def test_a_page_can_be_read_again() -> None:
    findings = [Finding(EXACT), Finding(EXACT), Finding(REFUSED, "a | b"), Finding(EXACT, "c")]
    found = [(Row("g", f"n, {i}", findings.pop), each) for i, each in enumerate([*findings])]
    text = page.write_page(found)
    assert page.read_page(text) == {(row.group, row.name): each.result for row, each in found}
    assert "| refused | n, 2 | a \\| b |" in text
    assert "Of 4 ways: 3 exact, 1 refused." in text


# --- what is not exact is found


class Tampering(trial.Watched):
    """A monitor whose copies have one wrong bit."""

    def record(self, step: Any) -> None:
        super().record(step)
        before, gradient, after = self.seen[-1]["0.bias"]
        wrong = torch.nextafter(after, after + 1)
        self.seen[-1]["0.bias"] = Entry(before, gradient, wrong)


class Silent(trial.Watched):
    """A monitor that misses each layer but one, and says nothing."""

    def record(self, step: Any) -> None:
        super().record(step)
        self.seen[-1] = {"0.bias": self.seen[-1]["0.bias"]}


class Drawing(trial.Watched):
    """A monitor that draws a random number."""

    def record(self, step: Any) -> None:
        super().record(step)
        torch.rand(1)


@pytest.fixture
def watch_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    return lambda kind: monkeypatch.setattr(trial, "Watched", kind)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Tampering, Finding(WRONG, "step 0: after of 0.bias differs")),
        (Silent, Finding(NOT_SEEN)),
        (Drawing, Finding(WRONG, "training differs from that without AltGrad")),
    ],
)
def test_a_wrong_monitor_is_found(
    watch_with: Any, kind: type[trial.Watched], expected: Finding
) -> None:
    assert trial.try_run(loop()) == Finding(EXACT)
    watch_with(kind)
    assert trial.try_run(loop()) == expected


def test_a_wrong_figure_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "is_equal", lambda figure, expected: figure < expected)
    found = trial.try_run(loop())
    assert found.result == WRONG
    assert "_frac of " in found.note or "_rms of " in found.note


def test_a_training_that_moves_nothing_proves_nothing() -> None:
    found = trial.try_run(loop(torch.optim.SGD, lr=0.0))
    assert found == Finding(NOT_RUN, "moves no weight without AltGrad")


def test_two_trainings_that_differ_by_themselves_prove_nothing() -> None:
    calls: list[None] = []

    def run(design: Any, folder: Path) -> Journal:
        calls.append(None)
        return loop(lr=0.01 * len(calls))(design, folder)

    assert trial.try_run(run) == Finding(NOT_RUN, "no two runs without AltGrad are equal")
