"""Why a run has no observed step: as its file says, in a training of each kind."""

from pathlib import Path

import pytest
import torch
from torch import nn

import altgrad
from altgrad.report import LayerInfo, RunFile, RunReport, page, read
from altgrad.report.no_steps import explain_no_step
from altgrad.report.records.schema import Unobserved
from tests.command_line import altgrad as run_altgrad
from tests.report.runs import make_run, write_empty_run, write_run

HEADING = "No step was observed: there are no verdicts. "


RATE = "40 had a learning rate of 0. Train beyond the warm-up, or with a learning rate above 0."
INF = "2 had gradients with inf or NaN, and were skipped by the GradScaler, 1 had no gradients, "
SCALE = "Train for more steps, until the scale is found, or lower its init_scale. Call backward() "
REMEDY = "Train for longer, or pass every_n_steps=1."


@pytest.mark.parametrize(
    ("unobserved", "parts"),
    [
        (Unobserved(40, {"learning rate 0": 40}), ("No weight moved in 40 steps: ", RATE)),
        (
            Unobserved(3, {"inf": 2, "no gradients": 1, "solar wind": 1}),
            ("No weight moved in 4 steps: ", INF, "1 solar wind. ", SCALE),
        ),
        (
            Unobserved(3, {"inf": 0}, 50),
            ("The run made 3 steps, and none was due (every_n_steps=50). ", REMEDY),
        ),
        (
            Unobserved(1, {}, 1),
            ("The run made 1 step, and none was due by its every_n_steps. ", REMEDY),
        ),
        (Unobserved(9, {}, 0), ("This Trainer logs at no step", "pass every_n_steps.")),
    ],
)
def test_the_heading_says_why_no_step_was_observed(
    unobserved: Unobserved, parts: tuple[str, ...]
) -> None:
    run = make_run([], unobserved=unobserved)
    text = explain_no_step(run)
    assert text.startswith(HEADING + parts[0])
    assert all(part in text for part in parts)
    assert RunReport.from_run(run).answer == text


def test_a_file_that_ends_with_its_header_names_what_may_have_happened() -> None:
    layers = {"a": LayerInfo((8,), "float32", 8, (), 20), "b": LayerInfo((8,), "float32", 8, (), 7)}
    text = explain_no_step(make_run([], layers=layers))
    assert text.startswith(HEADING + "Its file ends before the first one (every_n_steps=7): ")
    assert "attached after the training" in text
    assert "(every_n_steps" not in explain_no_step(make_run([]))


# --- real runs


def watch(folder: Path, steps: int, lr: float, every: int) -> Path:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    run = altgrad.watch(model, optimizer, folder, every_n_steps=every, warn=[].append)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    run.close()
    return folder


def test_a_watched_run_writes_that_its_learning_rate_was_0(tmp_path: Path) -> None:
    run = read(watch(tmp_path, 5, lr=0.0, every=1))
    assert run.unobserved == Unobserved(5, {"learning rate 0": 5}, 1)
    shown = run_altgrad("report", tmp_path)
    assert shown.returncode == 1
    assert "5 had a learning rate of 0. Train beyond" in " ".join(shown.stdout.split())
    assert "5 had a learning rate of 0" in page(RunReport.from_run(run))


def test_a_watched_run_writes_that_none_of_its_steps_was_due(tmp_path: Path) -> None:
    run = read(watch(tmp_path, 3, lr=0.1, every=50))
    assert run.unobserved == Unobserved(3, {}, 50)


def test_a_watched_run_with_an_observed_step_writes_nothing_of_this(tmp_path: Path) -> None:
    run = read(watch(tmp_path, 3, lr=0.1, every=1))
    assert run.unobserved is None
    assert len(run.steps) == 3


@pytest.mark.filterwarnings("ignore")  # of Lightning, and that no step was observed
def test_a_run_of_lightning_writes_it_too(tmp_path: Path) -> None:
    from altgrad_lightning import PrecisionMonitor
    from tests.lightning.runs import fit

    monitor = PrecisionMonitor(every_n_steps=100)
    fit(tmp_path, monitor)
    assert monitor.path is not None
    found = read(monitor.path).unobserved
    assert found is not None
    assert (found.skipped, found.every_n_steps) == ({}, 100)
    assert found.steps > 0


# --- the run file


def make_header(path: Path) -> altgrad.report.Header:
    """Return the header of a run file, to write another one."""
    run = read(path)
    return altgrad.report.Header(
        run.formats, run.layers, run.scaling, recipes=run.recipes, now=run.now
    )


def test_the_line_is_written_and_read(tmp_path: Path) -> None:
    path = write_empty_run(tmp_path / "a")
    with RunFile.create(tmp_path / "b", make_header(path)) as file:
        file.add_unobserved(7, {"inf": 7})
    assert read(file.path).unobserved == Unobserved(7, {"inf": 7}, None)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((1.5, {}), TypeError), ((1, {"inf": -1}), ValueError), ((1, {}, True), TypeError)],
)
def test_wrong_numbers_are_refused(tmp_path: Path, arguments: tuple, error: type) -> None:
    header = make_header(write_empty_run(tmp_path / "a"))
    with (
        RunFile.create(tmp_path / "b", header) as file,
        pytest.raises(error, match="expected a"),
    ):
        file.add_unobserved(*arguments)
    assert read(file.path).unobserved is None


def test_steps_that_were_observed_count_more(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    with RunFile.resume(path, 100, make_header(path)) as file:
        file.add_unobserved(30, {"inf": 1})
    assert RunReport.from_run(read(path)).answer.startswith("Not fine")
