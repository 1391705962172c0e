"""`Judge.add_columns`: a step at once gives the verdicts that layer by layer gives."""

from pathlib import Path
from typing import Any

import torch

from altgrad import StepRecord
from altgrad.measurement.figure_columns import split_columns
from altgrad.report import Judge
from tests.report.twin_runs import make_layers, record


def test_columns_of_a_step_say_what_each_layer_says(tmp_path: Path) -> None:
    """The other side looks up each figure of each layer by its key."""
    torch.manual_seed(0)
    net = make_layers(wide=torch.randn(90, 100), gain=torch.ones(300), small=torch.randn(7) / 50)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-4)
    records: list[StepRecord] = []
    recipes = ["bf16", "bf16-sr", "e5m2"]
    settings: dict[str, Any] = {"formats": ["bf16", "fp16"], "recipes": recipes}
    run = record(tmp_path, net, optimizer, on_record=records.append, max_elements=2048, **settings)
    whole, single = (Judge(run.formats, run.layers, run.recipes, run.now) for _ in range(2))
    for each in records:
        for columns in split_columns(each.layers):
            whole.add_columns(each.index, columns)
        for layer, figures in each.layers.items():
            errors = {key: figures.standard_error(key) for key in figures}
            single.add(each.index, layer, dict(figures), errors)
    assert len(records) == 4
    found, expected = whole.assessment(), single.assessment()
    assert repr(found.advice) == repr(expected.advice)
    assert repr(found.runs) == repr(expected.runs)
    assert (found.suggestions, found.summary) == (expected.suggestions, expected.summary)
    assert repr(whole.state_dict()) == repr(single.state_dict())
