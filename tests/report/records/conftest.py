"""Three records of a model with one sampled layer, and their header."""

import pytest

from altgrad import StepRecord
from altgrad.report import Header
from tests.report.records.recording import header_from, make_records


@pytest.fixture(scope="module")
def records() -> list[StepRecord]:
    return make_records(max_elements=1000)


@pytest.fixture(scope="module")
def header(records: list[StepRecord]) -> Header:
    return header_from(records[0])
