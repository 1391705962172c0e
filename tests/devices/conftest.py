"""The device of a check: one that can do what CUDA can, or one that lacks what MPS lacks."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from altgrad.quantization import devices
from tests.devices.simulated import NAME, find_limits_like_mps, lacking, make_device


@pytest.fixture
def able() -> Iterator[torch.device]:
    """Yield a device with float64, on which AltGrad computes as it does on CUDA."""
    with mock.patch.object(devices, "EXACT", devices.EXACT | {NAME}):
        yield make_device()


@pytest.fixture
def limited() -> Iterator[torch.device]:
    """Yield a device that lacks what MPS lacks."""
    made = make_device()
    with lacking(find_limits_like_mps()):
        yield made


@pytest.fixture(params=["able", "limited"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return each of the two devices."""
    return request.getfixturevalue(request.param)
