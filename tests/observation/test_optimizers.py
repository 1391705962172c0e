"""`unwrap` and the checks: optimizers found under wrappers, and optimizers refused."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.optim import SGD, Optimizer

from altgrad import OptimizerStep, StepObserver
from altgrad.observation.optimizers import (
    check_not_captured,
    check_not_in_backward,
    check_observable,
    unwrap,
)
from tests.observation.watching import hook_count

RATE = 0.5


def sgd(model: nn.Module | None = None) -> SGD:
    return SGD((model or nn.Linear(2, 1)).parameters(), lr=RATE)


def in_backward(model: nn.Module) -> list[Optimizer]:
    """Return the optimizers in backward that torch makes, one for each parameter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its package uses TorchScript
        # torch has no public name for it: torch/distributed/optim/apply_optimizer_in_backward.py
        from torch.distributed.optim import _apply_optimizer_in_backward

    once = {p: len(getattr(p, "_in_backward_optimizers", ())) for p in model.parameters()}
    _apply_optimizer_in_backward(SGD, model.parameters(), {"lr": RATE})
    # torch keeps the optimizers in this attribute, and has no public way to them.
    return [each for p, old in once.items() for each in p._in_backward_optimizers[old:]]


class Uninitialised(Optimizer):
    """An Optimizer whose constructor has not run, around a real one, as in some Lookaheads."""

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# unwrap


def test_a_plain_optimizer_is_returned_itself() -> None:
    optimizer = sgd()
    assert unwrap(optimizer) is optimizer


def test_an_optimizer_with_hooks_is_returned_itself_although_it_holds_another() -> None:
    """Lookahead and SAM are such optimizers: their own `step` changes the parameters."""
    optimizer = sgd()
    optimizer.optimizer = sgd()
    assert unwrap(optimizer) is optimizer


@pytest.mark.parametrize("base", [object, Optimizer])
def test_a_wrapper_that_passes_on_the_step_of_the_optimizer_inside_is_unwrapped(
    base: type,
) -> None:
    class Passing(base):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer, self.step = optimizer, optimizer.step

    optimizer = sgd()
    assert unwrap(Passing(Passing(optimizer))) is optimizer


def test_a_wrapper_with_a_step_of_its_own_is_refused() -> None:
    class Lookahead(Uninitialised):
        def step(self, closure: object = None) -> None:
            self.optimizer.step()

    with pytest.raises(TypeError, match=r"the step\(\) of Lookahead calls no hooks"):
        unwrap(Lookahead(sgd()))


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_the_optimizer_of_lightning_is_unwrapped(package: str) -> None:
    wrappers = pytest.importorskip(f"{package}.core.optimizer")
    optimizer = sgd()
    wrapped = wrappers.LightningOptimizer(optimizer)
    assert isinstance(wrapped, Optimizer)
    assert unwrap(wrapped) is optimizer


@pytest.mark.parametrize("package", ["lightning_fabric", "lightning.fabric"])
def test_the_optimizer_of_fabric_is_unwrapped(package: str) -> None:
    wrappers = pytest.importorskip(f"{package}.wrappers")
    optimizer = sgd()
    # Fabric makes the wrapper in `setup`, and has no public name for it.
    wrapped = wrappers._FabricOptimizer(optimizer, SimpleNamespace())
    assert isinstance(wrapped, Optimizer)
    assert unwrap(wrapped) is optimizer


def test_the_optimizer_of_accelerate_is_unwrapped_and_its_steps_are_shown() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, steps = nn.Linear(2, 1), []
    optimizer = sgd(model)
    model, wrapped = accelerate.Accelerator(cpu=True).prepare(model, optimizer)
    assert isinstance(wrapped, Optimizer)
    assert unwrap(wrapped) is optimizer
    with StepObserver(model, steps.append).attach(wrapped):
        model(torch.ones(1, 2)).sum().backward()
        wrapped.step()
    assert [step.optimizer for step in steps] == [optimizer]


def test_wrappers_around_wrappers_are_unwrapped() -> None:
    optimizer = sgd()
    assert unwrap(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))) is optimizer


