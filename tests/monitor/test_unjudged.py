"""Layers and formats that cannot be judged are left out, with notices."""

import torch
from torch import nn

from altgrad import UpdateMonitor, WeightStorage


def notices(model: nn.Module, *, stored: str | None = None, formats=("bf16", "e4m3fn")):
    """Return the notices of `attach`, and the formats of each layer afterwards."""
    said: list[str] = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if stored is not None:
        WeightStorage(stored, scaling=None).attach(optimizer)
    monitor = UpdateMonitor(model, formats=formats, warn=said.append, strict=True)
    with monitor.attach(optimizer):
        return said, {name: layer.formats for name, layer in monitor.layers.items()}


def test_weights_stored_finer_than_all_formats_give_no_notice() -> None:
    both = ("bf16", "e4m3fn")
    assert notices(nn.Linear(2, 2)) == ([], {"weight": both, "bias": both})


def test_formats_no_coarser_than_the_dtype_give_one_notice() -> None:
    said, layers = notices(nn.Linear(2, 2).bfloat16())
    assert [each.split(":")[0] for each in said] == [
        "cannot judge bf16 for weights already stored in torch.bfloat16"
    ]
    assert layers["weight"] == ("bf16", "e4m3fn")  # their figures are NaN


def test_formats_no_coarser_than_a_storage_are_left_out_with_one_notice() -> None:
    said, layers = notices(nn.Linear(2, 2), stored="e4m3fn", formats=["bf16", "e4m3fn", "e5m2"])
    assert layers == {"weight": ("e5m2",), "bias": ("e5m2",)}
    (notice,) = said
    assert notice.startswith(
        "cannot judge bf16, e4m3fn for weights that a WeightStorage stores in "
    )
    assert "e4m3fn: stalled updates are lost" in notice


def test_a_notice_names_parameters_of_other_dtypes() -> None:
    model = nn.Linear(2, 2)
    model.mask = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.index = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    said, _ = notices(model)
    assert said == ["leaves out parameters of other dtypes: ['mask']"]
