"""Names of parameters without wrappers, and the registry that reads them again."""

import gc
import weakref
from collections.abc import Iterator
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh

# Private, because torch has no public name for the attribute of a wrapper.
from torch.distributed.fsdp import _common_utils as fsdp, fully_shard
from torch.nn.utils import parametrizations, parametrize
from torch.optim import SGD

from altgrad.observation.parameter_names import ParameterRegistry, parameter_names

PLAIN = ["weight", "bias"]


def read_names(source: object) -> list[str]:
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
    assert read_names(module) == list(expected.values())
    assert set(expected.values()) >= {"b.weight", "a.c.bias", "d"}


def test_a_compiled_module_has_the_names_of_the_module() -> None:
    assert read_names(torch.compile(linear(), backend="eager")) == PLAIN
    inside = holding(a=torch.compile(linear(), backend="eager"))
    assert [name for name, _ in inside.named_parameters()] == [
        "a._orig_mod.weight",
        "a._orig_mod.bias",
    ]
    assert read_names(inside) == ["a.weight", "a.bias"]


def test_activation_checkpointing_leaves_no_trace_in_names() -> None:
    inside = holding(a=checkpoint_wrapper(linear()))
    assert "_checkpoint_wrapped_module" in vars(inside.a)["_modules"]
    assert read_names(inside) == ["a.weight", "a.bias"]


@pytest.mark.parametrize(
    "attribute",
    ["_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"],
)
def test_the_attributes_of_wrappers_are_removed_wherever_they_are(attribute: str) -> None:
    module = holding(**{attribute: holding(a=holding(**{attribute: linear()}))})
    assert next(module.named_parameters())[0] == f"{attribute}.a.{attribute}.weight"
    assert read_names(module) == ["a.weight", "a.bias"]


def test_fsdp_still_keeps_its_module_under_the_attribute_that_is_removed() -> None:
    assert fsdp.FSDP_WRAPPED_MODULE == "_fsdp_wrapped_module"


def test_a_name_that_only_contains_that_of_a_wrapper_stays() -> None:
    assert read_names(holding(my_orig_mod=linear())) == ["my_orig_mod.weight", "my_orig_mod.bias"]


def test_the_part_module_of_data_parallel_is_removed() -> None:
    assert read_names(nn.DataParallel(linear())) == PLAIN
    assert read_names(holding(a=nn.DataParallel(linear()))) == ["a.weight", "a.bias"]
    assert read_names(nn.DataParallel(nn.DataParallel(linear()))) == PLAIN


@pytest.mark.usefixtures("process_group")
def test_the_part_module_of_distributed_data_parallel_is_removed() -> None:
    wrapped = nn.parallel.DistributedDataParallel(linear())
    assert read_names(wrapped) == PLAIN
    assert read_names(torch.compile(wrapped, backend="eager")) == PLAIN
    inside = nn.parallel.DistributedDataParallel(torch.compile(linear(), backend="eager"))
    assert read_names(inside) == PLAIN


def test_a_submodule_that_the_user_named_module_keeps_its_name() -> None:
    own = ["module.weight", "module.bias"]
    assert read_names(holding(module=linear())) == own
    assert read_names(nn.DataParallel(holding(module=linear()))) == own
    assert read_names(holding(module=nn.DataParallel(linear()))) == own


@pytest.mark.parametrize("package", ["lightning.fabric", "lightning_fabric"])
def test_the_parts_that_fabric_adds_are_removed(package: str) -> None:
    wrappers = pytest.importorskip(f"{package}.wrappers")
    # Fabric has no public name for the class; `Fabric.setup` makes its objects.
    wrapped = wrappers._FabricModule(linear(), SimpleNamespace())
    assert next(name for name, _ in wrapped.named_parameters()) == "_forward_module.weight"
    assert read_names(wrapped) == PLAIN
    for inside in (nn.DataParallel(linear()), torch.compile(linear(), backend="eager")):
        assert read_names(wrappers._FabricModule(inside, SimpleNamespace())) == PLAIN


def test_the_part_module_of_deepspeed_is_removed() -> None:
    # The attribute of the engine: deepspeed/runtime/engine.py.
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = holding(module=linear())
    assert read_names(engine) == ["module.weight", "module.bias"]
    child = type("Child", (type(engine),), {})()
    child.module = linear()
    assert read_names(holding(a=child)) == ["a.weight", "a.bias"]
    other = type("DeepSpeedEngine", (nn.Module,), {"__module__": "mine"})()
    other.module = linear()
    assert read_names(other) == ["module.weight", "module.bias"]


