"""`StepObserver` in plain torch: what it shows and counts, and that it leaves nothing behind."""

import gc
import logging
import subprocess
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad import OptimizerStep, StepObserver
from altgrad.observation.parameter_names import parameter_names

RATE = 0.5
NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")
INF = float("inf")


@pytest.fixture(autouse=True)
def _choose_of_small_parameters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("altgrad.observation.snapshots.WHOLE_UP_TO", -1)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def training(kind: type[Optimizer] = SGD, **options) -> tuple[nn.Module, Optimizer]:
    model = make_model()
    return model, kind(model.parameters(), **{"lr": RATE, **options})


def set_gradients(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def clone(step: OptimizerStep) -> OptimizerStep:
    fields = ("before", "gradients", "after")
    return replace(step, **{f: tuple(t.clone() for t in getattr(step, f)) for f in fields})


class Kept(list):
    """A callback that keeps copies of the steps."""

    def __call__(self, step: OptimizerStep) -> None:
        self.append(clone(step))


def assert_exact(
    step: OptimizerStep, model: nn.Module, optimizer: Optimizer, index: int, seed: int
) -> None:
    """What is shown is what was there: gradients of this seed, and the weights as they are now."""
    twin = make_model()
    set_gradients(twin, seed)
    assert step.names == NAMES
    assert equal(step.gradients, gradients_of(twin))
    assert equal(step.after, weights_of(model))
    assert step.optimizer is optimizer
    assert step.index == index
    assert step.found_inf is None


def hook_count(optimizer: Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


@contextmanager
def counted_operations() -> Iterator[list[str]]:
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Count():
        yield names


def scaled_step(scaler: GradScaler, model: nn.Module, optimizer: Optimizer, factor: float) -> None:
    """A step with gradients that are `factor`, still multiplied by the scale."""
    scaler.scale(torch.ones(()))  # the scale is made on first use
    for p in model.parameters():
        p.grad = torch.full_like(p, factor * scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()


def raises(*_: object) -> None:
    raise ArithmeticError("of the user")


# What is shown


def test_each_step_is_shown_as_it_was() -> None:
    model, optimizer = training()
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer) as observer:
        assert observer.names == NAMES
        for index in range(3):
            before = weights_of(model)
            set_gradients(model, seed=index)
            optimizer.step()
            assert equal(steps[-1].before, before)
            assert_exact(steps[-1], model, optimizer, index, seed=index)
    assert len(steps) == 3
    assert not observer.skipped


def test_the_weights_after_the_step_are_the_parameters_themselves() -> None:
    model, optimizer = training()
    pointers, flags = [], []

    def on_step(step: OptimizerStep) -> None:
        pointers.extend(t.data_ptr() for t in step.after)
        flags.append(torch.is_grad_enabled())
        flags.extend(t.requires_grad for t in (*step.before, *step.gradients, *step.after))

    with StepObserver(model, on_step).attach(optimizer):
        set_gradients(model)
        optimizer.step()
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert not any(flags)


def test_gradients_of_a_closure_are_shown() -> None:
    model, optimizer = training()
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        optimizer.step(lambda: set_gradients(model, seed=5))
    assert_exact(steps[0], model, optimizer, 0, seed=5)
    assert equal(steps[0].before, weights_of(make_model()))


def test_gradients_that_the_optimizer_overwrites_are_shown_as_applied() -> None:
    model, optimizer = training(momentum=0.9, nesterov=True, foreach=True)
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        for seed in range(2):
            set_gradients(model, seed)
            optimizer.step()
            assert_exact(steps[-1], model, optimizer, seed, seed)
            assert not equal(steps[-1].gradients, gradients_of(model))


def test_gradients_that_earlier_hooks_change_are_shown_changed() -> None:
    model, optimizer = training()
    steps = Kept()
    optimizer.register_step_pre_hook(lambda *_: set_gradients(model, seed=9))
    with StepObserver(model, steps).attach(optimizer):
        set_gradients(model, seed=1)
        optimizer.step()
    assert_exact(steps[0], model, optimizer, 0, seed=9)


def test_parameters_without_a_gradient_are_left_out() -> None:
    model, optimizer = training()
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        set_gradients(model)
        model[0].weight.grad = None
        optimizer.step()
    assert steps[0].names == NAMES[1:]
    assert equal(steps[0].after, weights_of(model)[1:])


def test_chosen_elements_are_shown_in_one_dimension() -> None:
    model, optimizer = training()
    steps, chosen = Kept(), torch.tensor([7, 0])
    elements = {"0.weight": chosen}
    with StepObserver(model, steps, elements=lambda name, p: elements.get(name)).attach(optimizer):
        before = weights_of(model)
        set_gradients(model)
        optimizer.step()
    (step,) = steps
    whole = (before[0], model[0].weight.grad, model[0].weight.detach())
    shown = (step.before[0], step.gradients[0], step.after[0])
    assert equal(shown, [t.flatten()[chosen] for t in whole])
    assert equal(step.before[1:], before[1:])
    assert equal(step.after[1:], weights_of(model)[1:])


def test_each_optimizer_has_its_own_index_and_its_own_parameters() -> None:
    model = make_model()
    first, second = (SGD(layer.parameters(), lr=RATE) for layer in model)
    steps = Kept()
    with StepObserver(model, steps).attach(first, second):
        for optimizer in (first, second, second, first):
            set_gradients(model)
            optimizer.step()
    shown = [(step.optimizer, step.index, step.names) for step in steps]
    assert shown == [
        (first, 0, NAMES[:2]),
        (second, 0, NAMES[2:]),
        (second, 1, NAMES[2:]),
        (first, 1, NAMES[:2]),
    ]


def test_an_optimizer_around_another_is_shown_with_the_weights_that_it_found() -> None:
    class Twice(SGD):
        def step(self, closure=None):
            inner.step()
            inner.step()

    model, inner = training()
    outer = Twice(model.parameters(), lr=RATE)
    steps, before = Kept(), weights_of(model)
    with StepObserver(model, steps).attach(outer, inner):
        set_gradients(model)
        outer.step()
    assert [step.optimizer for step in steps] == [inner, inner, outer]
    assert equal(steps[0].before, before)
    assert equal(steps[2].before, before)


def test_parameters_that_came_in_mid_run_are_shown_and_foreign_ones_are_not() -> None:
    model, optimizer = training()
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
        foreign = nn.Linear(2, 1)
        optimizer.add_param_group({"params": foreign.parameters()})
        for module in (model, foreign):
            set_gradients(module)
        optimizer.step()
        model.append(nn.Linear(2, 2, bias=False))
        optimizer.add_param_group({"params": model[2].parameters()})
        for module in (model, foreign):
            set_gradients(module)
        before = weights_of(model)
        optimizer.step()
    assert [step.names for step in steps] == [NAMES, NAMES, (*NAMES, "2.weight")]
    assert observer.names == (*NAMES, "2.weight")
    assert equal(steps[2].before, before)
    assert equal(steps[2].after, weights_of(model))


def test_the_names_are_read_again_only_where_there_is_something_new(monkeypatch) -> None:
    model = make_model()
    foreign = nn.Linear(2, 1)
    optimizer = SGD([*model.parameters(), *foreign.parameters()], lr=RATE)
    reads = []

    def read(module: nn.Module) -> dict[Tensor, str]:
        reads.append(module)
        return parameter_names(module)

    monkeypatch.setattr("altgrad.observation.observer.parameter_names", read)
    with StepObserver(model, lambda step: None).attach(optimizer):
        for _ in range(3):
            set_gradients(model)
            optimizer.step()
    assert len(reads) == 2  # at first, and for the foreign ones


def test_pairs_of_name_and_parameter_will_do() -> None:
    model, optimizer = training()
    steps = Kept()
    pairs = ((f"mine.{name}", p) for name, p in model[1].named_parameters())
    with StepObserver(pairs, steps).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
        optimizer.step()
    assert observer.names == steps[1].names == ("mine.weight", "mine.bias")
    assert equal(steps[1].after, weights_of(model[1]))


@pytest.mark.parametrize("nothing", [nn.ReLU(), []], ids=["module", "pairs"])
def test_without_parameters_there_is_nothing_to_observe(nothing) -> None:
    with pytest.raises(
        ValueError, match="no parameter to observe, neither in a module nor as pair"
    ):
        StepObserver(nothing, print)


def test_steps_are_compared_by_identity() -> None:
    model, optimizer = training()
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        for _ in range(2):
            set_gradients(model)
            optimizer.step()
    assert steps[0] != steps[1]
    assert len({*steps}) == 2


# Attaching and detaching


def test_attaching_twice_does_not_double() -> None:
    model, optimizer = training()
    steps = Kept()
    observer = StepObserver(model, steps)
    assert observer.attach(optimizer, optimizer) is observer
    observer.attach(optimizer)
    assert hook_count(optimizer) == 2
    set_gradients(model)
    optimizer.step()
    assert len(steps) == 1
    observer.detach()
    assert hook_count(optimizer) == 0
    optimizer.step()
    assert len(steps) == 1
    observer.detach()


def test_an_optimizer_attached_later_leaves_those_before() -> None:
    model = make_model()
    optimizers = [SGD(layer.parameters(), lr=RATE) for layer in model]
    steps = Kept()
    observer = StepObserver(model, steps)
    for optimizer in optimizers:
        observer.attach(optimizer)
        set_gradients(model)
        for each in optimizers:
            each.step()
    assert [(optimizers.index(step.optimizer), step.index) for step in steps] == [
        (0, 0),
        (0, 1),
        (1, 0),
    ]
    observer.detach()


def test_a_detached_observer_can_be_attached_again() -> None:
    model, optimizer = training()
    steps = Kept()
    observer = StepObserver(model, steps)
    for seed in range(2):
        with observer.attach(optimizer):
            set_gradients(model, seed)
            optimizer.step()
        assert_exact(steps[-1], model, optimizer, 0, seed)
        optimizer.step()
    assert len(steps) == 2


def test_what_cannot_be_observed_leaves_nothing_attached() -> None:
    model, optimizer = training()
    observer = StepObserver(model, print)
    with pytest.raises(ValueError, match="steps none of the observed parameters"):
        observer.attach(optimizer, SGD(nn.Linear(1, 1).parameters(), lr=RATE))
    with pytest.raises(TypeError, match="Linear is no"):
        observer.attach(optimizer, model[0])
    assert hook_count(optimizer) == 0


def test_a_scaler_that_is_none_is_named_and_leaves_nothing_attached() -> None:
    model, optimizer = training()
    observer = StepObserver(model, print)
    with pytest.raises(TypeError, match="scaler"):
        observer.attach(optimizer, scaler="native")
    assert hook_count(optimizer) == 0


def test_detaching_within_on_step_ends_the_observation() -> None:
    model, optimizer = training()
    steps = Kept()

    def on_step(step: OptimizerStep) -> None:
        steps(step)
        observer.detach()

    other = StepObserver(model, others := Kept())
    observer = StepObserver(model, on_step).attach(optimizer)
    other.attach(optimizer)
    for _ in range(2):
        set_gradients(model)
        optimizer.step()
    assert (len(steps), len(others)) == (1, 2)
    observer.detach()
    other.detach()
    assert hook_count(optimizer) == 0


@pytest.mark.parametrize("how", ["collected", "attached"])
def test_hooks_left_by_detaching_within_on_step_go_later(how: str) -> None:
    model, optimizer = training()
    observers = [StepObserver(model, lambda step: observers[0].detach())]
    observers[0].attach(optimizer)
    set_gradients(model)
    optimizer.step()
    assert hook_count(optimizer) == 2
    if how == "collected":
        observers.clear()
        assert hook_count(optimizer) == 0
    else:
        other = SGD(model.parameters(), lr=RATE)
        observers[0].attach(other)
        assert (hook_count(optimizer), hook_count(other)) == (0, 2)
        observers[0].detach()


def test_detaching_between_the_backward_pass_and_the_update_forgets_the_step() -> None:
    model, optimizer = training()
    steps = Kept()
    observer = StepObserver(model, steps).attach(optimizer)

    def closure() -> None:
        set_gradients(model)
        observer.detach()

    optimizer.step(closure)
    assert not steps
    assert not observer.skipped
    observer.detach()
    assert hook_count(optimizer) == 0


def test_attaching_within_on_step() -> None:
    model, optimizer = training()
    other = SGD(model.parameters(), lr=RATE)
    steps, errors = Kept(), []
    late = StepObserver(model, steps)

    def on_step(step: OptimizerStep) -> None:
        if step.optimizer is optimizer and step.index == 0:
            observer.attach(optimizer, other)
            try:
                late.attach(optimizer)
            except RuntimeError as error:
                errors.append(str(error))
            late.attach(other)

    observer = StepObserver(model, on_step).attach(optimizer)
    for each in (optimizer, other, optimizer):
        set_gradients(model)
        each.step()
    assert ["under way" in error for error in errors] == [True]
    assert (hook_count(optimizer), hook_count(other)) == (2, 4)
    assert [step.optimizer for step in steps] == [other]
    observer.detach()
    late.detach()


def test_detaching_and_attaching_within_on_step_goes_on() -> None:
    model, optimizer = training()
    indices = []

    def on_step(step: OptimizerStep) -> None:
        indices.append(step.index)
        observer.detach()
        observer.attach(optimizer)

    observer = StepObserver(model, on_step).attach(optimizer)
    for _ in range(3):
        set_gradients(model)
        optimizer.step()
    assert indices == [0, 1, 2]
    observer.detach()
    assert hook_count(optimizer) == 0


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_with_block_passes_and_detaches(kind: type) -> None:
    model, optimizer = training()
    with pytest.raises(kind), StepObserver(model, print).attach(optimizer):
        raise kind
    assert hook_count(optimizer) == 0


def test_a_scaler_is_told_of_again_after_a_detach() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    observer = StepObserver(model, print)
    for count in (1, 2):
        with observer.attach(optimizer, scaler=scaler):
            scaled_step(scaler, model, optimizer, INF)
        assert observer.skipped == {"inf": count}


# Nothing is held


def test_a_dropped_observer_takes_its_hooks_along() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu")
    observer = StepObserver(model, lambda step: None).attach(optimizer, scaler=scaler)
    set_gradients(model)
    optimizer.step()
    gone = weakref.ref(observer)
    del observer
    assert gone() is None
    assert hook_count(optimizer) == 0
    assert "step" not in vars(scaler)


def test_an_observer_that_is_not_held_is_warned_of() -> None:
    model, optimizer = training()
    with pytest.warns(UserWarning, match="was collected before its first step: hold it in a vari"):
        StepObserver(model, print).attach(optimizer)
    assert hook_count(optimizer) == 0


def test_an_observer_that_is_not_held_leaves_no_hooks_where_warnings_are_errors(
    monkeypatch,
) -> None:
    model, optimizer = training()
    raised = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StepObserver(model, print).attach(optimizer)
    assert len(raised) == 1
    assert hook_count(optimizer) == 0


def test_a_program_that_ends_before_the_first_step_ends_without_a_word() -> None:
    script = """
import torch, altgrad
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
observer = altgrad.StepObserver(model, print).attach(optimizer)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "StepObserver" not in ended.stderr


@pytest.mark.parametrize("end", ["never attached", "detached", "optimizer gone"])
def test_an_observer_that_could_not_have_observed_is_not_warned_of(end: str) -> None:
    model, optimizer = training()
    observer = StepObserver(model, print)
    if end != "never attached":
        observer.attach(optimizer)
    if end == "detached":
        observer.detach()
    del optimizer
    gc.collect()
    del observer


def test_an_observer_holds_no_optimizer_and_a_dropped_one_no_model() -> None:
    model, optimizer = training()
    observer = StepObserver(model, Kept()).attach(optimizer)
    set_gradients(model)
    optimizer.step()
    parts = [weakref.ref(part) for part in (optimizer, model, model[0].weight)]
    observer._on_step.clear()
    del optimizer
    gc.collect()
    assert parts[0]() is None
    assert parts[1]() is model
    del model, observer
    gc.collect()
    assert all(part() is None for part in parts)


def test_a_detached_observer_holds_no_parameter_of_another_module() -> None:
    model = make_model()
    foreign = nn.Parameter(torch.ones(2))
    optimizer = SGD([*model.parameters(), foreign], lr=RATE)
    observer = StepObserver(model, lambda step: None).attach(optimizer)
    set_gradients(model)
    optimizer.step()
    observer.detach()
    gone = weakref.ref(foreign)
    del foreign, optimizer
    gc.collect()
    assert gone() is None


def test_model_optimizer_and_observer_in_a_cycle_are_collected() -> None:
    model, optimizer = training()
    model.observer = StepObserver(model, model.forward).attach(optimizer, scaler=GradScaler("cpu"))
    model.optimizer = optimizer
    set_gradients(model)
    with pytest.warns(UserWarning, match="stops observing"):
        optimizer.step()
    parts = [weakref.ref(part) for part in (model, optimizer, model.observer)]
    del model, optimizer
    gc.collect()
    assert all(part() is None for part in parts)


class Held:
    """The memory of the copies, after every reference that a test could have is gone."""

    def __init__(self) -> None:
        self._references: list[weakref.ref] = []

    def note(self, step: OptimizerStep) -> None:
        self._references += [weakref.ref(t) for t in (*step.before, *step.gradients)]

    def note_taken(self, observer: StepObserver) -> None:
        for each in observer._hooks[0]._captured:
            self._references += [weakref.ref(each.before), weakref.ref(each.gradient)]

    def count(self) -> int:
        assert self._references
        return sum(reference() is not None for reference in self._references)


@pytest.mark.parametrize("elements", [None, lambda name, p: torch.tensor([0])])
def test_detaching_lets_go_of_every_copy(elements) -> None:
    model, optimizer = training()
    held = Held()
    observer = StepObserver(model, held.note, elements=elements).attach(optimizer)
    set_gradients(model)
    optimizer.step()
    assert held.count() == 8
    observer.detach()
    assert held.count() == 0


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_step_that_raises_leaves_no_copy_and_the_next_observation_is_exact(kind: type) -> None:
    model, optimizer = training()
    held, steps = Held(), Kept()

    def fail(*_: object) -> None:
        held.note_taken(observer)
        raise kind

    observer = StepObserver(model, steps)
    with observer.attach(optimizer):
        handle = optimizer.register_step_pre_hook(fail)
        set_gradients(model)
        with pytest.raises(kind):
            optimizer.step()
        handle.remove()
        assert observer._hooks[0]._captured is not None
        set_gradients(model, seed=3)
        optimizer.step()
        assert_exact(steps[-1], model, optimizer, 0, seed=3)
        handle = optimizer.register_step_pre_hook(fail)
        with pytest.raises(kind):
            optimizer.step()
        handle.remove()
    assert held.count() == 0
    assert hook_count(optimizer) == 0
    assert len(steps) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_fault_lets_go_of_every_copy(strict: bool) -> None:
    model, optimizer = training()
    held = Held()

    def on_step(step: OptimizerStep) -> None:
        held.note(step)
        raises()

    observer = StepObserver(model, on_step, strict=strict).attach(optimizer)
    set_gradients(model)
    if strict:
        with pytest.raises(ArithmeticError):
            optimizer.step()
    else:
        with pytest.warns(UserWarning, match="stops observing"):
            optimizer.step()
    assert held.count() == 0
    observer.detach()
    assert hook_count(optimizer) == 0


def test_a_keyboard_interrupt_in_on_step_passes_and_leaves_nothing() -> None:
    model, optimizer = training()
    held = Held()

    def on_step(step: OptimizerStep) -> None:
        held.note(step)
        raise KeyboardInterrupt

    with StepObserver(model, on_step).attach(optimizer):
        set_gradients(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert held.count() == 0
    assert hook_count(optimizer) == 0


def test_a_keyboard_interrupt_in_the_policy_passes() -> None:
    def interrupted(index: int) -> bool:
        raise KeyboardInterrupt

    model, optimizer = training()
    with StepObserver(model, print, interrupted).attach(optimizer):
        set_gradients(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert hook_count(optimizer) == 0


# Which steps


def test_a_step_that_is_not_due_costs_one_call_and_no_operation() -> None:
    model, optimizer = training()
    set_gradients(model)
    with counted_operations() as plain:
        optimizer.step()
    assert plain
    calls = []
    observer = StepObserver(model, raises, lambda index: calls.append(index) is not None)
    with observer.attach(optimizer), counted_operations() as observed:
        optimizer.step()
    assert observed == plain
    assert calls == [0]
    assert observer.peak_bytes == 0
    assert not observer.skipped


def test_the_policy_is_asked_once_for_each_step_with_its_index() -> None:
    model, optimizer = training()
    steps, asked = Kept(), []

    def every_second(index: int) -> bool:
        asked.append(index)
        return index % 2 == 1

    with StepObserver(model, steps, every_second).attach(optimizer):
        for seed in range(4):
            set_gradients(model, seed)
            optimizer.step() if seed < 2 else optimizer.step(lambda: None)
            if seed % 2:
                assert_exact(steps[-1], model, optimizer, seed, seed)
    assert asked == [0, 1, 2, 3]
    assert [step.index for step in steps] == [1, 3]


# Steps that are none


def test_a_step_without_gradients_is_counted_and_not_shown() -> None:
    model, optimizer = training()
    with StepObserver(model, raises).attach(optimizer) as observer:
        optimizer.step()
        optimizer.step(lambda: None)
    assert observer.skipped == {"no gradients": 2}


def test_a_closure_that_is_not_called_ends_the_observation_by_name() -> None:
    class Deaf(SGD):
        def step(self, closure=None):
            return None

    model, optimizer = training(Deaf)
    set_gradients(model)
    observer = StepObserver(model, raises).attach(optimizer)
    with pytest.warns(UserWarning, match="Deaf does not call the closure"):
        optimizer.step(lambda: None)
    assert not observer.is_observing
    assert observer.skipped == {}


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_step_with_learning_rate_0_is_counted_and_not_shown(rate) -> None:
    model, optimizer = training(lr=rate)
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
        assert observer.skipped == {"learning rate 0": 1}
        assert not steps
        optimizer.param_groups[0]["lr"] = RATE
        optimizer.step()
    assert [step.index for step in steps] == [1]
    assert observer.skipped == {"learning rate 0": 1}


def test_of_two_groups_the_one_with_learning_rate_0_is_left_out() -> None:
    model = make_model()
    still, moving = ({"params": layer.parameters()} for layer in model)
    optimizer, steps = SGD([still | {"lr": 0.0}, moving], lr=RATE), Kept()
    with StepObserver(model, steps).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
    assert steps[0].names == NAMES[2:]
    assert equal(steps[0].gradients, gradients_of(model)[2:])
    assert equal(steps[0].after, weights_of(model)[2:])
    assert not observer.skipped


def test_weights_that_move_at_learning_rate_0_are_shown() -> None:
    class Stubborn(SGD):
        def step(self, closure=None):
            with torch.no_grad():
                model[1].bias.add_(1)

    model, optimizer = training(Stubborn, lr=0.0)
    steps, before = Kept(), weights_of(model)
    with StepObserver(model, steps).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
    assert steps[0].names == ("1.bias",)
    assert equal(steps[0].before, before[3:])
    assert not observer.skipped


def test_weights_that_do_not_move_at_another_rate_are_a_step() -> None:
    """A stall is a result; it is not left out."""
    model, optimizer = training(lr=1e-30)
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
    assert steps[0].names == NAMES
    assert equal(steps[0].before, steps[0].after)
    assert not observer.skipped


def test_an_optimizer_without_a_learning_rate_is_observed() -> None:
    model, optimizer = training()
    del optimizer.param_groups[0]["lr"]
    optimizer.step = lambda: None
    steps = Kept()
    observer = StepObserver(model, steps).attach(optimizer)
    set_gradients(model)
    (hooks,) = observer._hooks
    hooks._before(optimizer, (optimizer,), {})
    hooks._after(optimizer)
    assert steps[0].names == NAMES
    observer.detach()


# GradScaler


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled"])
def test_gradients_under_a_scaler_are_shown_as_applied(fused: bool, unscaled: bool) -> None:
    model, optimizer = training(AdamW, fused=fused)
    scaler, steps = GradScaler("cpu", init_scale=3.0), Kept()
    with StepObserver(model, steps).attach(optimizer, scaler=scaler) as observer:
        scaler.scale(torch.ones(()))
        set_gradients(model)
        scaled = gradients_of(model)
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    divided = [g / 3 for g in scaled]
    # Where the optimizer does not divide, the scaler did, in place.
    assert equal(steps[0].gradients, divided if fused and not unscaled else gradients_of(model))
    assert all(map(torch.allclose, steps[0].gradients, divided))
    assert equal(steps[0].after, weights_of(model))
    assert not observer.skipped


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_steps_that_a_scaler_skips_are_counted_and_not_shown(fused: bool) -> None:
    model, optimizer = training(AdamW, fused=fused)
    scaler, steps = GradScaler("cpu", init_scale=4.0), Kept()
    start = weights_of(model)
    with StepObserver(model, steps).attach(optimizer, scaler=scaler) as observer:
        scaled_step(scaler, model, optimizer, INF)
        assert equal(weights_of(model), start)
        assert observer.skipped == {"inf": 1}
        scaled_step(scaler, model, optimizer, 1.0)
        scaled_step(scaler, model, optimizer, INF)
    assert observer.skipped == {"inf": 2}
    assert len(steps) == 1
    assert equal(steps[0].before, start)
    assert equal(steps[0].gradients, [torch.ones_like(p) for p in model.parameters()])
    assert "step" not in vars(scaler)
    scaled_step(scaler, model, optimizer, INF)
    assert observer.skipped == {"inf": 2}


def test_a_scaler_that_is_attached_twice_counts_once() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    observer = StepObserver(model, print).attach(optimizer, scaler=scaler)
    observer.attach(optimizer, scaler=scaler)
    scaled_step(scaler, model, optimizer, INF)
    assert observer.skipped == {"inf": 1}
    observer.detach()
    assert "step" not in vars(scaler)


def test_two_observers_count_the_skips_of_one_scaler() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    both = [StepObserver(model, lambda step: None).attach(optimizer, scaler=scaler) for _ in "ab"]
    scaled_step(scaler, model, optimizer, INF)
    assert [observer.skipped for observer in both] == [{"inf": 1}] * 2
    both[1].detach()
    scaled_step(scaler, model, optimizer, INF)
    assert [observer.skipped["inf"] for observer in both] == [2, 1]
    both[0].detach()
    assert "step" not in vars(scaler)


def test_skips_of_steps_that_are_not_due_and_of_other_optimizers_are_not_counted() -> None:
    model, optimizer = training()
    other = SGD(model.parameters(), lr=RATE)
    scaler, asked = GradScaler("cpu", init_scale=4.0), []
    observer = StepObserver(model, print, lambda index: bool(asked.append(index)))
    with observer.attach(optimizer, scaler=scaler):
        scaled_step(scaler, model, other, INF)
        assert asked == []
        scaled_step(scaler, model, optimizer, INF)
    assert asked == [0]
    assert not observer.skipped


def test_the_scaler_of_a_wrapper_is_known() -> None:
    class Wrapper:
        def __init__(self, optimizer: Optimizer, scaler: GradScaler | None) -> None:
            self.optimizer, self.scaler = optimizer, scaler

    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    with StepObserver(model, print).attach(Wrapper(optimizer, scaler)) as observer:
        scaled_step(scaler, model, optimizer, INF)
    assert observer.skipped == {"inf": 1}
    StepObserver(model, print).attach(Wrapper(optimizer, None)).detach()


def test_found_inf_is_left_to_the_callback_on_demand() -> None:
    model, optimizer = training(AdamW, fused=True)
    scaler, steps = GradScaler("cpu", init_scale=4.0), Kept()
    observer = StepObserver(model, steps, read_found_inf=False)
    with observer.attach(optimizer, scaler=scaler):
        for factor in (INF, 1.0):
            scaled_step(scaler, model, optimizer, factor)
    assert [step.found_inf.item() for step in steps] == [1, 0]
    assert [step.index for step in steps] == [0, 1]
    assert equal(steps[0].before, steps[0].after)
    assert not observer.skipped


# Faults and training


def train(
    attach: Callable[[nn.Module, Optimizer], StepObserver] | None, kind: type[Optimizer] = AdamW
) -> tuple[list[Tensor], dict, Tensor]:
    """Weights, state and global random state after five steps from one seed."""
    model, optimizer = training(kind)
    observer = attach(model, optimizer) if attach is not None else None
    for seed in range(5):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        nn.functional.dropout(model(torch.randn(4, 3))).square().sum().backward()
        optimizer.step()
    if observer is not None:
        observer.detach()
    state = {f"{i}{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return weights_of(model), state, torch.get_rng_state()


def assert_same(one, other) -> None:
    assert equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert equal(list(one[1].values()), list(other[1].values()))
    assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("elements", [None, lambda name, p: torch.tensor([1, 0])])
def test_training_is_the_same_with_and_without(elements) -> None:
    steps = Kept()

    def attach(model: nn.Module, optimizer: Optimizer) -> StepObserver:
        return StepObserver(model, steps, elements=elements).attach(optimizer)

    assert_same(train(attach), train(None))
    assert len(steps) == 5


FAULTS = {
    "on_step": ({}, "raises"),
    "should_observe": ({"should_observe": raises}, "raises"),
    "elements": ({"elements": raises}, "raises"),
    "wrong elements": ({"elements": lambda name, p: torch.tensor([-1])}, "_check_indices"),
}


@pytest.mark.parametrize("place", FAULTS)
def test_a_fault_is_warned_of_once_and_training_goes_on(place: str) -> None:
    options, function = FAULTS[place]

    def attach(model: nn.Module, optimizer: Optimizer) -> StepObserver:
        on_step = raises if place == "on_step" else lambda step: None
        return StepObserver(model, on_step, **options).attach(optimizer)

    with pytest.warns(UserWarning, match="StepObserver stops observing after a fault") as caught:
        result = train(attach)
    assert_same(result, train(None))
    (warning,) = caught
    text = str(warning.message)
    assert f" in {function}, " in text
    assert ("ValueError" if place == "wrong elements" else "ArithmeticError('of the user')") in text
    assert text.endswith(". Training goes on; strict=True would raise it")
    assert ".py:" in text


@pytest.mark.parametrize("place", FAULTS)
def test_a_fault_is_raised_into_strict_training(place: str) -> None:
    options, _ = FAULTS[place]
    model, optimizer = training()
    on_step = raises if place == "on_step" else lambda step: None
    observer = StepObserver(model, on_step, strict=True, **options).attach(optimizer)
    set_gradients(model)
    expected = ValueError if place == "wrong elements" else ArithmeticError
    with pytest.raises(expected):
        optimizer.step()
    optimizer.step()  # the observation has ended
    observer.detach()
    assert hook_count(optimizer) == 0


def test_a_fault_of_one_observer_does_not_end_another() -> None:
    model, optimizer = training()
    steps = Kept()
    faulty = StepObserver(model, raises).attach(optimizer)
    with StepObserver(model, steps).attach(optimizer):
        set_gradients(model)
        with pytest.warns(UserWarning, match="stops observing"):
            optimizer.step()
        optimizer.step()
    assert len(steps) == 2
    faulty.detach()


def test_after_a_fault_the_observer_can_be_attached_again() -> None:
    model, optimizer = training()
    steps = Kept()
    faults = [ArithmeticError("once")]

    def on_step(step: OptimizerStep) -> None:
        if faults:
            raise faults.pop()
        steps(step)

    observer = StepObserver(model, on_step).attach(optimizer)
    set_gradients(model)
    with pytest.warns(UserWarning, match="stops observing"):
        optimizer.step()
    optimizer.step()
    assert not steps
    with observer.attach(optimizer):
        assert hook_count(optimizer) == 2
        set_gradients(model, seed=4)
        optimizer.step()
    assert_exact(steps[0], model, optimizer, 0, seed=4)


def test_a_fault_in_the_policy_where_a_scaler_skips_is_warned_of() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    with StepObserver(model, print, raises).attach(optimizer, scaler=scaler) as observer:
        with pytest.warns(UserWarning, match="stops observing after a fault"):
            scaled_step(scaler, model, optimizer, INF)
        scaled_step(scaler, model, optimizer, INF)
    assert not observer.skipped


# Memory


def test_the_peak_of_the_memory_is_logged_once_in_the_end(caplog) -> None:
    model, optimizer = training()
    observer = StepObserver(model, lambda step: None, lambda index: index > 0)
    with caplog.at_level(logging.INFO, logger="altgrad"):
        observer.attach(optimizer).detach()
        assert not caplog.records  # nothing was copied
        with observer.attach(optimizer):
            set_gradients(model)
            for _ in range(3):
                optimizer.step()
        observer.detach()
    count = 2 * 4 * sum(p.numel() for p in model.parameters())
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("altgrad", "INFO")
    assert record.getMessage() == f"the copies of observed steps took up to {count} bytes"
    assert observer.peak_bytes == count


def test_elements_are_chosen_once_also_when_attached_again() -> None:
    model, optimizer = training()
    names = []
    observer = StepObserver(
        model, lambda step: None, elements=lambda name, p: names.append((name, p.shape))
    )
    for _ in range(2):
        with observer.attach(optimizer):
            set_gradients(model)
            optimizer.step()
    assert names == [(name, p.shape) for name, p in model.named_parameters()]


# Closures that are not where one expects them


class Sam(SGD):
    """Sharpness-aware: it goes to a worse place, asks for gradients there, and steps from here."""

    def step(self, closure):
        parameters = self.param_groups[0]["params"]
        found = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(0.1)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, old in zip(parameters, found, strict=True):
                p.copy_(old)
        super().step()


class DecaysFirst(SGD):
    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)
        return super().step(closure)


@pytest.mark.parametrize("kind", [Sam, DecaysFirst])
def test_an_optimizer_that_moves_weights_before_its_closure_is_named_and_not_shown(kind) -> None:
    SGD([torch.ones(1)], lr=1)  # from now on torch calls hooks around SGD's own step
    model, optimizer = training(kind)
    observer = StepObserver(model, raises).attach(optimizer)
    with pytest.warns(UserWarning, match=f"{kind.__name__} moves weights before it calls its clos"):
        optimizer.step(lambda: set_gradients(model))
    assert not observer.is_observing


@pytest.mark.parametrize(
    "call",
    [
        lambda optimizer, closure: optimizer.step("x", closure),
        lambda optimizer, closure: optimizer.step("x", closure=closure),
        lambda optimizer, closure: optimizer.step(closure=closure, x="x"),
    ],
    ids=["second", "by keyword", "keywords"],
)
def test_a_closure_is_found_where_the_step_takes_it(call) -> None:
    class Extra(SGD):
        def step(self, x, closure=None):
            assert x == "x"
            return super().step(closure)

    model, optimizer = training(Extra)
    steps, before = Kept(), weights_of(model)
    with StepObserver(model, steps).attach(optimizer):
        call(optimizer, lambda: set_gradients(model))
    (step,) = steps
    assert equal(step.before, before)
    assert equal(step.gradients, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("name", ["fn", "loss_function"])
def test_a_closure_of_another_name_is_found(name: str) -> None:
    scope: dict[str, type] = {"SGD": SGD}
    exec(
        f"class Other(SGD):\n def step(self, {name}=None):\n  return SGD.step(self, {name})", scope
    )
    model, optimizer = training(scope["Other"])
    set_gradients(model, seed=5)  # of the last step: these are not applied
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        optimizer.step(lambda: set_gradients(model))
    assert equal(steps[0].gradients, [p.grad for p in model.parameters()])


def test_a_closure_may_initialise_the_parameters() -> None:
    """As lazy modules do in their first forward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    optimizer = SGD(model.parameters(), lr=RATE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        return loss

    steps = Kept()
    with StepObserver(model, steps, strict=True).attach(optimizer):
        optimizer.step(closure)
        optimizer.step(closure)
    assert [step.names[0] for step in steps] == ["0.weight", "0.weight"]
    assert equal(steps[1].before, steps[0].after)


def test_a_callable_that_is_no_closure_arrives_as_it_is() -> None:
    class Takes(SGD):
        def step(self, model, closure=None):
            assert isinstance(model, nn.Module)
            return super().step(closure)

    model, optimizer = training(Takes)
    steps = Kept()
    set_gradients(model)
    with StepObserver(model, steps).attach(optimizer):
        optimizer.step(model)
    assert len(steps) == 1


def test_a_closure_keeps_its_attributes() -> None:
    class Asks(SGD):
        def step(self, closure):
            assert closure.name == "mine"
            return super().step(closure)

    model, optimizer = training(Asks)

    def closure():
        set_gradients(model)

    closure.name = "mine"
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        optimizer.step(closure)
    assert len(steps) == 1


# Nothing is held, and little is asked


def test_an_observer_that_its_own_arguments_refer_to_is_collected() -> None:
    class Owner:
        def __init__(self, model, optimizer):
            self.observer = StepObserver(model, self.show, self.due, elements=self.choose)
            self.observer.attach(optimizer)

        def show(self, step):
            pass

        def due(self, index):
            return True

        def choose(self, name, parameter):
            return None

    model, optimizer = training()
    owner = Owner(model, optimizer)
    set_gradients(model)
    optimizer.step()
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
    assert hook_count(optimizer) == 0


def test_a_policy_may_detach_on_a_step_that_the_scaler_skips() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)

    def policy(index):
        observer.detach()
        return True

    observer = StepObserver(model, raises, policy).attach(optimizer, scaler=scaler)
    scaled_step(scaler, model, optimizer, float("inf"))
    assert "step" not in vars(scaler)


def test_a_learning_rate_on_the_device_is_read_once_for_each_group() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    model, optimizer = training()
    optimizer.param_groups[0]["lr"] = torch.tensor(RATE)
    set_gradients(model)

    def reads() -> int:
        with Reads() as mode:
            optimizer.step()
        return mode.count

    alone = reads()
    with StepObserver(model, lambda step: None).attach(optimizer):
        assert reads() - alone == len(optimizer.param_groups) == 1


def test_fsdp1_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = module

    package = types.SimpleNamespace(FullyShardedDataParallel=FullyShardedDataParallel)
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", package)
    model = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2)))
    optimizer = SGD(model.parameters(), lr=RATE)
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        StepObserver(model, print).attach(optimizer)
    assert hook_count(optimizer) == 0


def test_optimizers_that_are_gone_leave_no_copies() -> None:
    model, _ = training()
    observer = StepObserver(model, lambda step: None)
    for _ in range(5):
        optimizer = SGD(model.parameters(), lr=RATE)
        observer.attach(optimizer)
        set_gradients(model)
        optimizer.step()
        del optimizer
        gc.collect()
    observer.attach(SGD(model.parameters(), lr=RATE))
    assert len(observer._hooks) == len(observer._snapshots) == 1
    assert observer.peak_bytes <= 2 * 2 * 4 * sum(p.numel() for p in model.parameters())


def test_after_a_fault_attach_begins_anew() -> None:
    model, optimizer = training()
    observer = StepObserver(model, raises).attach(optimizer)
    set_gradients(model)
    for _ in range(3):
        with pytest.warns(UserWarning, match="stops observing after a fault"):
            optimizer.step()
        observer.attach(optimizer)
    assert len(observer._hooks) == len(observer._snapshots) == 1
    assert hook_count(optimizer) == 2
