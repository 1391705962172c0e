"""`Snapshots` with a `Memory` function: requests for all parameters, repeated after a change."""

import pytest
import torch
from torch import Tensor

from altgrad.observation.snapshots import Copies, Request, Snapshot, Snapshots, read_weights_after
from tests.observation.copying import changed, reshape, take, with_gradient


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Lender:
    """A `Memory` function that records its requests and lends to all but some names."""

    def __init__(self, *but: str) -> None:
        self.but = but
        self.asked: list[list[Request]] = []
        self.given: list[dict[str, Copies]] = []

    def __call__(self, requests) -> list[Copies | None]:
        self.asked.append([*requests])
        self.given.append({})
        for name, parameter, gradient_dtype, indices in requests:
            if name not in self.but:
                shape = parameter.shape if indices is None else indices.shape
                self.given[-1][name] = Copies(
                    torch.empty(shape, dtype=parameter.dtype),
                    torch.empty(shape, dtype=gradient_dtype),
                    torch.empty(shape, dtype=parameter.dtype),
                )
        return [self.given[-1].get(request.name) for request in requests]

    def names(self) -> list[list[str]]:
        return [[request.name for request in each] for each in self.asked]


def assert_shown(lender: Lender, taken: list[Snapshot], parameters: list[Tensor]) -> None:
    """Assert that all parameters are copied, into lent memory where the lender gave any."""
    before = [parameter.detach().clone() for parameter in parameters]
    gradients = [parameter.grad.clone() for parameter in parameters]
    for parameter in parameters:
        changed(parameter)
    with torch.no_grad():
        after = read_weights_after(taken)
    for number, (each, parameter) in enumerate(zip(taken, parameters, strict=True)):
        at = slice(None) if each.indices is None else each.indices
        assert each.parameter is parameter
        assert torch.equal(each.before, before[number][at])
        assert torch.equal(each.gradient, gradients[number][at])
        assert torch.equal(after[number], parameter.detach()[at])
        given = lender.given[-1].get(each.name)
        places = (each.before, each.gradient, after[number])
        if given is not None:
            assert all(mine is theirs for mine, theirs in zip(places, given, strict=True))
        else:
            assert places[2].data_ptr() == parameter.data_ptr()


def test_memory_is_requested_for_all_parameters_at_once_and_only_once() -> None:
    parameters = [with_gradient(torch.randn(n)) for n in (2, 3, 4)]
    parameters[1] = with_gradient(torch.randn(3).bfloat16())
    without = torch.randn(3).requires_grad_()
    chosen = torch.tensor([3, 0])
    lender = Lender("p0")
    snapshots = Snapshots(lambda name, _: chosen if name == "p2" else None, memory=lender)
    for _ in range(3):
        taken = take(snapshots, *parameters, without)
        assert_shown(lender, taken, parameters)
    assert lender.names() == [["p0", "p1", "p2", "p3"]]  # one without a gradient may get it later
    (requests,) = lender.asked
    assert all(r.parameter is p for r, p in zip(requests, [*parameters, without], strict=True))
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert [r.gradient_dtype for r in requests] == dtypes
    assert [r.indices for r in requests] == [None, None, chosen, None]


def test_memory_is_requested_again_for_all_when_a_parameter_is_new() -> None:
    parameters, lender = [with_gradient(torch.randn(n)) for n in (2, 3)], Lender("p1")
    snapshots = Snapshots(None, memory=lender)
    (_, own) = take(snapshots, *parameters)
    parameters.append(with_gradient(torch.randn(4)))
    taken = take(snapshots, *parameters)
    assert lender.names() == [["p0", "p1"], ["p0", "p1", "p2"]]
    assert taken[1] is own  # memory of the snapshots themselves is reused
    assert_shown(lender, taken, parameters)


def test_memory_is_requested_for_a_parameter_without_a_gradient_if_it_had_one() -> None:
    parameters, lender = [with_gradient(torch.randn(n)) for n in (2, 3, 4)], Lender()
    snapshots = Snapshots(None, memory=lender)
    take(snapshots, *parameters[:2])
    gradient, parameters[0].grad = parameters[0].grad, None
    taken = take(snapshots, *parameters)
    assert [each.name for each in taken] == ["p1", "p2"]
    assert sorted(lender.names()[1]) == ["p0", "p1", "p2"]
    parameters[0].grad = gradient
    assert_shown(lender, take(snapshots, *parameters), parameters)
    assert len(lender.asked) == 2


