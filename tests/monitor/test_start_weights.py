"""`StartWeights`: the share of weights that differ from the start, without twins."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Optimizer

from altgrad import StepRecord, UpdateMonitor, WeightStorage
from altgrad.report import RunFile, judge_run, read
from altgrad.report.answers import write_storage
from altgrad.report.matching import has_own_figures
from tests.processes import run

KEY = "moved_since_start_frac/now"


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 40), nn.LayerNorm(40), nn.Linear(40, 4)).to(dtype)


class Stochastic(SGD):
    """Round weights at random, up or down in proportion to the distance."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            exact = parameter.float() - self.param_groups[0]["lr"] * parameter.grad.float()
            bits = exact.view(torch.int32) + torch.randint(1 << 16, exact.shape, dtype=torch.int32)
            parameter.copy_((bits & ~0xFFFF).view(torch.float32))


class Kahan(SGD):
    """Keep what rounding loses, and add it to the next update."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            lost = state.setdefault("lost", torch.zeros_like(parameter, dtype=torch.float32))
            exact = parameter.float() - self.param_groups[0]["lr"] * parameter.grad.float() + lost
            parameter.copy_(exact)
            lost.copy_(exact - parameter.float())


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        loss = model(torch.randn(16, 8, generator=generator).to(dtype)).square().mean()
        (1e-2 * loss).backward()
        optimizer.step()


def watch(model: nn.Module, optimizer: Optimizer, steps: int, **options: Any) -> UpdateMonitor:
    options = {"formats": "e4m3fn", "recipes": (), "strict": True} | options
    monitor = UpdateMonitor(model, **options)
    with monitor.attach(optimizer):
        train(model, optimizer, steps)
    return monitor


def compare(model: nn.Module, start: nn.Module) -> dict[str, float]:
    """Return the share of the elements of each layer that differ, over whole layers."""
    before = dict(start.named_parameters())
    pairs = {name: (each, before[name]) for name, each in model.named_parameters()}
    return {name: (a != b).double().mean().item() for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("kind", [SGD, Stochastic, Kahan])
def test_the_share_is_that_of_the_whole_layer_if_the_sample_is_the_layer(
    kind: type[SGD], every: int
) -> None:
    model = net()
    start = copy.deepcopy(model)
    monitor = watch(model, kind(model.parameters(), lr=0.05), 30, every_n_steps=every)
    truth = compare(model, start)
    # Of layers from 64 elements on, whole chunks of 64 are sampled: up to 256 of 320 and 160.
    for name, share in truth.items():
        size = model.get_parameter(name).numel()
        tolerance = 0 if size < 64 else 4 * math.sqrt(0.25 / min(size, 256))
        assert monitor.latest.layers[name][KEY] == pytest.approx(share, abs=tolerance), name
    shares = [monitor.latest.layers[name][KEY] for name in truth]
    assert min(shares) <= monitor.latest.model[KEY] <= max(shares)


def test_it_tells_stochastic_and_kahan_from_frozen_weights() -> None:
    shares = {}
    for kind in (SGD, Stochastic, Kahan):
        model = net()
        monitor = watch(model, kind(model.parameters(), lr=0.05), 200, every_n_steps=50)
        gain = monitor.latest.layers["1.weight"]
        assert gain["unmoved_frac"] > 0.9
        shares[kind] = gain[KEY]
    assert shares[SGD] == 0
    assert min(shares[Stochastic], shares[Kahan]) > 0.1


def test_weights_in_float32_have_no_such_figure_unless_they_are_stored_low() -> None:
    model = net(torch.float32)
    monitor = watch(model, SGD(model.parameters(), lr=0.05), 2)
    assert KEY not in monitor.latest.model
    model = net(torch.float32)
    optimizer = SGD(model.parameters(), lr=0.05)
    WeightStorage("bf16").attach(optimizer, module=model)
    monitor = watch(model, optimizer, 2)
    assert 0 <= monitor.latest.layers["1.weight"][KEY] <= 1


def test_layers_without_a_step_or_with_other_dtypes_keep_their_own_figures() -> None:
    model = net()
    model[1].float()
    model[0].requires_grad_(False)
    forward: Callable[[Tensor], Tensor] = model[1].forward
    model[1].forward = lambda x: forward(x.float()).bfloat16()
    rest = [each for each in model.parameters() if each.requires_grad]
    monitor = watch(model, SGD(rest, lr=0.05), 2)
    assert {name for name, each in monitor.latest.layers.items() if KEY in each} == {
        "2.weight",
        "2.bias",
    }


def test_layers_that_an_optimizer_gets_later_begin_with_their_first_observed_step() -> None:
    model = net()
    model[0].requires_grad_(False)
    rest = [each for each in model.parameters() if each.requires_grad]
    optimizer = SGD(rest, lr=0.05)
    monitor = UpdateMonitor(model, formats="e4m3fn", recipes=(), every_n_steps=2, strict=True)
    with monitor.attach(optimizer):
        train(model, optimizer, 3)
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": [*model[0].parameters()]})
        start = copy.deepcopy(model)
        train(model, optimizer, 3)
    assert monitor.latest.layers["0.bias"][KEY] == compare(model, start)["0.bias"] > 0
    assert 0 < monitor.latest.model[KEY] < 1


def test_twins_have_the_figure_where_there_are_any() -> None:
    model = net()
    start = copy.deepcopy(model)
    monitor = watch(model, SGD(model.parameters(), lr=0.05), 5, recipes="bf16")
    assert monitor.latest.layers["2.bias"][KEY] == compare(model, start)["2.bias"]
    assert monitor.state_dict()["starts"] == {}


def test_a_resumed_run_counts_from_the_first_start() -> None:
    model = net()
    start = copy.deepcopy(model)
    optimizer = Stochastic(model.parameters(), lr=0.05)
    state = watch(model, optimizer, 10).state_dict()
    assert all(each.device.type == "cpu" for i, w, _ in state["starts"].values() for each in (i, w))
    resumed = UpdateMonitor(model, formats="e4m3fn", recipes=(), seed=5, strict=True)
    resumed.load_state_dict(state)
    with resumed.attach(optimizer):
        train(model, optimizer, 10)
    truth = compare(model, start)
    for name in ("0.bias", "1.weight", "1.bias", "2.bias"):
        assert resumed.latest.layers[name][KEY] == truth[name]


def train_sharded(_: int, state: Any) -> tuple[list[str], int, bool]:
    """Go on from a state with sharded layers; return the layers of the last record."""
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    monitor = UpdateMonitor(model, formats="e4m3fn", recipes=(), strict=True)
    monitor.load_state_dict(state)
    optimizer = SGD(model.parameters(), lr=0.05)
    with monitor.attach(optimizer):
        train(model, optimizer, 2)
    record = monitor.latest
    return [*record.layers], record.index, any(KEY in each for each in record.layers.values())


def test_a_run_that_goes_on_with_sharded_layers_leaves_the_figure_out() -> None:
    model = net()
    state = watch(model, SGD(model.parameters(), lr=0.05), 2).state_dict()
    assert state["starts"]
    names = [name for name, _ in model.named_parameters()]
    assert run(train_sharded, 2, state) == [(names, 1, False)] * 2


@pytest.mark.parametrize(("recipes", "share"), [((), 1.0), ("bf16", 0.0)])
def test_weights_that_other_code_writes_count_as_moved_without_twins_alone(
    recipes: Any, share: float
) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=1e-9)
    monitor = UpdateMonitor(model, formats="e4m3fn", recipes=recipes, strict=True)
    with monitor.attach(optimizer):
        model.load_state_dict({n: each + 1 for n, each in model.state_dict().items()})
        train(model, optimizer, 1)
    assert monitor.latest.layers["1.weight"][KEY] == share


INDICES = torch.arange(3)
DAMAGED = [
    None,
    (INDICES, torch.ones(3)),
    (INDICES, torch.ones(2), 8),
    (INDICES, torch.ones(3), 2),
    (INDICES.double(), torch.ones(3), 8),
    (INDICES, None, 8),
    (INDICES - 1, torch.ones(3), 8),
    (INDICES[:1], torch.ones(1), True),
]


@pytest.mark.parametrize("start", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_state_is_an_error_that_names_the_layer(start: Any) -> None:
    monitor = UpdateMonitor(net(), recipes=())
    state = monitor.state_dict() | {"starts": {"2.bias": start}}
    with pytest.raises(ValueError, match=r"^starts of 2\.bias is .*: expected places, weights and"):
        monitor.load_state_dict(state)


@pytest.mark.parametrize("starts", [None, [1]])
def test_a_state_without_layers_is_an_error(starts: Any) -> None:
    monitor = UpdateMonitor(net(), recipes=())
    state = monitor.state_dict() | {"starts": starts}
    with pytest.raises(ValueError, match=r"^starts=.*: expected the weights of each layer by name"):
        monitor.load_state_dict(state)


def test_states_of_earlier_versions_begin_anew() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)
    state = watch(model, optimizer, 3).state_dict()
    del state["starts"]
    monitor = UpdateMonitor(model, formats="e4m3fn", recipes=(), strict=True)
    monitor.load_state_dict(state)
    with monitor.attach(optimizer):
        train(model, optimizer, 1)
    assert KEY in monitor.latest.model


def test_the_report_of_such_a_run_has_no_verdict_on_it(tmp_path: Path) -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.05)

    def keep(record: StepRecord) -> None:
        file.append(record.index, record, skipped=monitor.skipped)

    monitor = UpdateMonitor(model, keep, formats="e4m3fn", recipes=())
    monitor.attach(optimizer)
    with RunFile.create(tmp_path, monitor.run_header()) as file:
        train(model, optimizer, 3)
    monitor.detach()
    run = read(tmp_path)
    assessment = judge_run(run)
    assert 0 <= run.rows[-1].figures[KEY] <= 1
    assert "now" not in assessment.runs
    assert not has_own_figures(run)
    text = write_storage(run, assessment.runs)
    assert "unknown without twins: read moved_since_start_frac/now" in text


def test_training_is_untouched() -> None:
    models = [net(), net()]
    optimizers = [SGD(each.parameters(), lr=0.05) for each in models]
    state = torch.get_rng_state()
    watch(models[0], optimizers[0], 5)
    assert torch.equal(torch.get_rng_state(), state)
    train(models[1], optimizers[1], 5)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
