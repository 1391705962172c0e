"""`parameter_names`: names as the user wrote them, whatever is wrapped around the module."""

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import _common_utils as fsdp

from altgrad.observation.parameter_names import parameter_names

PLAIN = ["weight", "bias"]


def names_of(source: object) -> list[str]:
    return list(parameter_names(source).values())


def linear() -> nn.Module:
    return nn.Linear(2, 1)


def holding(**children: nn.Module | nn.Parameter) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_plain_module_keeps_its_names_and_their_order() -> None:
    module = holding(b=linear(), a=holding(c=linear()), d=nn.Parameter(torch.ones(1)))
    expected = {parameter: name for name, parameter in module.named_parameters()}
    assert parameter_names(module) == expected
    assert names_of(module) == list(expected.values())
    assert set(expected.values()) >= {"b.weight", "a.c.bias", "d"}


def test_a_compiled_module_has_the_names_of_the_module() -> None:
    assert names_of(torch.compile(linear(), backend="eager")) == PLAIN
    inside = holding(a=torch.compile(linear(), backend="eager"))
    assert [name for name, _ in inside.named_parameters()] == [
        "a._orig_mod.weight",
        "a._orig_mod.bias",
    ]
    assert names_of(inside) == ["a.weight", "a.bias"]


def test_activation_checkpointing_leaves_no_trace_in_names() -> None:
    inside = holding(a=checkpoint_wrapper(linear()))
    assert "_checkpoint_wrapped_module" in vars(inside.a)["_modules"]
    assert names_of(inside) == ["a.weight", "a.bias"]


@pytest.mark.parametrize(
    "attribute",
    ["_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"],
)
def test_the_attributes_of_wrappers_are_removed_wherever_they_are(attribute: str) -> None:
    module = holding(**{attribute: holding(a=holding(**{attribute: linear()}))})
    assert next(module.named_parameters())[0] == f"{attribute}.a.{attribute}.weight"
    assert names_of(module) == ["a.weight", "a.bias"]


def test_fsdp_still_keeps_its_module_under_the_attribute_that_is_removed() -> None:
    assert fsdp.FSDP_WRAPPED_MODULE == "_fsdp_wrapped_module"


def test_a_name_that_only_contains_that_of_a_wrapper_stays() -> None:
    assert names_of(holding(my_orig_mod=linear())) == ["my_orig_mod.weight", "my_orig_mod.bias"]


def test_the_module_of_data_parallel_is_removed() -> None:
    assert names_of(nn.DataParallel(linear())) == PLAIN
    assert names_of(holding(a=nn.DataParallel(linear()))) == ["a.weight", "a.bias"]
    assert names_of(nn.DataParallel(nn.DataParallel(linear()))) == PLAIN


@pytest.mark.usefixtures("process_group")
def test_the_module_of_distributed_data_parallel_is_removed() -> None:
    wrapped = nn.parallel.DistributedDataParallel(linear())
    assert names_of(wrapped) == PLAIN
    assert names_of(torch.compile(wrapped, backend="eager")) == PLAIN
    inside = nn.parallel.DistributedDataParallel(torch.compile(linear(), backend="eager"))
    assert names_of(inside) == PLAIN


def test_a_submodule_that_the_user_named_module_keeps_its_name() -> None:
    own = ["module.weight", "module.bias"]
    assert names_of(holding(module=linear())) == own
    assert names_of(nn.DataParallel(holding(module=linear()))) == own
    assert names_of(holding(module=nn.DataParallel(linear()))) == own


def test_names_that_collide_are_numbered() -> None:
    module = holding(weight=nn.Parameter(torch.ones(1)), _orig_mod=linear(), _fpw_module=linear())
    assert names_of(module) == ["weight", "weight-2", "bias", "weight-3", "bias-2"]


def test_pairs_of_two_modules_may_repeat_names() -> None:
    pairs = chain(linear().named_parameters(), linear().named_parameters())
    assert names_of(pairs) == ["weight", "bias", "weight-2", "bias-2"]


def test_a_number_that_is_taken_is_not_given_again() -> None:
    a, b, c = (torch.ones(1) for _ in range(3))
    assert names_of([("w", a), ("w-2", b), ("w", c)]) == ["w", "w-2", "w-3"]


def test_pairs_are_cleaned_of_attributes_that_no_user_gives() -> None:
    pairs = [("_orig_mod.a.module.w", torch.ones(1)), ("module.w", torch.ones(1))]
    assert names_of(pairs) == ["a.module.w", "module.w"]


def test_a_tied_parameter_has_the_first_of_its_names() -> None:
    module = holding(a=linear(), b=linear())
    module.b.weight = module.a.weight
    assert names_of(module) == ["a.weight", "a.bias", "b.bias"]
    tied = module.a.weight
    assert parameter_names([("x", tied), ("y", tied)]) == {tied: "x"}
    assert names_of([("x", tied), ("y", tied), ("x", torch.ones(1))]) == ["x", "x-2"]


def test_equal_parameters_are_not_tied() -> None:
    pairs = [("a", torch.ones(1)), ("b", torch.ones(1))]
    assert names_of(pairs) == ["a", "b"]


def test_without_parameters_there_are_no_names() -> None:
    assert parameter_names(nn.ReLU()) == {}
    assert parameter_names([]) == {}


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ([torch.ones(1)], "Tensor"),
        ({"weight": torch.ones(1)}, "str"),
        ([("weight", 1.0)], "tuple"),
        ([("weight",)], "tuple"),
        ([["weight", torch.ones(1)]], "list"),
    ],
    ids=repr,
)
def test_what_is_neither_a_module_nor_pairs_is_named(source: object, kind: str) -> None:
    with pytest.raises(TypeError, match=f"pairs of name and parameter, .* not {kind}$"):
        parameter_names(source)


@pytest.mark.parametrize("source", [[(0, torch.ones(1))], 5, None], ids=repr)
def test_numbers_for_names_and_what_cannot_be_iterated_are_a_type_error_too(source: object) -> None:
    with pytest.raises(TypeError):
        parameter_names(source)
