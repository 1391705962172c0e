"""Settings for every test."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from altgrad.measurement.native_code import CACHE, CHOICE, find_file, native_code

# Small tensors on many threads of a busy machine wait more than they compute.
torch.set_num_threads(1)

# No test compiles in the background. Tests of the native kernel choose it.
os.environ.setdefault(CHOICE, "eager")


@pytest.fixture(scope="session")
def compiled_kernel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Compile the native kernel, once for all processes of a test run, and return its file."""
    pytest.importorskip("numba")
    cache = getattr(request.config, "cache", None)
    # pytest's cache serves later runs, too; `-p no:cacheprovider` leaves it out.
    folder = tmp_path_factory.getbasetemp().parent / "altgrad-kernel"
    if os.environ.get(CACHE):
        folder = Path(os.environ[CACHE])
    elif cache is not None:
        folder = cache.mkdir("altgrad-kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(folder))
        patch.setenv(CHOICE, "native")
        native_code.prepare(compiles=True)
        return find_file()


@pytest.fixture(scope="module")
def native_kernel(compiled_kernel: Path) -> Iterator[None]:
    """Run the tests of a module with the native kernel; skip them without numba."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHOICE, "native")
        yield


@pytest.fixture(scope="module", params=["eager", "native"])
def both_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the tests of a module with each kernel; the native one is skipped without numba."""
    if request.param == "native":
        request.getfixturevalue("compiled_kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHOICE, request.param)
        yield request.param


@pytest.fixture(autouse=True)
def _no_twins_by_default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Step no twins unless a test names recipes, or is marked ``default_twins``.

    Optimizers of tests record themselves and hold parameters, so that twins cannot copy them.
    """
    if request.node.get_closest_marker("default_twins") is None:
        monkeypatch.setattr("altgrad.monitor.monitor.find_default_recipes", lambda _: ())
