"""The code that applies suggestions runs, and stores each layer in the suggested format."""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from altgrad import FloatFormat, WeightStorage
from altgrad.quantization.block_formats import get_formats
from altgrad.report import Advice, Assessment, FormatInfo, LayerInfo, Run, Verdict
from altgrad.report.applying import group_by_pattern, write_code, write_rules

FINE, WATCH = Verdict.STORES_FINE, Verdict.WATCH
OWN = {"mine": FloatFormat("mine", exponent_bits=3, mantissa_bits=2, bias=3)}


def write_lines(
    verdicts: dict[str, dict[str, Verdict]],
    scaling="tensor",
    own=OWN,
    dtype="float32",
    optimizers=MappingProxyType({}),
    figures=MappingProxyType({}),
) -> str:
    """Write the code for a run with these verdicts by layer and format."""
    names = dict.fromkeys(f for by_format in verdicts.values() for f in by_format)
    formats = {f: FormatInfo.from_format(own.get(f) or get_formats(f)[0], scaling) for f in names}
    layers = {n: LayerInfo((4, 4), dtype, 16, tuple(fs)) for n, fs in verdicts.items()}
    advice = [
        Advice(layer, format, verdict, figures, {}, "")
        for layer, by_format in verdicts.items()
        for format, verdict in by_format.items()
    ]
    run = Run(Path("run"), formats, scaling, layers, [], [], [], {}, "", optimizers=optimizers)
    return write_code(run, Assessment({}, advice, {}, ""))


def test_lines_say_that_a_format_was_judged_by_single_updates_alone() -> None:
    verdicts = {"a": {"bf16": FINE}, "b": {"bf16": WATCH}}
    assert "# Judged by single updates" in write_lines(verdicts)
    assert "single updates" not in write_lines(verdicts, figures={"progress_kept": 0.99})


def run_lines(lines: str, names: list[str]) -> dict[str, str]:
    """Run the code on a model with layers of these names and return their formats."""
    parameters = [(name, nn.Parameter(torch.randn(4, 4))) for name in names]
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    class Model(nn.Module):
        def named_parameters(self, *_, **__):
            return iter(parameters)

    found = {"optimizer": optimizer, "model": Model()}
    exec(compile(lines, "lines", "exec"), found)
    storage = found["storage"]
    assert isinstance(storage, WeightStorage)
    return storage.formats


def test_weights_in_16_bits_are_not_stored_in_16_bits_again() -> None:
    both = {"bf16": FINE, "e4m3fn": WATCH}
    assert 'WeightStorage("bf16")' in write_lines({"head": both})
    lines = write_lines({"head": both}, dtype="bfloat16")
    assert "bf16" not in lines
    assert 'WeightStorage("e4m3fn", rounding="stochastic")' in lines
    assert write_lines({"head": {"bf16": WATCH}}, dtype="bfloat16") == ""


def test_each_layer_is_stored_in_the_smallest_format_that_stores_it_fine() -> None:
    verdicts = {
        "embed.weight": {"bf16": FINE, "e4m3fn": FINE},
        "blocks.0.norm.weight": {"bf16": Verdict.FROZEN, "e4m3fn": Verdict.FROZEN},
        "blocks.1.norm.weight": {"bf16": Verdict.FROZEN, "e4m3fn": Verdict.FROZEN},
        **{f"blocks.{k}.mlp.{k}.weight": {"bf16": FINE, "e4m3fn": WATCH} for k in range(12)},
        "head.weight": {"bf16": FINE},
    }
    lines = write_lines(verdicts)
    assert run_lines(lines, [*verdicts]) == {
        "embed.weight": "e4m3fn",
        **{f"blocks.{k}.mlp.{k}.weight": "bf16" for k in range(12)},
        "head.weight": "bf16",
    }
    assert lines.count("SamplingRule(") == 4
    assert 'SamplingRule("blocks.*.mlp.*.weight"),' in lines
    assert "2 of 16 layers stay unchanged" in lines


def test_layers_with_similar_names_and_different_formats_have_separate_rules() -> None:
    verdicts = {
        "a.0.weight": {"bf16": FINE},
        "a.1.weight": {"bf16": FINE, "e5m2": FINE},
        "a.2.weight": {"bf16": WATCH},
    }
    expected = {"a.0.weight": "bf16", "a.1.weight": "e5m2"}
    assert run_lines(write_lines(verdicts), [*verdicts]) == expected


