"""`describe_layers`: a table of the layers that fits a terminal."""

from hypothesis import given, strategies as st

from altgrad.monitor.describe import describe_layers
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


def test_the_table_lists_the_settings_of_each_layer() -> None:
    rules = [
        SamplingRule("*.bias", enabled=False),
        SamplingRule("*.mlp.*", every_n_steps=1, max_elements="all", formats=()),
        SamplingRule("blocks.1.*", every_n_steps=2000, formats="e5m2"),
        SamplingRule("blocks.1.mlp.weight"),
    ]
    assert describe_layers(resolved(*rules), rules).splitlines() == [
        "layer                     rule        observed     elements  formats",
        "embed.weight              (default)   every 10     4,096     bf16, e4m3fn",
        "blocks.0.attn.qkv.weight  (default)   every 10     4,096     bf16, e4m3fn",
        "blocks.0.attn.qkv.bias    *.bias      no           -         -",
        "blocks.0.mlp.weight       *.mlp.*     every step   all       -",
        "blocks.1.attn.qkv.weight  blocks.1.*  every 2,000  4,096     e5m2",
        "blocks.1.attn.qkv.bias    *.bias      no           -         -",
        "blocks.1.mlp.weight       *.mlp.*     every step   all       -",
        "head.weight               (default)   every 10     4,096     bf16, e4m3fn",
        "rule 4 (blocks.1.mlp.weight) gets no layer: earlier rules match first",
    ]


def test_the_middle_of_long_names_is_shortened() -> None:
    names = ["model.language_model.layers.10.self_attn.q_proj.base_layer.weight", "head.weight"]
    rules = [SamplingRule("*.self_attn.*.base_layer.*", formats=["bf16", "e4m3fn", "e5m2"])]
    layers = resolved(*rules, names=names)
    assert describe_layers(layers, rules).splitlines() == [
        "layer                             rule          observed  elements  formats",
        "model.language_m…se_layer.weight  *.self…yer.*  every 10  4,096     bf16, … e5m2",
        "head.weight                       (default)     every 10  4,096     bf16, e4m3fn",
    ]


def test_cells_that_fit_are_not_shortened() -> None:
    rules = [SamplingRule("*.qkv.*"), SamplingRule("*.attn.*")]
    text = describe_layers(resolved(*rules), rules, width=200)
    assert "…" not in text
    assert text.count("bf16, e4m3fn") == len(NAMES)
    assert text.endswith("rule 2 (*.attn.*) gets no layer: earlier rules match first")


def test_a_repeated_rule_gets_no_layer() -> None:
    rule = SamplingRule("*")
    for twice in ([rule, rule], [rule, SamplingRule("*")]):
        last = describe_layers(resolved(*twice), twice).splitlines()[len(NAMES) + 1 :]
        assert last == ["rule 2 (*) gets no layer: earlier rules match first"]


def test_a_table_without_layers_has_only_headings() -> None:
    assert describe_layers({}, []) == "layer  rule  observed  elements  formats"


long_names = st.lists(st.text("ab.", min_size=1, max_size=150), min_size=1, unique=True)


@thorough
@given(long_names, st.lists(st.text("f", min_size=1, max_size=40)), st.integers(70, 200))
def test_lines_fit_the_width_and_names_keep_both_ends(names, formats, width) -> None:
    rules = [SamplingRule("*" * 90, max_elements=10**6), SamplingRule("*" * 99)]
    layers = resolve_layers(
        names, rules, every_n_steps=10**6, max_elements=None, formats=tuple(formats)
    )
    lines = describe_layers(layers, rules, width=width).splitlines()
    assert len(lines) == 1 + len(names) + 1
    assert all(len(line) <= width for line in lines)
    for name, line in zip(names, lines[1:], strict=False):
        shown = line.split("  ")[0]
        if shown == name:
            continue
        begin, end = shown.split("…")
        assert name.startswith(begin)
        assert name.endswith(end)
        assert 0 <= len(begin) - len(end) <= 1
        assert len(begin) + len(end) < len(name)