@pytest.mark.parametrize(
    "new", [torch.randn(5), torch.randn(3, dtype=torch.float64)], ids=["shape", "dtype"]
)
def test_memory_is_requested_again_for_all_when_a_parameter_changes(new: Tensor) -> None:
    parameters, lender = [with_gradient(torch.randn(n)) for n in (2, 3)], Lender()
    snapshots = Snapshots(None, memory=lender)
    take(snapshots, *parameters)
    reshape(parameters[1], new)
    parameters[1].grad = torch.randn_like(new)
    assert_shown(lender, take(snapshots, *parameters), parameters)
    assert lender.names() == [["p0", "p1"]] * 2
    assert lender.asked[1][1].gradient_dtype == new.dtype
    assert_shown(lender, take(snapshots, *parameters), parameters)
    assert len(lender.asked) == 2


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have the parameter's dtype here"
)
@pytest.mark.parametrize("changed_one", ["parameter", "gradient"])
def test_memory_is_requested_again_when_the_dtype_of_parameter_or_gradient_changes(
    changed_one: str,
) -> None:
    parameter, lender = with_gradient(torch.randn(3)), Lender()
    snapshots = Snapshots(None, memory=lender)
    take(snapshots, parameter)
    both = {"parameter": torch.float32, "gradient": torch.float32} | {changed_one: torch.bfloat16}
    reshape(parameter, torch.randn(3, dtype=both["parameter"]))
    parameter.grad_dtype = None  # allows any dtype
    parameter.grad = torch.randn(3, dtype=both["gradient"])
    taken = take(snapshots, parameter)
    assert (taken[0].before.dtype, taken[0].gradient.dtype) == (*both.values(),)
    assert_shown(lender, taken, [parameter])
    assert [each.gradient_dtype for (each,) in lender.asked] == [torch.float32, both["gradient"]]


def test_memory_is_requested_again_for_the_others_when_a_parameter_is_gone() -> None:
    parameters, lender = [with_gradient(torch.randn(n)) for n in (2, 3)], Lender()
    snapshots = Snapshots(None, memory=lender)
    take(snapshots, *parameters)
    taken = take(snapshots, parameters[0])
    assert lender.names() == [["p0", "p1"], ["p0"]]
    assert_shown(lender, taken, parameters[:1])


def test_memory_is_not_requested_again_when_parameters_are_left_out() -> None:
    """Layers are left out of steps at which they are not due."""
    parameters, lender = [with_gradient(torch.randn(n)) for n in (2, 3)], Lender()
    snapshots = Snapshots(None, memory=lender)
    for left_out in ((), {"p0"}, (), {"p1"}, {"p0"}, ()):
        taken = take(snapshots, *parameters, left_out=left_out)
        due = [p for number, p in enumerate(parameters) if f"p{number}" not in left_out]
        assert_shown(lender, taken, due)
    assert lender.names() == [["p0", "p1"]]


def test_memory_is_requested_again_after_clear() -> None:
    parameters, lender = [with_gradient(torch.randn(n)) for n in (2, 3)], Lender()
    snapshots = Snapshots(None, memory=lender)
    take(snapshots, *parameters)
    snapshots.clear()
    assert_shown(lender, take(snapshots, *parameters), parameters)
    assert lender.names() == [["p0", "p1"]] * 2


def test_memory_that_is_no_longer_lent_is_not_written_to() -> None:
    parameter, lender = with_gradient(torch.randn(2)), Lender()
    snapshots = Snapshots(None, memory=lender)
    take(snapshots, parameter)
    lent = [each.clone() for each in lender.given[0]["p0"][:2]]
    lender.but = ("p0",)
    other = with_gradient(torch.randn(3))
    changed(parameter)
    assert_shown(lender, take(snapshots, parameter, other), [parameter, other])
    assert all(map(torch.equal, lender.given[0]["p0"][:2], lent))


def test_peak_bytes_includes_lent_memory() -> None:
    parameter, lender = with_gradient(torch.randn(10)), Lender()
    snapshots = Snapshots(None, memory=lender)
    take(snapshots, parameter)
    assert snapshots.peak_bytes == 3 * 10 * 4


@pytest.mark.parametrize("lender", [None, Lender("p1"), Lender()], ids=["none", "some", "all"])
def test_a_parameter_that_changes_without_a_gradient_gets_memory_with_its_next_one(lender) -> None:
    parameters = [with_gradient(torch.randn(n)) for n in (2, 3)]
    snapshots = Snapshots(None, memory=lender)
    take(snapshots, *parameters)
    for parameter, new in zip(parameters, (torch.randn(5), torch.randn(6)), strict=True):
        reshape(parameter, new)
    parameters[0].grad = torch.randn(5)
    (taken,) = take(snapshots, *parameters)
    assert torch.equal(taken.gradient, parameters[0].grad)
    parameters[1].grad = torch.randn(6)
    (_, taken) = take(snapshots, *parameters)
    assert torch.equal(taken.before, parameters[1])
    assert torch.equal(taken.gradient, parameters[1].grad)