def test_layers_share_a_rule_if_one_number_in_their_names_decides_the_format() -> None:
    verdicts = {
        **{f"blocks.{k}.mlp.0.weight": {"bf16": WATCH} for k in range(3)},
        **{f"blocks.{k}.mlp.2.weight": {"bf16": FINE} for k in range(3)},
    }
    lines = write_lines(verdicts)
    assert 'SamplingRule("blocks.*.mlp.2.weight"),' in lines
    assert lines.count("SamplingRule(") == 2
    assert run_lines(lines, [*verdicts]) == {f"blocks.{k}.mlp.2.weight": "bf16" for k in range(3)}


PARTS = st.sampled_from(["a", "b", "0", "1", "12", "a*", "w[0]", "", "x1"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(
    st.dictionaries(NAMES, st.sampled_from([(FINE, FINE), (FINE, WATCH), (WATCH, WATCH)])),
)
def test_the_rules_store_each_layer_in_its_format_whatever_its_name(
    verdicts: dict[str, tuple[Verdict, Verdict]],
) -> None:
    smallest = {(FINE, FINE): "e5m2", (FINE, WATCH): "bf16"}
    lines = write_lines(
        {name: dict(zip(("bf16", "e5m2"), each, strict=True)) for name, each in verdicts.items()}
    )
    if any(each[0] is FINE for each in verdicts.values()):
        expected = {name: smallest[each] for name, each in verdicts.items() if each[0] is FINE}
        assert apply_rules(lines, [*verdicts]) == expected


def apply_rules(lines: str, names: list[str]) -> dict[str, str]:
    """Return the format of each stored layer, by the first rule that matches its name."""
    arguments: dict = {}

    def note(formats: str, *, layers: tuple = ({"layers": "*"},), **_: object) -> None:
        arguments.update(formats=formats, layers=layers)

    def rule(layers: str, **settings: object) -> dict:
        return {"layers": layers, **settings}

    code = lines[lines.index("storage =") : lines.index("storage.attach")]
    exec(compile(code, "lines", "exec"), {"WeightStorage": note, "SamplingRule": rule})
    found = {}
    for name in names:
        first = next(r for r in arguments["layers"] if fnmatchcase(name, r["layers"]))
        if first.get("enabled", True):
            found[name] = first.get("formats", arguments["formats"])
    return found


def count_calls(call: Callable[[], object]) -> int:
    """Count the calls of functions, those written in C included."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "template",
    ["layer{0}.weight", "blocks.{0}.weight", "block{0}.0.weight", "a.{1}.b.{2}.weight"],
)
@pytest.mark.parametrize("verdicts", [[FINE], [FINE, WATCH]], ids=["all", "every second"])
def test_twice_as_many_layers_take_twice_the_work(template: str, verdicts: list[Verdict]) -> None:
    def write(count: int) -> str:
        names = [template.format(k, k % 20, k // 20) for k in range(count)]
        formats = itertools.cycle(verdicts)
        layers = {name: {"bf16": each} for name, each in zip(names, formats, strict=False)}
        return write_lines(layers | {"other": {"bf16": WATCH}})

    write(2)  # imports, and caches of regular expressions
    few, many = (count_calls(lambda count=count: write(count)) for count in (400, 800))
    assert many < 2.3 * few


def test_one_format_for_all_layers_needs_no_rule() -> None:
    verdicts = {name: {"bf16": FINE} for name in ("a", "b")}
    lines = write_lines(verdicts)
    assert 'WeightStorage("bf16")' in lines
    assert "SamplingRule" not in lines
    assert run_lines(lines, ["a", "b", "not observed"]) == dict.fromkeys(
        ["a", "b", "not observed"], "bf16"
    )


def test_without_a_fine_format_the_code_rounds_stochastically() -> None:
    lines = write_lines({"a": {"e5m2": Verdict.NEEDS_REMEDY, "bf16": Verdict.FROZEN}})
    assert 'WeightStorage("bf16", rounding="stochastic")' in lines
    assert run_lines(lines, ["a"]) == {"a": "bf16"}


def test_unknown_verdicts_get_no_remedy() -> None:
    unsure, unjudged, out = Verdict.UNCERTAIN, Verdict.NOT_JUDGED, Verdict.RANGE
    assert write_lines({"a": {"bf16": unsure}, "b": {"bf16": unjudged}, "c": {"e5m2": out}}) == ""
    lines = write_lines({"a": {"bf16": FINE}, "b": {"bf16": unsure}, "c": {"bf16": out}})
    assert "2 of 3 layers stay unchanged" in lines
    assert "lose updates" not in lines
    lines = write_lines({"a": {"e5m2": WATCH, "bf16": unsure}})
    assert 'WeightStorage("e5m2", rounding="stochastic")' in lines


def test_a_comment_says_that_a_rule_also_stores_layers_that_were_not_observed() -> None:
    lines = write_lines({"0.weight": {"bf16": FINE}, "0.bias": {"bf16": WATCH}})
    assert 'SamplingRule("*.weight")' in lines
    assert "not observed" in lines


def test_a_user_format_with_the_name_of_a_built_in_one_is_not_suggested() -> None:
    own = {"e4m3fn": FloatFormat("e4m3fn", exponent_bits=5, mantissa_bits=10, bias=15)}
    assert write_lines({"a": {"e4m3fn": FINE}}, own=own) == ""
    assert 'WeightStorage("e4m3fn")' in write_lines({"a": {"e4m3fn": FINE}})


def test_without_verdicts_there_is_no_code() -> None:
    assert write_lines({}) == ""


def test_formats_that_weight_storage_does_not_support_are_not_suggested() -> None:
    assert write_lines({"a": {"mine": FINE}}) == ""
    verdicts = {"a": {"mine": FINE, "nvfp4": FINE, "bf16": FINE}, "b": {"nvfp4": FINE}}
    assert run_lines(write_lines(verdicts), [*verdicts]) == {"a": "bf16"}


@pytest.mark.parametrize("scaling", [None, "channel", ("block", 2)])
def test_the_code_has_the_scaling_of_the_run(scaling) -> None:
    lines = write_lines({"a": {"e4m3fn": FINE}, "b": {"e4m3fn": WATCH}}, scaling)
    assert "scaling=" in lines
    found: dict = {}
    head = lines[: lines.index("storage.attach")]
    exec(compile(head, "lines", "exec"), found)
    assert found["storage"].scaling == scaling


@pytest.mark.parametrize(
    "name", ['a"b', "a'b\"", "a\nimport os", "w[0]", "a*b", "\\", "é.0.ü", "7"]
)
def test_names_are_quoted_as_python_strings(name: str) -> None:
    verdicts = {name: {"bf16": FINE}, "other": {"bf16": WATCH}, "a.b": {"bf16": WATCH}}
    lines = write_lines(verdicts)
    parameter = nn.Parameter(torch.ones(4))
    found = {
        "optimizer": torch.optim.SGD([(name, parameter), ("other", nn.Parameter(torch.ones(2)))])
    }
    exec(compile(lines.replace(", module=model", ""), "lines", "exec"), found)
    assert found["storage"].formats == {name: "bf16"}


@pytest.mark.parametrize(
    "scaling",
    ['x"), __import__("os").system("id"), ("', ('block", 1), exit(), ("', 2), ("block", "2), f(")],
)
def test_no_scaling_is_read_as_code(scaling) -> None:
    """Files are checked when they are read; a `Run` made in Python is not."""
    lines = write_lines({"a": {"bf16": FINE}, "b": {"bf16": WATCH}}, scaling)
    calls = [n for n in ast.walk(ast.parse(lines)) if isinstance(n, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} == {
        *("SamplingRule", "WeightStorage", "storage.attach")
    }


def test_patterns_match_exactly_the_names_with_their_value() -> None:
    chosen = {"a.0.norm": "kept", "a.1.norm": "kept", "a.0.mlp": None, "norm": "kept", "b.0": "x"}
    assert group_by_pattern(chosen) == {"a.*.norm": "kept", "norm": "kept", "b.*": "x"}
    assert write_rules(chosen, "kept")[-1] == 'SamplingRule("b.*", formats="x")'


def test_several_optimizers_are_all_attached() -> None:
    verdicts = {"a": {"bf16": FINE}, "b": {"bf16": WATCH}}
    two = {"torch.optim.adamw.AdamW": 1, "torch.optim.sgd.SGD": 1}
    assert "storage.attach(optimizer_1, optimizer_2, module=model)" in write_lines(
        verdicts, optimizers=two
    )
