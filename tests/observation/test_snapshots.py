"""`Snapshots`: exact copies, in memory that is reused and counted to the byte."""

import warnings
import weakref

import pytest
import torch
from torch import Tensor

from altgrad.observation.snapshots import SMALL, Snapshots
from tests.observation.copying import changed, fixed, pointers, read_after, take, with_gradient

EVERY_SHAPE = {
    "matrix": lambda: torch.randn(3, 4),
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 5),
    "transposed": lambda: torch.randn(4, 3).t(),
    "sliced": lambda: torch.randn(6, 8)[::2, ::2],
    "expanded_rows": lambda: torch.randn(3, 1, 4).movedim(0, 2),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "bf16": lambda: torch.randn(3, 4).bfloat16(),
    "float64": lambda: torch.randn(3, 4, dtype=torch.float64),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Copies


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_whole_copies_equal_the_weights_and_gradients(shape: str) -> None:
    parameter = with_gradient(EVERY_SHAPE[shape]())
    weights, gradient = parameter.detach().clone(), parameter.grad.clone()
    (taken,) = take(Snapshots(None), parameter)
    changed(parameter)
    assert torch.equal(taken.before, weights)
    assert torch.equal(taken.gradient, gradient)
    assert taken.before.dtype == taken.gradient.dtype == weights.dtype
    assert torch.equal(read_after(taken), parameter)
    assert read_after(taken).data_ptr() == parameter.data_ptr()
    assert not any(t.requires_grad for t in (taken.before, taken.gradient, read_after(taken)))


@pytest.mark.parametrize("shape", [name for name in EVERY_SHAPE if name != "empty"])
def test_chosen_elements_are_those_of_the_flattened_weights(shape: str) -> None:
    parameter = with_gradient(EVERY_SHAPE[shape]())
    indices = torch.randint(parameter.numel(), (7,))
    weights, gradient = parameter.detach().clone(), parameter.grad.clone()
    (taken,) = take(Snapshots(fixed(indices)), parameter)
    changed(parameter)
    assert torch.equal(taken.before, weights.reshape(-1)[indices])
    assert torch.equal(taken.gradient, gradient.reshape(-1)[indices])
    assert torch.equal(read_after(taken), parameter.detach().reshape(-1)[indices])
    assert not any(t.requires_grad for t in (taken.before, taken.gradient, read_after(taken)))


@pytest.mark.parametrize("shape", ["matrix", "empty"])
def test_an_empty_choice_of_elements_is_allowed(shape: str) -> None:
    parameter = with_gradient(EVERY_SHAPE[shape]())
    (taken,) = take(Snapshots(fixed(torch.empty(0, dtype=torch.int64))), parameter)
    assert taken.before.shape == taken.gradient.shape == read_after(taken).shape == (0,)


def test_whole_and_chosen_copies_come_in_the_order_of_the_parameters() -> None:
    parameters = [with_gradient(torch.randn(4)) for _ in range(4)]
    parameters[2].grad = None
    chosen = torch.tensor([3, 0])
    snapshots = Snapshots(lambda name, _: chosen if name == "p1" else None)
    taken = take(snapshots, *parameters)
    assert [each.name for each in taken] == ["p0", "p1", "p3"]
    assert [each.parameter is p for each, p in zip(taken, parameters[:2], strict=False)] == [
        True,
        True,
    ]
    for each, expected in zip(
        taken, [parameters[0], parameters[1][chosen], parameters[3]], strict=True
    ):
        assert torch.equal(each.before, expected)
    assert all(each.rests is True for each in taken)


def test_gradients_of_other_strides_than_the_weights_are_copied() -> None:
    parameter = with_gradient(torch.randn(3, 4), torch.randn(4, 3).t())
    (taken,) = take(Snapshots(None), parameter)
    assert torch.equal(taken.gradient, parameter.grad)
    assert torch.equal(taken.before, parameter)


def test_a_mixture_of_dtypes_and_shapes_is_copied() -> None:
    parameters = [with_gradient(make()) for make in EVERY_SHAPE.values()]
    for each, parameter in zip(take(Snapshots(None), *parameters), parameters, strict=True):
        assert torch.equal(each.before, parameter)
        assert torch.equal(each.gradient, parameter.grad)


def test_copies_of_gradients_with_a_graph_have_no_graph() -> None:
    parameter = torch.randn(3).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once in a process of create_graph
        (parameter**3).sum().backward(create_graph=True)
    assert parameter.grad.requires_grad
    (taken,) = take(Snapshots(None), parameter)
    assert torch.equal(taken.gradient, parameter.grad)
    assert not taken.gradient.requires_grad
    parameter.grad = None  # parameter and gradient refer to each other


