"""`altgrad.watch`: a run file, figures and a summary of any training, in a line."""

import gc
import json
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import altgrad
from altgrad.report import judge_run, read
from tests.integrations.trainings import (
    FORMAT,
    RecordingAdamW,
    assert_equal,
    assert_true,
    clone_weights,
    make_model,
    make_training,
    train,
)

NAMES = [name for name, _ in make_model().named_parameters()]


def test_figures_are_those_of_the_recorded_step(tmp_path: Path) -> None:
    model, optimizer = make_training()
    with altgrad.watch(model, optimizer, tmp_path, formats=FORMAT, every_n_steps=2) as run:
        train(model, optimizer, 5)
        assert_true(run.latest.layers, NAMES, optimizer.steps[3])
    assert run.path == tmp_path / "altgrad.jsonl"
    found = read(run.path)
    assert found.steps == (1, 3)
    last = {row.layer: row.figures for row in found.rows if row.step == 3}
    for name in NAMES:
        assert last[name]["update_rms"] == pytest.approx(run.latest.layers[name]["update_rms"])


@pytest.mark.default_twins
def test_training_is_bit_identical(tmp_path: Path) -> None:
    plain = make_training()
    train(*plain, 4)
    state = torch.get_rng_state()
    watched = make_training()
    run = altgrad.watch(*watched, tmp_path, every_n_steps=2)
    train(*watched, 4)
    run.close()
    assert_equal(clone_weights(watched[0]), clone_weights(plain[0]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.default_twins
def test_the_end_of_a_with_block_prints_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with altgrad.watch(*(training := make_training()), tmp_path, every_n_steps=1) as run:
        train(*training, 3)
    out, err = capsys.readouterr()
    assert (out, err) == (f"{run.summarize()}\n", "")
    assert run.close() == run.summarize()
    lines = out.splitlines()
    assert lines[-1] == f"altgrad report {run.path}"
    assert lines[0].startswith("[AltGrad] Fine: ")
    assert run.assessment.summary == judge_run(read(run.path)).summary
    with altgrad.watch(*training, tmp_path):
        pass  # there is nothing to say without a step
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_training_passes_and_leaves_a_complete_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: type[BaseException]
) -> None:
    """After Ctrl-C the summary is printed; after an error it would hide the traceback."""

    def train_and_raise() -> None:
        model, optimizer = make_training()
        with altgrad.watch(model, optimizer, tmp_path, every_n_steps=1):
            train(model, optimizer, 2)
            raise error

    with pytest.raises(error):
        train_and_raise()
    assert read(tmp_path).steps == (0, 1)
    assert ("altgrad report" in capsys.readouterr().out) == (error is KeyboardInterrupt)


def test_the_result_need_not_be_kept(tmp_path: Path) -> None:
    model, optimizer = make_training()
    altgrad.watch(model, optimizer, tmp_path, every_n_steps=1)
    gc.collect()
    train(model, optimizer, 3)
    assert read(tmp_path).steps == (0, 1, 2)


def test_an_optimizer_that_is_gone_leaves_nothing(tmp_path: Path) -> None:
    model, optimizer = make_training()
    model.optimizer = optimizer  # a cycle, as in modules that keep their optimizer
    run = weakref.ref(altgrad.watch(model, optimizer, tmp_path, every_n_steps=1))
    train(model, optimizer, 1)
    del model, optimizer
    gc.collect()
    assert run() is None
    altgrad.report.RunFile.resume(tmp_path / "altgrad.jsonl", 1, read_header(tmp_path)).close()


def read_header(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "altgrad.jsonl").read_bytes().split(b"\n")[0])


def test_a_closed_run_leaves_no_hook(tmp_path: Path) -> None:
    model, optimizer = make_training()

    def count_hooks() -> int:
        return sum(len(value) for name, value in vars(optimizer).items() if name.endswith("_hooks"))

    run = altgrad.watch(model, optimizer, tmp_path)
    assert count_hooks()
    run.close()
    assert count_hooks() == 0


