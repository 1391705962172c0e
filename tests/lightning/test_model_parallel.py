"""`PrecisionMonitor` with sharded parameters: fully_shard under ModelParallelStrategy."""

import contextlib
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from altgrad import StepRecord
from altgrad.distributed.host_group import HostGroup
from altgrad.report import read
from altgrad_lightning import PrecisionMonitor
from tests.distributed.comparing import differences
from tests.distributed.listening import Listening
from tests.distributed.sharded import WholeSteps, replayed
from tests.lightning.runs import around, batches, count_hooks, trainer
from tests.processes import run

SETTINGS = {"max_elements": 100}


class Recording(torch.optim.SGD):
    """An SGD that records the truth inside the step, where Lightning's closure makes gradients."""

    truth: WholeSteps

    def step(self, closure: Any = None) -> Any:
        if closure is None:  # torch steps without a closure when it restores the state
            return super().step()
        loss = closure()
        self.truth.before()
        super().step()
        self.truth.after()
        return loss


class Net(pl.LightningModule):
    """A net with one large layer and small layers, sharded if the strategy has a mesh.

    Args:
        at_once: If True, shard all layers in one group; otherwise the first layer apart.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        super().__init__()
        self.at_once = at_once
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 300), nn.Linear(300, 8), nn.LayerNorm(8))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            if not self.at_once:
                fully_shard(self.layers[0], mesh=mesh)
            fully_shard(self.layers, mesh=mesh)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        return (self.layers(batch[0]) - 1).square().mean()

    def validation_step(self, batch: list[Tensor], batch_index: int) -> None:
        """Run a forward without a backward, as Lightning does before the first step."""
        self.log("val", self.layers(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = Recording(self.parameters(), lr=1e-2, momentum=0.9)
        self.truth = optimizer.truth = WholeSteps(self)
        return optimizer


class InTurn(Net):
    """A net with two optimizers, one for each linear layer."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_index: int) -> None:
        self.manual_backward((self.layers(batch[0]) - 1).square().mean())
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(each.parameters(), lr=1e-2) for each in self.layers[:2]]


