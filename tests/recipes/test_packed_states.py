"""Which layers an optimizer packs, and wrong descriptions."""

from __future__ import annotations

import pytest

from altgrad.recipes import PackedStates, StateParts


@pytest.mark.parametrize(
    ("only_whole", "expected"),
    [(False, [False, True, True, True]), (True, [False, True, False, True])],
)
def test_layers_are_packed_from_the_least_size_on(only_whole: bool, expected: list[bool]) -> None:
    packed = PackedStates(StateParts, dict, block=64, least=256, only_whole=only_whole)
    assert [packed.packs(numel) for numel in (192, 256, 257, 320)] == expected


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"block": 100}, ValueError, "block=100: expected a power of two"),
        ({"block": 1}, ValueError, "block"),
        ({"block": 2.0}, TypeError, "block"),
        ({"least": 127}, ValueError, "least"),
        ({"only_whole": 1}, TypeError, "only_whole"),
        ({"take_apart": None}, TypeError, "take_apart=None: expected a function"),
    ],
)
def test_a_wrong_description_is_an_error(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        PackedStates(**{"take_apart": StateParts, "put_together": dict, **settings})
