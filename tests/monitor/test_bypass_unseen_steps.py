"""`BypassDetector`: steps that nobody observes while the attached optimizer steps as well."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from altgrad import UpdateMonitor

Loop = Callable[[nn.Module, Any], object]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))


def backward(model: nn.Module) -> Tensor:
    loss = model(torch.randn(4, 3)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def watch(make: Callable[[nn.Module], Any], loop: Loop, **options: Any) -> list[str]:
    """Return the notices of three turns of a training loop."""
    model, told = net(), []
    optimizer = make(model)
    options = {"formats": "bf16", "recipes": ()} | options
    with UpdateMonitor(model, warn=told.append, **options).attach(optimizer):
        for _ in range(3):
            loop(model, optimizer)
    return told


def make_sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


# --- each of these is told of


@pytest.mark.parametrize("recipes", [(), None])
@pytest.mark.parametrize("every", [1, 2])
def test_a_second_optimizer_of_the_same_layers_is_named_once(recipes: Any, every: int) -> None:
    def make(model: nn.Module) -> Optimizer:
        model.second = AdamW(model[0].parameters())
        return make_sgd(model)

    def loop(model: nn.Module, optimizer: Optimizer) -> None:
        train(model, optimizer)
        model.second.step()

    (notice,) = watch(make, loop, recipes=recipes, every_n_steps=every)
    assert notice == (
        "cannot see what moves 0.weight, 0.bias: AdamW has these layers, too, and is not attached; "
        "attach it"
    )


def make_with_a_compiled_second(model: nn.Module) -> Optimizer:
    torch.compiler.reset()
    model.second = SGD(model[0].parameters(), lr=0.1)  # which hooks cannot see
    model.step_second = torch.compile(model.second.step, backend="eager")
    return make_sgd(model)


def step_both(model: nn.Module, optimizer: Optimizer) -> None:
    train(model, optimizer)
    model.step_second()


@pytest.mark.parametrize("recipes", ["bf16", ()])
def test_a_second_optimizer_whose_step_is_compiled_is_named(recipes: Any) -> None:
    (notice,) = watch(make_with_a_compiled_second, step_both, recipes=recipes)
    assert notice.startswith("cannot see what moves 0.weight, 0.bias: SGD has these layers, too")


class InBackward(Optimizer):
    """The container of torchtitan: its own step does nothing, and hooks step each parameter."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizers = {each: AdamW([each]) for each in model.parameters()}
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.step_one)
        super().__init__(model.parameters(), {})

    def step_one(self, parameter: Tensor) -> None:
        self.optimizers[parameter].step()
        parameter.grad = None

    def step(self, closure: Any = None) -> None:
        """Do nothing, because backward has stepped."""


def test_a_container_whose_optimizers_step_in_backward_is_told_of() -> None:
    (notice,) = watch(InBackward, train)
    assert notice == (
        "cannot see what moves 0.weight, 0.bias, 1.weight and 3 more: their gradients have hooks "
        "inside the backward pass, where AdamW steps that is not attached; attach each optimizer "
        "that these hooks step"
    )