class Scale(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.by * weight


def test_a_weight_under_a_parametrization_has_its_own_name() -> None:
    module = holding(a=linear(), b=linear(), c=linear())
    parametrizations.orthogonal(module.a)
    parametrizations.weight_norm(module.b)
    parametrize.register_parametrization(module.c, "weight", Scale())
    assert "a.parametrizations.weight.original" in dict(module.named_parameters())
    assert sorted(read_names(module)) == [
        *("a.bias", "a.weight"),
        *("b.bias", "b.weight.original0", "b.weight.original1"),
        *("c.bias", "c.weight", "c.weight.0.by"),
    ]


def test_modules_that_the_user_named_like_a_parametrization_keep_their_names() -> None:
    module = holding(parametrizations=holding(weight=holding(original=linear())))
    assert read_names(module)[0] == "parametrizations.weight.original.weight"


def test_the_prefix_of_peft_stays() -> None:
    peft = pytest.importorskip("peft")
    module = peft.get_peft_model(holding(a=linear()), peft.LoraConfig(target_modules=["a"]))
    assert "base_model.model.a.lora_A.default.weight" in read_names(module)


def test_names_that_collide_are_numbered() -> None:
    module = holding(weight=nn.Parameter(torch.ones(1)), _orig_mod=linear(), _fpw_module=linear())
    assert read_names(module) == ["weight", "weight-2", "bias", "weight-3", "bias-2"]


def test_pairs_of_two_modules_may_repeat_names() -> None:
    pairs = chain(linear().named_parameters(), linear().named_parameters())
    assert read_names(pairs) == ["weight", "bias", "weight-2", "bias-2"]


def test_a_number_that_is_taken_is_not_given_again() -> None:
    a, b, c = (torch.ones(1) for _ in range(3))
    assert read_names([("w", a), ("w-2", b), ("w", c)]) == ["w", "w-2", "w-3"]


def test_attributes_of_wrappers_are_removed_from_the_names_of_pairs() -> None:
    pairs = [("_orig_mod.a.module.w", torch.ones(1)), ("module.w", torch.ones(1))]
    assert read_names(pairs) == ["a.module.w", "module.w"]


def test_a_tied_parameter_has_the_first_of_its_names() -> None:
    module = holding(a=linear(), b=linear())
    module.b.weight = module.a.weight
    assert read_names(module) == ["a.weight", "a.bias", "b.bias"]
    tied = module.a.weight
    assert parameter_names([("x", tied), ("y", tied)]) == {tied: "x"}
    assert read_names([("x", tied), ("y", tied), ("x", torch.ones(1))]) == ["x", "x-2"]


def test_equal_parameters_are_not_tied() -> None:
    pairs = [("a", torch.ones(1)), ("b", torch.ones(1))]
    assert read_names(pairs) == ["a", "b"]


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
def test_a_source_that_is_neither_a_module_nor_pairs_is_refused_by_its_type(
    source: object, kind: str
) -> None:
    with pytest.raises(
        TypeError, match=f"module: expected .* pairs of name and parameter, .* got {kind}$"
    ):
        parameter_names(source)


@pytest.mark.parametrize("source", [[(0, torch.ones(1))], 5, None], ids=repr)
def test_names_that_are_numbers_and_sources_that_cannot_be_iterated_are_refused(
    source: object,
) -> None:
    with pytest.raises(TypeError):
        parameter_names(source)


# ParameterRegistry


class Counting(nn.Sequential):
    """A module that counts how often its names are read."""

    reads = 0

    def named_parameters(self, *arguments, **options):
        self.reads += 1
        return super().named_parameters(*arguments, **options)


def read_stepped_names(registry: ParameterRegistry, optimizer: SGD) -> list[str]:
    return [name for name, _, _ in registry.find_stepped(optimizer)]


def test_a_registry_knows_the_parameters_by_name_and_the_names_by_parameter() -> None:
    module = nn.Sequential(torch.compile(linear(), backend="eager"))
    registry = ParameterRegistry(module)
    assert registry.module is module
    assert registry.names == parameter_names(module)
    assert [*registry.parameters] == ["0.weight", "0.bias"]
    assert registry.parameters["0.bias"] is module[0].bias
    pairs = ParameterRegistry(iter([("w", module[0].weight)]))
    assert pairs.module is None
    assert pairs.names == {module[0].weight: "w"}


@pytest.mark.parametrize("nothing", [nn.ReLU(), []], ids=["module", "pairs"])
def test_a_registry_without_parameters_is_refused(nothing: object) -> None:
    with pytest.raises(ValueError, match="there is no parameter to observe, neither in a module"):
        ParameterRegistry(nothing)
    with pytest.raises(TypeError, match="pairs of name and parameter"):
        ParameterRegistry([torch.ones(1)])


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_stepped_parameters_come_in_the_order_of_the_optimizer_and_say_if_their_rate_is_0(
    zero,
) -> None:
    module = nn.Sequential(linear(), linear())
    groups = [{"params": module[1].parameters(), "lr": zero}, {"params": [module[0].weight]}]
    optimizer = SGD(groups, lr=0.1)
    stepped = ParameterRegistry(module).find_stepped(optimizer)
    assert [(name, rests) for name, _, rests in stepped] == [
        ("1.weight", True),
        ("1.bias", True),
        ("0.weight", False),
    ]
    assert all(module.get_parameter(name) is parameter for name, parameter, _ in stepped)


def test_a_group_without_a_learning_rate_does_not_rest() -> None:
    module = linear()
    optimizer = SGD(module.parameters(), lr=0.0)
    del optimizer.param_groups[0]["lr"]
    assert [rests for _, _, rests in ParameterRegistry(module).find_stepped(optimizer)] == [
        False,
        False,
    ]


def test_names_are_read_again_for_unknown_parameters_and_only_once_for_foreign_ones() -> None:
    module = Counting(linear())
    optimizer = SGD(module[0].parameters(), lr=0.1)
    registry = ParameterRegistry(module)
    for _ in range(2):
        assert read_stepped_names(registry, optimizer) == ["0.weight", "0.bias"]
    assert module.reads == 1
    foreign = linear()
    optimizer.add_param_group({"params": foreign.parameters()})
    for _ in range(2):
        assert read_stepped_names(registry, optimizer) == ["0.weight", "0.bias"]
    assert module.reads == 2
    other = SGD([*foreign.parameters(), module[0].bias], lr=0.1)
    for _ in range(2):
        assert read_stepped_names(registry, other) == ["0.bias"]
        assert read_stepped_names(registry, optimizer) == ["0.weight", "0.bias"]
    assert module.reads == 3
    module.append(linear())
    optimizer.add_param_group({"params": module[1].parameters()})
    for _ in range(2):
        assert read_stepped_names(registry, optimizer)[2:] == ["1.weight", "1.bias"]
    assert module.reads == 4
    assert [*registry.parameters] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_parameter_that_the_module_takes_over_from_another_gets_a_name() -> None:
    module, foreign = nn.Sequential(linear()), linear()
    optimizer = SGD([*module.parameters(), *foreign.parameters()], lr=0.1)
    registry = ParameterRegistry(module)
    assert len(registry.find_stepped(optimizer)) == 2
    module.append(foreign)
    registry.read()
    assert read_stepped_names(registry, optimizer)[2:] == ["1.weight", "1.bias"]


def test_names_of_pairs_stay_as_they_were_given() -> None:
    module = nn.Sequential(linear(), linear())
    registry = ParameterRegistry([("mine", module[0].weight)])
    optimizer = SGD(module.parameters(), lr=0.1)
    before = registry.names
    for _ in range(2):
        assert read_stepped_names(registry, optimizer) == ["mine"]
    registry.read()
    assert registry.names is before


@pytest.mark.usefixtures("process_group")
def test_shards_are_known_also_after_an_evaluation() -> None:
    """An evaluation leaves the outermost module with whole parameters."""
    module = fully_shard(linear(), mesh=init_device_mesh("cpu", (1,)))
    optimizer = SGD(module.parameters(), lr=0.1)

    def evaluate() -> None:
        with torch.no_grad():
            module(torch.ones(1, 2))
        assert not {*module.parameters()} & {*optimizer.param_groups[0]["params"]}

    evaluate()
    registry = ParameterRegistry(module)
    assert {*registry.names} == {*optimizer.param_groups[0]["params"]}
    assert read_stepped_names(registry, optimizer) == PLAIN
    evaluate()
    registry.read()
    assert read_stepped_names(registry, optimizer) == PLAIN


@pytest.mark.parametrize("how", ["optimizer gone", "forgotten", "no longer stepped"])
def test_foreign_parameters_are_released_when_they_are_no_longer_stepped(how: str) -> None:
    module, foreign = linear(), nn.Parameter(torch.ones(2))
    optimizer = SGD([*module.parameters(), foreign], lr=0.1)
    registry = ParameterRegistry(module)
    registry.find_stepped(optimizer)
    replaced, module.weight = module.weight, nn.Parameter(torch.ones(1, 2))
    gone = [weakref.ref(foreign), weakref.ref(replaced)]
    optimizer.param_groups[0]["params"] = [module.bias, module.weight, foreign]
    assert read_stepped_names(registry, optimizer) == ["bias", "weight"]
    del foreign, replaced
    gc.collect()
    assert [reference() is None for reference in gone] == [False, True]
    del optimizer.param_groups[0]["params"][2]
    if how == "optimizer gone":
        del optimizer
    elif how == "forgotten":
        registry.forget_optimizers()
    else:
        module.extra = nn.Parameter(torch.ones(1))
        optimizer.param_groups[0]["params"].append(module.extra)
        registry.find_stepped(optimizer)
    gc.collect()
    assert [reference() is None for reference in gone] == [True, True]
