"""`Charts`: all rows have the same keys, also rows from before the layers are chosen."""

import math
from collections.abc import Mapping

import pytest

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad_lightning.charts import PER_LAYER, PER_LAYER_AND_FORMAT, Charts, Row

FORMATS = ("bf16", "e5m2")


class Figures(dict[str, float]):
    """A stand-in for `altgrad.Figures` with chosen values."""

    formats = FORMATS


def figures(kept: float = math.nan, formats: tuple[str, ...] = FORMATS) -> Figures:
    values = dict.fromkeys(PER_LAYER, 1.0)
    values |= {f"{metric}/{format}": 0.5 for metric in PER_LAYER_AND_FORMAT for format in formats}
    made = Figures(values | {f"kept_update_ratio/{format}": kept for format in formats})
    made.formats = formats
    return made


def rows(charts: Charts, *steps: Mapping[str, Figures]) -> list[tuple[int, dict[str, float]]]:
    found = [
        charts.add(k, figures(0.5), layers, {"own_share": 0.1}) for k, layers in enumerate(steps)
    ]
    return [(row.step, merge_row(row)) for each in [*found, charts.take_waiting()] for row in each]


def merge_row(row: Row) -> dict[str, float]:
    assert not row.model.keys() & row.others.keys()
    return row.model | row.others


def test_rows_wait_until_the_charted_layers_are_chosen() -> None:
    charts = Charts(FORMATS, 2)
    unknown = {name: figures() for name in "abc"}
    assert charts.add(0, figures(), unknown, {}) == []
    known = {"a": figures(0.9), "b": figures(0.1), "c": figures(0.2)}
    first, second = charts.add(1, figures(), known, {})
    assert (first.step, second.step) == (0, 1)
    assert [*charts.charted] == ["b", "c"]
    assert merge_row(first).keys() == merge_row(second).keys()
    assert math.isnan(merge_row(first)["altgrad/kept_update_ratio/bf16/b"])
    assert merge_row(second)["altgrad/kept_update_ratio/bf16/b"] == 0.1
    assert not any(key.endswith("/a") for key in merge_row(second))


def test_keys_stay_where_layers_and_figures_are_missing() -> None:
    steps = [{"a": figures(0.1)}, {}, {"a": figures()}]
    found = rows(Charts(FORMATS, 1), *steps)
    assert [step for step, _ in found] == [0, 1, 2]
    assert len({tuple(charts) for _, charts in found}) == 1
    values = [charts["altgrad/kept_update_ratio/e5m2/a"] for _, charts in found]
    assert values == pytest.approx([0.1, math.nan, math.nan], nan_ok=True)
    keys = {*found[0][1]}
    assert {f"altgrad/{metric}" for metric in LAYER_METRICS} <= keys
    assert {f"altgrad/{metric}/{f}" for metric in FORMAT_METRICS for f in FORMATS} <= keys
    assert "altgrad/monitor/own_share" in keys


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (1, {"a": "a", "c": "a c", "e": "a c"}),
        (2, {"a": "a b", "c": "a b c d", "e": "a b c d"}),
        (0, {"a": "", "c": "", "e": ""}),
        (["a", "d", "e"], {"a": "a", "c": "a d", "e": "a d e"}),
    ],
    ids=str,
)
def test_layers_that_appear_later_join_the_charted_ones(
    chosen: int | list[str], expected: dict[str, str]
) -> None:
    """A backbone is unfrozen, or a second network is stepped in other batches than the first."""
    kept = {"a": {"a": 0.1, "b": 0.2}, "c": {"d": 0.4, "c": 0.3, "x": 0.9}, "e": {"e": 0.0}}
    layers = {key: {name: figures(value) for name, value in kept[key].items()} for key in kept}
    charts = Charts(FORMATS, chosen)
    for key, names in expected.items():
        for _ in range(2):  # the second time nothing is new
            rows(charts, layers[key])
            assert " ".join(charts.charted) == names
        resumed = Charts(FORMATS, chosen)
        resumed.load_state_dict(charts.state_dict())
        charts = resumed


def test_a_later_layer_is_charted_once_it_has_figures() -> None:
    charts = Charts(FORMATS, 1)
    rows(charts, {"a": figures(0.1)}, {"b": figures()})
    assert [*charts.charted] == ["a"]
    rows(charts, {"b": figures(0.5)})
    assert [*charts.charted] == ["a", "b"]


def test_layers_are_charted_by_pattern_or_not_at_all() -> None:
    layers = {"a.weight": figures(0.9), "b.weight": figures(0.1), "b.bias": figures(0.0)}
    charts = Charts(FORMATS, ["*.weight", "missing"])
    rows(charts, layers)
    assert [*charts.charted] == ["a.weight", "b.weight"]
    charts = Charts(FORMATS, 0)
    ((_, row),) = rows(charts, layers)
    assert not [key for key in row if key.split("/")[-1] in layers]


def test_a_layer_is_charted_for_its_own_formats() -> None:
    ((_, row),) = rows(Charts(FORMATS, 8), {"a": figures(0.1, ("bf16",)), "b": figures(0.1)})
    assert "altgrad/stall_frac/bf16/a" in row
    assert "altgrad/stall_frac/e5m2/a" not in row
    assert "altgrad/stall_frac/e5m2/b" in row


def test_rows_wait_for_at_most_20_steps() -> None:
    charts = Charts(FORMATS, 1)
    waited = [len(charts.add(k, figures(), {"a": figures()}, {})) for k in range(22)]
    assert sum(waited) == 22
    assert max(waited) == 20
    assert [*charts.charted] == ["a"]


def test_a_resumed_run_charts_the_same_layers() -> None:
    charts, resumed = Charts(FORMATS, 1), Charts(FORMATS, 1)
    rows(charts, {"a": figures(0.1), "b": figures(0.2)})
    resumed.load_state_dict(charts.state_dict())
    rows(resumed, {"a": figures(0.9), "b": figures(0.2)})
    assert [*resumed.charted] == ["a"]
