"""`flat_state`: states are gathered from layers, split, and refused if not elementwise."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from altgrad.twins.flat_state import NotElementwiseError, split_state, take_state

SHAPES = [torch.Size([4, 3]), torch.Size([]), torch.Size([1]), torch.Size([5])]
take_float32 = partial(take_state, dtype=torch.float32, real_dtype=torch.float32)


def run(kind, shapes, dtype=torch.float32, steps=3, **options) -> tuple:
    """Return the optimizer and parameters of a short training."""
    generator = torch.Generator().manual_seed(0)
    held = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    optimizer = kind(held, **options)
    for _ in range(steps):
        for each in held:
            each.grad = torch.randn(each.shape, generator=generator).to(dtype)
        optimizer.step()
    return optimizer, held


def everything(shapes) -> list[Tensor]:
    return [torch.arange(shape.numel()) for shape in shapes]


def assert_shares_nothing(taken: dict, states: list) -> None:
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    addresses = {each.data_ptr() for each in tensors}
    assert not addresses & {v.data_ptr() for v in taken.values() if isinstance(v, Tensor)}


# --- from layers


def test_sampled_elements_follow_one_another_and_zeros_follow_them() -> None:
    states = [
        {"v": torch.arange(12.0).view(4, 3).t().contiguous().t()},  # in another order in memory
        {"v": torch.tensor([7.0, 8.0])},
    ]
    shapes = [torch.Size([4, 3]), torch.Size([2])]
    taken = take_float32(states, shapes, [torch.tensor([0, 5, 11]), torch.tensor([1])], 6)
    assert taken["v"].tolist() == [0, 5, 11, 8, 0, 0]
    assert_shares_nothing(taken, states)


KINDS = {
    "Adam": (torch.optim.Adam, {"exp_avg", "exp_avg_sq"}),
    "NAdam": (torch.optim.NAdam, {"exp_avg", "exp_avg_sq"}),
    "RAdam": (torch.optim.RAdam, {"exp_avg", "exp_avg_sq"}),
    "Adamax": (torch.optim.Adamax, {"exp_avg", "exp_inf"}),
    "Adagrad": (torch.optim.Adagrad, {"sum"}),
    "Adadelta": (torch.optim.Adadelta, {"square_avg", "acc_delta"}),
    "ASGD": (torch.optim.ASGD, {"ax"}),
    "RMSprop": (torch.optim.RMSprop, {"square_avg"}),
    "Rprop": (torch.optim.Rprop, {"prev", "step_size"}),
    "momentum": (partial(torch.optim.SGD, momentum=0.9), {"momentum_buffer"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shapes", [SHAPES, *([shape] for shape in SHAPES)], ids=str)
def test_layers_of_any_shape_have_flat_states_and_single_counters(kind: str, shapes) -> None:
    make, elementwise = KINDS[kind]
    optimizer, held = run(make, shapes)
    states = [dict(optimizer.state[each]) for each in held]
    taken = take_float32(states, shapes, everything(shapes), 64)
    assert {name for name, value in taken.items() if value.shape == (64,)} == elementwise
    for name, value in taken.items():
        expected = torch.cat([state[name].flatten() for state in states])
        if name not in elementwise:
            assert torch.equal(value, states[0][name])
        else:
            assert torch.equal(value[: len(expected)], expected)
            assert not value[len(expected) :].any()
    assert_shares_nothing(taken, states)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_of_its_own_keeps_its_shape(shape: torch.Size) -> None:
    optimizer, (held,) = run(torch.optim.Adam, [shape])
    state = optimizer.state[held]
    taken = take_float32([state], [shape], everything([shape]), shape.numel(), shape=shape)
    for name, value in state.items():
        assert torch.equal(taken[name], value)
        assert taken[name].shape == value.shape


def test_states_in_the_dtype_of_the_run_get_that_of_the_twin() -> None:
    state = {
        "step": torch.tensor(3.0),
        "m": torch.ones(5, dtype=torch.bfloat16),
        "v": torch.ones(5, dtype=torch.float64),
        "codes": torch.ones(5, dtype=torch.uint8),
        "mask": torch.ones(5, dtype=torch.bool),
    }
    options = {"dtype": torch.float32, "real_dtype": torch.bfloat16}
    taken = take_state([state], [torch.Size([5])], [torch.arange(5)], 5, **options)
    assert {name: value.dtype for name, value in taken.items()} == {
        "step": torch.float32,
        "m": torch.float32,
        "v": torch.float64,
        "codes": torch.uint8,
        "mask": torch.bool,
    }


def test_a_counter_stays_exact_in_a_twin_of_16_bits() -> None:
    state = {"step": torch.tensor(257.0), "m": torch.ones(())}
    options = {"dtype": torch.bfloat16, "real_dtype": torch.float32}
    taken = take_state(
        [state], [torch.Size([])], [torch.zeros(1, dtype=torch.int64)], 64, **options
    )
    assert taken["step"].item() == 257
    assert taken["m"].dtype == torch.bfloat16


def test_states_that_are_no_tensors_are_copied() -> None:
    state = {"step": 3, "none": None, "list": [1, torch.ones(())], "name": "a"}
    taken = take_float32([state, state], [torch.Size([3])] * 2, [torch.arange(3)] * 2, 64)
    assert taken == state
    assert taken["list"] is not state["list"]
    assert taken["list"][1] is not state["list"][1]


def test_a_state_in_a_graph_is_copied_without_the_graph() -> None:
    state = {"v": torch.ones(3, requires_grad=True) * 2, "one": torch.ones((), requires_grad=True)}
    taken = take_float32([state], [torch.Size([3])], [torch.arange(3)], 3)
    assert not any(value.requires_grad for value in taken.values())


def test_layers_without_states_have_an_empty_flat_state() -> None:
    assert take_float32([{}, {}], [torch.Size([3])] * 2, [torch.arange(3)] * 2, 64) == {}


class Marked(Tensor):
    """A tensor of a class of its own, as quantised states are."""


BAD = {
    "rows": (
        torch.ones(4, 1),
        r"state\['s'\] has shape \(4, 1\) for a parameter of shape \(4, 3\)",
    ),
    "flat": (torch.ones(12), r"has shape \(12,\)"),
    "a class": (torch.ones(4, 3).as_subclass(Marked), "is a Marked"),
    "a class of one number": (torch.ones(()).as_subclass(Marked), "is a Marked"),
    "sparse": (torch.ones(4, 3).to_sparse(), "expected one number per element"),
    "in a list": ([torch.ones(4, 3)], r"state\['s'\] has shape \(4, 3\)"),
    "in a dict": ({"a": (torch.ones(7),)}, r"state\['s'\] has shape \(7,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_state_that_is_not_elementwise_is_named(case: str) -> None:
    value, message = BAD[case]
    with pytest.raises(NotElementwiseError, match=message):
        take_float32([{"ok": 1, "s": value}], [torch.Size([4, 3])], [torch.arange(5)], 64)


def test_adafactor_has_no_elementwise_states() -> None:
    optimizer, (held,) = run(torch.optim.Adafactor, SHAPES[:1])
    with pytest.raises(NotElementwiseError, match=r"state\['row_var'\]"):
        take_float32([optimizer.state[held]], SHAPES[:1], everything(SHAPES[:1]), 64)


@pytest.mark.parametrize("other", [{}, {"m": None}, {"m": 1}])
def test_states_that_some_layers_lack_are_refused(other: dict) -> None:
    states = [{"m": torch.ones(3)}, other]
    for each in (states, states[::-1]):
        with pytest.raises(NotElementwiseError, match="expected the same states"):
            take_float32(each, [torch.Size([3])] * 2, [torch.arange(3)] * 2, 64)


# --- from a flat parameter


def test_parts_of_a_flat_state_are_padded_anew() -> None:
    state = {"step": torch.tensor(5.0), "v": torch.arange(128.0), "k": [1]}
    before = copy.deepcopy(state)
    parts = split_state(state, torch.tensor([2, 70, 100]), 64)
    assert parts["v"].tolist() == [2, 70, 100] + [0] * 61
    assert parts["step"].item() == 5
    assert parts["k"] == [1]
    assert parts["k"] is not state["k"]
    parts["step"] += 1
    assert state["step"] == before["step"]


@pytest.mark.parametrize("shape", [torch.Size([2, 5]), torch.Size([10])])
def test_a_small_parameter_keeps_its_shape(shape: torch.Size) -> None:
    state = {"step": torch.tensor(5.0), "v": torch.arange(10.0).view(shape)}
    parts = split_state(state, torch.arange(10), 10, shape)
    assert torch.equal(parts["v"], state["v"])
    assert parts["v"].data_ptr() != state["v"].data_ptr()


@pytest.mark.parametrize("shape", [torch.Size([]), torch.Size([1])])
def test_a_parameter_of_one_element_keeps_all_shapes(shape: torch.Size) -> None:
    state = {"step": torch.tensor(5.0), "v": torch.ones(shape)}
    parts = split_state(state, torch.arange(1), 1, shape)
    assert {name: value.shape for name, value in parts.items()} == {"step": (), "v": shape}


NOT_ELEMENTWISE = {
    "a class": {"v": torch.ones(128).as_subclass(Marked)},
    "a matrix beside": {"v": torch.ones(128), "q": torch.ones(4, 4)},
    "a list": {"v": [torch.ones(128)]},
    "too short": {"v": torch.ones(16)},
}


@pytest.mark.parametrize("case", NOT_ELEMENTWISE)
def test_states_that_are_not_elementwise_cannot_go_apart(case: str) -> None:
    with pytest.raises(NotElementwiseError, match="do not hold one number per element"):
        split_state(NOT_ELEMENTWISE[case], torch.arange(64, 128), 64)


@pytest.mark.parametrize("case", ["a class", "a matrix beside", "a list"])
def test_states_of_any_kind_are_copied_if_no_layer_goes_apart(case: str) -> None:
    state = NOT_ELEMENTWISE[case]
    parts = split_state(state, torch.arange(128), 128)
    assert [*map(type, parts.values())] == [*map(type, state.values())]
    assert parts["v"] is not state["v"]
