"""`StepObserver` with `on_outcome`: the outcome of each observed step."""

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.optim import SGD, AdamW

from altgrad import StepObserver
from altgrad.observation import StepOutcome
from altgrad.observation.snapshots import Copies, Memory, Request
from tests.observation.watching import (
    INF,
    NAMES,
    RATE,
    Kept,
    clone_weights,
    equal,
    make_model,
    raises,
    scaled_step,
    set_gradients,
    training,
)


def observed(model: nn.Module, **options) -> tuple[StepObserver, list[StepOutcome]]:
    outcomes: list[StepOutcome] = []
    return StepObserver(model, on_outcome=outcomes.append, **options), outcomes


def test_one_of_the_two_callbacks_is_needed() -> None:
    with pytest.raises(TypeError, match="on_step=None: expected a callable, or one as on_outcome"):
        StepObserver(make_model())


def test_the_outcome_of_a_successful_step_contains_the_step() -> None:
    model, optimizer = training()
    shown = []

    def on_outcome(outcome: StepOutcome) -> None:
        shown.append([t.clone() for t in outcome.step.after])
        outcomes.append(outcome)

    outcomes: list[StepOutcome] = []
    with StepObserver(model, raises, on_outcome=on_outcome).attach(optimizer):
        for index in range(2):
            set_gradients(model)
            optimizer.step()
            assert equal(shown[-1], clone_weights(model))
            assert (outcomes[-1].optimizer, outcomes[-1].index) == (optimizer, index)
    for outcome in outcomes:
        assert (outcome.skipped, outcome.error) == (None, None)
        assert outcome.step.names == NAMES
        assert (outcome.step.optimizer, outcome.step.index) == (optimizer, outcome.index)
        assert 0 < outcome.copy_seconds < 10


def test_steps_that_are_not_observed_have_no_outcome() -> None:
    model, optimizer = training()
    observer, outcomes = observed(model, should_observe=lambda index: index == 1)
    with observer.attach(optimizer):
        for _ in range(3):
            optimizer.step()
    assert [each.index for each in outcomes] == [1]


def test_a_step_that_raises_has_no_outcome() -> None:
    model, optimizer = training()
    observer, outcomes = observed(model)
    with observer.attach(optimizer):
        with pytest.raises(ArithmeticError):
            optimizer.step(raises)
        optimizer.step()
    assert [each.index for each in outcomes] == [0]


# Skipped steps


def test_the_outcome_of_a_skipped_step_has_the_reason_and_the_observer_does_not_count_it() -> None:
    model, optimizer = training(lr=0.0)
    observer, outcomes = observed(model)
    with observer.attach(optimizer):
        optimizer.step()
        set_gradients(model)
        optimizer.step()
    assert [each.skipped for each in outcomes] == ["no gradients", "learning rate 0"]
    assert [each.error for each in outcomes] == [None, None]
    assert [each.step.names for each in outcomes] == [(), NAMES]
    assert outcomes[1].step.resting == {*NAMES}
    assert not observer.skipped


def test_the_step_of_an_outcome_includes_parameters_with_learning_rate_0() -> None:
    model = make_model()
    still, moving = ({"params": layer.parameters()} for layer in model)
    optimizer = SGD([still | {"lr": 0.0}, moving], lr=RATE)
    observer, outcomes = observed(model)
    with observer.attach(optimizer):
        set_gradients(model)
        optimizer.step()
    assert outcomes[0].skipped is None
    assert outcomes[0].step.names == NAMES
    assert outcomes[0].step.resting == {*NAMES[:2]}


@pytest.mark.parametrize("read", [True, False])
def test_a_step_skipped_by_a_fused_optimizer_is_recognised_only_if_found_inf_is_read(
    read: bool,
) -> None:
    model, optimizer = training(AdamW, fused=True)
    scaler = GradScaler("cpu", init_scale=4.0)
    observer, outcomes = observed(model, read_found_inf=read)
    with observer.attach(optimizer, scaler=scaler):
        for factor in (INF, 1.0):
            scaled_step(scaler, model, optimizer, factor)
    assert [each.skipped for each in outcomes] == ["inf" if read else None, None]
    assert [each.step.found_inf.item() for each in outcomes] == [1, 0]