def fit(
    folder: Path,
    size: int,
    epochs: int,
    checkpoint: Path | None,
    *,
    saving: bool = False,
    at_once: bool = False,
) -> dict[str, Any]:
    """Train, and return the findings of this rank with the recorded truth."""
    warnings.filterwarnings("error", message=".*(PrecisionMonitor|UpdateMonitor|StepObserver)")
    monitor = PrecisionMonitor(every_n_steps=1, strict=True, recipes=(), **SETTINGS)
    strategy: Any = "auto"
    if size > 1:
        strategy = ModelParallelStrategy(size, 1, save_distributed_checkpoint=False)
    callbacks = [ModelCheckpoint(folder / "saved", filename="last")] if saving else []
    options = {"strategy": strategy, "devices": size, "enable_checkpointing": saving}
    options |= {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": epochs}
    fitted = trainer(folder, monitor, *callbacks, **options)
    net = Net(at_once=at_once)
    loader = DataLoader(batches(6).dataset, batch_size=4 // size, shuffle=False)
    fitted.fit(net, loader, loader, ckpt_path=None if checkpoint is None else str(checkpoint))
    return {
        "hooks": count_hooks(fitted),
        "step": monitor.latest_step,
        "path": None if monitor.path is None else str(monitor.path),
        "steps": net.truth.steps,
        "record": StepRecord(0, monitor.latest, monitor.latest_model, 0.0, 0.0),
        "state": monitor.state_dict(),
    }


def fit_first(rank: int, folder: Path, size: int) -> dict[str, Any]:
    return fit(folder, size, 1, None, saving=True)


def fit_at_once(rank: int, folder: Path, size: int) -> dict[str, Any]:
    return fit(folder, size, 1, None, at_once=True)


def fit_alone(rank: int, folder: Path, size: int) -> dict[str, Any]:
    """Train with a monitor on rank 0 only, which waits once for rank 1."""
    # A run file needs Trainer.log_dir, a broadcast in which rank 1 takes no part.
    monitors = [PrecisionMonitor(every_n_steps=1, run_file=False, recipes=())] if rank == 0 else []
    strategy = ModelParallelStrategy(size, 1)
    fitted = trainer(folder, *monitors, strategy=strategy, devices=size)
    net = InTurn()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted.fit(net, DataLoader(batches(6).dataset, batch_size=2))
    notices = [str(each.message) for each in caught if "PrecisionMonitor" in str(each.message)]
    return {"notices": notices, "steps": fitted.global_step}


def fit_listening(rank: int, folder: Path, size: int) -> list[Counter[str]]:
    """Return what this rank says in each observed batch, less what it says without a monitor."""
    found: list[list[Counter[str]]] = []

    def listen(batch: contextlib.ExitStack) -> None:
        said: Counter[str] = Counter()
        gather = HostGroup.gather

        def note(group: HostGroup, call: str, value: object) -> list[Any]:
            said[f"text in {call}"] += 1
            return gather(group, call, value)

        heard = batch.enter_context(Listening())
        batch.enter_context(mock.patch.object(HostGroup, "gather", note))
        batch.callback(lambda: said.update(name for name, _ in heard.said))
        found[-1].append(said)

    for monitors in ([], [PrecisionMonitor(["bf16"], every_n_steps=1, strict=True, recipes=())]):
        found.append([])
        callbacks = around(monitors, listen)
        fitted = trainer(folder, *callbacks, strategy=ModelParallelStrategy(size, 1), devices=size)
        fitted.fit(Net(), DataLoader(batches(5).dataset, batch_size=2))
    return [watched - alone for alone, watched in zip(*found, strict=True)]


def fit_passing(rank: int, folder: Path, size: int) -> list[float]:
    """Train, and return the figure of callbacks on this rank, and its latest figure."""
    monitor = PrecisionMonitor(every_n_steps=2, run_file=False, callback_metrics=["update_rms"])
    fitted = trainer(folder, monitor, strategy=ModelParallelStrategy(size, 1), devices=size)
    fitted.fit(Net(), DataLoader(batches(6).dataset, batch_size=2))
    return [
        fitted.callback_metrics["altgrad/update_rms"].item(),
        monitor.latest_model["update_rms"],
    ]


def fit_more(rank: int, folder: Path, size: int, checkpoint: Path) -> dict[str, Any]:
    return fit(folder, size, 2, checkpoint)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return the findings of one epoch on 2 ranks, and of a second epoch on 1, 2 and 3 ranks."""
    folder = tmp_path_factory.mktemp("parallel")
    seen = {"first": run(fit_first, 2, folder, 2)}
    checkpoint = folder / "saved" / "last.ckpt"
    return seen | {
        size: run(fit_more, size, folder / str(size), size, checkpoint) for size in (1, 2, 3)
    }


def replay_truth(steps: Any, state: Any = None) -> Any:
    parameters = {name: nn.Parameter(before.clone()) for name, (before, _, _) in steps[0].items()}
    return replayed(steps, state, parameters=parameters, **SETTINGS)


def test_two_ranks_get_the_figures_of_one(fitted) -> None:
    first = fitted["first"]
    expected = replay_truth(first[0]["steps"])
    assert len(expected.records) == 3
    for seen in first:
        assert seen["step"] == 2
        assert differences(seen["record"], expected.records[-1]) == []


def test_a_model_sharded_in_one_group_is_observed(tmp_path) -> None:
    for seen in run(fit_at_once, 2, tmp_path, 2):
        assert differences(seen["record"], replay_truth(seen["steps"]).records[-1]) == []


def test_a_monitor_on_one_rank_only_gives_a_warning(tmp_path) -> None:
    first, second = run(fit_alone, 2, tmp_path, 2, collective=6.0)
    assert first["steps"] == second["steps"] == 12
    assert len(first["notices"]) == 1
    assert "does not observe this run: rank 0 of 2" in first["notices"][0]
    assert "every rank has to attach" in first["notices"][0]


@pytest.mark.slow
def test_an_observed_batch_makes_two_all_reduces_also_when_pictures_are_drawn(tmp_path) -> None:
    """Pictures are drawn at the first and at the fourth observed batch."""
    for each in run(fit_listening, 2, tmp_path, 2):
        assert each == [Counter({"allreduce": 2})] * 5


def test_callbacks_find_the_same_figure_on_every_rank(tmp_path) -> None:
    first, second = run(fit_passing, 2, tmp_path, 2)
    assert first == second
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_the_gradients_are_accumulated_and_clipped(fitted) -> None:
    gradients = [g for _, _, g in fitted["first"][0]["steps"][0].values()]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert norm == pytest.approx(0.5, rel=1e-4)


def test_only_the_first_rank_writes(fitted) -> None:
    written = read(fitted["first"][0]["path"])
    assert [*written.steps] == [0, 1, 2]
    assert written.now is not None
    assert written.now.dtype == "float32"
    assert fitted["first"][1]["path"] is None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_ranks_resumes_from_the_checkpoint(fitted, size: int) -> None:
    before = replay_truth(fitted["first"][0]["steps"])
    expected = replay_truth(fitted[size][0]["steps"], before.final_state)
    assert expected.records
    for seen in fitted[size]:
        assert differences(seen["record"], expected.records[-1]) == []
        bits = seen["state"]["monitor"]["ever_moved"]
        assert bits.keys() == expected.final_state["ever_moved"].keys()
        for name, (shape, packed) in expected.final_state["ever_moved"].items():
            assert bits[name][0] == shape
            assert torch.equal(bits[name][1], packed)


def test_no_hook_is_left(fitted) -> None:
    assert [seen["hooks"] for seen in fitted["first"]] == [0, 0]
