"""The comparison with one process finds known errors of distributed code."""

from __future__ import annotations

from unittest import mock

import torch

from altgrad import UpdateMonitor
from altgrad.distributed.host_group import HostGroup
from altgrad.distributed.layers import ShardedLayers
from altgrad.distributed.shards import Shard
from altgrad.measurement.chunks import Sample
from altgrad.measurement.columns import FORMAT_MAXIMA, FORMAT_SUMS, MAXIMA, PRODUCTS, SUMS
from altgrad.measurement.kernel import EverMoved
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.step_record import step_record
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.format_set import FormatSet
from tests.distributed.comparing import differences
from tests.distributed.sharded import WholeSteps, fsdp, hsdp, replayed
from tests.distributed.training import train, warned

read_shard, reduce, find_expected = Shard.read, HostGroup.reduce, ShardedLayers.expected


def every_replica_counts(*arguments) -> Shard:
    return read_shard(*arguments)._replace(counts=True)


def twice_as_many(layers: ShardedLayers, names):
    """Return twice the expected number of elements."""
    expected = find_expected(layers, names)
    return {n: each._replace(elements=2 * each.elements) for n, each in expected.items()}


def average_for_max(group: HostGroup, numbers: torch.Tensor, how: str) -> None:
    if how != "MAX":
        return reduce(group, numbers, how)
    finite = torch.where(numbers.isfinite(), numbers, 0)
    reduce(group, finite, "SUM")
    numbers.copy_(torch.where(numbers.isfinite(), finite / group.size, numbers))
    return None


def observe(rank: int, make, size: int) -> list[str]:
    net = make(size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    truth, records = WholeSteps(net, optimizer), []
    with UpdateMonitor(net, records.append, max_elements=300, strict=True).attach(optimizer):
        train(net, optimizer, 2)
    expected = replayed(truth.steps, max_elements=300).records
    pairs = zip(records, expected, strict=True)
    return [found for own, other in pairs for found in differences(own, other)]


def control(rank: int) -> dict[str, list[str]]:
    twice = mock.patch.object(Shard, "read", staticmethod(every_replica_counts))
    unnoticed = mock.patch.object(ShardedLayers, "expected", twice_as_many)
    average = mock.patch.object(HostGroup, "reduce", average_for_max)
    found = {"sound": observe(rank, hsdp, 2)}
    with twice, unnoticed:
        found["replicas twice"] = observe(rank, hsdp, 2)
    with twice:
        net = hsdp(2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with UpdateMonitor(net).attach(optimizer):
            found["replicas twice, as told"] = warned(net, optimizer, 1)
    with average:
        found["averaged maxima"] = observe(rank, fsdp, 2)
    return found


def test_replicas_counted_twice_and_averaged_maxima_are_found(two) -> None:
    first, second = two(control)
    assert first["sound"] == second["sound"] == []
    twice = first["replicas twice"]
    assert any("up.weight: elements 600 for 300" in each for each in twice), twice
    (told,) = first["replicas twice, as told"]
    assert "measured elements on all ranks together, got" in told
    assert "shards and replicas are as the placements say" in told
    assert second["replicas twice, as told"] == [told]
    averaged = first["averaged maxima"]
    assert averaged
    assert any(each.startswith("up.weight: ulp_max") for each in averaged)
    assert any(each.startswith("model ulp_max") for each in averaged)


# Each column


def measure_sample(formats: FormatSet) -> torch.Tensor:
    """Return the sums and maxima of a sample: 300 elements of a layer with 1,000."""
    torch.manual_seed(0)
    before, update, gradient = torch.randn(3, 300).float()
    ever = EverMoved(torch.zeros(1, 1, 300).bool(), torch.zeros(1, len(formats), 300).bool())
    sample = Sample(torch.Size([1000]), torch.arange(0, 900, 3))
    after = before + 0.01 * update
    return Measurer(formats).measure_tensor(before, after, gradient, None, ever, sample)


UNSEEN = {
    "ever_moved",  # figures follow from the columns of the formats
    # These only decide whether all elements have the same gradient or error.
    *("largest paired_gradient_abs", "largest minus_paired_gradient_abs"),
    *("largest minus_grid_error bf16", "largest minus_grid_error e4m3fn"),
}
DIFFERENCES = {"paired_gradient_sq", "stiffness_sq", "grid_error_sq"}
"""Sums of squares that figures show only as a difference, so that most digits cancel."""


def test_a_small_change_in_any_column_is_found() -> None:
    formats = FormatSet(get_formats(["bf16", "e4m3fn"]), "tensor")
    names = formats.names
    row = measure_sample(formats)
    columns = [*SUMS, *(f"{sum} {f}" for f in names for sum in FORMAT_SUMS)]
    columns += [f"largest {each}" for each in MAXIMA]
    columns += [f"largest {each} {f}" for f in names for each in FORMAT_MAXIMA]

    def record(vector: torch.Tensor):
        return step_record(names, {"it": names}, vector.unsqueeze(0).numpy(), 0, (0.0, 0.0))

    unseen = set()
    for place, column in enumerate(columns):
        changed = row.clone()
        is_whole = float(row[place]).is_integer() and not column.startswith("largest")
        share = 1e-6 if column.split()[0] in DIFFERENCES else 1e-8
        changed[place] += 1 if is_whole else share * row[place]
        if not differences(record(changed), record(row)):
            unseen.add(column)
    # Elements are drawn one by one: sums over clusters count where blocks are drawn.
    over_clusters = {each for each in columns if each.split()[1:2] in [[name] for name in PRODUCTS]}
    assert unseen == UNSEEN | over_clusters
    assert differences(record(row), record(row)) == []
