"""`StepTable`: rows of layers, and the rows of the model that they make."""

import pytest
import torch

from altgrad.measurement.columns import ELEMENTS, POPULATION, SUMS, max_count, sum_count
from altgrad.measurement.step_table import StepTable
from tests.counting import Operations


@pytest.mark.parametrize("layers", [2, 3, 7, 8, 64, 101])
@pytest.mark.parametrize("formats", [1, 4])
def test_equal_sums_of_layers_stay_equal_in_the_model(layers: int, formats: int) -> None:
    """A share of nothing is 0 and not −3e-16, whatever each sampled element stands for."""
    generator = torch.Generator().manual_seed(layers)
    counts = torch.randint(1, 1000, (layers, 1), generator=generator).double()
    sums = counts.expand(layers, sum_count(formats)).clone()
    sums[:, POPULATION] = 1000.0 + torch.arange(layers) * 7
    maxima = torch.zeros(layers, max_count(formats), dtype=torch.float64)
    names = [f"f{k}" for k in range(formats)]
    with Operations() as operations:
        table, rows = StepTable.with_model(
            names, torch.cat((sums, maxima), dim=1), [names] * layers
        )
    # Some processors add up the columns of a matrix product in different orders.
    assert not {"aten.mv.default", "aten.mm.default", "aten.bmm.default"} & {*operations.counts}
    of_model = table.vectors[rows[None], : sum_count(formats)]
    assert of_model[POPULATION] == of_model[ELEMENTS]
    assert of_model.unique().numel() == 1
    assert table.values("unmoved_frac") == [[0.0] * (layers + 1)]
    assert (SUMS[POPULATION], SUMS[ELEMENTS]) == ("population", "elements")
