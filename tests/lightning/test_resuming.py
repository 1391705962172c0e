"""`PrecisionMonitor`: its state in checkpoints, and from run to run."""

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from altgrad import DEFAULT_FORMATS, UpdateMonitor
from altgrad.report import read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Attached, Net, batches, step_once, trainer

KEYS = [f"never_moved_frac/{format}" for format in DEFAULT_FORMATS]


class Wide(Net):
    """A net with one sampled layer: the same elements are measured after a resume."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.layers.insert(0, nn.Linear(8, 400))
        self.layers[1] = nn.Linear(400, 8)


class Plain(Wide):
    """A net whose optimizer has no state, so that a new optimizer replaces it exactly.

    Many weights move in the first epoch, and rest in the second.
    """

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers[0].param_groups[0]["lr"] = 1e-6


class Fast(Wide):
    """A net whose weights all move in every format."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1.0)


def collect_never_moved(monitor: PrecisionMonitor) -> dict[str, float]:
    found = {f"{name}/{k}": each[k] for name, each in monitor.latest.items() for k in KEYS}
    return found | {key: monitor.latest_model[key] for key in KEYS}


def train(
    folder: Path,
    monitor: PrecisionMonitor,
    *callbacks: pl.Callback,
    epochs: int = 2,
    module: type[Wide] = Wide,
    ckpt_path: Path | None = None,
) -> dict[str, float]:
    options = {"max_epochs": epochs, "enable_checkpointing": bool(callbacks)}
    run = trainer(folder, monitor, *callbacks, **options)
    run.fit(module(), batches(4), ckpt_path=ckpt_path)
    return collect_never_moved(monitor)


def make_checkpoint(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=folder / "kept", filename="first", every_n_epochs=1, save_top_k=1
    )


@pytest.mark.filterwarnings(
    r"ignore:.*add the following callbacks. \[.ModelCheckpoint[^\]]*\]\.$"
)  # the resumed run saves no checkpoint
def test_a_resumed_run_knows_which_weights_never_moved(tmp_path: Path) -> None:
    whole = train(tmp_path, PrecisionMonitor(every_n_steps=1))
    train(tmp_path, PrecisionMonitor(every_n_steps=1), make_checkpoint(tmp_path), epochs=1)
    resumed = PrecisionMonitor(every_n_steps=1)
    figures = train(tmp_path, resumed, ckpt_path=tmp_path / "kept" / "first.ckpt")
    assert figures == whole
    assert resumed.latest_step == 7
    # Only the state makes the figures equal: a callback without a saved state has others.
    other = PrecisionMonitor([*DEFAULT_FORMATS, "fp16"], every_n_steps=1)
    with pytest.warns(UserWarning, match="add the following callbacks.*PrecisionMonitor"):
        anew = train(tmp_path, other, ckpt_path=tmp_path / "kept" / "first.ckpt")
    assert all(anew[key] >= whole[key] for key in whole)
    assert (
        anew["layers.0.weight/never_moved_frac/bf16"]
        > whole["layers.0.weight/never_moved_frac/bf16"]
    )


