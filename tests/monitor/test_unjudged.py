"""Layers and formats that cannot be judged are left out, and each is said."""

import torch
from torch import nn

from altgrad import UpdateMonitor, WeightStorage


def notices(model: nn.Module, *, stored: str | None = None, formats=("bf16", "e4m3fn")):
    """What a monitor says as it attaches, and the formats of each layer then."""
    said: list[str] = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if stored is not None:
        WeightStorage(stored, scaling=None).attach(optimizer)
    monitor = UpdateMonitor(model, formats=formats, tell=said.append, strict=True)
    with monitor.attach(optimizer):
        return said, {name: layer.formats for name, layer in monitor.layers.items()}


def test_of_weights_that_are_stored_finer_nothing_is_said() -> None:
    both = ("bf16", "e4m3fn")
    assert notices(nn.Linear(2, 2)) == ([], {"weight": both, "bias": both})


def test_formats_no_coarser_than_the_dtype_are_said_once_for_all_layers() -> None:
    said, layers = notices(nn.Linear(2, 2).bfloat16())
    assert [each.split(":")[0] for each in said] == [
        "cannot judge bf16 for weights already stored in torch.bfloat16"
    ]
    assert layers["weight"] == ("bf16", "e4m3fn")  # their figures are NaN


def test_formats_no_coarser_than_a_storage_are_left_out_and_said_once() -> None:
    said, layers = notices(nn.Linear(2, 2), stored="e4m3fn", formats=["bf16", "e4m3fn", "e5m2"])
    assert layers == {"weight": ("e5m2",), "bias": ("e5m2",)}
    (notice,) = said
    assert notice.startswith(
        "cannot judge bf16, e4m3fn for weights that a WeightStorage stores in "
    )
    assert "e4m3fn: updates that stalled" in notice


def test_parameters_of_other_dtypes_are_named() -> None:
    model = nn.Linear(2, 2)
    model.mask = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.index = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    said, _ = notices(model)
    assert said == ["leaves out parameters of other dtypes: ['mask']"]
