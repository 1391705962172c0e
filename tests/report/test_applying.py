"""The lines that apply suggestions: they run, and each layer is stored in what was suggested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from altgrad import FloatFormat, WeightStorage
from altgrad.quantization.block_formats import get_formats
from altgrad.report import Advice, Assessment, FormatInfo, LayerInfo, Run, Verdict
from altgrad.report.applying import applying

FINE, WATCH = Verdict.STORES_FINE, Verdict.WATCH
OWN = {"mine": FloatFormat("mine", exponent_bits=3, mantissa_bits=2, bias=3)}


def lines_for(verdicts: dict[str, dict[str, Verdict]], scaling="tensor", own=OWN) -> str:
    """Of a run with these verdicts by layer and format."""
    names = dict.fromkeys(f for of_layer in verdicts.values() for f in of_layer)
    formats = {f: FormatInfo.of(own.get(f) or get_formats(f)[0], scaling) for f in names}
    layers = {n: LayerInfo((4, 4), "float32", 16, tuple(of)) for n, of in verdicts.items()}
    advice = [
        Advice(layer, format, verdict, {}, {}, "")
        for layer, of_layer in verdicts.items()
        for format, verdict in of_layer.items()
    ]
    run = Run(Path("run"), formats, scaling, layers, [], [], [], {}, "")
    return applying(run, Assessment(advice, {}, ""))


def stored(lines: str, names: list[str]) -> dict[str, str]:
    """What the lines store each layer of a model in."""
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


def test_each_layer_is_stored_in_the_smallest_format_that_stores_it_fine() -> None:
    verdicts = {
        "embed.weight": {"bf16": FINE, "e4m3fn": FINE},
        "blocks.0.norm.weight": {"bf16": Verdict.FROZEN, "e4m3fn": Verdict.FROZEN},
        "blocks.1.norm.weight": {"bf16": Verdict.FROZEN, "e4m3fn": Verdict.FROZEN},
        **{f"blocks.{k}.mlp.{k}.weight": {"bf16": FINE, "e4m3fn": WATCH} for k in range(12)},
        "head.weight": {"bf16": FINE},
    }
    lines = lines_for(verdicts)
    assert stored(lines, [*verdicts]) == {
        "embed.weight": "e4m3fn",
        **{f"blocks.{k}.mlp.{k}.weight": "bf16" for k in range(12)},
        "head.weight": "bf16",
    }
    assert lines.count("SamplingRule(") == 4
    assert 'SamplingRule("blocks.*.mlp.*.weight"),' in lines
    assert "2 of 16 layers stay as they are" in lines


def test_layers_that_differ_in_a_number_and_in_their_format_have_rules_of_their_own() -> None:
    verdicts = {
        "a.0.weight": {"bf16": FINE},
        "a.1.weight": {"bf16": FINE, "e5m2": FINE},
        "a.2.weight": {"bf16": WATCH},
    }
    expected = {"a.0.weight": "bf16", "a.1.weight": "e5m2"}
    assert stored(lines_for(verdicts), [*verdicts]) == expected


def test_layers_share_a_rule_where_one_of_their_numbers_tells_formats_apart() -> None:
    verdicts = {
        **{f"blocks.{k}.mlp.0.weight": {"bf16": WATCH} for k in range(3)},
        **{f"blocks.{k}.mlp.2.weight": {"bf16": FINE} for k in range(3)},
    }
    lines = lines_for(verdicts)
    assert 'SamplingRule("blocks.*.mlp.2.weight"),' in lines
    assert lines.count("SamplingRule(") == 2
    assert stored(lines, [*verdicts]) == {f"blocks.{k}.mlp.2.weight": "bf16" for k in range(3)}


def test_one_format_for_all_needs_no_rule() -> None:
    verdicts = {name: {"bf16": FINE} for name in ("a", "b")}
    lines = lines_for(verdicts)
    assert 'WeightStorage("bf16")' in lines
    assert "SamplingRule" not in lines
    assert stored(lines, ["a", "b", "not watched"]) == dict.fromkeys(
        ["a", "b", "not watched"], "bf16"
    )


def test_where_nothing_is_fine_the_remedy_is_named() -> None:
    lines = lines_for({"a": {"e5m2": Verdict.NEEDS_REMEDY, "bf16": Verdict.FROZEN}})
    assert 'WeightStorage("bf16", rounding="stochastic")' in lines
    assert stored(lines, ["a"]) == {"a": "bf16"}


def test_what_nobody_knows_is_not_called_lost_and_has_no_remedy() -> None:
    unsure, unjudged, out = Verdict.UNCERTAIN, Verdict.NOT_JUDGED, Verdict.RANGE
    assert lines_for({"a": {"bf16": unsure}, "b": {"bf16": unjudged}, "c": {"e5m2": out}}) == ""
    lines = lines_for({"a": {"bf16": FINE}, "b": {"bf16": unsure}, "c": {"bf16": out}})
    assert "2 of 3 layers stay as they are" in lines
    assert "What helps" not in lines
    lines = lines_for({"a": {"e5m2": WATCH, "bf16": unsure}})
    assert 'WeightStorage("e5m2", rounding="stochastic")' in lines


def test_a_rule_says_that_it_stores_what_was_not_watched() -> None:
    lines = lines_for({"0.weight": {"bf16": FINE}, "0.bias": {"bf16": WATCH}})
    assert 'SamplingRule("*.weight")' in lines
    assert "not watched" in lines


def test_a_format_of_ones_own_by_the_name_of_another_is_not_suggested() -> None:
    own = {"e4m3fn": FloatFormat("e4m3fn", exponent_bits=5, mantissa_bits=10, bias=15)}
    assert lines_for({"a": {"e4m3fn": FINE}}, own=own) == ""
    assert 'WeightStorage("e4m3fn")' in lines_for({"a": {"e4m3fn": FINE}})


def test_no_verdict_no_lines() -> None:
    assert lines_for({}) == ""


def test_formats_that_weights_cannot_be_stored_in_are_not_suggested() -> None:
    assert lines_for({"a": {"mine": FINE}}) == ""
    verdicts = {"a": {"mine": FINE, "nvfp4": FINE, "bf16": FINE}, "b": {"nvfp4": FINE}}
    assert stored(lines_for(verdicts), [*verdicts]) == {"a": "bf16"}


@pytest.mark.parametrize("scaling", [None, "channel", ("block", 2)])
def test_the_scaling_is_that_of_the_run(scaling) -> None:
    lines = lines_for({"a": {"e4m3fn": FINE}, "b": {"e4m3fn": WATCH}}, scaling)
    assert "scaling=" in lines
    found: dict = {}
    head = lines[: lines.index("storage.attach")]
    exec(compile(head, "lines", "exec"), found)
    assert found["storage"].scaling == scaling


@pytest.mark.parametrize(
    "name", ['a"b', "a'b\"", "a\nimport os", "w[0]", "a*b", "\\", "é.0.ü", "7"]
)
def test_names_are_quoted(name: str) -> None:
    verdicts = {name: {"bf16": FINE}, "other": {"bf16": WATCH}, "a.b": {"bf16": WATCH}}
    lines = lines_for(verdicts)
    parameter = nn.Parameter(torch.ones(4))
    found = {
        "optimizer": torch.optim.SGD([(name, parameter), ("other", nn.Parameter(torch.ones(2)))])
    }
    exec(compile(lines.replace(", module=model", ""), "lines", "exec"), found)
    assert found["storage"].formats == {name: "bf16"}