class ByGradientHooks(Optimizer):
    """An optimizer that steps in hooks on gradients, as AdaLOMO does, and has no other step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient, p=parameter: self.move(p, gradient))

    @torch.no_grad()
    def move(self, parameter: Tensor, gradient: Tensor) -> None:
        parameter.sub_(gradient, alpha=0.1)


def test_an_optimizer_that_steps_in_gradient_hooks_is_told_of() -> None:
    (notice,) = watch(ByGradientHooks, lambda model, _: backward(model))
    assert "and 3 more: their gradients have hooks inside the backward pass" in notice


def step_flat_copies(model: nn.Module, optimizer: Optimizer) -> None:
    """Step as DeepSpeed ZeRO does: replace the groups of the optimizer with a flat copy."""
    if not hasattr(model, "flat"):
        model.layers = [*model.parameters()]
        model.flat = [torch.cat([each.detach().flatten() for each in model.layers])]
        optimizer.param_groups[0]["params"] = model.flat
    model.zero_grad()
    backward(model)
    model.flat[0].grad = torch.cat([each.grad.flatten() for each in model.layers])
    optimizer.step()
    parts = model.flat[0].split([each.numel() for each in model.layers])
    for layer, part in zip(model.layers, parts, strict=True):
        layer.data.copy_(part.view_as(layer))


class ByHooksBesideAnIdleStep(Optimizer):
    """An optimizer that steps in hooks, leaves gradients where they are, and has an idle `step`."""

    def __init__(self, model: nn.Module, register: str) -> None:
        super().__init__(model.parameters(), {})
        for parameter in model.parameters():
            getattr(parameter, register)(functools.partial(self.step_one, parameter))

    @torch.no_grad()
    def step_one(self, parameter: Tensor, _: Tensor) -> None:
        parameter -= 0.1 * (parameter + 1)

    def step(self, closure: Any = None) -> None:
        """Do nothing, because backward has stepped."""


class ByHooksBesideNodes(ByHooksBesideAnIdleStep):
    """The same by hooks of the nodes that accumulate gradients, which nothing shows."""

    def __init__(self, model: nn.Module) -> None:
        Optimizer.__init__(self, model.parameters(), {})
        # Autograd holds these nodes weakly.
        self.nodes = {p: p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters()}
        for parameter, node in self.nodes.items():
            node.register_hook(lambda *_, p=parameter: self.step_one(p, p))


@pytest.mark.parametrize("every", [1, 2])
def test_an_optimizer_with_an_idle_step_and_hooks_of_nodes_is_told_of(every: int) -> None:
    model, told = net(), []
    optimizer = ByHooksBesideNodes(model)
    options = {"formats": "bf16", "recipes": (), "every_n_steps": every, "warn": told.append}
    with UpdateMonitor(model, **options).attach(optimizer):
        for _ in range(2 * every + 1):
            train(model, optimizer)
    (notice,) = told
    assert "and 3 more: step() of ByHooksBesideNodes moved nothing in any observed" in notice


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("recipes", [(), None])
def test_an_optimizer_with_an_idle_step_is_told_of(recipes: Any, register: str) -> None:
    notices = watch(lambda model: ByHooksBesideAnIdleStep(model, register), train, recipes=recipes)
    (told,) = [each for each in notices if "cannot see" in each]
    assert told == (
        "cannot see what moves 0.weight, 0.bias, 1.weight and 3 more: step() of "
        "ByHooksBesideAnIdleStep moved nothing in any observed step, and other code moves these "
        "weights between the steps, such as hooks that step inside the backward pass; attach each "
        "optimizer that steps there; if there is none, such steps cannot be observed"
    )


def test_an_optimizer_whose_groups_become_flat_copies_is_told_of() -> None:
    (notice,) = watch(make_sgd, step_flat_copies)
    assert "and 3 more: SGD no longer has them in its param_groups, and steps copies" in notice


class WithoutGradients(Optimizer):
    """An optimizer that needs no gradient, as those of zeroth order, or keeps it elsewhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(torch.randn_like(parameter))


def test_an_optimizer_without_gradients_is_told_of() -> None:
    (notice,) = watch(WithoutGradients, lambda _, optimizer: optimizer.step())
    assert "and 3 more: the steps of WithoutGradients found no gradients in .grad" in notice


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def shard_with_fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def shard_with_original_parameters(model: nn.Module) -> nn.Module:
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, device_id=device, use_orig_params=True)


