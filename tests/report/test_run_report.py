"""Texts, shares and pictures of runs that are made of plain numbers."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from altgrad import Histogram
from altgrad.report import LayerInfo, Row, RunReport
from altgrad.report.next_lines import write_next
from tests.report.pictures import read_texts
from tests.report.runs import make_rows, make_run
from tests.report.shown_runs import record_fp32

NAN = math.nan


def model_row(step: int, **more: Any) -> Row:
    return Row(step, None, {}, {}, **more)


def report(*rows: Row, **more: Any) -> RunReport:
    return RunReport.from_run(make_run(rows, **more))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "no step observed"),
        ([9], "1 step observed, 9"),
        ([9, 3], "2 steps observed, 3 to 9"),
        (range(0, 12_000, 10), "1,200 steps observed, 0 to 11,990"),
    ],
)
def test_the_observed_steps_are_put_into_words(steps: Any, words: str) -> None:
    assert report(*map(model_row, steps)).steps == words


LAYERS = {
    "whole": LayerInfo((4, 10), "float32", 40, ("bf16",)),
    "sampled": LayerInfo((40, 50), "float32", 256, ("bf16",)),
    "scalar": LayerInfo((), "float32", 1, ("bf16",)),
}


def step_of(step: int, *layers: str) -> list[Row]:
    """Return the rows of one observed step: those of its layers, then that of the model."""
    return [*(Row(step, name, {}, {}) for name in layers), model_row(step)]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (("whole", "sampled"), "296 of 2,040 elements in 2 layers"),
        (("whole",), "all 40 elements in 1 layer"),
        (("scalar",), "all 1 element in 1 layer"),
        (("sampled", "other"), "256 of 2,000 elements in 1 layer, and 1 layer of unknown size"),
        ((), "no element measured"),
    ],
)
def test_the_elements_of_layers_with_figures_are_put_into_words(
    layers: tuple[str, ...], words: str
) -> None:
    assert report(*step_of(0, *layers), layers=LAYERS).measured == words


def test_layers_without_figures_are_named() -> None:
    (note,) = report(*step_of(0, "whole"), *step_of(1, "whole"), layers=LAYERS).notes
    assert note.startswith("without an observed step: 2 layers (sampled, scalar), which had no")
    assert report(layers=LAYERS).notes == []  # no step was observed, which is said elsewhere
    assert report(*step_of(0, *LAYERS), layers=LAYERS).notes == []


def test_a_model_whose_row_stands_for_different_layers_has_a_note() -> None:
    rows = [*step_of(0, "whole"), *step_of(1, "sampled"), *step_of(2, "whole")]
    note = report(*rows, layers=LAYERS).notes[-1]
    assert note.startswith("2 sets of layers (1, 1) were observed in different steps")
    rows += [*step_of(3, *LAYERS), *step_of(4, "sampled", "other"), *step_of(5)]
    assert report(*rows, layers=LAYERS).notes[-1].startswith("4 sets of layers (1, 1, 3, …) were")


def test_skipped_steps_are_those_of_the_row_with_the_highest_count() -> None:
    """With two optimizers, the row of either counts the skipped steps of the whole run so far."""
    counts = [{"inf": 1}, {"inf": 2, "no gradients": 1}, {"inf": 2}]
    assert report(*(model_row(k, skipped=c) for k, c in enumerate(counts))).skipped == counts[1]
    assert report().skipped == {}


def test_the_own_share_counts_every_step_between_observed_steps() -> None:
    """Observing takes 0.5 s and 0.25 s, beside 10 training steps of 0.1 s and 10 of 0.125 s."""
    first = model_row(0)
    later = [
        model_row(10, own_seconds=0.5, training_seconds=0.1),
        model_row(20, own_seconds=0.25, training_seconds=0.125),
    ]
    assert report(first, *later).own_share == pytest.approx(0.75 / (0.75 + 1 + 1.25))
    twice = model_row(20, own_seconds=0.75, training_seconds=0.125)  # by another optimizer
    assert report(first, *later, twice).own_share == pytest.approx(1.5 / (1.5 + 1 + 1.25))
    again = model_row(5, own_seconds=0.75, training_seconds=0.125)  # by a resumed run
    assert report(first, *later, again).own_share == pytest.approx(1.5 / (1.5 + 1 + 1.25))
    assert math.isnan(report(first).own_share)
    assert math.isnan(report().own_share)


def test_without_twins_layers_that_no_update_moves_come_first() -> None:
    """A run in bf16 of which only single updates are known."""
    layers = {name: LayerInfo((8,), "bfloat16", 8, ("e5m2",)) for name in ("moves", "still")}
    rows = make_rows({"moves": {"e5m2": 0.0}, "still": {"e5m2": 1.0}})
    unmoved = {"moves": 0.5, "still": 1.0}
    rows = [
        replace(row, figures={**row.figures, "unmoved_frac": unmoved[str(row.layer)]})
        for row in rows
    ]
    assert [*report(*rows, layers=layers, formats=["e5m2"]).by_layer] == ["still", "moves"]
    whole = {name: LayerInfo((8,), "float32", 8, ("e5m2",)) for name in layers}
    assert [*report(*rows, layers=whole, formats=["e5m2"]).by_layer] == ["moves", "still"]


def test_a_report_says_why_there_is_no_verdict() -> None:
    assert report().answer.startswith("No step was observed: there are no verdicts.")
    nothing = report(*step_of(0, "whole"), formats=()).answer
    assert nothing.startswith("The monitor has neither formats nor recipes")


def test_pictures_are_drawn_if_the_run_has_their_figures() -> None:
    steps = {f"steps/{format}": Histogram(-3, [1, 2]) for format in ("bf16", "e5m2")}
    weights = {"weights": Histogram(-6, [1, 2, 1])}
    kept = make_rows({"a": {"bf16": 0.25, "e5m2": 0.0}})
    assert report().pictures() == {}
    stalls = ["stalls-0", "stalls-1"]
    assert [*report(*kept).pictures()] == ["kept", *stalls]
    assert [*report(model_row(0, histograms=steps)).pictures()] == ["steps", *stalls]
    whole = report(*kept, model_row(0, histograms=steps | weights))
    assert [*whole.pictures()] == ["kept", "steps", "ranges", *stalls]


def test_the_last_histogram_of_each_key_is_drawn() -> None:
    early = {"steps/bf16": Histogram(-3, [5, 7]), "weights": Histogram(-6, [1, 4])}
    late = {"steps/bf16": Histogram(-3, [2, 3])}
    pictures = report(model_row(0, histograms=early), model_row(1, histograms=late)).pictures()
    heights = {
        name: [bar.get_height() for bar in pictures[name].axes[0].patches]
        for name in ("steps", "ranges")
    }
    assert heights == {"steps": [2, 3], "ranges": [1, 4]}


def test_a_heat_map_shows_the_layers_judged_for_its_format() -> None:
    layers = {
        "both": LayerInfo((8,), "float32", 8, ("bf16", "e5m2")),
        "one": LayerInfo((8,), "float32", 8, ("e5m2",)),
    }
    rows = make_rows({"both": {"bf16": 1.0, "e5m2": 1.0}, "one": {"e5m2": 1.0}})
    pictures = report(*rows, layers=layers).pictures()
    shown = {
        name: {"both", "one"} & {*read_texts(pictures[name])} for name in ("stalls-0", "stalls-1")
    }
    assert shown == {"stalls-0": {"both"}, "stalls-1": {"both", "one"}}
    assert "stall_frac in bf16" in read_texts(pictures["stalls-0"])


def test_histograms_of_other_keys_are_not_drawn() -> None:
    others = {"weights/x": Histogram(-6, [1, 2]), "steps/fp16": Histogram(-3, [1, 2])}
    found = report(model_row(0, histograms=others)).pictures()
    assert not {"steps", "ranges"} & {*found}


def share_rows(dtype: str) -> RunReport:
    """Make a report of two steps of two layers in a dtype, one of which has NaN."""
    rows = [
        Row(step, layer, {"unmoved_frac": unmoved, "nonfinite_frac": broken}, {})
        for step, layer, unmoved, broken in (
            *((0, "a", 0.5, 0.0), (0, "b", NAN, 0.25), (1, "a", 1.0, 0.0), (1, "b", NAN, 0.125)),
        )
    ]
    rows += [Row(step, None, {"visible_frac/bf16": 0.25 + step / 2}, {}) for step in (0, 1)]
    layers = {name: LayerInfo((8,), dtype, 8, ("bf16",)) for name in "ab"}
    return report(*rows, layers=layers, formats=["bf16"])


def test_the_mean_unmoved_share_is_that_of_runs_stored_below_float32() -> None:
    assert share_rows("bfloat16").unmoved == {"a": 0.75}
    assert share_rows("float32").unmoved == {}


def test_the_largest_share_of_nan_is_that_of_layers_with_any() -> None:
    assert share_rows("float32").nonfinite == share_rows("bfloat16").nonfinite == {"b": 0.25}


def test_the_mean_visible_share_is_that_of_runs_in_float32() -> None:
    assert share_rows("float32").visible == {"bf16": 0.5}
    assert share_rows("bfloat16").visible == {}


def test_a_run_and_its_verdicts_are_shown_in_a_line_and_in_a_notebook(tmp_path: Path) -> None:
    run = record_fp32(tmp_path)
    found = RunReport.from_run(run)
    assert repr(run).endswith("altgrad.jsonl': 4 observed steps, 2 layers, 3 recipes)")
    assert repr(run.rows[0]).startswith("Row(step=9, layer='bias': ")
    runs = found.assessment.runs
    verdicts = ", ".join(f"{name}: {each.verdict.short}" for name, each in runs.items())
    assert repr(found.assessment) == f"Assessment({verdicts}; 2 layers)"
    assert repr(found) == f"RunReport({run!r}, {found.assessment!r})"
    for shown in (run, found, found.assessment):
        html = shown._repr_html_()  # the protocol of notebooks
        assert html.count("<tr>") == 1 + len(found.recipes)
        assert found.answer in html
    html = run._repr_html_()  # the protocol of notebooks
    assert "nothing is lost now" in html
    assert f"<b>Next:</b> {write_next(run, runs)}</p>" in html
