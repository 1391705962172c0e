"""`Charts`: all rows have the same keys, also rows from before the layers are chosen."""

import json
import math
from collections.abc import Mapping

import pytest

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.output.charts import PER_LAYER, PER_LAYER_AND_FORMAT, Charts, Row

FORMATS = ("bf16", "e5m2")


class Figures(dict[str, float]):
    """A stand-in for `altgrad.Figures` with chosen values."""

    formats = FORMATS
    recipes: tuple[str, ...] = ()
    twin_keys: tuple[str, ...] = ()


def figures(kept: float = math.nan, formats: tuple[str, ...] = FORMATS) -> Figures:
    values = dict.fromkeys(PER_LAYER, 1.0)
    values |= {f"{metric}/{format}": 0.5 for metric in PER_LAYER_AND_FORMAT for format in formats}
    made = Figures(values | {f"kept_update_ratio/{format}": kept for format in formats})
    made.formats = formats
    return made


def add_twins(made: Figures, *recipes: str, states: tuple[str, ...] = ()) -> Figures:
    metrics = ("progress_kept", "drift", "moved_rms", "frozen_frac")
    metrics += tuple(f"{state}_ratio" for state in states)
    keys = [f"{metric}/{recipe}" for recipe in recipes for metric in metrics]
    twinned = Figures(made | dict.fromkeys(keys, 0.25))
    twinned.formats, twinned.recipes, twinned.twin_keys = made.formats, recipes, tuple(keys)
    return twinned


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


def test_a_share_of_single_updates_is_not_compared_with_one_of_twins() -> None:
    charts = Charts(FORMATS, 1)
    rows(charts, {"a": figures(0.1), "b": make_kept(bf16=0.9)})
    assert [*charts.charted] == ["b"]


def test_rows_that_wait_are_logged_by_a_resumed_run_as_by_one_without_a_stop() -> None:
    unknown = {name: add_twins(figures(), "bf16") for name in "ab"}
    for layer in unknown.values():
        layer.update({"progress_kept/bf16": math.nan, "unmoved_frac": 0.75})
    known = {"a": figures(0.9), "b": figures(0.1)}
    whole, stopped, resumed = (Charts(FORMATS, 1) for _ in range(3))
    for charts in (whole, stopped):
        for step in range(3):
            assert charts.add(step, add_twins(figures(0.5), "bf16"), unknown, {"a": 0.5}) == []
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    expected, found = (each.add(3, figures(0.5), known, {"a": 0.5}) for each in (whole, resumed))
    assert [row.step for row in found] == [0, 1, 2, 3]
    assert repr(found) == repr(expected)  # NaN differs from itself
    assert merge_row(found[0])["altgrad/unmoved_frac/b"] == 0.75


def test_a_resumed_run_keeps_the_charts_of_twins_that_have_ended() -> None:
    both = add_twins(figures(0.1), "bf16", "bf16-true")
    charts, resumed = Charts(FORMATS, 1), Charts(FORMATS, 1)
    rows(charts, {"a": both})
    charts.add(1, both, {"a": both}, {})
    resumed.load_state_dict(charts.state_dict())
    (row,) = resumed.add(2, figures(0.1), {"a": figures(0.1)}, {})
    assert math.isnan(row.model["altgrad/drift/bf16-true"])
    assert math.isnan(row.others["altgrad/progress_kept/bf16-true/a"])
    assert resumed.recipes == ["bf16", "bf16-true"]


def test_a_state_of_version_0_1_0_has_no_rows_that_wait() -> None:
    charts = Charts(FORMATS, 1)
    charts.load_state_dict({"charted": {"a": FORMATS}})
    assert charts.take_waiting() == []
    assert [row.step for row in charts.add(5, figures(), {"a": figures()}, {})] == [5]


def test_figures_of_twins_but_moved_rms_are_charted_for_the_model_and_two_for_a_layer() -> None:
    charts = Charts(FORMATS, 1)
    layers = {"a": add_twins(figures(0.1), "bf16", "e5m2-sr"), "b": figures(0.9)}
    model = add_twins(figures(0.5), "bf16", "e5m2-sr", states=("exp_avg_sq",))
    (row,) = charts.add(0, model, layers, {})
    for recipe in ("bf16", "e5m2-sr"):
        for metric in ("progress_kept", "drift", "frozen_frac", "exp_avg_sq_ratio"):
            assert row.model[f"altgrad/{metric}/{recipe}"] == 0.25
        assert f"moved_rms/{recipe}" in model
        assert f"altgrad/moved_rms/{recipe}" not in row.model
    of_layer = {key for key, value in row.others.items() if value == 0.25}
    assert of_layer == {
        f"altgrad/{metric}/{recipe}/a"
        for metric in ("progress_kept", "frozen_frac")
        for recipe in ("bf16", "e5m2-sr")
    }


def test_keys_of_twins_stay_after_the_twins_have_ended() -> None:
    charts = Charts(FORMATS, 2)
    both = add_twins(figures(0.1), "bf16", "bf16-true")
    one = add_twins(figures(0.1), "bf16")
    kept = [charts.add(k, each, {"a": each}, {}) for k, each in enumerate((both, one, figures()))]
    before, after, without = (merge_row(row) for (row,) in kept)
    assert before.keys() == after.keys() == without.keys()
    assert after["altgrad/drift/bf16"] == 0.25
    assert math.isnan(after["altgrad/drift/bf16-true"])
    assert math.isnan(after["altgrad/progress_kept/bf16-true/a"])
    assert math.isnan(without["altgrad/frozen_frac/bf16/a"])


def test_a_layer_without_twins_has_no_charts_of_twins() -> None:
    charts = Charts(FORMATS, 2)
    layers = {"a": add_twins(figures(0.1), "bf16"), "b": figures(0.2)}
    (row,) = charts.add(0, layers["a"], layers, {})
    assert [key for key in row.others if "progress_kept" in key] == ["altgrad/progress_kept/bf16/a"]


def make_kept(**kept: float) -> Figures:
    """Make the figures of a layer that keeps these shares by recipe, and all in each format."""
    made = add_twins(figures(1.0), *kept)
    made.update({f"progress_kept/{recipe}": share for recipe, share in kept.items()})
    return made


@pytest.mark.parametrize(
    ("layers", "charted"),
    [
        ({"a": {"now": 0.9, "e5m2": 0.0}, "b": {"now": 0.1, "e5m2": 0.5}}, ["b"]),
        ({"a": {"bf16": 0.9, "e5m2": 0.2}, "b": {"bf16": 0.5, "e5m2": 0.4}}, ["a"]),
        # A share of what the run keeps now is not compared with one that a recipe would keep.
        ({"a": {"now": math.nan, "e5m2": 0.3}, "b": {"now": 0.4}}, ["b"]),
        ({"a": {"e5m2": 0.0}, "b": {"now": 0.4, "e5m2": 0.5}}, ["b"]),
        ({"a": {"now": 0.4, "e5m2": 0.5}, "b": {"now": 0.4, "e5m2": 0.3}}, ["b"]),
        ({"a": {"bf16": math.nan}, "b": {"bf16": 0.9}}, ["b"]),
        ({"a": {"bf16": math.nan}, "b": {"bf16": math.nan}}, ["a"]),
    ],
)
def test_layers_are_charted_by_what_they_keep_now_or_else_by_their_worst_twin(
    layers: dict[str, dict[str, float]], charted: list[str]
) -> None:
    charts = Charts(FORMATS, 1)
    rows(charts, {name: make_kept(**kept) for name, kept in layers.items()})
    assert [*charts.charted] == charted
