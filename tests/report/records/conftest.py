"""Three records of a model of which one layer is sampled, and their header."""

import pytest

from altgrad import StepRecord
from altgrad.report import Header
from tests.report.records.recording import header_from, records_of


@pytest.fixture(scope="module")
def records() -> list[StepRecord]:
    return records_of(max_elements=1000)


@pytest.fixture(scope="module")
def header(records: list[StepRecord]) -> Header:
    return header_from(records[0])
