"""`SamplingRule` and `resolve_layers`: the settings by which layers are observed."""

from dataclasses import FrozenInstanceError
from fnmatch import fnmatchcase

import pytest
from hypothesis import assume, given, strategies as st

from altgrad.observation.rules import LayerSampling, SamplingRule, resolve_layers
from tests.strategies import thorough

NAMES = [
    "embed.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.attn.qkv.bias",
    "blocks.0.mlp.weight",
    "blocks.1.attn.qkv.weight",
    "blocks.1.attn.qkv.bias",
    "blocks.1.mlp.weight",
    "head.weight",
]


def resolved(*rules: SamplingRule, names: list[str] = NAMES) -> dict[str, LayerSampling]:
    return resolve_layers(
        names, rules, every_n_steps=10, max_elements=4096, formats=("bf16", "e4m3fn")
    )


# Rules


def test_a_rule_with_a_pattern_alone_sets_nothing_else() -> None:
    rule = SamplingRule("*")
    assert rule.enabled
    assert (rule.every_n_steps, rule.max_elements, rule.formats) == (None, None, None)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("bf16", ("bf16",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ())],
    ids=repr,
)
def test_formats_are_kept_as_a_tuple(given: object, kept: tuple[str, ...]) -> None:
    assert SamplingRule("*", formats=given).formats == kept


def test_rules_are_compared_by_value_and_cannot_be_changed() -> None:
    rule = SamplingRule("*", formats=["a"])
    assert rule == SamplingRule("*", formats=("a",))
    assert len({rule, SamplingRule("*", formats=("a",))}) == 1
    with pytest.raises(FrozenInstanceError):
        rule.enabled = False


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": ""}, ValueError, "layers='': expected a pattern such as"),
        ({"layers": ["a"]}, TypeError, r"layers=\['a'\]: expected str, got list"),
        ({"enabled": "no"}, TypeError, "enabled='no': expected bool, got str"),
        ({"enabled": 0}, TypeError, "enabled=0: expected bool, got int"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps=0: expected 1 or more"),
        ({"every_n_steps": 1.5}, TypeError, r"every_n_steps=1\.5: expected int, got float"),
        ({"every_n_steps": True}, TypeError, "every_n_steps=True: expected int, got bool"),
        ({"max_elements": 0}, ValueError, "max_elements=0: expected 1 or more"),
        ({"max_elements": "every"}, ValueError, "max_elements='every': expected a number or 'all'"),
        ({"max_elements": 1e3}, TypeError, r"max_elements=1000\.0: expected int, got float"),
        ({"formats": 8}, TypeError, "formats=8: expected names of formats such as .*, got int"),
        ({"formats": {"a": 1}}, TypeError, "formats={'a': 1}: expected names .*, got dict"),
        ({"formats": ["a", 8]}, TypeError, "formats: each name=8: expected str, got int"),
    ],
)
def test_wrong_fields_are_named(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        SamplingRule(**{"layers": "*", **arguments})


# Layers and their rules


def test_without_rules_all_layers_have_the_settings_of_the_monitor() -> None:
    layers = resolved()
    assert list(layers) == NAMES
    assert layers["head.weight"] == LayerSampling(
        name="head.weight",
        rule=None,
        enabled=True,
        every_n_steps=10,
        max_elements=4096,
        formats=("bf16", "e4m3fn"),
    )


def test_a_rule_overrides_what_it_sets_and_leaves_the_rest() -> None:
    rules = [
        SamplingRule("*.bias", enabled=False),
        SamplingRule("*.mlp.*", every_n_steps=100),
        SamplingRule("head.*", max_elements="all", formats="e5m2"),
        SamplingRule("embed.*", max_elements=7, formats=()),
    ]
    layers = resolved(*rules)
    both = ("bf16", "e4m3fn")
    bias, mlp = "blocks.1.attn.qkv.bias", "blocks.0.mlp.weight"
    assert layers[bias] == LayerSampling(bias, rules[0], False, 10, 4096, both)
    assert layers[mlp] == LayerSampling(mlp, rules[1], True, 100, 4096, both)
    head = LayerSampling("head.weight", rules[2], True, 10, None, ("e5m2",))
    assert layers["head.weight"] == head
    assert layers["embed.weight"] == LayerSampling("embed.weight", rules[3], True, 10, 7, ())
    assert layers["blocks.0.attn.qkv.weight"].rule is None


def test_all_elements_may_be_the_setting_of_the_monitor() -> None:
    rules = [SamplingRule("a", max_elements=5), SamplingRule("b")]
    layers = resolve_layers("abc", rules, every_n_steps=1, max_elements=None, formats=())
    assert [layer.max_elements for layer in layers.values()] == [5, None, None]


def test_the_first_rule_that_matches_wins() -> None:
    narrow, wide = SamplingRule("*.0.*", every_n_steps=3), SamplingRule("*", every_n_steps=4)
    assert resolved(narrow, wide)["blocks.0.mlp.weight"].rule is narrow
    assert resolved(narrow, wide)["blocks.1.mlp.weight"].rule is wide
    assert {layer.every_n_steps for layer in resolved(wide, narrow).values()} == {4}


def test_patterns_may_leave_out_the_prefix_of_peft() -> None:
    name = "base_model.model.head.lora_A.default.weight"
    for pattern in ("head.*", "base_model.model.head.*", "*.lora_A.*", name):
        assert SamplingRule(pattern).matches(name), pattern
    assert not SamplingRule("model.head.*").matches(name)
    assert not SamplingRule("head.*").matches("my_base_model.model.head.weight")


def test_patterns_match_whole_names_and_are_case_sensitive() -> None:
    rule = SamplingRule("[eh]*.weigh?")
    layers = resolved(rule)
    assert [name for name in NAMES if layers[name].rule] == ["embed.weight", "head.weight"]
    for pattern in ("Head.weight", "head", "weight"):
        with pytest.raises(ValueError, match=f"layers='{pattern}' matches none of 8 layers"):
            resolved(SamplingRule(pattern))


def test_names_that_differ_in_case_alone_are_different_layers() -> None:
    layers = resolved(SamplingRule("Head.*"), names=["head.weight", "Head.weight"])
    assert [layer.rule is None for layer in layers.values()] == [True, False]


PATTERNS = [
    "*",
    "*.bias",
    "*.weight",
    "blocks.*",
    "blocks.0.*",
    "*.mlp.*",
    "head.*",
    "?????.weight",
]


@thorough
@given(st.lists(st.sampled_from(PATTERNS)), st.integers(0, 8))
def test_a_list_of_rules_equals_its_first_part_followed_by_the_second(
    patterns: list[str], cut: int
) -> None:
    rules = [SamplingRule(pattern, every_n_steps=i) for i, pattern in enumerate(patterns, 1)]
    whole, first, second = resolved(*rules), resolved(*rules[:cut]), resolved(*rules[cut:])
    for name in NAMES:
        assert whole[name] == (second[name] if first[name].rule is None else first[name])


# Rules without a match


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.atn.*", "blocks.0.attn.qkv.weight"),
        ("*.attn", "blocks.0.attn.qkv.weight"),
        ("blocks.0", "blocks.0.attn.qkv.weight"),
        ("block.1.mlp.*", "blocks.1.mlp.weight"),
        ("Head.weight", "head.weight"),
        ("HEAD.*", "head.weight"),
        ("blocks0mlpweight", "blocks.0.mlp.weight"),
        ("head_weight", "head.weight"),
        ("*.wieght", "embed.weight"),
        ("mlp", "blocks.0.mlp.weight"),
    ],
)
def test_near_matches_are_listed_the_nearest_first(pattern: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"near matches are '{near}'.*correct it or remove"):
        resolved(SamplingRule("*"), SamplingRule(pattern))


