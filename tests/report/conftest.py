"""A run whose verdicts are known."""

from pathlib import Path

import pytest

from tests.report.runs import written_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_run(tmp_path_factory.mktemp("run")).parent