@pytest.mark.parametrize("chosen", [None, torch.tensor([5, 1, 0])], ids=["whole", "chosen"])
def test_sparse_gradients_become_dense_with_repeated_entries_summed(chosen: Tensor | None) -> None:
    gradient = torch.sparse_coo_tensor(
        [[1, 0, 1]], [[1.0, 2], [3, 4], [10, 20]], (3, 2), check_invariants=True
    )
    parameter = with_gradient(torch.randn(3, 2), gradient)
    (taken,) = take(Snapshots(fixed(chosen)), parameter)
    dense = torch.tensor([[3.0, 4], [11, 22], [0, 0]])
    expected = dense if chosen is None else dense.flatten()[chosen]
    assert torch.equal(taken.gradient, expected)
    assert taken.gradient.layout == torch.strided
    assert not parameter.grad.is_coalesced()


@pytest.mark.parametrize("chosen", [None, torch.arange(999)], ids=["whole", "chosen"])
def test_gradients_are_divided_by_the_scale_and_not_multiplied_by_its_inverse(chosen) -> None:
    parameter = with_gradient(torch.randn(1000))
    scale = torch.tensor(3.0)
    gradient = parameter.grad.clone()
    expected = gradient / scale
    assert not torch.equal(expected, gradient * (1 / scale))
    (taken,) = take(Snapshots(fixed(chosen)), parameter, grad_scale=scale)
    assert torch.equal(taken.gradient, expected if chosen is None else expected[chosen])
    assert torch.equal(parameter.grad, gradient)
    assert torch.equal(taken.before, parameter if chosen is None else parameter[chosen])


def test_parameters_without_gradients_are_not_copied() -> None:
    parameter = torch.randn(2).requires_grad_()
    snapshots = Snapshots(None)
    assert take(snapshots, parameter) == take(snapshots) == []
    assert snapshots.peak_bytes == 0


# Memory


@pytest.mark.parametrize("elements", [None, fixed(torch.tensor([1, 2]))], ids=["whole", "chosen"])
@pytest.mark.parametrize("count", [3, SMALL + 1])
def test_every_buffer_is_reused_on_a_cpu(elements, count: int) -> None:
    parameter, snapshots = with_gradient(torch.randn(count)), Snapshots(elements)
    (taken,) = take(snapshots, parameter)
    first = (taken.before, taken.gradient)
    changed(parameter)
    (taken,) = take(snapshots, parameter)
    assert taken.before is first[0]
    assert taken.gradient is first[1]
    assert len(set(pointers(taken))) == 2
    whole = elements is None
    assert torch.equal(taken.before, parameter if whole else parameter[1:3])


def test_buffers_have_the_strides_of_what_they_copy() -> None:
    parameter = with_gradient(EVERY_SHAPE["channels_last"]())
    (taken,) = take(Snapshots(None), parameter)
    assert taken.before.stride() == parameter.stride()
    assert taken.gradient.stride() == parameter.grad.stride()


@pytest.mark.parametrize(
    "new", [torch.randn(5, 1), torch.randn(5, dtype=torch.float64)], ids=["shape", "dtype"]
)
def test_a_parameter_with_another_shape_or_dtype_gets_new_buffers(new: Tensor) -> None:
    parameter, snapshots = with_gradient(torch.randn(5)), Snapshots(None)
    first = take(snapshots, parameter)
    parameter.grad = None
    parameter.data = new
    parameter.grad = torch.randn_like(new)
    (taken,) = take(snapshots, parameter)
    assert not set(pointers(taken)) & set(pointers(*first))
    assert torch.equal(taken.before, parameter)
    assert torch.equal(taken.gradient, parameter.grad)
    assert taken.before.dtype == new.dtype
    assert pointers(*take(snapshots, parameter)) == pointers(taken)


def test_a_parameter_that_moved_to_another_device_gets_buffers_there() -> None:
    parameter, snapshots = with_gradient(torch.randn(5)), Snapshots(None)
    take(snapshots, parameter)
    torch.utils.swap_tensors(parameter, with_gradient(torch.empty(5, device="meta")))
    (taken,) = take(snapshots, parameter)
    assert taken.before.is_meta
    assert taken.gradient.is_meta


