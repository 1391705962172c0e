"""`LayerPlan`: which layers share a bucket, and which have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altgrad.recipes import PackedStates, StateParts
from altgrad.twins.layer_plan import MOST_BUCKETS, LaneKind, LayerPlan, Stepped
from tests.twins.twinning import make_net

FLOAT32 = LaneKind(torch.float32, torch.float32, torch.device("cpu"), 1)


class Source:
    """Layers whose samples are their first 64 elements."""

    is_shared = False

    def __init__(self) -> None:
        self.notices: list[str] = []

    def draw(self, name: str, shape: torch.Size, block: int) -> Tensor:
        return torch.arange(min(shape.numel(), 64))

    def warn(self, notice: str) -> None:
        self.notices.append(notice)


class Planned:
    """A plan for the layers of a net."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, kind=FLOAT32) -> None:
        self.source = Source()
        self.plan = LayerPlan(kind, self.source)  # type: ignore[arg-type]
        self.optimizer = optimizer
        names = {parameter: name for name, parameter in net.named_parameters()}
        self.stepped = [
            Stepped(names[parameter], parameter, number)
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        ]

    def arrange(self, *, without: tuple[str, ...] = ()) -> list[list[str]]:
        """Arrange the layers, all of which but some have a gradient."""
        names = [each.name for each in self.stepped]
        present = {name for name in names if name not in without}
        self.plan.arrange(self.optimizer, self.stepped, present)
        return [[*bucket.counts] for bucket in self.plan.layout.buckets]


def plan_net(dtype: torch.dtype = torch.float32, kind: LaneKind = FLOAT32, **flags) -> Planned:
    net = make_net(dtype)
    return Planned(net, torch.optim.AdamW(net.parameters(), 1e-3, **flags), kind)


def test_layers_of_a_group_share_a_bucket() -> None:
    net = make_net()
    groups = [{"params": net[0].parameters()}, {"params": net[2:].parameters(), "lr": 1e-4}]
    assert Planned(net, torch.optim.AdamW(groups, 1e-3)).arrange() == [
        ["0.weight", "0.bias"],
        ["2.weight", "2.bias", "3.weight", "3.bias"],
    ]


def test_a_second_step_of_the_same_layers_changes_nothing() -> None:
    planned = plan_net()
    planned.arrange()
    layout, present = planned.plan.layout, {each.name for each in planned.stepped}
    assert not planned.plan.arrange(planned.optimizer, planned.stepped, present)
    assert planned.plan.layout is layout


@pytest.mark.parametrize(
    ("dtype", "flags", "shapes"),
    [
        (torch.float32, {}, [None]),
        (torch.float32, {"fused": True}, [None, torch.Size([10])]),
        (torch.bfloat16, {}, [None, torch.Size([10])]),
    ],
)
def test_small_layers_keep_their_shape_where_their_tail_is_rounded_in_another_way(
    dtype: torch.dtype, flags: dict[str, bool], shapes: list[torch.Size | None]
) -> None:
    kind = FLOAT32._replace(dtype=dtype, gradient_dtype=dtype)
    planned = plan_net(dtype, kind, **flags)
    planned.arrange()
    assert [bucket.shape for bucket in planned.plan.layout.buckets] == shapes


def test_layers_with_other_counts_of_steps_do_not_share_a_bucket() -> None:
    planned = plan_net()
    for each in planned.stepped[1:]:
        planned.optimizer.state[each.parameter] = {"step": torch.tensor(3.0)}
    assert sorted(map(len, planned.arrange())) == [1, 5]


def test_a_bucket_is_split_where_layers_begin_to_differ_and_stays_so() -> None:
    planned = plan_net()
    planned.arrange()
    frozen = ("0.weight", "0.bias")
    assert sorted(map(len, planned.arrange(without=frozen))) == [2, 4]
    assert sorted(map(len, planned.arrange())) == [2, 4]
    assert planned.plan.find_present({"0.weight", "0.bias"}).count(True) == 1


def test_a_layer_that_is_gone_is_forgotten() -> None:
    planned = plan_net()
    planned.arrange()
    gone = planned.stepped.pop()
    planned.arrange()
    assert gone.name not in planned.plan.layers
    assert gone.name not in planned.plan.layout.places


def test_the_groups_beyond_a_limit_are_left_out_with_one_notice() -> None:
    experts = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(MOST_BUCKETS + 5))
    planned = Planned(experts, torch.optim.AdamW(experts.parameters(), 1e-3))
    for count, each in enumerate(planned.stepped):
        planned.optimizer.state[each.parameter] = {"step": torch.tensor(float(count))}
    assert len(planned.arrange()) == MOST_BUCKETS
    assert len(planned.arrange()) == MOST_BUCKETS
    assert {*planned.plan.layers} == {*planned.plan.layout.places}
    [notice] = planned.source.notices
    assert str(MOST_BUCKETS) in notice


def test_the_groups_of_the_user_are_not_limited() -> None:
    layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(MOST_BUCKETS + 9))
    groups = [{"params": [each.weight], "lr": 10.0**-k} for k, each in enumerate(layers)]
    planned = Planned(layers, torch.optim.AdamW(groups))
    assert len(planned.arrange()) == len(groups)
    assert planned.source.notices == []


class Restored(Planned):
    """A plan that is restored from the state of another one, whose layers have equal weights."""

    def __init__(self, **changes: Any) -> None:
        net = make_net()
        super().__init__(net, torch.optim.AdamW(net.parameters(), 1e-3))
        planned = plan_net()
        planned.arrange()
        saved = planned.plan.state_dict(planned.optimizer)
        indices, weights, state = saved["samples"]["0.bias"]
        now = {"indices": indices, "weights": weights, "state": state} | changes
        saved["samples"]["0.bias"] = tuple(now.values())
        self.plan.load_state_dict(saved)
        self.found = self.plan.restore(self.optimizer, self.stepped)
        self.buckets = self.arrange()