def test_a_part_between_underscores_is_compared_too() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(ValueError, match=f"near matches are '{names[1]}'\\. Expected"):
        resolved(SamplingRule("*.atn.*"), names=names)


def test_at_most_three_near_matches_are_listed() -> None:
    with pytest.raises(ValueError, match=r"near matches are ('[^']*', ){2}'[^']*'\. Expected"):
        resolved(SamplingRule("*.weights"))


@pytest.mark.parametrize("pattern", ["*.conv.*", "zzz", "*.?.x", "?"])
def test_without_near_matches_the_first_names_are_shown(pattern: str) -> None:
    message = r"no name is similar; the first are 'embed.weight', 'blocks.0.*', 'blocks.0[^,]*"
    with pytest.raises(ValueError, match=message):
        resolved(SamplingRule(pattern))


def test_a_rule_for_a_model_without_layers_is_an_error() -> None:
    assert resolved(names=[]) == {}
    with pytest.raises(ValueError, match=r"layers='\*' matches none of 0 layers: the model has"):
        resolved(SamplingRule("*"), names=[])


@thorough
@given(st.text("abcdehlmopstw.*?[]", min_size=1, max_size=12))
def test_a_pattern_without_a_match_is_an_error_that_names_it(pattern: str) -> None:
    assume(not any(fnmatchcase(name, pattern) for name in NAMES))
    with pytest.raises(ValueError, match="matches none of 8 layers") as raised:
        resolved(SamplingRule(pattern))
    assert repr(pattern) in str(raised.value)


def test_a_rule_whose_layers_all_match_an_earlier_rule_is_allowed() -> None:
    taken = SamplingRule("*.bias")
    assert all(layer.rule != taken for layer in resolved(SamplingRule("*"), taken).values())


@pytest.mark.parametrize("rules", [SamplingRule("*"), {"layers": "*"}, None], ids=repr)
def test_rules_that_are_not_a_list_are_refused(rules: object) -> None:
    with pytest.raises(TypeError, match=r"rules=.*: expected a list of SamplingRule such as"):
        resolve_layers(NAMES, rules, every_n_steps=1, max_elements=None, formats=())


def test_an_entry_that_is_not_a_rule_is_named() -> None:
    with pytest.raises(TypeError, match=r"expected a SamplingRule such as .*, got '\*\.bias'"):
        resolved("*.bias")


def test_wrong_settings_of_the_monitor_are_named() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0: expected 1 or more"):
        resolve_layers(NAMES, [], every_n_steps=0, max_elements=None, formats=())
    with pytest.raises(TypeError, match="max_elements='all': expected int, got str"):
        resolve_layers(NAMES, [], every_n_steps=1, max_elements="all", formats=())