def test_a_step_skipped_by_a_scaler_has_no_outcome_and_the_observer_counts_it() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    observer, outcomes = observed(model)
    with observer.attach(optimizer, scaler=scaler):
        scaled_step(scaler, model, optimizer, INF)
    assert outcomes == []
    assert observer.skipped == {"inf": 1}


# Errors


class Deaf(SGD):
    def step(self, closure=None):
        """Ignore the closure."""


ERRORS = {
    "should_observe": {"should_observe": raises},
    "elements": {"elements": raises},
    "should_copy": {"should_copy": raises},
    "memory": {"memory": lambda optimizer: raises},
}


@pytest.mark.parametrize("place", ERRORS)
def test_an_error_is_part_of_the_outcome_and_the_observation_goes_on(
    place: str,
) -> None:
    model, optimizer = training()
    observer, outcomes = observed(model, **ERRORS[place])
    with observer.attach(optimizer):
        for _ in range(2):
            set_gradients(model)
            optimizer.step()
        assert observer.is_observing
    assert [each.index for each in outcomes] == [0, 1]
    for outcome in outcomes:
        assert repr(outcome.error) == "ArithmeticError('of the user')"
        assert (outcome.step, outcome.skipped) == (None, None)
    assert observer.peak_bytes == 0


def test_an_error_that_the_callback_raises_ends_the_observation() -> None:
    def on_outcome(outcome: StepOutcome) -> None:
        outcomes.append(outcome)
        raise outcome.error

    model, optimizer = training()
    outcomes: list[StepOutcome] = []
    observer = StepObserver(model, on_outcome=on_outcome, should_observe=raises).attach(optimizer)
    with pytest.warns(UserWarning, match=r"error: ArithmeticError\('of the user'\) in raises, "):
        optimizer.step()
    optimizer.step()
    assert len(outcomes) == 1
    assert not observer.is_observing


def test_the_error_of_a_step_that_cannot_be_shown_names_the_optimizer() -> None:
    model, optimizer = training(Deaf)
    observer, outcomes = observed(model)
    with observer.attach(optimizer):
        optimizer.step(lambda: None)
    assert "Deaf does not call the closure" in str(outcomes[0].error)
    assert outcomes[0].step is None


def test_an_error_of_should_observe_belongs_to_its_step_and_the_next_step_is_shown() -> None:
    def should_observe(index: int) -> bool:
        if index == 1:
            raises()
        return True

    model, optimizer = training()
    observer, outcomes = observed(model, should_observe=should_observe)
    with observer.attach(optimizer):
        for _ in range(3):
            set_gradients(model)
            optimizer.step()
    assert [each.error is None for each in outcomes] == [True, False, True]
    assert [each.step is None for each in outcomes] == [False, True, False]


def test_an_error_of_should_observe_at_a_skipped_step_has_an_outcome() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    observer, outcomes = observed(model, should_observe=raises)
    with observer.attach(optimizer, scaler=scaler):
        scaled_step(scaler, model, optimizer, INF)
    assert [repr(each.error) for each in outcomes] == ["ArithmeticError('of the user')"]
    assert not observer.skipped


@pytest.mark.parametrize("next_one", ["fails", "cannot be shown"])
def test_copy_seconds_are_those_of_the_same_step(next_one: str) -> None:
    def memory(optimizer: SGD) -> Memory:
        def slow(requests: list[Request]) -> list[None]:
            time.sleep(0.2)
            return [None] * len(requests)

        return slow

    def should_observe(index: int) -> bool:
        if index == 1 and next_one == "fails":
            raises()
        return True

    class Listens(SGD):
        def step(self, closure=None):
            if closure is None:
                super().step()

    model, optimizer = training(Listens)
    observer, outcomes = observed(model, memory=memory, should_observe=should_observe)
    with observer.attach(optimizer):
        set_gradients(model)
        optimizer.step()
        optimizer.step(None if next_one == "fails" else lambda: None)
    assert outcomes[1].error is not None
    assert outcomes[0].copy_seconds > 0.2
    assert outcomes[1].copy_seconds < 0.2


