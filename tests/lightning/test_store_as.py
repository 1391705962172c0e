"""`StoreAs`: a Trainer stores weights and states as `Recipe.attach` does, also when resumed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from altgrad import Recipe, SamplingRule
from altgrad.observation.stored import get_stored
from altgrad.recipes import get_recipes
from altgrad_lightning import PrecisionMonitor, StoreAs
from tests.lightning.runs import Net, batches, count_hooks, trainer
from tests.lightning.storing import KAHAN, LOW, QUIET, assert_equal, fit, is_stored, train_plainly


class Validated(Net):
    def val_dataloader(self) -> Any:
        return batches(1)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("valid", self.layers(batch[0]).mean())

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.layers(batch[0])


# --- what a Trainer stores


@pytest.mark.parametrize("recipe", [LOW, KAHAN, "bf16"], ids=["low", "kahan", "bf16"])
def test_a_trainer_stores_what_a_plain_loop_stores(tmp_path: Path, recipe: Any) -> None:
    callback = StoreAs(recipe, seed=5)
    net, run = fit(tmp_path, callback)
    other, optimizer, storage = train_plainly(
        lambda *o, **n: callback.recipe.attach(*o, **n, seed=5)
    )
    assert_equal(net.state_dict(), other.state_dict())
    assert_equal(run.optimizers[0].state_dict(), optimizer.state_dict())
    assert_equal(callback.state_dict(), storage.state_dict())
    assert callback.formats == storage.formats


def test_the_other_package_stores_the_same(tmp_path: Path) -> None:
    class Other(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Net().layers

        training_step = Net.training_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    net = Other()
    run = lightning.pytorch.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[StoreAs(LOW)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run.fit(net, batches(4))
    assert_equal(net.state_dict(), train_plainly(LOW.attach)[0].state_dict())


def test_rules_and_scaling_are_those_of_a_storage(tmp_path: Path) -> None:
    rules = [SamplingRule("layers.0.*", enabled=False), SamplingRule("*.bias", formats="bf16")]
    callback = StoreAs("e4m3fn", scaling="channel", layers=rules)
    fit(tmp_path, callback, steps=1)
    assert callback.formats == {
        "layers.1.weight": "e4m3fn",
        "layers.1.bias": "bf16",
        "layers.2.weight": "e4m3fn",
        "layers.2.bias": "bf16",
    }
    assert callback.state_dict()["layers"]["layers.1.weight"]["scales"].shape == (8, 1)
    with pytest.raises(ValueError, match=r"layers\.9"):
        fit(tmp_path, StoreAs("bf16", layers=[SamplingRule("layers.9.*", enabled=False)]))


class Adversaries(Net):
    """A module that steps two optimizers, of which one has the states of the recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.layers(batch[0]).sum())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        first, *others = self.layers
        rest = [p for each in others for p in each.parameters()]
        return [torch.optim.AdamW(first.parameters()), torch.optim.SGD(rest, lr=1e-3)]


def test_all_optimizers_are_stored(tmp_path: Path) -> None:
    callback = StoreAs(Recipe("low", weights="bf16", states={"exp_avg": "bf16"}))
    net, run = fit(tmp_path, callback, module=Adversaries)
    assert is_stored(net)
    assert len(callback.formats) == 6
    for state in run.optimizers[0].state.values():
        assert torch.equal(state["exp_avg"], state["exp_avg"].bfloat16().float())