def test_a_restored_plan_has_the_layers_of_the_state() -> None:
    restored = Restored()
    assert restored.found == (set(), set())
    assert restored.plan.begun == restored.plan.renewed == frozenset()
    assert len(restored.buckets) == 1
    assert restored.source.notices == []


def test_a_restored_layer_with_other_weights_was_written_to() -> None:
    restored = Restored(weights=torch.zeros(64))
    assert restored.found == ({"0.bias"}, set())
    assert restored.plan.begun == frozenset()


def test_a_restored_layer_with_other_states_has_changed_states() -> None:
    restored = Restored(state={"step": torch.tensor([3.0])})
    assert restored.found == (set(), {"0.bias"})
    assert restored.plan.begun == frozenset()


@pytest.mark.parametrize(
    "changes",
    [
        {"indices": torch.arange(64) + 1},
        {"weights": torch.zeros(64), "state": {"step": torch.tensor([3.0])}},
    ],
)
def test_a_restored_layer_of_another_sample_or_time_begins_anew(changes: dict[str, Any]) -> None:
    restored = Restored(**changes)
    assert restored.found == (set(), set())
    assert restored.plan.begun == restored.plan.renewed == {"0.bias"}
    [notice] = restored.source.notices
    assert "0.bias" in notice


def test_layers_whose_states_were_changed_take_those_of_the_run_and_keep_their_sample() -> None:
    planned = plan_net()
    planned.arrange()
    names = {each.name for each in planned.stepped}
    assert planned.plan.arrange(planned.optimizer, planned.stepped, names, {"0.weight"})
    assert planned.plan.renewed == {"0.weight"}
    assert planned.plan.begun == frozenset()


def test_a_layer_of_another_shape_begins_anew() -> None:
    planned = plan_net()
    planned.arrange()
    first = planned.stepped[0]
    planned.stepped[0] = first._replace(parameter=nn.Parameter(torch.zeros(200, 65)))
    planned.arrange()
    assert planned.plan.begun == {first.name}


def test_a_kind_is_described_without_the_number_of_its_device() -> None:
    kinds = [FLOAT32._replace(device=torch.device("cuda", number)) for number in (0, 1)]
    assert kinds[0].describe() == kinds[1].describe() != FLOAT32.describe()


# --- states that are packed in blocks


PACKED = PackedStates(StateParts, dict, block=32, least=512)


class Drawn(Source):
    """Samples as large as is allowed, of whole blocks if there are some."""

    def draw(self, name: str, shape: torch.Size, block: int) -> Tensor:
        assert block == 1 or len(shape) == 1
        return torch.arange(shape.numel() - shape.numel() % max(block, 64))


def plan_packed(block: int, *sizes: tuple[int, ...]) -> LayerPlan:
    net = nn.ParameterList([nn.Parameter(torch.ones(size)) for size in sizes])
    kind = FLOAT32._replace(block=block, packed=PACKED)
    planned = Planned(net, torch.optim.SGD(net.parameters(), 0.1), kind)
    planned.plan = LayerPlan(kind, Drawn())  # type: ignore[arg-type]
    planned.arrange()
    return planned.plan


def test_samples_of_packed_layers_are_whole_blocks_in_a_parameter_that_is_packed() -> None:
    plan = plan_packed(32, (9, 64), (600,), (8, 100))
    (bucket,) = plan.layout.buckets
    assert bucket.counts == {"0": 576, "1": 576, "2": 768}
    assert PACKED.packs(bucket.length)
    assert bucket.length % PACKED.block == 0


def test_a_parameter_of_a_small_sample_is_padded_until_its_states_are_packed() -> None:
    kind = FLOAT32._replace(block=32, packed=PACKED)
    net = nn.ParameterList([nn.Parameter(torch.ones(640))])
    planned = Planned(net, torch.optim.SGD(net.parameters(), 0.1), kind)
    planned.arrange()  # draws 64 elements
    (bucket,) = planned.plan.layout.buckets
    assert (sum(bucket.counts.values()), bucket.length) == (64, 512)


def test_samples_of_other_layers_lie_in_parameters_that_are_not_packed() -> None:
    plan = plan_packed(1, *[(200,)] * 5, (9999,))
    assert [name for bucket in plan.layout.buckets for name in bucket.counts] == [*"012345"]
    assert not any(PACKED.packs(bucket.length) for bucket in plan.layout.buckets)
    indices = plan.layers["5"].indices  # as many as fit, from the whole layer
    assert len(indices) == 448
    assert indices.max() > 9900
    assert (indices.diff() > 0).all()


@pytest.mark.parametrize("block", [2, 32, 64, 256, 4096])
@pytest.mark.parametrize("least", [128, 129, 4096, 5000])
def test_the_limits_of_a_parameter_decide_whether_it_is_packed(block: int, least: int) -> None:
    packed = PackedStates(StateParts, dict, block=block, least=least, only_whole=True)
    fewest, none = FLOAT32._replace(block=block, packed=packed).find_limits()
    assert none is None
    assert packed.packs(fewest)
    assert fewest % 64 == 0
    nothing, most = FLOAT32._replace(packed=packed).find_limits()
    assert nothing == 0
    assert most is not None
    assert 0 < most < least
    assert most % 64 == 0
    assert FLOAT32.find_limits() == (0, None)
