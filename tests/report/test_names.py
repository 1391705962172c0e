"""Short names are printable and still distinct."""

import pytest

from altgrad.report.names import (
    fold_names,
    replace_unprintable,
    replace_unprintable_in_lines,
    shorten_names,
)


def test_long_names_are_cut_in_the_middle_and_stay_distinct() -> None:
    layers = [f"transformer.encoder.layer.{k}.attention.self.query.weight" for k in range(12)]
    other = [f"a.very.long.common.beginning.of.all.of.the.names.{k}.weight" for k in range(12)]
    for names in (layers, other):
        short = shorten_names(names)
        assert len({*short}) == 12
        for long, name in zip(names, short, strict=True):
            head, tail = name.split("…")
            assert len(name) == 44
            assert long.startswith(head)
            assert long.endswith(tail)
    assert shorten_names(["short", "x" * 44]) == ["short", "x" * 44]


@pytest.mark.parametrize("place", [0, 25, 45, 60])
def test_the_part_in_which_names_differ_is_kept_wherever_it_is(place: int) -> None:
    names = ["x" * place + digit + "y" * (60 - place) for digit in "0123456789"]
    assert len({*shorten_names(names)}) == 10


@pytest.mark.parametrize("width", [14, 22, 28, 44])
def test_no_name_is_longer_than_the_width(width: int) -> None:
    names = ["a" * length for length in range(1, 100)]
    short = shorten_names(names, width)
    assert short[:width] == names[:width]
    assert {len(name) for name in short[width:]} == {width}
    assert all(name.count("…") == 1 for name in short[width:])


def test_each_unprintable_character_is_replaced() -> None:
    assert replace_unprintable("größe 重み.[0]") == "größe 重み.[0]"
    assert replace_unprintable("a\nb\t\x1b[31mc\ud800") == "a�b��[31mc�"
    assert shorten_names(["a\nb"]) == ["a�b"]


def test_unprintable_characters_are_replaced_within_lines() -> None:
    text = "a\x1b[31m\nb\u202e\udcff c\r\n"
    assert replace_unprintable_in_lines(text) == "a�[31m\nb�� c�\n"


def test_names_that_differ_in_numbers_alone_are_folded() -> None:
    names = ["blocks.0.norm.weight", "norm.weight", "blocks.11.norm.weight", "blocks.0.mlp.2.bias"]
    assert fold_names(names) == [
        "blocks.*.norm.weight (2 layers)",
        "norm.weight",
        "blocks.0.mlp.2.bias",
    ]
    assert fold_names([]) == []
    assert fold_names(["0.weight", "2.weight"], ["1.weight"]) == ["0.weight", "2.weight"]
    assert fold_names(["0.weight", "2.weight"], ["1.bias"]) == ["*.weight (2 layers)"]
    assert fold_names(["l10", "l11"]) == ["l10", "l11"]  # numbers within a word are kept
