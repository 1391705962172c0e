"""Steps, counts and histograms that would make a run file unreadable are refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from altgrad import Histogram, StepRecord
from altgrad.report import Header, RunFile, read
from tests.report.records.recording import written

NO_WHOLE_NUMBERS = [
    None,
    True,
    np.True_,
    1.0,
    1.5,
    math.nan,
    math.inf,
    "1",
    torch.tensor(1),
    torch.tensor(1.5),
    torch.tensor([1, 2]),
    np.float64(1),
]
OUT_OF_RANGE = [-1, 2**63, 10**400, -(10**5000), np.int64(-1)]


@pytest.mark.parametrize("step", NO_WHOLE_NUMBERS, ids=repr)
def test_a_step_that_is_no_whole_number_is_refused(
    tmp_path: Path, records: list[StepRecord], header: Header, step: Any
) -> None:
    with RunFile.create(tmp_path, header) as file:
        with pytest.raises(TypeError, match=r"^step=.*: expected a whole number, got .*; pass an"):
            file.append(step, records[0], skipped={})
        file.append(3, records[1], skipped={})
    assert read(file.path).steps == (3,)


@pytest.mark.parametrize("step", OUT_OF_RANGE, ids=[0, 1, 2, 3, 4])
def test_a_step_out_of_range_is_refused(
    tmp_path: Path, records: list[StepRecord], header: Header, step: int
) -> None:
    with RunFile.create(tmp_path, header) as file:
        with pytest.raises(ValueError, match=r"^step=.*: expected a number from 0 to 2\*\*63 - 1"):
            file.append(step, records[0], skipped={})
        file.append(2**63 - 1, records[1], skipped={})
    assert read(file.path).steps == (2**63 - 1,)


def test_the_integers_of_numpy_are_steps(
    tmp_path: Path, records: list[StepRecord], header: Header
) -> None:
    path = written(tmp_path, header, records, steps=[np.int64(1), np.uint8(2), np.int32(3)])
    assert read(path).steps == (1, 2, 3)


@pytest.mark.parametrize("count", [*NO_WHOLE_NUMBERS, -1, 2**63], ids=repr)
def test_a_number_of_skipped_steps_is_whole(
    tmp_path: Path, records: list[StepRecord], header: Header, count: Any
) -> None:
    with RunFile.create(tmp_path, header) as file:
        with pytest.raises((TypeError, ValueError), match=r"^skipped\['inf'\]=.*: expected a"):
            file.append(0, records[0], skipped={"inf": count})
        file.append(1, records[1], skipped={"inf": np.int64(2)})
    (model,) = (row for row in read(file.path).rows if row.layer is None)
    assert (model.step, model.skipped) == (1, {"inf": 2})


@pytest.mark.parametrize(
    "weights",
    [
        *(Histogram(0, (1.0, count)) for count in (math.nan, math.inf, -1.0, 1e31)),
        *(Histogram(0, ()), Histogram(0, (1.0,) * 10**4), Histogram(10**6, (1.0,))),
    ],
    ids=lambda weights: str(weights)[:40],
)
def test_a_histogram_that_no_reader_would_take_is_an_error(
    tmp_path: Path, records: list[StepRecord], header: Header, weights: Histogram
) -> None:
    with RunFile.create(tmp_path, header) as file:
        with pytest.raises(ValueError, match=r"^weights\['(counts|first)'\].*: expected a"):
            file.append(0, records[0], skipped={}, weights=weights)
        file.append(1, records[1], skipped={}, weights=Histogram(0, (1.0, 0.0)))
    assert read(file.path).steps == (1,)


@pytest.mark.parametrize("step", [*NO_WHOLE_NUMBERS, *OUT_OF_RANGE[:2]], ids=repr)
def test_the_step_at_which_a_run_is_resumed_is_whole(
    tmp_path: Path, records: list[StepRecord], header: Header, step: Any
) -> None:
    path = written(tmp_path, header, records)
    content = path.read_bytes()
    with pytest.raises((TypeError, ValueError), match=r"^before_step=.*: expected a"):
        RunFile.resume(path, step, header)
    with pytest.raises((TypeError, ValueError), match=r"^predecessor\[1\]=.*: expected a"):
        RunFile.create(tmp_path, header, predecessor=(path, step))
    assert path.read_bytes() == content
    assert [*tmp_path.iterdir()] == [path]