def test_torch_loads_the_state_with_weights_only(tmp_path: Path) -> None:
    train(tmp_path, PrecisionMonitor(every_n_steps=1), make_checkpoint(tmp_path), epochs=1)
    held = torch.load(tmp_path / "kept" / "first.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in held.items() if key.startswith("PrecisionMonitor"))
    assert "layers.0.weight" in state["monitor"]["ever_moved"]


def test_the_state_is_saved_before_and_after_a_run(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(every_n_steps=1)
    assert monitor.state_dict() == {}
    train(tmp_path, monitor)
    state = monitor.state_dict()
    assert "layers.0.weight" in state["monitor"]["ever_moved"]
    twin = PrecisionMonitor(every_n_steps=1)
    twin.load_state_dict(state)
    assert twin.state_dict() == state  # tuners save and restore states before training starts


@pytest.mark.slow
def test_a_second_run_takes_no_state_from_the_first(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(every_n_steps=1)
    first = train(tmp_path, monitor)
    assert set(train(tmp_path, monitor, module=Fast).values()) == {0.0}
    assert train(tmp_path, monitor) == first


def test_several_callbacks_of_a_run_have_separate_states(tmp_path: Path) -> None:
    options: dict[str, Any] = {"every_n_steps": 1}
    run = trainer(
        tmp_path,
        *(PrecisionMonitor(**options), PrecisionMonitor(**options, scaling=None)),
        PrecisionMonitor("bf16", **options),
    )
    run.fit(Wide(), batches(2))
    run.save_checkpoint(tmp_path / "both.ckpt")
    held = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    states = [state["monitor"] for key, state in held.items() if key.startswith("PrecisionMonitor")]
    assert [len(state["formats"]) for state in states] == [3, 3, 1]


@pytest.mark.slow
def test_the_state_is_kept_when_optimizers_are_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    class Replacing(Plain):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.strategy.optimizers = [self.configure_optimizers()]
            super().on_train_epoch_start()

    def detach_and_collect(monitor: UpdateMonitor) -> None:
        """Collect garbage at once, which Python may do at any time."""
        detach(monitor)
        gc.collect()

    detach = UpdateMonitor.detach
    monkeypatch.setattr(UpdateMonitor, "detach", detach_and_collect)
    whole = train(tmp_path, PrecisionMonitor(every_n_steps=1), module=Plain)
    assert train(tmp_path, PrecisionMonitor(every_n_steps=1), module=Replacing) == whole
    assert train(tmp_path, PrecisionMonitor(every_n_steps=8), module=Plain) != whole


def test_a_state_loaded_in_mid_training_does_not_replace_the_state(
    attached: Attached,
) -> None:
    """Lightning's learning rate finder saves and loads all states in mid-training."""
    monitor, run, module = attached()
    monitor.load_state_dict(monitor.state_dict())
    assert monitor.state_dict()["monitor"]["last_seen"] == {}
    step_once(monitor, run, module)
    assert "layers.0.weight" in monitor.state_dict()["monitor"]["last_seen"]


# --- several callbacks with the same formats


def test_callbacks_with_equal_formats_and_other_names_have_separate_states(tmp_path: Path) -> None:
    def make() -> list[PrecisionMonitor]:
        return [PrecisionMonitor("bf16", every_n_steps=k, name=name) for k, name in arguments]

    arguments = [(1, None), (2, "seldom"), (4, "rarely")]
    run = trainer(tmp_path, *make(), logger=False)
    run.fit(Net(), batches(4))
    run.save_checkpoint(tmp_path / "all.ckpt")
    states = torch.load(tmp_path / "all.ckpt", weights_only=True)["callbacks"]
    # The key of a callback without a name is that of version 0.1.0.
    assert "PrecisionMonitor{'formats': ['bf16'], 'scaling': 'tensor'}" in states
    last = [state["monitor"]["last_seen"]["layers.0.weight"] for state in states.values()]
    assert len(states) == len(last) == 3
    monitors = make()
    resumed = trainer(tmp_path, *monitors, max_epochs=2, logger=False)
    resumed.fit(Net(), batches(4), ckpt_path=tmp_path / "all.ckpt")
    assert [read(each.path).steps for each in monitors] == [
        (*range(8),),
        (1, 3, 5, 7),
        (3, 7),
    ]


@pytest.mark.parametrize("names", [(None, None), ("a", "a"), ("a", None, "a")])
def test_an_error_says_that_callbacks_with_equal_formats_need_a_name(
    tmp_path: Path, names: tuple[str | None, ...]
) -> None:
    run = trainer(
        tmp_path, *(PrecisionMonitor(every_n_steps=k, name=n) for k, n in enumerate(names, 1))
    )
    with pytest.raises(
        ValueError, match=r"name=.*expected another name.*pass name=… to all but one"
    ):
        run.fit(Net(), batches(1))


def test_a_changed_interval_keeps_the_state(tmp_path: Path) -> None:
    assert PrecisionMonitor(every_n_steps=7).state_key == PrecisionMonitor().state_key


# --- damaged states


def keys_of_states(state: dict[str, Any], *path: str) -> list[tuple[str, ...]]:
    """Return the path of each key that a version of AltGrad writes into the state."""
    own = [(*path, key) for key in state]
    for key, value in state.items():
        if isinstance(value, dict) and key in ("monitor", "output", "scales", "charts"):
            own += keys_of_states(value, *path, key)
    return own


def test_a_checkpoint_without_one_of_the_keys_is_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"every_n_steps": 1}
    run = trainer(tmp_path, monitor := PrecisionMonitor("bf16", **options), logger=False)
    run.fit(Net(), batches(1))
    run.save_checkpoint(tmp_path / "whole.ckpt")
    paths = keys_of_states(monitor.state_dict())
    assert {("monitor", "budgets"), ("output", "verdicts"), ("monitor", "scales", "amax")} < {
        *paths
    }
    for path in paths:
        checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=True)
        (state,) = checkpoint["callbacks"].values()
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]
        torch.save(checkpoint, tmp_path / "damaged.ckpt")
        resumed = PrecisionMonitor("bf16", **options)
        again = trainer(tmp_path, resumed, max_epochs=2, logger=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again.fit(Net(), batches(1), ckpt_path=tmp_path / "damaged.ckpt")
        assert resumed.latest_step == 1, path
        notices = [str(each.message) for each in caught if "PrecisionMonitor" in str(each.message)]
        may_lack = {("monitor",), ("output",), ("output", "last_step"), ("last_batches",)}
        # As a state of 0.1.0, which drew these layers alike, and had no twins.
        may_lack |= {("monitor", "samples"), ("monitor", "scales", "tensor_amax")}
        may_lack |= {("monitor", "twins"), ("monitor", "starts")}
        may_lack |= {("output", "charts", key) for key in ("considered", "left")}
        may_lack |= {("output", "charts", key) for key in ("waiting", "twin_keys", "recipes")}
        assert len(notices) == (path not in may_lack), (path, notices)
        assert all(path[-1] in notice for notice in notices), notices


@pytest.mark.parametrize(
    "damage",
    [
        {"budgets": [{"interval": 1}]},
        {"ever_moved": {"layers.0.weight": ((2, 8), torch.zeros(1, dtype=torch.uint8))}},
        {"ever_moved": {"layers.0.weight": None}},
        {"last_seen": 3},
    ],
    ids=lambda each: next(iter(each)),
)
def test_a_damaged_state_begins_anew(tmp_path: Path, damage: dict[str, Any]) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=1, overhead_budget=0.9)
    run = trainer(tmp_path, monitor, logger=False)
    run.fit(Net(), batches(1))
    monitor.state_dict()["monitor"].update(damage)
    monitor.load_state_dict(monitor.state_dict())
    with pytest.warns(UserWarning, match="begins anew, because its state cannot be restored"):
        trainer(tmp_path, monitor, logger=False).fit(Net(), batches(1))
    assert monitor.latest_step == 0
