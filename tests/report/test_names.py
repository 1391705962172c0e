"""Short names: printable, and still told apart."""

import pytest

from altgrad.report.names import printable, short_names


def test_long_names_are_cut_in_the_middle_and_told_apart() -> None:
    layers = [f"transformer.encoder.layer.{k}.attention.self.query.weight" for k in range(12)]
    other = [f"a.very.long.common.beginning.of.all.of.the.names.{k}.weight" for k in range(12)]
    for names in (layers, other):
        short = short_names(names)
        assert len({*short}) == 12
        for long, name in zip(names, short, strict=True):
            head, tail = name.split("…")
            assert len(name) == 44
            assert long.startswith(head)
            assert long.endswith(tail)
    assert short_names(["short", "x" * 44]) == ["short", "x" * 44]


@pytest.mark.parametrize("place", [0, 25, 45, 60])
def test_what_tells_names_apart_is_kept_wherever_it_stands(place: int) -> None:
    names = ["x" * place + digit + "y" * (60 - place) for digit in "0123456789"]
    assert len({*short_names(names)}) == 10


@pytest.mark.parametrize("width", [14, 22, 28, 44])
def test_no_name_is_wider_than_asked_for(width: int) -> None:
    names = ["a" * length for length in range(1, 100)]
    short = short_names(names, width)
    assert short[:width] == names[:width]
    assert {len(name) for name in short[width:]} == {width}
    assert all(name.count("…") == 1 for name in short[width:])


def test_what_cannot_be_printed_is_replaced_character_by_character() -> None:
    assert printable("größe 重み.[0]") == "größe 重み.[0]"
    assert printable("a\nb\t\x1b[31mc\ud800") == "a�b��[31mc�"
    assert short_names(["a\nb"]) == ["a�b"]