def test_new_optimizers_are_stored_from_the_next_batch_on(tmp_path: Path) -> None:
    class Replaced(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 2:
                self.trainer.strategy.optimizers = [self.configure_optimizers()]

    monitor, storing = PrecisionMonitor("e4m3fn", every_n_steps=1, recipes=()), StoreAs("bf16")
    for callbacks in ([storing], [storing, monitor], [monitor, storing]):
        net, run = fit(tmp_path, *callbacks, module=Replaced)
        assert is_stored(net)
        assert count_hooks(run) == 0
        if monitor in callbacks:
            assert monitor.latest_step == 3


@pytest.mark.filterwarnings("ignore:.*cannot judge bf16 for weights that a WeightStorage stores")
@pytest.mark.parametrize("order", [1, -1])
def test_a_monitor_sees_stored_weights_in_any_order_of_the_callbacks(
    tmp_path: Path, order: int
) -> None:
    options: dict[str, Any] = {"formats": ["bf16", "e4m3fn"], "every_n_steps": 1, "strict": True}
    monitor, records = PrecisionMonitor(**options), []
    fit(tmp_path, *[monitor, StoreAs("bf16-sr")][::order])
    train_plainly(StoreAs("bf16-sr").recipe.attach, on_record=records.append, **options)
    expected = records[-1].layers
    assert {*monitor.latest} == {*expected}
    for name, figures in expected.items():
        assert dict(monitor.latest[name]) == pytest.approx(dict(figures), nan_ok=True), name
        assert "stall_frac/bf16" not in figures  # what is stored cannot be seen to stall


def make_scaler() -> MixedPrecision:
    # "16-mixed" on a CPU is silently bf16 unless the scaler is given.
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))


class InfAt2(Net):
    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.batch_idx == 2:
            self.layers[0].weight.grad[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("module", "options", "stored"),
    [
        (Net, {}, 4),
        (Net, {"accumulate_grad_batches": 2}, 2),
        (Net, {"precision": "bf16-mixed", "gradient_clip_val": 0.1}, 4),
        (InfAt2, {"plugins": [make_scaler()]}, 3),
    ],
    ids=["plain", "accumulated", "mixed", "inf"],
)
def test_a_step_of_an_optimizer_stores_once_and_a_skipped_step_does_not(
    tmp_path: Path, module: Any, options: dict[str, Any], stored: int
) -> None:
    callback, counted = StoreAs("bf16-sr"), StoreAs("bf16-sr")
    net, _ = fit(tmp_path, callback, module=module, **options)
    fit(tmp_path, counted, steps=stored)
    assert is_stored(net)
    assert_equal(callback.state_dict()["generators"], counted.state_dict()["generators"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="Lightning 2.4")
def test_a_moving_average_is_not_stored_and_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    weights: list[Any] = []

    class Watched(Validated):
        def on_train_batch_end(self, *_: Any) -> None:
            weights.append(copy.deepcopy(self.state_dict()))

    options = {"module": Watched, "max_epochs": 2, "val_check_interval": 2}
    fit(tmp_path, StoreAs(KAHAN), **options)
    expected, weights[:] = weights[:], []
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    net, _ = fit(tmp_path, average, StoreAs(KAHAN), **options)
    assert_equal(weights, expected)
    assert not torch.equal(net.layers[0].weight, weights[-1]["layers.0.weight"])


class Normalized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.BatchNorm1d(8))


@pytest.mark.parametrize(("module", "stored"), [(Net, False), (Normalized, True)])
def test_the_last_average_is_stored_if_lightning_ends_with_a_step(
    tmp_path: Path, module: Any, stored: bool
) -> None:
    """Batch norm needs another pass over the data, and Lightning ends it with a step."""
    average = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    net, _ = fit(tmp_path, StoreAs("bf16"), average, module=module, max_epochs=3)
    assert is_stored(net) is stored


# --- resumed runs


@pytest.mark.parametrize("recipe", [LOW, KAHAN], ids=["low", "kahan"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, recipe: Recipe) -> None:
    whole = StoreAs(recipe)
    expected, run = fit(tmp_path, whole, max_epochs=2)
    _, first = fit(tmp_path, StoreAs(recipe))
    first.save_checkpoint(tmp_path / "first.ckpt")
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)
    saved["callbacks"] = {}
    torch.save(saved, tmp_path / "without.ckpt")

    resumed = StoreAs(recipe)
    net, again = fit(tmp_path, resumed, max_epochs=2, ckpt_path=tmp_path / "first.ckpt")
    assert_equal(net.state_dict(), expected.state_dict())
    assert_equal(again.optimizers[0].state_dict(), run.optimizers[0].state_dict())
    assert_equal(resumed.state_dict(), whole.state_dict())
    # Only the state makes them equal.
    other, _ = fit(tmp_path, StoreAs(recipe), max_epochs=2, ckpt_path=tmp_path / "without.ckpt")
    assert not torch.equal(other.layers[0].weight, expected.layers[0].weight)


