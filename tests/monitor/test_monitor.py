"""`UpdateMonitor`: records equal the definitions, with optimizers that record their steps."""

import copy
import gc
import math
import pickle
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from altgrad import StepRecord, UpdateMonitor, measure
from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.measurement.figures import model_figures
from altgrad.measurement.measurer import Measurer
from altgrad.quantization import (
    BLOCK_FORMATS,
    FloatFormat,
)
from tests.monitor.watching import (
    FORMATS,
    RecordingSGD,
    assert_equal_figures,
    net,
    train,
    watched,
)

# --- every element


@pytest.mark.parametrize("scaling", [None, "tensor", "channel", ("block", 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_figures_equal_those_of_each_tensor_measured_alone(
    dtype: torch.dtype, scaling: object
) -> None:
    model = net().to(dtype)
    formats = ("e4m3fn", "e2m1")
    optimizer, _, records = watched(model, scaling=scaling, formats=formats)
    train(model, optimizer)
    (record,), (step,) = records, optimizer.steps
    assert list(record.layers) == list(step)
    for name, (before, after, gradient) in step.items():
        expected = measure(before, after, gradient, formats, scaling)
        assert_equal_figures(record.layers[name], expected)
        assert record.layers[name].elements == record.layers[name].population == before.numel()


def test_the_models_figures_equal_those_of_all_elements_together() -> None:
    model = net()
    optimizer, _, records = watched(model, scaling=None)
    train(model, optimizer)
    record = records[0]
    together = [
        torch.cat([each.flatten() for each in part])
        for part in zip(*optimizer.steps[0].values(), strict=True)
    ]
    assert_equal_figures(record.model, measure(*together, FORMATS, None))
    assert record.model.elements == record.model.population == together[0].numel()
    assert_equal_figures(model_figures([*record.layers.values()]), dict(record.model))


def test_block_formats_are_judged_with_their_own_scales() -> None:
    model = net()
    optimizer, _, records = watched(model, formats=("bf16", *BLOCK_FORMATS))
    train(model, optimizer)
    for name, step in optimizer.steps[0].items():
        assert_equal_figures(records[0].layers[name], measure(*step, ("bf16", *BLOCK_FORMATS)))


def test_one_monitor_observes_weights_of_several_dtypes() -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.randn(50))
    model.b = nn.Parameter(torch.randn(50).bfloat16())
    model.c = nn.Parameter(torch.randn(50).double())
    optimizer, _, records = watched(model, warn=(said := []).append)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, step in optimizer.steps[0].items():
        assert_equal_figures(records[0].layers[name], measure(*step, FORMATS))
    assert math.isnan(records[0].layers["b"]["stall_frac/bf16"])
    assert records[0].model["stall_frac/bf16"] > 0  # of the two other layers
    assert len(said) == 1
    assert "cannot judge bf16 for weights already stored in torch.bfloat16" in said[0]


def test_parameters_without_a_gradient_are_not_in_the_record() -> None:
    model = net()
    optimizer, _, records = watched(model)
    train(model, optimizer)
    frozen = model[3].weight.requires_grad_(False)
    frozen.grad = None
    train(model, optimizer, 2, seed=2)
    assert "3.weight" in records[0].layers
    assert "3.weight" not in records[1].layers
    for record, step in zip(records, optimizer.steps, strict=True):
        assert set(record.layers) == set(step)
    assert (
        records[2].model.population == sum(p.numel() for p in model.parameters()) - frozen.numel()
    )


def test_empty_scalar_and_oddly_named_parameters_are_observed() -> None:
    model = nn.Module()
    model.register_parameter("<script>/%", nn.Parameter(torch.tensor(1.0)))
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.alone = nn.Parameter(torch.tensor([1.5]))
    optimizer, _, records = watched(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    assert set(records[0].layers) == {"<script>/%", "empty", "alone"}
    for name, step in optimizer.steps[0].items():
        assert_equal_figures(records[0].layers[name], measure(*step, FORMATS))
    assert math.isnan(records[0].layers["empty"]["stall_frac/bf16"])
    assert records[0].model["stall_frac/bf16"] == 1


def test_two_optimizers_have_separate_records() -> None:
    model = net()
    one = RecordingSGD([(n, p) for n, p in model.named_parameters() if n < "3"], lr=0.05)
    two = RecordingSGD([(n, p) for n, p in model.named_parameters() if n >= "3"], lr=0.01)
    records: list[StepRecord] = []
    with UpdateMonitor(model, records.append, formats=FORMATS, strict=True).attach(one, two):
        train(model, one)
        two.step()
    assert [set(record.layers) for record in records] == [set(one.steps[0]), set(two.steps[0])]
    assert_equal_figures(records[1].layers["4.bias"], measure(*two.steps[0]["4.bias"], FORMATS))


def test_without_formats_there_are_the_figures_of_the_update() -> None:
    model = net()
    optimizer, _, records = watched(model, formats=[])
    train(model, optimizer)
    assert set(records[0].model) == {*LAYER_METRICS}
    assert_equal_figures(
        records[0].layers["3.weight"], measure(*optimizer.steps[0]["3.weight"], [])
    )


def test_custom_formats_have_all_keys() -> None:
    mine = FloatFormat("mine", 4, 1, 7)
    model = net()
    optimizer, _, records = watched(model, formats=[mine, "bf16"])
    train(model, optimizer)
    keys = set(records[0].model)
    assert keys == {*LAYER_METRICS} | {f"{m}/{f}" for m in FORMAT_METRICS for f in ("mine", "bf16")}
    with pytest.raises(KeyError, match="unknown metric 'stal_frac'; nearest: stall_frac"):
        records[0].model["stal_frac/bf16"]


# --- training and errors


@pytest.mark.parametrize("options", [{}, {"max_elements": 100}, {"overhead_budget": 0.5}])
def test_training_is_unchanged(options: dict[str, Any]) -> None:
    def run(observe: bool) -> tuple[list[Tensor], Tensor]:
        model = net()
        model.insert(2, nn.Dropout(0.1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        monitor = UpdateMonitor(model, strict=True, **options)
        if observe:
            monitor.attach(optimizer)
        train(model, optimizer, 5)
        assert (monitor.latest is not None) is observe
        return [p.detach() for p in model.parameters()], torch.get_rng_state()

    (weights, state), (expected, expected_state) = run(True), run(False)
    assert all(map(torch.equal, weights, expected))
    assert torch.equal(state, expected_state)


def test_an_error_warns_once_and_training_goes_on() -> None:
    model = net()
    optimizer, monitor, records = watched(model, strict=False)
    with (
        mock.patch.object(Measurer, "measure_batch", side_effect=RuntimeError("broken")),
        pytest.warns(
            UserWarning, match="^UpdateMonitor stops observing after an error: .*broken"
        ) as warned,
    ):
        train(model, optimizer, 3)
    assert len(warned) == 1
    assert (records, len(optimizer.steps), monitor.is_observing) == ([], 3, False)


@pytest.mark.parametrize(("inf", "gradient", "shown"), [(0, 1, True), (0, 0, True), (1, 1, False)])
def test_a_step_skipped_by_a_grad_scaler_is_counted_without_a_record(
    inf: float, gradient: float, shown: bool
) -> None:
    model = net()
    records: list[StepRecord] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    monitor = UpdateMonitor(model, records.append, strict=True).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(inf)), None
    optimizer.step()
    assert (len(records), monitor.skipped["inf"]) == (int(shown), int(not shown))


def test_two_threads_may_step_two_optimizers() -> None:
    models = [nn.Linear(300, 300) for _ in range(2)]
    optimizers = [RecordingSGD(m.named_parameters(), lr=0.05) for m in models]
    records: list[StepRecord] = []
    both = nn.ModuleList(models)
    for number, optimizer in enumerate(optimizers):
        optimizer.named = {f"{number}.{n}": p for n, p in models[number].named_parameters()}

    def run(number: int) -> None:
        for _ in range(20):
            for parameter in models[number].parameters():
                parameter.grad = torch.full_like(parameter, 1e-3 * (1 + number))
            optimizers[number].step()

    with UpdateMonitor(both, records.append, scaling=None, max_elements=None, strict=True).attach(
        *optimizers
    ):
        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(records) == 40
    for record in records:
        (number,) = {int(name[0]) for name in record.layers}
        step = optimizers[number].steps[record.index]
        name = f"{number}.weight"
        assert_equal_figures(
            record.layers[name], measure(*step[name], scaling=None), ("never_moved_frac",)
        )


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copying_a_monitor_is_an_error(copied: Callable[[Any], Any]) -> None:
    _, monitor, _ = watched(net())
    with pytest.raises(TypeError, match="make another monitor for the copy"):
        copied(monitor)


# Optimizers that come and go, and threads


def step_with_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_an_optimizer_that_is_gone_is_not_held() -> None:
    model = nn.Linear(4, 4)
    first, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    with UpdateMonitor(model, strict=True).attach(first, other) as monitor:
        step_with_gradients(model, first)
        step_with_gradients(model, other)
        gone = weakref.ref(first)
        del first
        gc.collect()
        assert gone() is None
        step_with_gradients(model, other)
        assert monitor.latest.index == 1


def test_two_threads_step_two_optimizers_under_a_schedule_that_waits() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    seen: Counter[int] = Counter()

    def schedule(_: int) -> bool:
        time.sleep(0.001)  # so that the other thread asks meanwhile
        return True

    def on_record(record: StepRecord) -> None:
        seen["0.weight" in record.layers] += 1

    def train(number: int) -> None:
        for _ in range(20):
            step_with_gradients(model[number], optimizers[number])

    monitor = UpdateMonitor(
        model, on_record, every_n_steps=schedule, overhead_budget=0.99, strict=True
    )
    with monitor.attach(*optimizers), ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(train, number) for number in range(2)]:
            done.result()
    assert min(seen[True], seen[False]) >= 2