@pytest.mark.parametrize(
    ("count", "chosen", "kept"),
    [(SMALL, None, True), (SMALL + 1, None, False), (SMALL + 1, SMALL + 1, True)],
    ids=["small", "large", "chosen"],
)
def test_whole_buffers_of_large_parameters_are_not_kept_on_an_accelerator(
    count: int, chosen: int | None, kept: bool
) -> None:
    """The meta device stands for an accelerator, because it is not the CPU."""
    parameter = with_gradient(torch.empty(count, device="meta"))
    indices = None if chosen is None else torch.empty(chosen, dtype=torch.int64, device="meta")
    # Chosen already, because tensors on the meta device have no values to check.
    chosen_before = {parameter: ("p0", parameter.shape, indices)}
    snapshots = Snapshots(fixed(indices), chosen_before)
    (first,) = take(snapshots, parameter)
    (second,) = take(snapshots, parameter)
    assert (second.before is first.before) is kept
    assert (second.gradient is first.gradient) is kept
    buffers = [weakref.ref(tensor) for tensor in (first.before, first.gradient)]
    peak = snapshots.peak_bytes
    del first, second
    assert all((buffer() is not None) is kept for buffer in buffers)
    assert peak == 2 * 4 * count + (0 if chosen is None else 4 * chosen)


def test_clear_releases_the_buffers_and_keeps_the_chosen_elements() -> None:
    chosen = []

    def elements(name: str, parameter: Tensor) -> Tensor:
        chosen.append(name)
        return torch.tensor([0])

    parameter, snapshots = with_gradient(torch.randn(5)), Snapshots(elements)
    (taken,) = take(snapshots, parameter)
    buffers = [weakref.ref(tensor) for tensor in (taken.before, taken.gradient)]
    del taken
    assert all(buffer() is not None for buffer in buffers)
    snapshots.clear()
    assert all(buffer() is None for buffer in buffers)
    changed(parameter)
    (taken,) = take(snapshots, parameter)
    assert torch.equal(taken.before, parameter[:1])
    assert chosen == ["p0"]


def test_peak_bytes_are_those_of_all_copies() -> None:
    whole = with_gradient(torch.randn(10))
    half = with_gradient(torch.randn(10).bfloat16())
    chosen = with_gradient(torch.randn(10, dtype=torch.float64))
    indices = torch.arange(3)
    snapshots = Snapshots(lambda name, _: indices if name == "p2" else None)
    take(snapshots, whole)
    assert snapshots.peak_bytes == 2 * 10 * 4
    # Two copies of each parameter, and three of chosen elements: also the weights after the step.
    take(snapshots, whole, half, chosen)
    assert snapshots.peak_bytes == 2 * 10 * 4 + 2 * 10 * 2 + 3 * 3 * 8
    # Kept buffers count, and the peak does not fall.
    half.grad = chosen.grad = None
    take(snapshots, whole)
    assert snapshots.peak_bytes == 2 * 10 * 4 + 2 * 10 * 2 + 3 * 3 * 8


def test_peak_bytes_includes_buffers_that_this_step_does_not_use() -> None:
    both, snapshots = [with_gradient(torch.randn(10)) for _ in range(2)], Snapshots(None)
    for without_gradient in both:
        gradient, without_gradient.grad = without_gradient.grad, None
        take(snapshots, *both)
        without_gradient.grad = gradient
    assert snapshots.peak_bytes == 2 * 2 * 10 * 4


def test_peak_bytes_excludes_released_copies_and_never_falls() -> None:
    parameter, snapshots = with_gradient(torch.randn(10)), Snapshots(None)
    take(snapshots, parameter)
    parameter.grad, parameter.data = None, torch.randn(15)
    parameter.grad = torch.randn(15)
    take(snapshots, parameter)
    assert snapshots.peak_bytes == 2 * 15 * 4
    for count in (14, 13):
        snapshots.clear()
        take(snapshots, with_gradient(torch.randn(count)))
    take(snapshots, with_gradient(torch.randn(8)))  # replaces the parameter of the last call
    assert snapshots.peak_bytes == 2 * 15 * 4


# Chosen elements


def test_elements_are_chosen_once_for_each_parameter_with_its_name_and_itself() -> None:
    calls = []

    def elements(name: str, parameter: Tensor) -> Tensor | None:
        calls.append((name, parameter))
        return torch.tensor([0]) if len(calls) == 1 else None

    a, b = (with_gradient(torch.randn(3)) for _ in range(2))
    snapshots = Snapshots(elements)
    for _ in range(3):
        one, two = take(snapshots, a, b)
        assert one.before.shape == (1,)
        assert two.before.shape == (3,)
    assert [name for name, _ in calls] == ["p0", "p1"]
    assert [parameter is each for (_, parameter), each in zip(calls, (a, b), strict=True)] == [
        True,
        True,
    ]


