"""`PrecisionMonitor`: it logs true figures, and training stays bit-identical."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, TWIN_METRICS
from altgrad.observation.snapshots import Snapshots
from altgrad_lightning import PrecisionMonitor
from tests.counting import host_copies
from tests.lightning.runs import (
    Attached,
    Net,
    RecordingAdamW,
    assert_last_step,
    batches,
    count_scalars,
    fit,
    logged,
    trainer,
)

PER_FORMAT = (
    *("kept_update_ratio", "stall_frac", "stiffness_mean", "on_grid_frac"),
    *("grad_stiff_correlation", "grad_below_stiffness_frac"),
)

OF_TWINS = [metric for metric in TWIN_METRICS if metric != "moved_rms"]
PER_RECIPE = ("progress_kept", "frozen_frac")

RECIPES = ("bf16", "bf16-sr", "bf16-true", "e4m3fn", "e4m3fn-sr", "e5m2", "e5m2-sr")
"""Those of the default formats."""

STATES = [
    f"{state}_{end}"
    for state in ("exp_avg", "exp_avg_sq")
    for end in ("ratio", "error", "zero_frac")
]

"""Metrics of the states of AdamW."""

PER_LAYER = ("update_rms", "update_weight_ratio", "unmoved_frac", "ulp_mean", "ulp_zero_frac")

PER_MONITOR = ("own_share", "elements", "skipped_steps")


@pytest.mark.default_twins
def test_the_event_file_has_the_documented_keys(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(charts="all")
    run = fit(tmp_path, monitor)
    scalars = logged(run.logger.log_dir)
    layers = [name for name, _ in Net().named_parameters()]
    formats = ("bf16", "e4m3fn", "e5m2")
    expected = {f"altgrad/{metric}/{layer}" for metric in PER_LAYER for layer in layers}
    expected |= {
        f"altgrad/{metric}/{format}/{layer}"
        for metric in PER_FORMAT
        for format in formats
        for layer in layers
    }
    expected |= {f"altgrad/monitor/{key}" for key in PER_MONITOR} | {"altgrad/lost_now"}
    expected |= {f"altgrad/frozen_layers/{recipe}" for recipe in RECIPES}
    expected |= {f"altgrad/{metric}" for metric in LAYER_METRICS}
    expected |= {f"altgrad/{metric}/{format}" for metric in FORMAT_METRICS for format in formats}
    expected |= {f"altgrad/{metric}/{r}" for metric in (*OF_TWINS, *STATES) for r in RECIPES}
    expected |= {
        f"altgrad/{metric}/{recipe}/{layer}"
        for metric in PER_RECIPE
        for recipe in RECIPES
        for layer in layers
    }
    assert {tag for tag in scalars if tag.startswith("altgrad/")} == expected
    step, stalled = scalars["altgrad/stall_frac/bf16/layers.2.weight"][-1]
    assert stalled == 1.0  # a LayerNorm gain
    assert step == monitor.latest_step
    kept = scalars["altgrad/kept_update_ratio/e4m3fn/layers.0.weight"][-1][1]
    assert kept == pytest.approx(monitor.latest["layers.0.weight"]["kept_update_ratio/e4m3fn"])


def test_figures_are_logged_at_the_steps_of_the_loss(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(charts="all"))
    scalars = logged(run.logger.log_dir)
    steps = [step for step, _ in scalars["loss"]]
    assert steps == [1, 3, 5]
    assert [step for step, _ in scalars["altgrad/stall_frac/bf16/layers.0.weight"]] == steps


def test_figures_are_logged_at_the_steps_of_the_loss_with_accumulation(tmp_path: Path) -> None:
    run = fit(
        tmp_path, PrecisionMonitor(charts="all"), accumulate_grad_batches=2, log_every_n_steps=1
    )
    scalars = logged(run.logger.log_dir)
    loss_steps = [step for step, _ in scalars["loss"]]
    own_steps = [step for step, _ in scalars["altgrad/stall_frac/bf16/layers.0.weight"]]
    assert own_steps == loss_steps == [0, 1, 2]


def test_every_n_steps_is_independent_of_the_trainer(tmp_path: Path) -> None:
    run = fit(tmp_path, PrecisionMonitor(every_n_steps=3, charts="all"))
    own = logged(run.logger.log_dir)["altgrad/stall_frac/bf16/layers.0.weight"]
    assert [step for step, _ in own] == [2, 5]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:PrecisionMonitor cannot judge")  # bf16-true judged for bf16
def test_figures_equal_those_of_the_recorded_step(tmp_path: Path, options: Any) -> None:
    """The optimizer itself records weights and gradients, after accumulation and clipping."""
    torch.manual_seed(0)
    monitor = PrecisionMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor, **options)
    module = Net(optimizer=RecordingAdamW)
    run.fit(module, batches(6))
    names = [name for name, _ in module.named_parameters()]
    assert list(monitor.latest) == names
    for name, *steps in zip(names, *run.optimizers[0].steps, strict=True):
        assert_last_step(monitor.latest[name], steps)


def test_training_is_bit_identical_with_and_without_the_callback(tmp_path: Path) -> None:
    final = []
    for callbacks in ([], [PrecisionMonitor(every_n_steps=1)]):
        torch.manual_seed(0)
        module = Net()
        trainer(tmp_path, *callbacks, gradient_clip_val=0.1).fit(module, batches(6))
        final.append([p.detach().clone() for p in module.parameters()])
        final[-1].append(torch.rand(3))  # the global generator is where it was
    assert all(torch.equal(a, b) for a, b in zip(*final, strict=True))


def test_layer_charts_selects_the_layers_that_keep_least(tmp_path: Path) -> None:
    torch.manual_seed(0)
    monitor = PrecisionMonitor(layer_charts=2, charts="all", formats=["bf16"])
    run = trainer(tmp_path, monitor)
    run.fit(Net(depth=4), batches(6))
    tags = [tag for tag in logged(run.logger.log_dir) if tag.startswith("altgrad/stall_frac/bf16/")]
    assert len(tags) == 2
    assert (
        "altgrad/stall_frac/bf16/layers.4.weight" in tags
    )  # the LayerNorm gain keeps nothing of its update
    assert len(monitor.latest) == 10


def list_scalars(folder: Path, **arguments: Any) -> list[str]:
    """Return the keys that a run of a net with 42 layers logs, and check that none is lost."""
    run = trainer(folder, PrecisionMonitor(**arguments))
    run.fit(Net(depth=20), batches(2))
    own = [tag for tag in logged(run.logger.log_dir) if tag.startswith("altgrad/")]
    assert len(own) == count_scalars(run.logger.log_dir)
    return own


@pytest.mark.default_twins
def test_all_charts_are_those_of_eight_layers_and_of_the_model(tmp_path: Path) -> None:
    own = list_scalars(tmp_path, charts="all")
    model_charts = len(PER_MONITOR) + len(LAYER_METRICS) + 3 * len(FORMAT_METRICS) + len(["lost"])
    model_charts += len(RECIPES) * (len(OF_TWINS) + len(STATES) + len(["frozen_layers"]))
    layer_charts = len(PER_LAYER) + 3 * len(PER_FORMAT) + len(RECIPES) * len(PER_RECIPE)
    assert len(own) == 8 * layer_charts + model_charts


@pytest.mark.parametrize(
    ("arguments", "charted"), [({}, 4), ({"recipes": ()}, 5), ({"formats": "bf16"}, 8)], ids=str
)
@pytest.mark.default_twins
def test_a_deep_model_has_at_most_80_scalars_by_default(
    tmp_path: Path, arguments: Any, charted: int
) -> None:
    own = list_scalars(tmp_path, **arguments)
    assert 30 < len(own) <= 80
    formats = [arguments["formats"]] if "formats" in arguments else ["bf16", "e4m3fn", "e5m2"]
    assert {"altgrad/lost_now", "altgrad/monitor/own_share"} <= {*own}
    recipes = [each for each in RECIPES if each.startswith(tuple(formats))]
    kept, names = ("progress_kept", recipes)
    if "recipes" in arguments:
        kept, names = ("kept_update_ratio", formats)
    for name in names:
        assert {f"altgrad/{kept}/{name}", f"altgrad/frozen_layers/{name}"} <= {*own}
    layers = {key.rpartition("/")[2] for key in own if key.startswith("altgrad/ulp_mean/")}
    assert len(layers) == charted
    # DIAG-01 to 04, of the model and of each charted layer.
    for end in ("", *(f"/{layer}" for layer in layers)):
        assert {f"altgrad/{metric}{end}" for metric in ("ulp_mean", "ulp_zero_frac")} <= {*own}
        for metric in ("stiffness_mean", "on_grid_frac", "grad_stiff_correlation"):
            assert {f"altgrad/{metric}/{format}{end}" for format in formats} <= {*own}


@pytest.mark.default_twins
def test_layers_that_are_named_are_charted_even_beyond_80_scalars(tmp_path: Path) -> None:
    own = list_scalars(tmp_path, layer_charts=["layers.1?.weight"])
    assert len([key for key in own if key.startswith("altgrad/ulp_mean/")]) == 10
    assert len(own) > 80


def test_a_step_that_is_not_due_copies_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    taken = []
    original = Snapshots.take

    def counting(*arguments: Any) -> Any:
        taken.append(1)
        return original(*arguments)

    monkeypatch.setattr(Snapshots, "take", counting)
    fit(tmp_path, PrecisionMonitor(every_n_steps=3), steps=6)
    assert len(taken) == 2


@pytest.mark.parametrize("logger", [False, "csv"])
def test_figures_are_the_same_with_csv_and_without_a_logger(tmp_path: Path, logger: Any) -> None:
    if logger == "csv":
        logger = CSVLogger(tmp_path)
    monitor = PrecisionMonitor(charts="all")
    run = fit(tmp_path, monitor, logger=logger)
    assert monitor.latest_step == 5
    if logger:
        text = Path(run.logger.log_dir, "metrics.csv").read_text()
        assert "altgrad/stall_frac/bf16/layers.0.weight" in text.splitlines()[0]


# --- kinds of steps and parameters


def test_parameters_that_are_unfrozen_later_are_observed(tmp_path: Path) -> None:
    class Unfreezing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers[0].requires_grad_(False)

        def on_train_batch_start(self, _batch: Any, batch_index: int) -> None:
            if batch_index == 3:
                self.layers[0].requires_grad_(True)

    monitor = PrecisionMonitor()
    run = trainer(tmp_path, monitor, log_every_n_steps=1)
    run.fit(Unfreezing(), batches(6))
    assert not math.isnan(monitor.latest["layers.0.weight"]["stall_frac/bf16"])


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_a_step_without_gradients_has_no_figures(tmp_path: Path) -> None:
    class Silent(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Any:
            return None if batch_index == 3 else super().training_step(batch, batch_index)

    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1, charts="all"))
    run.fit(Silent(), batches(6))
    stalls = logged(run.logger.log_dir)["altgrad/stall_frac/e5m2/layers.0.weight"]
    assert [step for step, _ in stalls] == [0, 1, 2, 4, 5]


def test_frozen_unused_integer_and_complex_parameters_have_no_figures(tmp_path: Path) -> None:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.layers[0].weight.requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(3))
            self.counts = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
            self.wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    monitor = PrecisionMonitor()
    run = trainer(tmp_path, monitor)
    with pytest.warns(UserWarning, match=r"other dtypes: \['wave'\]"):
        run.fit(Odd(), batches(6))
    assert list(monitor.latest) == [
        *("layers.0.bias", "layers.1.weight", "layers.1.bias", "layers.2.weight", "layers.2.bias")
    ]


def test_manual_optimization_is_observed_with_and_without_a_closure(tmp_path: Path) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__(optimizer=RecordingAdamW)
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_index: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.layers(batch[0]).sum()
                self.manual_backward(loss)
                return loss

            if batch_index % 2:
                optimizer.step(closure=closure)
            else:
                closure()
                optimizer.step()

    for steps in (5, 6):  # the last step is one without, then one with a closure
        monitor = PrecisionMonitor(every_n_steps=1)
        run = trainer(tmp_path, monitor)
        run.fit(Manual(), batches(steps))
        first_layer = [step[0] for step in run.optimizers[0].steps]
        assert len(first_layer) == steps
        assert_last_step(monitor.latest["layers.0.weight"], first_layer)


class Unaware(torch.optim.SGD):
    """An SGD that ignores found_inf, and moves weights."""

    def step(self, closure: Any = None) -> Any:
        found_inf = self.__dict__.pop("found_inf", None)
        result = super().step(closure)
        self.found_inf = found_inf
        return result


@pytest.mark.parametrize(
    ("optimizer", "lr", "found", "moves", "is_skipped"),
    [
        (partial(torch.optim.SGD, fused=True), 0.1, 0.0, True, False),
        (partial(torch.optim.SGD, fused=True), 1e-30, 0.0, False, False),
        (partial(torch.optim.SGD, fused=True), 0.1, 1.0, False, True),
        (Unaware, 0.1, 1.0, True, False),
    ],
)
def test_found_inf_counts_as_a_skip_if_no_weight_moved(
    attached: Attached, optimizer: Any, lr: float, found: float, moves: bool, is_skipped: bool
) -> None:
    """A fused optimizer reads found_inf on the device, so it is copied along with the figures."""

    class Told(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.parameters(), lr=lr)

    module = Told()
    nn.init.ones_(module.layers[2].bias)  # 0 would move by as little as 1e-30
    monitor, run, _ = attached(module)
    for found_inf in (0.0, found):  # scales and samples are chosen at the first step
        module.zero_grad()
        module.layers(torch.randn(4, 8)).square().sum().backward()
        run.optimizers[0].found_inf = torch.tensor(found_inf)
        before = [p.detach().clone() for p in module.parameters()]
        with host_copies() as copies:
            run.optimizers[0].step()
        latest = monitor.latest
        monitor.on_train_batch_end(run, module)
    assert copies == ["cpu"]
    assert all(map(torch.equal, before, module.parameters())) != moves
    assert monitor.skipped == ({"inf": 1} if is_skipped else {})
    assert (monitor.latest is latest) == is_skipped
