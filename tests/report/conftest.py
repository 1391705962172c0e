"""A run file with known verdicts: two layers are frozen, the others are stored fine."""

from pathlib import Path

import pytest

from tests.report.runs import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run")).parent