class Rate(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Finder(pl.callbacks.LearningRateFinder):
    """A finder in mid-training, as in Lightning's documentation."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, run: pl.Trainer, module: pl.LightningModule) -> None:
        if run.current_epoch == 1:
            self.lr_find(run, module)


@pytest.mark.filterwarnings("ignore:The .dataloader. or .*:UserWarning")
@pytest.mark.parametrize("order", [1, -1])
def test_steps_of_a_learning_rate_finder_leave_no_trace(tmp_path: Path, order: int) -> None:
    """Steps with a large rate raise the scales, which would never shrink again."""
    finder = Finder(num_training_steps=4, max_lr=1e3, update_attr=False, early_stop_threshold=None)
    plain, found = StoreAs(LOW), StoreAs(LOW)
    expected, _ = fit(tmp_path, plain, module=Rate, max_epochs=3)
    net, _ = fit(tmp_path, *[finder, found][::order], module=Rate, max_epochs=3)
    assert len(finder.optimal_lr.results["lr"]) == 4
    assert_equal(net.state_dict(), expected.state_dict())
    assert_equal(found.state_dict(), plain.state_dict())


# --- other calls of the Trainer


def test_nothing_is_left_after_a_training_and_another_begins_anew(tmp_path: Path) -> None:
    callback = StoreAs(LOW)
    first, run = fit(tmp_path, callback)
    state = copy.deepcopy(callback.state_dict())
    assert count_hooks(run) == 0
    assert get_stored(run.optimizers) == {}
    weights = copy.deepcopy(first.state_dict())
    run.optimizers[0].step()
    assert not torch.equal(first.layers[0].weight, weights["layers.0.weight"])
    second, _ = fit(tmp_path, callback)
    assert_equal(second.state_dict(), weights)
    assert_equal(callback.state_dict(), state)


@pytest.mark.parametrize("where", ["training_step", "on_train_start"])
def test_nothing_is_left_after_an_exception(tmp_path: Path, where: str) -> None:
    class Failing(Net):
        def fail(self, *_: Any) -> None:
            raise KeyError(where)

    failing = type("Failing", (Failing,), {where: Failing.fail})
    callback = StoreAs("bf16")
    torch.manual_seed(0)
    net, run = failing(), trainer(tmp_path, callback, **QUIET)
    with pytest.raises(KeyError, match=where):
        run.fit(net, batches(2))
    assert count_hooks(run) == 0
    assert get_stored(run.optimizers) == {}
    again, _ = fit(tmp_path, callback)
    assert_equal(again.state_dict(), fit(tmp_path, StoreAs("bf16"))[0].state_dict())


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_other_calls_of_a_trainer_change_no_weight(tmp_path: Path, call: str) -> None:
    callback = StoreAs(LOW)
    net = Validated()
    before = copy.deepcopy(net.state_dict())
    run = trainer(tmp_path, callback, **QUIET)
    getattr(run, call)(net, batches(1))
    assert_equal(net.state_dict(), before)
    assert callback.formats == {}


def test_a_state_is_kept_after_a_training_and_after_a_test(tmp_path: Path) -> None:
    callback = StoreAs(KAHAN)
    _, run = fit(tmp_path, callback, module=Validated)
    expected = copy.deepcopy(callback.state_dict())
    run.test(Validated(), batches(1), verbose=False)
    assert_equal(callback.state_dict(), expected)


def test_a_state_that_is_loaded_for_a_test_is_kept_for_checkpoints_alone(tmp_path: Path) -> None:
    _, run = fit(tmp_path, StoreAs(KAHAN), module=Validated)
    run.save_checkpoint(tmp_path / "one.ckpt")
    held = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["StoreAs"]
    callback = StoreAs(KAHAN)
    run = trainer(tmp_path, callback, **QUIET)
    run.test(Validated(), batches(1), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert_equal(callback.state_dict(), held)
    expected, _ = fit(tmp_path, StoreAs(KAHAN))
    assert_equal(fit(tmp_path, callback)[0].state_dict(), expected.state_dict())


def test_a_copy_begins_without_a_state(tmp_path: Path) -> None:
    copies: list[StoreAs] = []

    class Copying(Net):
        def on_train_end(self) -> None:
            copies.extend([copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))])

    callback = StoreAs(LOW, seed=2)
    expected, _ = fit(tmp_path, callback, module=Copying)
    for each in copies:
        assert each.state_dict() == {"layers": {}, "generators": {}}
        assert_equal(fit(tmp_path, each)[0].state_dict(), expected.state_dict())


RULED = {"scaling": ["block", 4], "layers": [{"layers": "*.bias", "enabled": False}], "seed": 3}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ({"recipe": "bf16-sr"}, get_recipes("bf16-sr")[0]),
        ({"recipe": {"name": "mine", "weights": "e4m3fn"}, **RULED}, Recipe("mine", "e4m3fn")),
    ],
    ids=["name", "fields"],
)
def test_a_callback_is_configured_by_yaml(
    tmp_path: Path, monkeypatch: Any, arguments: dict[str, Any], recipe: Recipe
) -> None:
    callback = {"class_path": "altgrad_lightning.StoreAs", "init_args": arguments}
    options = {"callbacks": [callback], "default_root_dir": str(tmp_path), "accelerator": "cpu"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": options | QUIET | {"max_epochs": 1}}))
    monkeypatch.setattr("sys.argv", ["run.py", "--config", str(config)])
    cli = LightningCLI(Net, save_config_callback=None, run=False, seed_everything_default=False)
    (made,) = (each for each in cli.trainer.callbacks if isinstance(each, StoreAs))
    assert made.recipe == recipe
    cli.trainer.fit(cli.model, batches(1))
    assert {*made.formats.values()} == {str(recipe.weights)}
    assert ("layers.0.bias" in made.formats) is (recipe.name == "bf16-sr")


# --- errors


class Sharded(pl.strategies.SingleDeviceStrategy):
    """A strategy with the name of one that shards."""


Sharded.__name__ = "FSDPStrategy"


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"recipe": "bf16-true"}, {}, r"dtype=torch.bfloat16: .*Trainer\(precision='bf16-true'\)"),
        ({"recipe": "fp16-true-fused"}, {}, r"Trainer\(precision='16-true'\)"),
        ({"recipe": Recipe("f", fused=True)}, {}, "create the optimizer with fused=True"),
        ({"recipe": Recipe("f", optimizer=torch.optim.SGD)}, {}, "do create that optimizer"),
        ({"recipe": "bf16-rs"}, {}, "recipes='bf16-rs': expected a short name; nearest: bf16"),
        ({"recipe": "bf16", "scaling": "row"}, {}, "scaling='row'"),
        ({"recipe": "bf16"}, {"precision": "bf16-true"}, "not finer than bf16: expected float32"),
        ({"recipe": "bf16"}, {"strategy": Sharded("cpu")}, r"StoreAs .*\(FSDPStrategy\); use DDP"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_says_what_cannot_be_stored_and_what_to_do(
    tmp_path: Path, given: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, StoreAs(**given), **options)


def test_a_strategy_is_refused_before_the_module_is_on_its_device(tmp_path: Path) -> None:
    class Late(Net):
        def on_fit_start(self) -> None:
            raise AssertionError

    with pytest.raises(ValueError, match="StoreAs cannot store weights under this strategy"):
        fit(tmp_path, StoreAs("bf16"), module=Late, strategy=Sharded("cpu"))


@pytest.mark.parametrize("recipe", [None, ["bf16"], 16])
def test_a_recipe_of_another_type_is_an_error(recipe: Any) -> None:
    with pytest.raises(TypeError, match=r"recipe=.*: expected a short name such as 'bf16-sr'"):
        StoreAs(recipe)


def test_a_trainer_takes_one_storage(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `StoreAs`"):
        trainer(tmp_path, StoreAs("bf16"), StoreAs("e4m3fn"))


def test_a_warning_names_states_that_no_optimizer_has(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"states=\['exp_avg_sp'\]: .* AdamW has 'exp_avg'"):
        fit(tmp_path, StoreAs(Recipe("typo", states={"exp_avg_sp": "bf16"})))
