"""What one run predicted beside what happened in another, from real runs and plain numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from altgrad.report import Confirmation, find_confirmation, read
from altgrad.report.confirmation import explain_metric, shorten_metric
from altgrad.report.records.run import Run
from tests.report.confirming import make_twin_run, share, write_trained
from tests.report.records.by_hand import list_figures

NAN, INF = math.nan, math.inf


# --- real runs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the files of a run that predicts bf16-true, and of a shorter one that is so."""
    folder = tmp_path_factory.mktemp("runs")
    fp32 = write_trained(folder / "fp32", recipes=["bf16", "bf16-true"], every=5)
    return fp32, write_trained(folder / "bf16", torch.bfloat16, steps=12, every=2)


def find_last(path: Path, step: int) -> dict[str | None, dict[str, float]]:
    """Return the figures of a step by layer, decoded by hand."""
    return next(figures for number, figures in list_figures(path) if number == step)


def test_figures_are_those_of_both_files_at_the_last_step_that_both_observed(
    files: tuple[Path, Path],
) -> None:
    confirmation = find_confirmation(*map(read, files))
    assert confirmation is not None
    assert confirmation.recipe == "bf16-true"
    assert confirmation.metrics == ("frozen_frac", "progress_kept", "exp_avg_sq_ratio")
    steps = [{step for step, _ in list_figures(path)} for path in files]
    step = max(steps[0] & steps[1])
    assert step < max(steps[1]) < max(steps[0])
    predicted, real = (find_last(path, step) for path in files)
    assert confirmation.model is not None
    for layer in (confirmation.model, *confirmation.layers):
        assert layer.step == step
        for metric, pair in layer.pairs.items():
            assert pair.predicted == predicted[layer.name][f"{metric}/bf16-true"]
            assert pair.real == real[layer.name][f"{metric}/now"]
    assert {layer.name for layer in confirmation.layers} == predicted.keys() - {None}
    gain = next(layer for layer in confirmation.layers if layer.name == "1.weight")
    assert gain.pairs["frozen_frac"][:2] == (1.0, 1.0)  # updates of 1e-4 cannot move 1 in bf16
    assert confirmation.mean_errors["frozen_frac"] < 0.05
    (note,) = confirmation.notes
    assert note == (
        f"A was last observed at step {max(steps[0])}, and B at step {max(steps[1])}: they are "
        "compared at the last step that both have"
    )


def test_runs_in_the_other_order_change_places(files: tuple[Path, Path]) -> None:
    fp32, bf16 = map(read, files)
    one, other = find_confirmation(fp32, bf16), find_confirmation(bf16, fp32)
    assert one is not None
    assert other is not None
    assert [each.predicting.path for each in (one, other)] == [files[0]] * 2
    assert one.layers == other.layers
    assert other.notes == ["the runs were given in the other order: the first one is B", *one.notes]


def test_two_runs_of_which_none_predicts_the_other_have_no_confirmation(
    files: tuple[Path, Path],
) -> None:
    fp32, bf16 = map(read, files)
    assert find_confirmation(fp32, fp32) is find_confirmation(bf16, bf16) is None
    named = find_confirmation(fp32, bf16, "bf16")
    assert named is not None
    assert named.recipe == "bf16"
    with pytest.raises(ValueError, match=r"--recipe=fp16: .* predicts: bf16, bf16-true"):
        find_confirmation(fp32, bf16, "fp16")


# --- plain numbers


def confirm(
    predicted: dict[str | None, Any], real: dict[str | None, Any], **more: Any
) -> Confirmation:
    return Confirmation(
        make_twin_run(predicted, "true"), make_twin_run(real, letter="b", **more), "true"
    )


def test_layers_with_the_largest_difference_are_first_and_ties_are_by_name() -> None:
    predicted = {
        "kept": share(0.5, 0.1),
        "b.tie": share(0.5, 0.5),
        "a.tie": share(0.75, 0.5),
        "none": share(NAN, NAN),
        "equal": share(1, 0),
    }
    real = {
        "kept": share(0.5, 0.9),
        "b.tie": share(0.25, 0.5),
        "a.tie": share(0.5, 0.5),
        "none": share(0.5, NAN),
        "equal": share(1, 0),
    }
    confirmation = confirm(predicted, real)
    assert [each.name for each in confirmation.layers] == [
        "kept",
        "a.tie",
        "b.tie",
        "equal",
        "none",
    ]
    assert [each.difference for each in confirmation.layers] == [0.8, 0.25, 0.25, 0.0, -1.0]
    assert confirmation.summary[0] == "As predicted (both shares within 0.1): 1 of 5 layers."
    expected = fmean([0, 0.25, 0.25, 0])
    assert confirmation.mean_errors["frozen_frac"] == pytest.approx(expected)
    assert confirmation.mean_errors["progress_kept"] == pytest.approx(0.2)


def test_frozen_layers_are_counted_as_predicted_as_real_and_as_both() -> None:
    ends = {"both": (1, 0.99), "early": (0.99, 0.98), "late": (0.9, 1), "no": (0, 0.5)}
    predicted = {name: share(each[0], 0) for name, each in ends.items()} | {"nan": share(NAN, 0)}
    real = {name: share(each[1], 0) for name, each in ends.items()} | {"nan": share(1, 0)}
    confirmation = confirm(predicted, real)
    assert confirmation.frozen == (2, 2, 1, 4)
    assert confirmation.summary[-1] == (
        "Frozen, of 4 layers: 2 as A predicts, 2 in B, 1 in both (at least 99 % of their weights "
        "never moved)."
    )