# Memory


def test_memory_is_called_for_each_optimizer_and_requested_for_all_its_parameters_at_once() -> None:
    made: list[SGD] = []
    asked: list[list[str]] = []

    def memory(optimizer: SGD) -> Memory:
        def lend(requests: list[Request]) -> list[Copies]:
            asked.append([each.name for each in requests])
            return [Copies(*(torch.empty_like(p) for _ in range(3))) for _, p, _, _ in requests]

        made.append(optimizer)
        return lend

    model = make_model()
    optimizers = [SGD(layer.parameters(), lr=RATE) for layer in model]
    steps = Kept()
    with StepObserver(model, steps, memory=memory).attach(*optimizers):
        for _ in range(2):
            set_gradients(model)
            for optimizer in optimizers:
                optimizer.step()
    assert made == optimizers
    assert asked == [[*NAMES[:2]], [*NAMES[2:]]]
    assert equal([*steps[2].after, *steps[3].after], clone_weights(model))


def test_layers_that_are_not_due_keep_their_memory() -> None:
    asked, model = [], make_model()
    optimizer = SGD(model.parameters(), lr=RATE)

    def lend(requests: list[Request]) -> list[None]:
        asked.append([each.name for each in requests])
        return [None] * len(requests)

    def should_copy(name: str, index: int) -> bool:
        return name.startswith("0.") or index % 2 == 0

    steps = Kept()
    observer = StepObserver(model, steps, should_copy=should_copy, memory=lambda _: lend)
    with observer.attach(optimizer):
        for _ in range(4):
            set_gradients(model)
            optimizer.step()
    assert [step.names for step in steps] == [NAMES, NAMES[:2]] * 2
    assert asked == [[*NAMES]]


# Unreduced gradients


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def placed(mesh: DeviceMesh, tensor: Tensor, placement) -> DTensor:
    return DTensor.from_local(tensor, mesh, [placement], run_check=False)


class Still(SGD):
    """An optimizer that changes nothing, and does not reduce gradients over ranks."""

    def step(self, closure=None):
        pass


@pytest.fixture
def partly_unreduced(mesh: DeviceMesh) -> nn.ParameterList:
    model = nn.ParameterList(
        nn.Parameter(placed(mesh, torch.ones(2), placement)) for placement in (Shard(0),) * 2
    )
    model[0].grad = placed(mesh, torch.ones(2), Partial())
    model[1].grad = placed(mesh, torch.ones(2), Replicate())
    return model


def test_unreduced_gradients_are_an_error_that_says_what_to_do(
    partly_unreduced,
) -> None:
    observer, outcomes = observed(partly_unreduced)
    optimizer = Still(partly_unreduced.parameters(), lr=RATE)
    with observer.attach(optimizer):
        optimizer.step()
    said = str(outcomes[0].error)
    assert said.startswith("the gradient of 0 is placed as (Partial(sum),) and the parameter as ")
    assert said.endswith("before the step, or leave 0 out of what is observed")


def test_parameters_with_unreduced_gradients_can_be_left_out(
    partly_unreduced,
) -> None:
    left_out = []
    observer, outcomes = observed(
        partly_unreduced, leave_out=lambda names, why: left_out.append((names, why))
    )
    optimizer = Still(partly_unreduced.parameters(), lr=RATE)
    with observer.attach(optimizer):
        optimizer.step()
    assert outcomes[0].step.names == ("1",)
    ((names, why),) = left_out
    assert names == ["0"]
    assert why.startswith("the gradient of 0 is placed as ")
    assert why.endswith("to their parameters' placements before the step")


def test_an_unreduced_gradient_of_a_parameter_that_is_not_due_is_ignored(partly_unreduced) -> None:
    observer, outcomes = observed(
        partly_unreduced, should_copy=lambda name, index: name == "1", leave_out=raises
    )
    optimizer = Still(partly_unreduced.parameters(), lr=RATE)
    with observer.attach(optimizer):
        optimizer.step()
    assert outcomes[0].error is None
    assert outcomes[0].step.names == ("1",)
