"""`PrecisionMonitor`: figures of the whole model, and rules for single layers."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from altgrad import DEFAULT_FORMATS, SamplingRule, get_format
from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.quantization import compute_scale, effective_update, stall_mask
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import (
    Net,
    RecordingAdamW,
    Step,
    batches,
    fit,
    logged,
    replay_amax,
    trainer,
)


class Large(Net):
    """A net whose large layers are sampled by default."""

    def __init__(self) -> None:
        super().__init__(optimizer=RecordingAdamW)
        self.layers[0] = nn.Linear(8, 400)
        self.layers[1] = nn.Linear(400, 8)


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        halves = self.layers[0].parameters(), [*self.layers[1:].parameters()]
        optimizers = [RecordingAdamW(half, lr=1e-3) for half in halves]
        for optimizer in optimizers:
            optimizer.steps = []
        return optimizers

    def training_step(self, batch: list[Tensor], batch_index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.layers(batch[0]).square().sum())
            optimizer.step()


def fit_module(
    folder: Path, module: Net, *monitors: PrecisionMonitor, steps: int = 4
) -> pl.Trainer:
    run = trainer(folder, *monitors)
    run.fit(module, batches(steps))
    return run


def compute_truth(steps: list[Step]) -> dict[str, float]:
    """Return the true figures of the model at the last of its steps."""
    counts: dict[str, float] = dict.fromkeys(["moved", "elements", "squares"], 0.0)
    by_format = {f: dict.fromkeys(["stalled", "kept"], 0.0) for f in DEFAULT_FORMATS}
    for layer_steps in zip(*steps, strict=True):
        amax = replay_amax(layer_steps)[-1]
        before, after, _ = (each.double() for each in layer_steps[-1])
        update = after - before
        counts["moved"] += update.count_nonzero().item()
        counts["elements"] += update.numel()
        counts["squares"] += update.square().sum().item()
        for name in DEFAULT_FORMATS:
            scale = 1.0 if get_format(name).bits >= 16 else compute_scale(amax, name)
            stalled = stall_mask(before, update, name, scale).sum().item()
            kept = (effective_update(before, update, name, scale) * update).sum().item()
            by_format[name]["stalled"] += stalled
            by_format[name]["kept"] += kept
    truth = {
        "ulp_zero_frac": 1 - counts["moved"] / counts["elements"],
        "update_rms": math.sqrt(counts["squares"] / counts["elements"]),
    }
    for name, sums in by_format.items():
        truth[f"stall_frac/{name}"] = sums["stalled"] / counts["moved"]
        truth[f"kept_update_ratio/{name}"] = sums["kept"] / counts["squares"]
    return truth


def assert_is_truth(figures: Any, steps: list[Step]) -> None:
    for key, expected in compute_truth(steps).items():
        tolerance = (
            0 if "_frac" in key else 1e-12
        )  # counts are exact, sums may be rounded otherwise
        assert figures[key] == pytest.approx(expected, rel=tolerance, abs=0), key


def test_figures_of_the_model_cover_all_elements_of_all_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    monitor = PrecisionMonitor(every_n_steps=1, max_elements=None)
    run = fit_module(tmp_path, Large(), monitor)
    assert monitor.latest["layers.0.weight"].elements == 3200
    assert_is_truth(monitor.latest_model, run.optimizers[0].steps)
    assert 0 < monitor.latest_model["stall_frac/bf16"] < 1


@pytest.mark.default_twins
def test_the_figures_of_the_model_are_logged(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(layer_charts=0, charts="all")
    run = fit(tmp_path, monitor)
    scalars = logged(run.logger.log_dir)
    keys = [*LAYER_METRICS]
    keys += [f"{metric}/{format}" for format in DEFAULT_FORMATS for metric in FORMAT_METRICS]
    keys += monitor.latest_model.twin_keys
    assert [*monitor.latest_model] == keys
    assert "exp_avg_sq_ratio/bf16-true" in keys
    charted = [key for key in keys if not key.startswith("moved_rms/")]
    assert len(charted) < len(keys)
    own = {tag for tag in scalars if tag.startswith("altgrad/") and "/monitor/" not in tag}
    extra = {key for key in own if key.startswith(("altgrad/frozen_layers/", "altgrad/lost_now"))}
    assert own - extra == {f"altgrad/{key}" for key in charted}
    for key in charted:
        value, steps = monitor.latest_model[key], scalars[f"altgrad/{key}"]
        assert [step for step, _ in steps] == [1, 3, 5]
        # Event files hold float32.
        assert steps[-1][1] == pytest.approx(value, rel=1e-6, nan_ok=True)


def test_figures_of_the_model_cover_both_optimizers_of_a_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TwoOptimizers()
    monitor = PrecisionMonitor(every_n_steps=1, max_elements=None, charts="all")
    run = fit_module(tmp_path, module, monitor)
    names = [name for name, _ in module.named_parameters()]
    assert [*monitor.latest] == names
    assert monitor.latest_model.elements == sum(p.numel() for p in module.parameters())
    halves = zip(*(optimizer.steps for optimizer in run.optimizers), strict=True)
    assert_is_truth(monitor.latest_model, [first + second for first, second in halves])
    stalls = logged(run.logger.log_dir)["altgrad/stall_frac/bf16"]
    assert [step for step, _ in stalls] == [0, 1, 2, 3]  # batches, as those of the loss
    assert stalls[-1][1] == pytest.approx(monitor.latest_model["stall_frac/bf16"], rel=1e-6)


def test_max_elements_and_rules_apply_to_the_layers(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(
        every_n_steps=1,
        max_elements=100,
        charts="all",
        sampling=[
            SamplingRule("layers.1.weight", max_elements="all"),
            SamplingRule("*.bias", enabled=False),
            SamplingRule("layers.2.*", formats="e2m1"),
        ],
    )
    run = fit_module(tmp_path, Large(), monitor)
    assert {name: figures.elements for name, figures in monitor.latest.items()} == {
        "layers.0.weight": 100,
        "layers.1.weight": 3200,
        "layers.2.weight": 8,
    }
    assert monitor.latest["layers.0.weight"].population == 3200
    assert monitor.latest["layers.0.weight"].formats == DEFAULT_FORMATS
    assert monitor.latest["layers.2.weight"].formats == ("e2m1",)
    assert monitor.latest_model.population == 6408
    tags = logged(run.logger.log_dir).keys()
    tags_in_last = [
        tag for tag in tags if tag.startswith("altgrad/stall_frac/") and "layers.2." in tag
    ]
    assert tags_in_last == ["altgrad/stall_frac/e2m1/layers.2.weight"]
    assert not [tag for tag in tags if "bias" in tag]


def test_a_rule_may_observe_a_layer_less_often(tmp_path: Path) -> None:
    present = []

    class Watching(PrecisionMonitor):
        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            present.append("layers.0.weight" in self.latest)

    rule = SamplingRule("layers.0.weight", every_n_steps=3)
    run = fit_module(tmp_path, Net(), Watching(every_n_steps=1, sampling=[rule]), steps=7)
    assert present == [True, False, False, True, False, False, True]
    charted = logged(run.logger.log_dir)["altgrad/ulp_mean/layers.0.weight"]
    assert [not math.isnan(value) for _, value in charted] == present


def test_a_rule_without_a_layer_raises_an_error_when_training_starts(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(sampling=[SamplingRule("layer.0.weigt", enabled=False)])
    module = Net()
    weights = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"'layer\.0\.weigt' matches none.*'layers\.0\.weight'"):
        fit_module(tmp_path, module, monitor)
    assert all(map(torch.equal, weights, module.parameters()))


def test_observation_ends_if_the_layers_of_a_rule_are_replaced(tmp_path: Path) -> None:
    class Replacing(Net):
        def on_train_batch_start(self, _batch: Any, batch_index: int) -> None:
            if batch_index == 2:
                self.layers = nn.Sequential(nn.LayerNorm(8))
                self.trainer.strategy.optimizers = [self.configure_optimizers()]

    monitor = PrecisionMonitor(
        every_n_steps=1, sampling=[SamplingRule("layers.1.*", enabled=False)]
    )
    with pytest.warns(UserWarning, match=r"stops observing: layers='layers\.1\.\*' matches none"):
        run = fit_module(tmp_path, Replacing(), monitor, steps=6)
    assert run.global_step == 6
    assert monitor.latest_step == 1
