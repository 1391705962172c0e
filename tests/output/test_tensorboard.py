"""`TensorBoardRuns`: groups of cards in their order, and a run for each format and recipe."""

import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from altgrad.output import WriterLogger
from altgrad.output.charts import Row
from altgrad.output.tensorboard import TensorBoardRuns, find_tag, make_layout

MODEL = {
    "progress_kept/bf16": 0.5,
    "progress_kept/now": 0.75,
    "frozen_layers/bf16": 3.0,
    "kept_update_ratio/e5m2": 0.125,
    "frozen_layers/e5m2": 1.0,
    "kept_update_ratio/bf16": 0.5,
    "lost_now": 0.25,
    "ulp_mean": 2.0,
    "stiffness_mean/bf16": 0.625,
    "drift/now": 0.0,
}
ROW = Row(
    *(7, MODEL, {"own_share": 0.5, "elements": 9.0}),
    {"a/b.weight": {"ulp_mean": 4.0, "stiffness_mean/bf16": 8.0}},
)


def read(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return the steps and values of each tag, by the name of the run below a folder."""
    found = {}
    for file in folder.rglob("events.*"):
        events = EventAccumulator(str(file)).Reload()
        run = str(file.parent.relative_to(folder))
        found.setdefault(run, {}).update(
            {
                tag: [(each.step, each.value) for each in events.Scalars(tag)]
                for tag in events.Tags()["scalars"]
            }
        )
    return found


def test_each_format_and_recipe_is_a_run_and_the_training_itself_is_that_of_the_user(
    tmp_path: Path,
) -> None:
    with SummaryWriter(tmp_path) as writer:
        runs = TensorBoardRuns(WriterLogger(writer))
        runs.log_row(ROW)
        runs.close()
    found = {run: {t: v for t, [(_, v)] in tags.items()} for run, tags in read(tmp_path).items()}
    assert found == {
        ".": {
            "1-AltGrad/progress_kept": 0.75,
            "1-AltGrad/lost_now": 0.25,
            "1-AltGrad/monitor/own_share": 0.5,
            "2-AltGrad-model/monitor/elements": 9.0,
            "2-AltGrad-model/ulp_mean": 2.0,
            "2-AltGrad-model/drift": 0.0,
            "3-AltGrad-layers/ulp_mean/a/b.weight": 4.0,
        },
        "altgrad/bf16": {
            "1-AltGrad/progress_kept": 0.5,
            "1-AltGrad/frozen_layers": 3.0,
            "2-AltGrad-model/stiffness_mean": 0.625,
            "2-AltGrad-model/kept_update_ratio": 0.5,
            "3-AltGrad-layers/stiffness_mean/a/b.weight": 8.0,
        },
        # A format without a twin has its kept_update_ratio in the headline.
        "altgrad/e5m2": {"1-AltGrad/kept_update_ratio": 0.125, "1-AltGrad/frozen_layers": 1.0},
    }


def test_the_headline_is_the_first_group_and_a_heat_map_the_first_image() -> None:
    groups = {tag.partition("/")[0] for tag in map(find_tag, ("ranges", "steps/a", "stall_map/a"))}
    groups |= {*make_layout(ROW)}
    assert len(groups) == 6
    # TensorBoard sorts groups by name: tensorboard/webapp/metrics/utils.ts, compareTagNames.
    assert min(*groups, "Accuracy", "train", "loss", "_x") == "1-AltGrad"
    pictures = map(find_tag, ("ranges", "stall_frac_map/bf16", "stall_frac_map/e5m2"))
    assert min(pictures) == "4-AltGrad-maps/stall_frac_map/bf16"


def test_a_resumed_run_goes_on_in_the_same_runs_and_leaves_the_writer_open(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        for step in (3, 4):
            runs = TensorBoardRuns(WriterLogger(writer))
            runs.log_row(ROW._replace(step=step))
            runs.close()
            writer.add_scalar("loss", 1.0, step)
    found = read(tmp_path)
    assert [step for step, _ in found["."]["loss"]] == [3, 4]
    assert len([*tmp_path.glob("altgrad/bf16/events.*")]) == 2


def test_a_run_that_is_never_closed_is_complete_when_nothing_holds_it(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:
        runs = TensorBoardRuns(WriterLogger(writer))
        runs.log_row(ROW)
        del runs
        assert "1-AltGrad/progress_kept" in read(tmp_path)["altgrad/bf16"]


@pytest.mark.parametrize("name", ["a/b", "../up", "a b", "C:x"])
def test_a_name_is_one_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "log"
    with SummaryWriter(folder) as writer:
        runs = TensorBoardRuns(WriterLogger(writer))
        runs.log_row(Row(0, {f"progress_kept/{name}": 1.0}, {}, {}))
        runs.close()
    (file,) = folder.glob("altgrad/*/events.*")
    assert file.parent.parent == folder / "altgrad"


def test_a_writer_without_a_folder_has_the_names_behind_the_tags() -> None:
    class Memory:
        experiment: Any = object()
        logged: dict[str, float]

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.logged = metrics

    memory = Memory()
    TensorBoardRuns(memory).log_row(Row(0, {"progress_kept/bf16": math.inf}, {}, {}))
    assert memory.logged == {"1-AltGrad/progress_kept/bf16": math.inf}
