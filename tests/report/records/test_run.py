"""`Run` and `Row`: series, tables, and figures as mappings."""

import math
import sys
from unittest import mock

import pytest

from altgrad.report import Row, read
from tests.report.records.recording import assert_same, record_run, written


def test_a_series_has_one_figure_by_step(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records, steps=[9, 19, 29]))
    by_step = run.series("stall_frac/bf16")
    assert list(by_step) == [9, 19, 29]
    assert_same(by_step[19], records[1].model["stall_frac/bf16"])
    assert_same(run.series("update_rms", "1.bias")[29], records[2].layers["1.bias"]["update_rms"])
    assert run.series("stall_frac/e5m2") == {}
    with pytest.raises(
        KeyError, match=r"layer='head': expected a layer of the run, such as .*0\.weight"
    ):
        run.series("update_rms", "head")


def test_a_data_frame_has_a_line_for_each_row(tmp_path, records, header) -> None:
    frame = read(written(tmp_path, header, records)).to_pandas()
    assert len(frame) == 3 * 7
    model_rows = frame[frame.layer.isna()].set_index("step")
    assert_same(model_rows["stall_frac/bf16"][2], records[2].model["stall_frac/bf16"])
    error = frame[frame.layer == "0.weight"]["stall_frac_error/bf16"].iloc[0]
    assert_same(error, records[0].layers["0.weight"].standard_error("stall_frac/bf16"))
    assert frame[frame.layer == "0.bias"]["stall_frac_error/bf16"].isna().all()


def test_without_pandas_the_error_names_the_remedy(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records))
    with (
        mock.patch.dict(sys.modules, {"pandas": None}),
        pytest.raises(ImportError, match="pip install pandas"),
    ):
        run.to_pandas()


def test_the_figures_of_a_row_are_a_mapping(tmp_path, records, header) -> None:
    row: Row = read(written(tmp_path, header, records)).rows[0]
    assert dict(row.figures).keys() == records[0].layers["0.weight"].keys()
    assert "update_rms" in row.figures
    assert row.figures.get("nothing") is None
    assert repr(row.errors).startswith("{'kept_update_ratio/bf16': ")


def test_a_row_has_the_interval_that_its_figure_had(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records))
    rows = {row.layer: row for row in run.rows if row.step == run.steps[0]}
    sampled, whole, key = rows["0.weight"], rows["0.bias"], "stall_frac/bf16"
    expected = records[0].layers["0.weight"].interval(key)
    assert sampled.interval(key) == pytest.approx(expected, rel=1e-6)
    assert sampled.interval(key)[0] < sampled.figures[key] < sampled.interval(key)[1]
    assert whole.interval(key) == (whole.figures[key], whole.figures[key])
    assert all(map(math.isnan, sampled.interval("visible_frac/bf16")))  # no error is written
    with pytest.raises(KeyError):
        sampled.interval("visible_frac")


def test_a_sample_of_twins_leaves_the_figures_of_a_whole_layer_exact() -> None:
    figures = {"stall_frac/bf16": 0.5, "frozen_frac/bf16": 0.5, "drift/bf16": 2.0}
    row = Row(0, "w", figures, {"frozen_frac/bf16": 0.1})
    assert row.interval("stall_frac/bf16") == (0.5, 0.5)
    low, high = row.interval("frozen_frac/bf16")
    assert low < 0.5 < high
    assert all(map(math.isnan, row.interval("drift/bf16")))  # no error is written
    sampled = Row(0, "w", figures, row.errors | {"kept_update_ratio/bf16": 0.1})
    assert all(map(math.isnan, sampled.interval("stall_frac/bf16")))


def test_a_recipe_and_a_format_of_one_name_are_told_apart() -> None:
    figures = {"update_rms": 1.0, "stall_frac/bf16": 0.5, "new_figure": 3.0}
    twins = {"frozen_frac/bf16": 0.25, "exp_avg_ratio/bf16": 1.0, "drift/fp32": 0.0}
    assert Row(0, "w", figures | twins, {}).twins == {
        "bf16": {"frozen_frac": 0.25, "exp_avg_ratio": 1.0},
        "fp32": {"drift": 0.0},
    }
    assert Row(0, "w", figures, {}).twins == {}


def test_a_data_frame_has_the_figures_of_twins(tmp_path) -> None:
    header, records = record_run(formats=["bf16"], recipes=["bf16-sr"], twin_elements=64)
    frame = read(written(tmp_path, header, records)).to_pandas()
    last, model = frame.iloc[-1], records[-1].model
    for key in ("progress_kept/bf16-sr", "decay_projection/bf16-sr", "moved_rms/bf16-sr"):
        assert_same(last[key], model[key])
    assert_same(last["frozen_frac_error/bf16-sr"], model.standard_error("frozen_frac/bf16-sr"))
    assert_same(last["moved_elements"], model.moved_elements)