def shard_with_fsdp2(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


SHARDINGS = {
    shard_with_fsdp1: "they were wrapped in FSDP1 after attach(); use FSDP2",
    shard_with_original_parameters: "they were wrapped in FSDP1 after attach(); use FSDP2",
    shard_with_fsdp2: "they were sharded after attach(); shard the module first",
}


@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning")  # of one process, says torch
@pytest.mark.filterwarnings("ignore:.*NO_SHARD:FutureWarning")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("keeps_stepping", [True, False])
@pytest.mark.parametrize("shard", SHARDINGS)
def test_layers_that_are_wrapped_after_attach_are_told_of(shard: Any, keeps_stepping: bool) -> None:
    model, told = net(), []
    optimizer = make_sgd(model)
    monitor = UpdateMonitor(model, formats="bf16", recipes=(), warn=told.append)
    monitor.attach(optimizer)
    wrapped = shard(model)
    second = make_sgd(wrapped)
    for _ in range(3):
        train(wrapped, second)
        if keeps_stepping:
            optimizer.step()  # of parameters that the module has no longer
    monitor.detach()
    (notice,) = told
    assert SHARDINGS[shard] in notice


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("formats", ["bf16", "e4m3fn"])
def test_an_optimizer_that_gets_sharded_parameters_says_what_to_do(formats: str) -> None:
    def loop(model: nn.Module, optimizer: Optimizer) -> None:
        if not optimizer.state:  # as accelerate's prepare() does
            shard_with_fsdp2(model)
            optimizer.param_groups[0]["params"] = [*model.parameters()]
        train(model, optimizer)

    (notice,) = watch(lambda model: AdamW(model.parameters()), loop, formats=formats)
    assert ": sharded after attach(); shard the module first" in notice


# --- and none of these


class Swap(Optimizer):
    """An optimizer that steps by another one and then moves weights itself, as Lookahead does."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.99)


def make_schedule_free(model: nn.Module) -> Any:
    schedulefree = pytest.importorskip("schedulefree")
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01)
    optimizer.train()
    return optimizer


def make_optimi(model: nn.Module) -> Any:
    return pytest.importorskip("optimi").StableAdamW(model.parameters(), lr=0.01)


def make_prepared(model: nn.Module) -> Any:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    return accelerator.prepare_optimizer(AdamW(model.parameters()))


TORCH = (
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD"),
)
ORDINARY: dict[str, Callable[[nn.Module], Any]] = {
    **{name: lambda m, n=name: getattr(torch.optim, n)(m.parameters(), lr=0.01) for name in TORCH},
    "fused": lambda model: AdamW(model.parameters(), fused=True),
    "wrapper": lambda model: Swap(make_sgd(model)),
    "schedule-free": make_schedule_free,
    "optimi": make_optimi,
    "accelerate": make_prepared,
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_optimizers_give_no_warning(name: str, every: int) -> None:
    assert watch(ORDINARY[name], train, every_n_steps=every) == []


def test_a_closure_and_a_scaler_give_no_warning() -> None:
    def step_with_closure(model: nn.Module, optimizer: Optimizer) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            return backward(model)

        optimizer.step(closure)

    def scale(model: nn.Module, optimizer: Optimizer) -> None:
        scaler = GradScaler("cpu")
        scaler.scale(model(torch.randn(4, 3)).sum()).backward()
        scaler.step(optimizer)

    assert watch(lambda model: LBFGS(model.parameters(), max_iter=2), step_with_closure) == []
    assert watch(make_sgd, scale) == []


def swap_an_average(model: nn.Module, optimizer: Optimizer) -> None:
    train(model, optimizer)
    if not hasattr(optimizer, "average"):
        optimizer.average = AveragedModel(model, avg_fn=lambda s, w, _: 0.9 * s + 0.1 * w)
    optimizer.average.update_parameters(model)
    kept = copy.deepcopy(model.state_dict())
    model.load_state_dict(optimizer.average.module.state_dict())
    model.load_state_dict(kept)


def swap_for_good(model: nn.Module, optimizer: Optimizer) -> None:
    train(model, optimizer)
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})


def clip_in_gradient_hooks(model: nn.Module, optimizer: Optimizer) -> None:
    if not hasattr(optimizer, "clips"):
        optimizer.clips = [p.register_hook(lambda g: g.clamp(-1, 1)) for p in model.parameters()]
    swap_for_good(model, optimizer)


def unfreeze(model: nn.Module, optimizer: Optimizer) -> None:
    if len(optimizer.param_groups) == 1 and optimizer.state:
        optimizer.param_groups[0]["params"] = [*model[0].parameters()]
        optimizer.add_param_group({"params": [*model[3].parameters()], "lr": 0.0})
    train(model, optimizer)


def freeze_what_was_trained(model: nn.Module, optimizer: Optimizer) -> None:
    train(model, optimizer)
    optimizer.param_groups[0]["params"] = [*model[3].parameters()]


def skip_batches(model: nn.Module, optimizer: Optimizer) -> None:
    train(model, optimizer)
    optimizer.zero_grad()
    optimizer.step()


def train_another_model(model: nn.Module, optimizer: Optimizer) -> None:
    train(model, optimizer)
    another = net()
    train(another, make_sgd(another))


LOOPS = (
    swap_an_average,
    swap_for_good,
    clip_in_gradient_hooks,
    unfreeze,
    freeze_what_was_trained,
    skip_batches,
    train_another_model,
)


@pytest.mark.parametrize("recipes", [(), "bf16"])
@pytest.mark.parametrize("loop", LOOPS)
def test_ordinary_loops_give_no_warning(loop: Loop, recipes: Any) -> None:
    assert watch(lambda model: AdamW(model.parameters()), loop, recipes=recipes) == []


def test_a_resumed_run_gives_no_warning() -> None:
    model, told = net(), []
    optimizer = AdamW(model.parameters())
    train(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model = net()
    optimizer = AdamW(model.parameters())
    with UpdateMonitor(model, formats="bf16", recipes=(), warn=told.append).attach(optimizer):
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(model, optimizer)
    with UpdateMonitor(model, formats="bf16", recipes=(), warn=told.append).attach(optimizer):
        model.load_state_dict(saved[0])  # and no step is left
    assert told == []