def test_elements_are_chosen_again_when_the_shape_changes() -> None:
    parameter = with_gradient(torch.randn(10))
    snapshots = Snapshots(lambda name, p: torch.tensor([p.numel() - 1]))
    take(snapshots, parameter)
    parameter.grad, parameter.data = None, torch.randn(2, 3)
    parameter.grad = torch.randn(2, 3)
    (taken,) = take(snapshots, parameter)
    assert torch.equal(taken.before, parameter.detach().flatten()[5:])


@pytest.mark.parametrize(
    "wrong",
    [
        *([0, 1], 0, torch.tensor(0), torch.tensor([[0]])),
        *(torch.tensor([0], dtype=dtype) for dtype in (torch.float32, torch.int32, torch.bool)),
    ],
    ids=repr,
)
def test_elements_that_are_not_flat_indices_are_refused(wrong: object) -> None:
    with pytest.raises(
        TypeError, match=r"elements\('p0'\)=.*: expected a one-dimensional int64 tensor of flat"
    ):
        take(Snapshots(fixed(wrong)), with_gradient(torch.randn(3)))


@pytest.mark.parametrize(("indices", "named"), [([0, 6, 7], 6), ([-1, 0], -1), ([5, -7, 9], -7)])
def test_the_first_index_out_of_range_is_named(indices: list[int], named: int) -> None:
    with pytest.raises(
        ValueError,
        match=rf"elements\('p0'\): the index {named} is out of range; expected 0 <= index < 6,",
    ):
        take(Snapshots(fixed(torch.tensor(indices))), with_gradient(torch.randn(2, 3)))


def test_the_first_and_the_last_element_are_in_range() -> None:
    parameter = with_gradient(torch.randn(2, 3))
    (taken,) = take(Snapshots(fixed(torch.tensor([0, 5]))), parameter)
    assert torch.equal(taken.before, parameter.detach().flatten()[[0, 5]])


def test_indices_follow_a_parameter_to_another_device() -> None:
    """They are not checked again, which is impossible on the meta device."""
    parameter, calls = with_gradient(torch.randn(5)), []

    def elements(name: str, _: Tensor) -> Tensor:
        calls.append(name)
        return torch.tensor([3, 1])

    snapshots = Snapshots(elements)
    take(snapshots, parameter)
    torch.utils.swap_tensors(parameter, with_gradient(torch.empty(5, device="meta")))
    (taken,) = take(snapshots, parameter)
    assert (taken.before.device.type, taken.indices.device.type) == ("meta", "meta")
    assert taken.before.shape == (2,)
    assert calls == ["p0"]


# Parameters that are left out


def test_a_parameter_that_is_left_out_is_not_copied_and_keeps_its_memory() -> None:
    parameters = [with_gradient(torch.randn(3)) for _ in range(3)]
    snapshots = Snapshots(None)
    first = take(snapshots, *parameters)
    expected = first[1].before.clone()
    for each in parameters:
        changed(each)
    taken = take(snapshots, *parameters, left_out={"p1"})
    assert [each.name for each in taken] == ["p0", "p2"]
    assert torch.equal(first[1].before, expected)
    assert pointers(*take(snapshots, *parameters)) == pointers(*first)
    assert torch.equal(first[1].before, parameters[1])


def test_replaced_parameters_are_released() -> None:
    snapshots = Snapshots(None)
    gone = []
    for _ in range(5):
        parameter = with_gradient(torch.randn(3))
        taken = take(snapshots, parameter, with_gradient(torch.randn(2)))
        gone.append((weakref.ref(parameter), weakref.ref(taken[0].before)))
        del parameter, taken
    for each in zip(*gone, strict=True):
        assert [reference() is None for reference in each] == [True] * 4 + [False]
    assert snapshots.peak_bytes == 2 * 4 * (3 + 2)


def test_memory_made_in_inference_mode_can_be_written_outside_of_it() -> None:
    snapshots, parameter = Snapshots(None), with_gradient(torch.randn(3))
    with torch.inference_mode():
        take(snapshots, parameter)
    changed(parameter)
    (taken,) = take(snapshots, parameter)
    assert torch.equal(taken.before, parameter)
