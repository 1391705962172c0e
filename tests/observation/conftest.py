"""What several test files of this folder ask for by name."""

import pytest


@pytest.fixture
def choose_of_small_parameters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("altgrad.observation.snapshots.WHOLE_UP_TO", -1)
