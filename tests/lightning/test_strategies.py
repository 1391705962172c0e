"""Which ranks observe, and which strategies are refused: to a monitor, and to a storage."""

from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch.strategies
import pytest
import pytorch_lightning.strategies
from torch import nn

from altgrad_lightning import strategies
from altgrad_lightning.strategies import explain_no_storage, explain_refusal, is_idle
from tests.lightning.runs import Net


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DeepSpeedStrategy", "DeepSpeed steps flat copies .*use ModelParallelStrategy with"),
        ("FSDPStrategy", r"FSDP1 keeps .* flat shards.*\(FSDPStrategy\).*or DDP"),
        ("XLAStrategy", "XLA devices have no hooks"),
        ("Other", "Other has 2 processes, and whether each has all"),
    ],
)
def test_a_refusal_names_the_strategy_and_the_alternative(name: str, expected: str) -> None:
    run = SimpleNamespace(
        strategy=type(name, (), {})(), world_size=2, lightning_module=Net(), is_global_zero=True
    )
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(explain_refusal(run))


def make_trainer(strategy: type, size: int, *, first: bool = True) -> Any:
    module = nn.Linear(2, 2)
    return SimpleNamespace(
        strategy=strategy(), world_size=size, lightning_module=module, is_global_zero=first
    )


DDP, Deep, Other = (type(name, (), {}) for name in ("DDPStrategy", "DeepSpeedStrategy", "Other"))


@pytest.mark.parametrize(
    ("strategy", "size", "is_sharded"),
    [
        *((Other, 1, False), (Other, 2, True)),
        *((DDP, 2, False), (type("Mine", (DDP,), {}), 2, False)),
    ],
)
def test_strategies_with_whole_or_sharded_layers_are_accepted(
    monkeypatch: pytest.MonkeyPatch, strategy: type, size: int, is_sharded: bool
) -> None:
    monkeypatch.setattr(strategies, "is_sharded_module", lambda _: is_sharded)
    assert explain_refusal(make_trainer(strategy, size)) is None


@pytest.mark.parametrize(
    ("strategy", "size", "is_sharded", "expected"),
    [
        (Other, 1, False, None),
        (DDP, 2, False, None),
        (Other, 1, True, "the parameters are sharded"),
        (Other, 2, True, "the parameters are sharded"),
        (Other, 2, False, "Other has 2 processes"),
        (Deep, 1, False, "DeepSpeed steps flat copies of the parameters"),
    ],
)
def test_weights_are_stored_if_each_rank_has_whole_layers(
    monkeypatch: pytest.MonkeyPatch,
    strategy: type,
    size: int,
    is_sharded: bool,
    expected: str | None,
) -> None:
    monkeypatch.setattr(strategies, "is_sharded_module", lambda _: is_sharded)
    reason = explain_no_storage(make_trainer(strategy, size))
    if expected is None:
        assert reason is None
    else:
        assert reason is not None
        assert reason.startswith(expected)
        assert reason.endswith("; use DDP, or one device")


def test_a_subclass_of_a_refused_strategy_is_refused() -> None:
    reason = explain_refusal(make_trainer(type("Mine", (Deep,), {}), 1))
    assert reason is not None
    assert reason.startswith("DeepSpeed steps flat copies")
    assert "(DeepSpeedStrategy)" in reason


@pytest.mark.parametrize("package", [pytorch_lightning.strategies, lightning.pytorch.strategies])
def test_both_packages_have_the_strategies_known_by_name(package: ModuleType) -> None:
    names = {*strategies.REFUSED, strategies.REPLICATING}
    assert {getattr(package, name).__name__ for name in names} == names


@pytest.mark.parametrize(
    ("size", "first", "is_sharded", "idle"),
    [
        *((1, True, False, False), (1, True, True, False)),
        *((2, True, False, False), (2, True, True, False)),
        *((2, False, False, True), (2, False, True, False)),
    ],
)
def test_ranks_after_the_first_are_idle_if_the_model_is_whole(
    monkeypatch: pytest.MonkeyPatch, size: int, first: bool, is_sharded: bool, idle: bool
) -> None:
    monkeypatch.setattr(strategies, "is_sharded_module", lambda _: is_sharded)
    trainer = make_trainer(DDP, size, first=first)
    assert is_idle(trainer, trainer.lightning_module) is idle
