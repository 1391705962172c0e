"""Which processes observe, and which strategies cannot be observed at all."""

from types import ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch.strategies
import pytest
import pytorch_lightning.strategies
from torch import nn

from altgrad_lightning import strategies
from altgrad_lightning.strategies import is_idle, refused_strategy
from tests.lightning.runs import Net


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DeepSpeedStrategy", "DeepSpeed steps flat copies .*use ModelParallelStrategy with"),
        ("FSDPStrategy", r"FSDP1 keeps .* flat shards.*\(FSDPStrategy\).*or DDP"),
        ("XLAStrategy", "devices of XLA"),
        ("Other", "Other has 2 processes, and whether each has all"),
    ],
)
def test_what_cannot_be_observed_is_refused_by_name(name: str, expected: str) -> None:
    run = SimpleNamespace(
        strategy=type(name, (), {})(), world_size=2, lightning_module=Net(), is_global_zero=True
    )
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(refused_strategy(run))


def trainer_of(strategy: type, size: int, *, first: bool = True) -> Any:
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
def test_what_can_be_observed_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, strategy: type, size: int, is_sharded: bool
) -> None:
    monkeypatch.setattr(strategies, "is_sharded_module", lambda _: is_sharded)
    assert refused_strategy(trainer_of(strategy, size)) is None


def test_a_strategy_of_ones_own_is_refused_for_what_it_is_made_of() -> None:
    reason = refused_strategy(trainer_of(type("Mine", (Deep,), {}), 1))
    assert reason is not None
    assert reason.startswith("DeepSpeed steps flat copies")
    assert "(DeepSpeedStrategy)" in reason


@pytest.mark.parametrize("package", [pytorch_lightning.strategies, lightning.pytorch.strategies])
def test_lightning_has_the_strategies_that_are_known_by_name(package: ModuleType) -> None:
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
def test_all_but_the_first_of_several_with_a_whole_model_are_idle(
    monkeypatch: pytest.MonkeyPatch, size: int, first: bool, is_sharded: bool, idle: bool
) -> None:
    monkeypatch.setattr(strategies, "is_sharded_module", lambda _: is_sharded)
    trainer = trainer_of(DDP, size, first=first)
    assert is_idle(trainer, trainer.lightning_module) is idle
