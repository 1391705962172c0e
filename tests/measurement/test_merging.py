"""`merge_records`: one record from several optimizer steps."""

import math

import torch
from torch import nn

from altgrad import StepRecord, UpdateMonitor
from altgrad.measurement.merging import merge_records


def observe_two(shared: bool) -> tuple[list[StepRecord], list[torch.Tensor]]:
    """Step two optimizers, of which the second also steps the first layer if `shared`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD((model if shared else model[1]).parameters(), lr=0.01)
    model(torch.randn(5, 4)).square().mean().backward()
    records: list[StepRecord] = []
    updates: dict[str, torch.Tensor] = {}
    with UpdateMonitor(model, records.append, recipes=()).attach(first, second):
        for optimizer in (first, second):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.step()
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            updates |= {
                name: p.detach().double() - before[name].double()
                for name, p in model.named_parameters()
                if id(p) in stepped
            }
    return records, [*updates.values()]


def test_a_single_record_stays_as_it_is() -> None:
    records, _ = observe_two(shared=False)
    assert merge_records(records[:1]) is records[0]


def test_the_model_of_merged_records_is_all_layers() -> None:
    records, updates = observe_two(shared=False)
    merged = merge_records(records)
    assert {*merged.layers} == {"0.weight", "0.bias", "1.weight", "1.bias"}
    moved = torch.cat([each.flatten() for each in updates])
    rms = math.sqrt(moved.square().mean())
    assert math.isclose(merged.model["update_rms"], rms, rel_tol=1e-6)


def test_the_last_record_of_a_layer_counts() -> None:
    records, updates = observe_two(shared=True)
    merged = merge_records(records)
    rms = updates[0].square().mean().sqrt().item()
    assert math.isclose(merged.layers["0.weight"]["update_rms"], rms, rel_tol=1e-6)


def test_the_times_of_merged_records_are_added() -> None:
    records, _ = observe_two(shared=False)
    timed = [
        StepRecord(each.index, each.layers, each.model, own_seconds=k, training_seconds=10 * k)
        for k, each in enumerate(records, 1)
    ]
    merged = merge_records(timed)
    assert (merged.own_seconds, merged.training_seconds) == (3, 30)