def test_a_killed_process_leaves_a_complete_file(tmp_path: Path) -> None:
    script = """
import os, sys
import altgrad
from tests.integrations.trainings import make_training, train
training = make_training()
altgrad.watch(*training, sys.argv[1], every_n_steps=1, recipes=())
train(*training, 3)
os._exit(0)
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=root)
    run = read(tmp_path)
    assert run.steps == (0, 1, 2)
    assert judge_run(run).by_layer


def test_a_resumed_run_goes_on_in_its_file(tmp_path: Path) -> None:
    """The checkpoint is after step 5; the steps 6 and 7 are lost and made again."""
    model, optimizer = make_training()
    run = altgrad.watch(model, optimizer, tmp_path, every_n_steps=2)
    train(model, optimizer, 5)
    torch.save(run.state_dict(), tmp_path / "state.pt")
    train(model, optimizer, 3)
    run.close()
    assert read(tmp_path).steps == (1, 3, 5, 7)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = altgrad.watch(model, optimizer, tmp_path, every_n_steps=2, state=state)
    train(model, optimizer, 3)
    resumed.close()
    assert resumed.path == run.path
    assert read(tmp_path).steps == (1, 3, 5, 7)
    assert resumed.state_dict()["steps"] == 8


def test_a_run_that_is_resumed_elsewhere_names_its_predecessor(tmp_path: Path) -> None:
    model, optimizer = make_training()
    run = altgrad.watch(model, optimizer, tmp_path / "first", every_n_steps=2)
    train(model, optimizer, 4)
    run.close()
    state = run.state_dict()
    resumed = altgrad.watch(model, optimizer, tmp_path / "second", every_n_steps=2, state=state)
    train(model, optimizer, 2)
    resumed.close()
    assert resumed.path == tmp_path / "second" / "altgrad.jsonl"
    assert read(resumed.path).steps == (1, 3, 5)


@pytest.mark.parametrize("kept", [{"formats": "bf16"}, {"formats": "bf16", "recipes": ()}])
def test_a_resumed_run_with_fewer_formats_and_recipes_is_judged(
    tmp_path: Path, kept: dict[str, Any]
) -> None:
    training = make_training()
    formats, recipes = ["bf16", "e4m3fn"], ["bf16", "e4m3fn-sr"]
    with altgrad.watch(
        *training, tmp_path, every_n_steps=1, formats=formats, recipes=recipes
    ) as run:
        train(*training, 2)
    kept, notices = {"recipes": "bf16", **kept}, []
    resumed = altgrad.watch(
        *training, tmp_path, every_n_steps=1, state=run.state_dict(), warn=notices.append, **kept
    )
    train(*training, 2)
    resumed.close()
    assert {"e4m3fn", "e4m3fn-sr"} <= {*run.assessment.runs}
    assert {*resumed.assessment.runs} == {"bf16"}
    assert all("never_moved_frac" in each for each in notices)


def test_a_state_without_its_entries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state=\['monitor'\]: expected the entries of RunWatch"):
        altgrad.watch(*make_training(), tmp_path, state={"monitor": {}})


def test_a_state_takes_a_run_back_in_its_file(tmp_path: Path) -> None:
    model, optimizer = make_training()
    run = altgrad.watch(model, optimizer, tmp_path, formats=FORMAT, every_n_steps=1)
    train(model, optimizer, 3)
    weights, state = clone_weights(model), run.state_dict()
    train(model, optimizer, 4)
    with torch.no_grad():
        for parameter, before in zip(model.parameters(), weights, strict=True):
            parameter.copy_(before)
    run.load_state_dict(state)
    train(model, optimizer, 1)
    assert_true(run.latest.layers, NAMES, optimizer.steps[-1])
    run.close()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".jsonl"] == [run.path.name]
    assert read(tmp_path).steps == (0, 1, 2, 3)


def test_a_damaged_state_leaves_a_run_as_it_is(tmp_path: Path) -> None:
    model, optimizer = make_training()
    run = altgrad.watch(model, optimizer, tmp_path, every_n_steps=1)
    train(model, optimizer, 2)
    state = run.state_dict()
    del state["monitor"]["scales"]
    with pytest.raises(ValueError, match="scales"):
        run.load_state_dict(state)
    train(model, optimizer, 1)
    run.close()
    assert read(tmp_path).steps == (0, 1, 2)


def test_steps_of_two_optimizers_with_one_number_share_a_record(tmp_path: Path) -> None:
    model = make_model()
    halves = [RecordingAdamW(model[k].parameters(), lr=1e-3) for k in (0, 3)]
    run = altgrad.watch(model, halves, tmp_path, every_n_steps=2, formats=FORMAT)
    for _ in range(4):
        model(torch.randn(4, 8)).square().mean().backward()
        for each in halves:
            each.step()
    run.close()
    names = [name for name in NAMES if name[0] in "03"]
    assert_true(run.latest.layers, names, halves[0].steps[3] + halves[1].steps[3])
    rows = [(row.step, row.layer) for row in read(tmp_path).rows]
    assert sorted(name for step, name in rows if step == 3 and name) == sorted(names)
    assert len(rows) == 2 * (len(names) + 1)


def test_an_optimizer_that_steps_rarely_is_numbered_by_the_other(tmp_path: Path) -> None:
    """As in a GAN with three steps of the critic for one of the generator."""
    model = make_model()
    often, rarely = (torch.optim.SGD(model[k].parameters(), lr=1e-3) for k in (0, 3))
    run = altgrad.watch(model, [often, rarely], tmp_path, every_n_steps=2)
    for batch in range(6):
        model(torch.randn(4, 8)).square().mean().backward()
        often.step()
        if batch % 3 == 2:
            rarely.step()
    run.close()
    steps = {row.step for row in read(tmp_path).rows if row.layer == "3.bias"}
    assert steps == {5}  # its second step, in the sixth batch
    assert read(tmp_path).steps == (1, 3, 5)


def make_phases() -> tuple[nn.Module, RecordingAdamW, RecordingAdamW]:
    """Return a model, and two optimizers of a part of its layers each."""
    model = make_model()
    return model, *(RecordingAdamW(model[k].parameters(), lr=1e-3) for k in (0, 3))


def list_steps(folder: Path, layer: str) -> list[int]:
    return [row.step for row in read(folder).rows if row.layer == layer]


def test_optimizers_in_phases_keep_all_their_records(tmp_path: Path) -> None:
    """The first step of the second one shares the number of the last step of the first one."""
    model, first, second = make_phases()
    run = altgrad.watch(model, [first, second], tmp_path, formats=FORMAT, every_n_steps=2)
    train(model, first, 10)
    train(model, second, 10)
    assert run.state_dict()["steps"] == 19
    run.close()
    assert list_steps(tmp_path, "0.bias") == [1, 3, 5, 7, 9]
    assert list_steps(tmp_path, "3.bias") == [9, 11, 13, 15, 17]
    assert_true(run.latest.layers, ["3.weight", "3.bias"], second.steps[8])


def test_an_optimizer_that_is_attached_in_mid_run_goes_on_counting(tmp_path: Path) -> None:
    model, first = make_training()
    run = altgrad.watch(model, first, tmp_path, formats=FORMAT, every_n_steps=2)
    train(model, first, 5)
    second = RecordingAdamW(model.parameters(), lr=1e-2)
    run.attach(second)
    train(model, second, 5)
    run.close()
    assert read(tmp_path).steps == (1, 3, 5, 7, 9)
    assert len(read(tmp_path).rows) == 5 * (len(NAMES) + 1)
    assert_true(run.latest.layers, NAMES, second.steps[4])


def test_an_optimizer_that_is_dropped_in_mid_run_is_freed(tmp_path: Path) -> None:
    model, first = make_training()
    run = altgrad.watch(model, first, tmp_path, every_n_steps=1)
    train(model, first, 1)
    dropped = weakref.ref(first)
    run.attach(torch.optim.SGD(model.parameters(), lr=1e-3))
    del first
    gc.collect()
    assert dropped() is None
    run.close()


def test_optimizers_of_two_threads_keep_all_their_records(tmp_path: Path) -> None:
    model, *halves = make_phases()
    run = altgrad.watch(model, halves, tmp_path, formats=FORMAT, every_n_steps=1)
    parts = zip([model[0], model[3]], halves, [8, 16], strict=True)

    def train_part(part: nn.Module, optimizer: RecordingAdamW, size: int) -> None:
        for _ in range(20):
            optimizer.zero_grad()
            part(torch.ones(2, size)).square().mean().backward()
            optimizer.step()

    threads = [threading.Thread(target=train_part, args=each) for each in parts]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    run.close()
    assert len(list_steps(tmp_path, "0.bias")) == len(list_steps(tmp_path, "3.bias")) == 20


def test_a_step_of_all_optimizers_is_written_at_once(tmp_path: Path) -> None:
    model, *halves = make_phases()
    run = altgrad.watch(model, halves, tmp_path, every_n_steps=1)
    model(torch.randn(4, 8)).square().mean().backward()
    for each in halves:
        assert run.latest is None
        each.step()
    assert read(tmp_path).steps == (0,)  # also if the process is killed now
    run.close()


def test_a_closed_run_is_attached_to_no_optimizer(tmp_path: Path) -> None:
    model, optimizer = make_training()
    run = altgrad.watch(model, optimizer, tmp_path, every_n_steps=1)
    state = run.state_dict()
    run.close()
    with pytest.raises(RuntimeError, match="attach: expected a run that is not closed"):
        run.attach(optimizer)
    with pytest.raises(RuntimeError, match="load_state_dict: expected a run that is not closed"):
        run.load_state_dict(state)


def test_a_summary_writer_gets_figures_pictures_and_verdicts(tmp_path: Path) -> None:
    model, optimizer = make_training()
    with SummaryWriter(tmp_path) as writer:
        run = altgrad.watch(
            model, optimizer, tmp_path, formats=FORMAT, every_n_steps=1, writer=writer, charts="all"
        )
        train(model, optimizer, 2)
        run.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    scalars = events.Scalars("2-AltGrad-model/update_rms")
    rms = [each.value for each in scalars]
    both = [torch.cat([(a - b).flatten() for b, a in step]) for step in optimizer.steps]
    assert rms == pytest.approx([each.square().mean().sqrt().item() for each in both], rel=1e-5)
    assert [each.step for each in scalars] == [0, 1]
    assert "5-AltGrad-ranges/ranges" in events.Tags()["images"]
    assert "altgrad/verdict/text_summary" in events.Tags()["tensors"]


def test_a_run_without_a_due_step_warns(tmp_path: Path) -> None:
    model, optimizer = make_training()
    run = altgrad.watch(model, optimizer, tmp_path, every_n_steps=10)
    train(model, optimizer, 3)
    with pytest.warns(UserWarning, match=r"altgrad.watch observed no step: none was due"):
        run.close()


def test_layers_that_move_while_all_steps_are_skipped_are_named(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    notices: list[str] = []
    run = altgrad.watch(model, optimizer, tmp_path, every_n_steps=1, warn=notices.append)
    for _ in range(3):
        optimizer.step()  # without gradients
        for parameter in model.parameters():
            parameter.data += 0.1
    run.close()
    first, *others = notices
    skipped = "observed no step: all were skipped, {'no gradients': 3}"
    assert first == f"{skipped}, and yet layers moved"
    assert any("0.weight" in each for each in others)


def test_a_folder_that_cannot_be_written_costs_the_file_alone(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    model, optimizer = make_training()
    run = altgrad.watch(model, optimizer, tmp_path / "taken", every_n_steps=1)
    with pytest.warns(UserWarning, match="altgrad.watch goes on without a run file in"):
        train(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
        assert "altgrad report" not in run.close()
    assert run.latest is not None
    assert run.path is None


def test_a_strict_run_raises_what_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    model, optimizer = make_training()
    altgrad.watch(model, optimizer, tmp_path / "taken", every_n_steps=1, strict=True)
    with pytest.raises(FileExistsError):
        train(model, optimizer, 1)


def test_arguments_of_the_monitor_are_passed_on(tmp_path: Path) -> None:
    model, optimizer = make_training()
    rule = altgrad.SamplingRule("2.*", enabled=False)
    notices: list[str] = []
    run = altgrad.watch(
        model, optimizer, tmp_path, formats="e4m3fn", sampling=[rule], warn=notices.append
    )
    assert [each.name for each in run.monitor.formats] == ["e4m3fn"]
    assert not any(name.startswith("2.") for name in run.monitor.parameters)
    train(model, optimizer, 1)
    run.close()
    assert notices[0].startswith("observed no step")


def test_an_unknown_optimizer_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="optimizer=object: expected a torch"):
        altgrad.watch(nn.Linear(2, 2), object(), tmp_path)


def test_steps_that_a_scaler_skips_are_counted(tmp_path: Path) -> None:
    model, optimizer = make_training()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run = altgrad.watch(model, optimizer, tmp_path, formats=FORMAT, every_n_steps=1, scaler=scaler)
    for batch in range(3):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 8)).square().mean()).backward()
        if batch == 1:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    run.close()
    assert run.monitor.skipped == {"inf": 1}
    assert_true(run.latest.layers, NAMES, optimizer.steps[-1])
    assert read(tmp_path).rows[-1].step == 1  # the skipped step was no step of the optimizer
