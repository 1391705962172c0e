"""`StepObserver` in plain torch: the content of a step, and the steps that are shown or counted."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad import OptimizerStep, StepObserver
from tests.observation.watching import (
    NAMES,
    RATE,
    Kept,
    assert_exact,
    clone_gradients,
    clone_weights,
    counted_operations,
    equal,
    make_model,
    raises,
    set_gradients,
    training,
)

# The content of a step


def test_each_step_is_shown_exactly() -> None:
    model, optimizer = training()
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer) as observer:
        assert observer.names == NAMES
        for index in range(3):
            before = clone_weights(model)
            set_gradients(model, seed=index)
            optimizer.step()
            assert equal(steps[-1].before, before)
            assert_exact(steps[-1], model, optimizer, index, seed=index)
    assert len(steps) == 3
    assert not observer.skipped


def test_the_weights_after_the_step_share_memory_with_the_parameters() -> None:
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
    assert equal(steps[0].before, clone_weights(make_model()))


def test_gradients_that_the_optimizer_overwrites_are_shown_as_applied() -> None:
    model, optimizer = training(momentum=0.9, nesterov=True, foreach=True)
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        for seed in range(2):
            set_gradients(model, seed)
            optimizer.step()
            assert_exact(steps[-1], model, optimizer, seed, seed)
            assert not equal(steps[-1].gradients, clone_gradients(model))


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
    assert equal(steps[0].after, clone_weights(model)[1:])


def test_chosen_elements_are_shown_in_one_dimension() -> None:
    model, optimizer = training()
    steps, chosen = Kept(), torch.tensor([7, 0])
    elements = {"0.weight": chosen}
    with StepObserver(model, steps, elements=lambda name, p: elements.get(name)).attach(optimizer):
        before = clone_weights(model)
        set_gradients(model)
        optimizer.step()
    (step,) = steps
    whole = (before[0], model[0].weight.grad, model[0].weight.detach())
    shown = (step.before[0], step.gradients[0], step.after[0])
    assert equal(shown, [t.flatten()[chosen] for t in whole])
    assert equal(step.before[1:], before[1:])
    assert equal(step.after[1:], clone_weights(model)[1:])


def test_elements_is_called_for_every_parameter_however_small() -> None:
    model, optimizer = training()
    asked, steps = {}, Kept()

    def elements(name: str, parameter: Tensor) -> Tensor:
        asked[name] = parameter
        return torch.tensor([parameter.numel() - 1])

    with StepObserver(model, steps, elements=elements).attach(optimizer):
        set_gradients(model)
        optimizer.step()
    assert tuple(asked) == NAMES
    assert all(asked[name] is p for name, p in model.named_parameters())
    assert equal(steps[0].after, [p.detach().flatten()[-1:] for p in model.parameters()])


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


def test_an_optimizer_that_steps_another_is_shown_with_the_weights_before_both() -> None:
    class Twice(SGD):
        def step(self, closure=None):
            inner.step()
            inner.step()

    model, inner = training()
    outer = Twice(model.parameters(), lr=RATE)
    steps, before = Kept(), clone_weights(model)
    with StepObserver(model, steps).attach(outer, inner):
        set_gradients(model)
        outer.step()
    assert [step.optimizer for step in steps] == [inner, inner, outer]
    assert equal(steps[0].before, before)
    assert equal(steps[2].before, before)


def test_parameters_added_during_a_run_are_shown_and_foreign_ones_are_not() -> None:
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
        before = clone_weights(model)
        optimizer.step()
    assert [step.names for step in steps] == [NAMES, NAMES, (*NAMES, "2.weight")]
    assert observer.names == (*NAMES, "2.weight")
    assert equal(steps[2].before, before)
    assert equal(steps[2].after, clone_weights(model))


def test_names_are_read_again_only_for_unknown_parameters() -> None:
    class Counting(nn.Linear):
        reads = 0

        def named_parameters(self, *arguments, **options):
            self.reads += 1
            return super().named_parameters(*arguments, **options)

    model, foreign = Counting(2, 1), nn.Linear(2, 1)
    optimizer = SGD([*model.parameters(), *foreign.parameters()], lr=RATE)
    set_gradients(model)
    model.reads = 0
    with StepObserver(model, lambda step: None).attach(optimizer):
        for _ in range(3):
            optimizer.step()
    assert model.reads == 2  # once at first, and once for the foreign parameters


def test_pairs_of_name_and_parameter_can_replace_a_module() -> None:
    model, optimizer = training()
    steps = Kept()
    pairs = ((f"mine.{name}", p) for name, p in model[1].named_parameters())
    with StepObserver(pairs, steps).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
        optimizer.step()
    assert observer.names == steps[1].names == ("mine.weight", "mine.bias")
    assert equal(steps[1].after, clone_weights(model[1]))


@pytest.mark.parametrize("nothing", [nn.ReLU(), []], ids=["module", "pairs"])
def test_a_module_or_pairs_without_parameters_are_refused(nothing) -> None:
    with pytest.raises(
        ValueError, match="no parameter to observe, neither in a module nor as pair"
    ):
        StepObserver(nothing, print)


# Steps that are due


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


def test_should_observe_is_called_once_for_each_step_with_its_index() -> None:
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


def test_a_learning_rate_on_the_device_is_read_once_for_each_group() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            # The operator behind `Tensor.item` has no public name:
            # aten/src/ATen/native/native_functions.yaml, _local_scalar_dense.
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


# Skipped steps


def test_a_step_without_gradients_is_counted_and_not_shown() -> None:
    model, optimizer = training()
    with StepObserver(model, raises).attach(optimizer) as observer:
        optimizer.step()
        optimizer.step(lambda: None)
    assert observer.skipped == {"no gradients": 2}


def test_a_closure_that_is_not_called_ends_the_observation_with_a_warning() -> None:
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


def test_a_group_with_learning_rate_0_is_left_out_of_the_step() -> None:
    model = make_model()
    still, moving = ({"params": layer.parameters()} for layer in model)
    optimizer, steps = SGD([still | {"lr": 0.0}, moving], lr=RATE), Kept()
    with StepObserver(model, steps).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
    assert steps[0].names == NAMES[2:]
    assert equal(steps[0].gradients, clone_gradients(model)[2:])
    assert equal(steps[0].after, clone_weights(model)[2:])
    assert not observer.skipped


def test_weights_that_move_at_learning_rate_0_are_shown() -> None:
    class Stubborn(SGD):
        def step(self, closure=None):
            with torch.no_grad():
                model[1].bias.add_(1)

    model, optimizer = training(Stubborn, lr=0.0)
    steps, before = Kept(), clone_weights(model)
    with StepObserver(model, steps).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
    assert steps[0].names == ("1.bias",)
    assert equal(steps[0].before, before[3:])
    assert not observer.skipped


def test_a_step_that_stalls_at_another_learning_rate_is_shown() -> None:
    """A stalled update is a result, so that the step is not counted as skipped."""
    model, optimizer = training(lr=1e-30)
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
    assert steps[0].names == NAMES
    assert equal(steps[0].before, steps[0].after)
    assert not observer.skipped


def test_an_optimizer_without_a_learning_rate_is_observed() -> None:
    class Signs(Optimizer):
        def __init__(self, parameters, lr):
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad.sign())

    model, optimizer = training(Signs)
    assert "lr" not in optimizer.param_groups[0]
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        set_gradients(model)
        optimizer.step()
    assert_exact(steps[0], model, optimizer, 0, seed=1)