def test_layers_without_a_value_in_one_run_are_not_counted_as_not_frozen() -> None:
    confirmation = confirm({"a": share(0, 1)}, {"a": share(NAN, NAN)})
    (sentence,) = confirmation.summary
    assert sentence.startswith("No layer can be compared: float32 moved none, or weights are NaN")


def test_a_layer_that_becomes_nan_is_compared_at_the_last_step_before() -> None:
    finite = make_twin_run({"a": share(0, 0.5), None: share(0, 0.5)}, steps=[0, 5])
    broken = make_twin_run({"a": share(NAN, NAN), None: share(NAN, NAN)}, steps=[10])
    real = replace(finite, rows=[*finite.rows, *broken.rows])
    predicted = make_twin_run({"a": share(0, 0.75), None: share(0, 0.75)}, "true", steps=[0, 5, 10])
    confirmation = Confirmation(predicted, real, "true")
    (note,) = confirmation.notes
    assert note.startswith("figures end at step 5, though both runs go on to step 10: weights may")
    (layer,) = confirmation.layers
    assert (layer.step, layer.pairs["progress_kept"].difference) == (5, 0.25)
    assert confirmation.model is not None
    assert confirmation.model.step == 5


@pytest.mark.parametrize(
    ("predicted", "real", "octaves"),
    [(1, 2, 1), (4, 1, 2), (1, 1, 0), (0, 0, 0), (INF, INF, 0), (0, 1, INF), (1, NAN, NAN)],
)
def test_ratios_differ_by_octaves(predicted: float, real: float, octaves: float) -> None:
    runs = [{"a": share(0, 1, exp_avg_sq_ratio=ratio)} for ratio in (predicted, real)]
    confirmation = confirm(*runs)
    assert confirmation.metrics[2] == "exp_avg_sq_ratio"
    for found in (
        confirmation.layers[0].pairs["exp_avg_sq_ratio"].difference,
        confirmation.mean_errors["exp_avg_sq_ratio"],
    ):
        assert found == pytest.approx(octaves, nan_ok=True)


def test_the_ratio_is_that_of_the_second_moment_or_else_of_the_first_state_in_both() -> None:
    adam = share(0, 1, exp_avg_ratio=1.0, exp_avg_sq_ratio=1.0)
    sgd = share(0, 1, momentum_buffer_ratio=1.0, other_ratio=1.0)
    found = [
        confirm({"a": one}, {"a": other}).metrics[2:]
        for one, other in (
            (adam, adam),
            (sgd, sgd),
            (adam, share(0, 1, exp_avg_ratio=1.0)),
            (adam, sgd),
            (share(0, 1), share(0, 1)),
        )
    ]
    assert found == [
        ("exp_avg_sq_ratio",),
        ("momentum_buffer_ratio",),
        ("exp_avg_ratio",),
        (),
        (),
    ]


def test_layers_of_one_run_alone_are_noted() -> None:
    confirmation = confirm(
        {None: share(0, 1), "both": share(0, 1), "fp32": share(0, 1), "old": share(0, 1)},
        {None: share(0, 1), "both": share(0, 1), "fp32": None, "new": share(0, 1)},
    )
    assert [each.name for each in confirmation.layers] == ["both"]
    assert confirmation.notes == [
        "layers only in A: 1 (old)",
        "layers not stored low in B: 1 (fp32)",
        "layers only in B: 1 (new)",
        "A and B have figures of other layers, so that those of the model are left out",
    ]
    assert confirmation.model is None
    assert confirm({"a": share(0, 1)}, {"a": share(0, 1)}, notes=["torn"]).notes == ["torn"]


def observed_at(steps: dict[str | None, list[int]], recipe: str) -> Run:
    runs = [make_twin_run({n: share(0, 1)}, recipe, steps=each) for n, each in steps.items()]
    rows = sorted((row for run in runs for row in run.rows), key=lambda row: row.step)
    layers = {name: layer for run in runs for name, layer in run.layers.items()}
    return replace(runs[0], rows=rows, layers=layers)


def test_each_layer_is_compared_at_the_last_step_of_both() -> None:
    predicted = observed_at({"often": [0, 5, 10], "rare": [0, 10], None: [0, 5, 10]}, "true")
    real = observed_at({"often": [0, 5, 9], "rare": [0, 9], None: [0, 5, 9]}, "now")
    confirmation = Confirmation(predicted, real, "true")
    assert {each.name: each.step for each in confirmation.layers} == {"often": 5, "rare": 0}
    assert confirmation.heading.endswith("at step 5")
    lengths, steps = confirmation.notes
    assert lengths.startswith("A was last observed at step 10, and B at step 9: ")
    assert steps == "compared at earlier steps, down to 0: 1 layer (rare)"


def test_runs_without_a_common_step_say_so() -> None:
    confirmation = Confirmation(
        make_twin_run({"a": share(0, 1)}, "true", steps=[1, 3]),
        make_twin_run({"a": share(0, 1)}, steps=[2, 4]),
        "true",
    )
    assert (confirmation.layers, confirmation.model) == ([], None)
    assert confirmation.summary == [
        "No layer has figures of both runs at the same step: nothing to compare."
    ]
    assert confirmation.heading.endswith("at no step that both observed")
    assert confirmation.frozen == (0, 0, 0, 0)


def test_each_metric_has_a_word_and_a_meaning() -> None:
    metrics = ("frozen_frac", "progress_kept", "exp_avg_ratio")
    assert [shorten_metric(each) for each in metrics] == ["frozen", "kept", "ratio"]
    for metric in metrics:
        assert explain_metric(metric).startswith(f"{metric}: ")
