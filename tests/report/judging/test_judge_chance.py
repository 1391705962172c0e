"""The chance of stochastic rounding is that of as many elements as a twin steps."""

import pytest

from altgrad.report import Judge, LayerInfo
from tests.report.twin_runs import make_recipe


@pytest.mark.parametrize(("elements", "size"), [(None, 256), (1024, 1024), (100_000, 4096)])
def test_chance_shrinks_with_the_sample_that_the_run_file_names(
    elements: int | None, size: int
) -> None:
    """The error of stochastic rounding is the drift over the root of the sample's size."""
    info = LayerInfo((64, 64), "float32", 4096, (), twin_elements=elements)
    recipes = {"sr": make_recipe("sr", weights="bf16", rounding="stochastic")}
    judge = Judge({}, layers={"a": info}, recipes=recipes)
    found = {"progress_kept/sr": 1.0, "drift/sr": 0.5, "frozen_frac/sr": 0.0}
    judge.add(0, "a", found, {"progress_kept/sr": 0.0})
    (advice,) = judge.assessment().advice
    assert advice.errors["progress_kept"] == pytest.approx(0.5 / size**0.5, rel=1e-6)
