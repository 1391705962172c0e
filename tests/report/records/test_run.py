"""`Run` and `Row`: series, tables, and rows that are mappings of their own."""

import sys
from unittest import mock

import pytest

from altgrad.report import Row, read
from tests.report.records.recording import assert_same, written


def test_a_series_of_one_figure(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records, steps=[9, 19, 29]))
    of_model = run.series("stall_frac/bf16")
    assert list(of_model) == [9, 19, 29]
    assert_same(of_model[19], records[1].model["stall_frac/bf16"])
    assert_same(run.series("update_rms", "1.bias")[29], records[2].layers["1.bias"]["update_rms"])
    assert run.series("stall_frac/e5m2") == {}
    with pytest.raises(KeyError, match=r"'head': expected a layer of the run, such as .*0\.weight"):
        run.series("update_rms", "head")


def test_to_pandas(tmp_path, records, header) -> None:
    frame = read(written(tmp_path, header, records)).to_pandas()
    assert len(frame) == 3 * 7
    of_model = frame[frame.layer.isna()].set_index("step")
    assert_same(of_model["stall_frac/bf16"][2], records[2].model["stall_frac/bf16"])
    error = frame[frame.layer == "0.weight"]["stall_frac_error/bf16"].iloc[0]
    assert_same(error, records[0].layers["0.weight"].standard_error("stall_frac/bf16"))
    assert frame[frame.layer == "0.bias"]["stall_frac_error/bf16"].isna().all()


def test_without_pandas_the_remedy_is_named(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records))
    with (
        mock.patch.dict(sys.modules, {"pandas": None}),
        pytest.raises(ImportError, match="pip install pandas"),
    ):
        run.to_pandas()


def test_a_row_is_a_mapping_of_its_own(tmp_path, records, header) -> None:
    row: Row = read(written(tmp_path, header, records)).rows[0]
    assert dict(row.figures).keys() == records[0].layers["0.weight"].keys()
    assert "update_rms" in row.figures
    assert row.figures.get("nothing") is None
    assert repr(row.errors).startswith("{'kept_update_ratio/bf16': ")
