"""Settings for every test."""

from typing import Any

import pytest
import torch

# Small tensors on many threads of a busy machine wait more than they compute.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_twins_by_default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Step no twins unless a test names recipes, or is marked ``default_twins``.

    Optimizers of tests record themselves and hold parameters, so that twins cannot copy them.
    """
    if request.node.get_closest_marker("default_twins") is None:
        monkeypatch.setattr("altgrad.monitor.monitor.find_default_recipes", lambda _: ())