@pytest.mark.parametrize("wrap", [lambda each: each, lambda each: SimpleNamespace(optimizer=each)])
def test_an_optimizer_whose_step_calls_no_hooks_is_refused(wrap) -> None:
    """The steps of the optimizer inside are only part of its own step."""
    with pytest.raises(TypeError, match=r"the step\(\) of Uninitialised calls no hooks"):
        unwrap(wrap(Uninitialised(sgd())))


class Legacy(SGD):
    """An optimizer that takes the GradScaler as an argument, which torch has deprecated.

    torch/amp/grad_scaler.py, GradScaler.step, `has_grad_scaler_kwarg`
    """

    _step_supports_amp_scaling = True

    def step(self, closure=None, grad_scaler=None):
        for p in self.param_groups[0]["params"]:
            p.grad.div_(1 if grad_scaler is None else grad_scaler.get_scale())
        return super().step(closure)


def test_an_optimizer_that_takes_the_scaler_is_refused_if_a_scaler_is_given() -> None:
    model = nn.Linear(2, 1)
    optimizer = Legacy(model.parameters(), lr=0.1)
    observer = StepObserver(model, print)
    with pytest.raises(
        ValueError, match=r"Legacy\.step unscales its gradients with the GradScaler"
    ):
        observer.attach(optimizer, scaler=torch.amp.GradScaler("cpu"))
    observer.attach(optimizer).detach()


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
def test_an_optimizer_that_takes_an_unknown_scaler_ends_the_observation() -> None:
    model, shown = nn.Linear(2, 1), []
    optimizer = Legacy(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    observer = StepObserver(model, shown.append).attach(optimizer)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    with pytest.warns(UserWarning, match="Legacy unscales its gradients with a GradScaler"):
        scaler.step(optimizer)
    assert shown == []
    assert not observer.is_observing


def test_a_wrapper_of_itself_is_refused() -> None:
    endless = SimpleNamespace()
    endless.optimizer = endless
    with pytest.raises(TypeError, match=r"optimizer=SimpleNamespace: expected"):
        unwrap(endless)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (nn.Linear(1, 1), "Linear"),
        (None, "NoneType"),
        (SimpleNamespace(optimizer=SimpleNamespace(optimizer=3)), "SimpleNamespace"),
        ([], "list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_object_without_an_optimizer_is_refused_by_its_type(wrong: object, kind: str) -> None:
    with pytest.raises(
        TypeError,
        match=rf"^optimizer={kind}: expected a torch\.optim\.Optimizer, or a wrapper that has one "
        r"as `\.optimizer`; attach the optimizer whose step\(\) changes the parameters$",
    ):
        unwrap(wrong)


# check_observable


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^SGD steps none of the observed parameters: .* ZeRO"):
        StepObserver(nn.Linear(2, 1), print).attach(sgd())
    check_observable(sgd(), {"one": torch.ones(1)})  # one observed parameter is enough


def test_an_optimizer_that_steps_by_fused_backward_is_refused() -> None:
    class Lomo(Optimizer):
        def fused_backward(self, loss: torch.Tensor, lr: float) -> None:
            raise NotImplementedError

    model = nn.Linear(2, 1)
    with pytest.raises(
        ValueError, match=r"^Lomo steps by fused_backward\(\).* SGD in place of LOMO"
    ):
        StepObserver(model, print).attach(Lomo(model.parameters(), {}))


@pytest.mark.parametrize("kind", ["LOMO", "AdaLOMO"])
def test_the_optimizers_lomo_and_adalomo_are_refused(kind: str) -> None:
    model = nn.Linear(2, 1)
    optimizer = getattr(pytest.importorskip("pytorch_optimizer"), kind)(model)
    with pytest.raises(ValueError, match=f"^{kind} steps by fused_backward"):
        StepObserver(model, print).attach(optimizer)


@pytest.mark.filterwarnings("ignore:.*NO_SHARD")  # one process, says torch
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_the_module_inside_of_fsdp1_is_refused_with_what_replaces_it(use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    wrapped = FullyShardedDataParallel(
        inner, device_id=torch.device("cpu"), use_orig_params=use_orig_params
    )
    for observed in (wrapped, inner, [*inner.named_parameters()], nn.Sequential(wrapped)):
        observer = StepObserver(observed, print)
        with pytest.raises(ValueError, match=r"FSDP1.*fully_shard\(module\).*fsdp_version=2"):
            observer.attach(sgd(wrapped))


@pytest.mark.usefixtures("process_group")
def test_the_local_shards_of_fsdp2_are_shown() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(2, 1)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = sgd(model)
    shown: list[tuple[torch.Tensor, ...]] = []

    def keep(step: OptimizerStep) -> None:
        shown.extend(zip(map(torch.clone, step.before), step.gradients, step.after, strict=True))

    with StepObserver(model, keep, strict=True).attach(optimizer):
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
    for (before, gradient, after), parameter in zip(shown, model.parameters(), strict=True):
        assert torch.equal(after, parameter.to_local())
        assert torch.equal(before - RATE * gradient, after)
        assert not torch.equal(before, after)


def test_an_optimizer_is_refused_during_its_step() -> None:
    model = nn.Linear(2, 1)
    optimizer = sgd(model)
    own = dict(model.named_parameters())
    optimizer.register_step_post_hook(lambda *_: check_observable(optimizer, own))
    with pytest.raises(RuntimeError, match="a step of SGD is under way: attach before or after it"):
        optimizer.step()
    check_observable(optimizer, own)


# Optimizers in the backward pass


def test_parameters_that_are_stepped_in_the_backward_pass_are_named_and_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    in_backward(model[1])
    optimizer = sgd(model)
    with pytest.raises(
        ValueError, match=r"^optimizer in backward: 1\.weight, 1\.bias are .* _in_backward_optim"
    ):
        StepObserver(model, print).attach(optimizer)
    assert hook_count(optimizer) == 0


def test_all_optimizers_in_backward_of_a_parameter_must_be_attached() -> None:
    model = nn.Linear(2, 1, bias=False)
    both = in_backward(model) + in_backward(model)
    assert len(both) == 2
    with pytest.raises(ValueError, match="optimizer in backward: weight are"):
        StepObserver(model, print).attach(both[0])
    observer = StepObserver(model, print)
    observer.attach(*both)
    observer.detach()
    check_not_in_backward({model.weight: "weight"}, both)


def test_optimizers_in_backward_can_be_observed() -> None:
    model, steps = nn.Linear(2, 1), {}
    optimizers = in_backward(model)

    def on_step(step) -> None:
        assert step.index == 0
        (steps[step.names[0]],) = zip(
            *([t.clone() for t in each] for each in (step.before, step.gradients, step.after)),
            strict=True,
        )

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = torch.tensor([[3.0, -1.0]])
    with StepObserver(model, on_step).attach(*optimizers):
        model(inputs).sum().backward()
    gradients = {"weight": inputs, "bias": torch.ones(1)}
    assert set(steps) == {"weight", "bias"}
    for name, shown in steps.items():
        expected = (before[name], gradients[name], before[name] - RATE * gradients[name])
        assert all(map(torch.equal, shown, expected)), name
        assert torch.equal(model.get_parameter(name), expected[2])


def test_optimizers_in_backward_may_be_attached_before_the_others() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    observer = StepObserver(model, print).attach(*in_backward(model[1]))
    observer.attach(sgd(model[0]))
    observer.detach()


# CUDA graphs


def test_a_step_captured_in_a_cuda_graph_gives_one_warning_and_goes_on(monkeypatch) -> None:
    model, steps = nn.Linear(2, 1, bias=False), []
    optimizer = sgd(model)
    model(torch.ones(1, 2)).sum().backward()
    start = model.weight.detach().clone()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with StepObserver(model, steps.append).attach(optimizer):
        with pytest.warns(UserWarning, match="captured in a CUDA graph") as caught:
            optimizer.step()
        optimizer.step()
    assert len(caught) == 1
    assert not steps
    assert torch.equal(model.weight, start - RATE - RATE)


@pytest.mark.parametrize(("started", "capturing"), [(False, True), (True, False)])
def test_without_a_capture_steps_are_observed(monkeypatch, started, capturing) -> None:
    def is_capturing() -> bool:
        assert started, "asked before CUDA is there, which would start it"
        return capturing

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", is_capturing)
    check_not_captured()
