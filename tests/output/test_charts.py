"""`Charts`: all rows have the same keys, also rows from before the layers are chosen."""

import json
import math
from collections.abc import Mapping

import pytest

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.measurement.layer_columns import LayerRow, gather_columns
from altgrad.output.charts import PER_LAYER, PER_LAYER_AND_FORMAT, Charts, Row, check_charts

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


def add(
    charts: Charts,
    step: int,
    model: Figures,
    layers: Mapping[str, Figures],
    monitor: Mapping[str, float],
) -> list[Row]:
    columns = gather_columns(LayerRow(name, each, {}) for name, each in layers.items())
    return charts.add(step, model, layers, columns, monitor)


def rows(charts: Charts, *steps: Mapping[str, Figures]) -> list[tuple[int, dict[str, float]]]:
    found = [
        add(charts, k, figures(0.5), layers, {"own_share": 0.1}) for k, layers in enumerate(steps)
    ]
    return [(row.step, merge_row(row)) for each in [*found, charts.take_waiting()] for row in each]


def merge_row(row: Row) -> dict[str, float]:
    model, others = row.flatten()
    assert not model.keys() & others.keys()
    return model | others


def make_all(layers: int | list[str]) -> Charts:
    """Make charts of all metrics."""
    return Charts(FORMATS, layers, "all")


def test_rows_wait_until_the_charted_layers_are_chosen() -> None:
    charts = make_all(2)
    unknown = {name: figures() for name in "abc"}
    assert add(charts, 0, figures(), unknown, {}) == []
    known = {"a": figures(0.9), "b": figures(0.1), "c": figures(0.2)}
    first, second = add(charts, 1, figures(), known, {})
    assert (first.step, second.step) == (0, 1)
    assert [*charts.charted] == ["b", "c"]
    assert merge_row(first).keys() == merge_row(second).keys()
    assert math.isnan(merge_row(first)["altgrad/kept_update_ratio/bf16/b"])
    assert merge_row(second)["altgrad/kept_update_ratio/bf16/b"] == 0.1
    assert not any(key.endswith("/a") for key in merge_row(second))


def test_keys_stay_where_layers_and_figures_are_missing() -> None:
    steps = [{"a": figures(0.1)}, {}, {"a": figures()}]
    found = rows(make_all(1), *steps)
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
    charts = make_all(chosen)
    for key, names in expected.items():
        for _ in range(2):  # the second time nothing is new
            rows(charts, layers[key])
            assert " ".join(charts.charted) == names
        resumed = make_all(chosen)
        resumed.load_state_dict(charts.state_dict())
        charts = resumed


def test_a_later_layer_is_charted_once_it_has_figures() -> None:
    charts = make_all(1)
    rows(charts, {"a": figures(0.1)}, {"b": figures()})
    assert [*charts.charted] == ["a"]
    rows(charts, {"b": figures(0.5)})
    assert [*charts.charted] == ["a", "b"]


def test_layers_are_charted_by_pattern_or_not_at_all() -> None:
    layers = {"a.weight": figures(0.9), "b.weight": figures(0.1), "b.bias": figures(0.0)}
    charts = make_all(["*.weight", "missing"])
    rows(charts, layers)
    assert [*charts.charted] == ["a.weight", "b.weight"]
    charts = make_all(0)
    ((_, row),) = rows(charts, layers)
    assert not [key for key in row if key.split("/")[-1] in layers]


def test_a_layer_is_charted_for_its_own_formats() -> None:
    ((_, row),) = rows(make_all(8), {"a": figures(0.1, ("bf16",)), "b": figures(0.1)})
    assert "altgrad/stall_frac/bf16/a" in row
    assert "altgrad/stall_frac/e5m2/a" not in row
    assert "altgrad/stall_frac/e5m2/b" in row


def test_rows_wait_for_at_most_20_steps() -> None:
    charts = make_all(1)
    waited = [len(add(charts, k, figures(), {"a": figures()}, {})) for k in range(22)]
    assert sum(waited) == 22
    assert max(waited) == 20
    assert [*charts.charted] == ["a"]


def test_a_resumed_run_charts_the_same_layers() -> None:
    charts, resumed = make_all(1), make_all(1)
    rows(charts, {"a": figures(0.1), "b": figures(0.2)})
    resumed.load_state_dict(charts.state_dict())
    rows(resumed, {"a": figures(0.9), "b": figures(0.2)})
    assert [*resumed.charted] == ["a"]


def test_a_share_of_single_updates_is_not_compared_with_one_of_twins() -> None:
    charts = make_all(1)
    rows(charts, {"a": figures(0.1), "b": make_kept(bf16=0.9)})
    assert [*charts.charted] == ["b"]


def test_rows_that_wait_are_logged_by_a_resumed_run_as_by_one_without_a_stop() -> None:
    unknown = {name: add_twins(figures(), "bf16") for name in "ab"}
    for layer in unknown.values():
        layer.update({"progress_kept/bf16": math.nan, "unmoved_frac": 0.75})
    known = {"a": figures(0.9), "b": figures(0.1)}
    whole, stopped, resumed = (make_all(1) for _ in range(3))
    for charts in (whole, stopped):
        for step in range(3):
            assert add(charts, step, add_twins(figures(0.5), "bf16"), unknown, {"a": 0.5}) == []
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    expected, found = (add(each, 3, figures(0.5), known, {"a": 0.5}) for each in (whole, resumed))
    assert [row.step for row in found] == [0, 1, 2, 3]
    assert repr(found) == repr(expected)  # NaN differs from itself
    assert merge_row(found[0])["altgrad/unmoved_frac/b"] == 0.75


def test_a_resumed_run_keeps_the_charts_of_twins_that_have_ended() -> None:
    both = add_twins(figures(0.1), "bf16", "bf16-true")
    charts, resumed = make_all(1), make_all(1)
    rows(charts, {"a": both})
    add(charts, 1, both, {"a": both}, {})
    resumed.load_state_dict(charts.state_dict())
    (row,) = add(resumed, 2, figures(0.1), {"a": figures(0.1)}, {})
    assert math.isnan(row.model["drift/bf16-true"])
    assert math.isnan(row.layers["a"]["progress_kept/bf16-true"])
    assert resumed.recipes == ["bf16", "bf16-true"]


def test_a_state_of_version_0_1_0_has_no_rows_that_wait() -> None:
    charts = make_all(1)
    charts.load_state_dict({"charted": {"a": FORMATS}})
    assert charts.take_waiting() == []
    assert [row.step for row in add(charts, 5, figures(), {"a": figures()}, {})] == [5]


def test_figures_of_twins_but_moved_rms_are_charted_for_the_model_and_two_for_a_layer() -> None:
    charts = make_all(1)
    layers = {"a": add_twins(figures(0.1), "bf16", "e5m2-sr"), "b": figures(0.9)}
    model = add_twins(figures(0.5), "bf16", "e5m2-sr", states=("exp_avg_sq",))
    (row,) = add(charts, 0, model, layers, {})
    for recipe in ("bf16", "e5m2-sr"):
        for metric in ("progress_kept", "drift", "frozen_frac", "exp_avg_sq_ratio"):
            assert row.model[f"{metric}/{recipe}"] == 0.25
        assert f"moved_rms/{recipe}" in model
        assert f"moved_rms/{recipe}" not in row.model
    of_layer = {key for key, value in row.layers["a"].items() if value == 0.25}
    assert of_layer == {
        f"{metric}/{recipe}"
        for metric in ("progress_kept", "frozen_frac")
        for recipe in ("bf16", "e5m2-sr")
    }


def test_keys_of_twins_stay_after_the_twins_have_ended() -> None:
    charts = make_all(2)
    both = add_twins(figures(0.1), "bf16", "bf16-true")
    one = add_twins(figures(0.1), "bf16")
    kept = [add(charts, k, each, {"a": each}, {}) for k, each in enumerate((both, one, figures()))]
    before, after, without = (merge_row(row) for (row,) in kept)
    assert before.keys() == after.keys() == without.keys()
    assert after["altgrad/drift/bf16"] == 0.25
    assert math.isnan(after["altgrad/drift/bf16-true"])
    assert math.isnan(after["altgrad/progress_kept/bf16-true/a"])
    assert math.isnan(without["altgrad/frozen_frac/bf16/a"])


def test_a_layer_without_twins_has_no_charts_of_twins() -> None:
    charts = make_all(2)
    layers = {"a": add_twins(figures(0.1), "bf16"), "b": figures(0.2)}
    (row,) = add(charts, 0, layers["a"], layers, {})
    kept = [key for key in row.flatten()[1] if "progress_kept" in key]
    assert kept == ["altgrad/progress_kept/bf16/a"]


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
    charts = make_all(1)
    rows(charts, {name: make_kept(**kept) for name, kept in layers.items()})
    assert [*charts.charted] == charted


# --- what is logged by default


def test_a_row_has_the_headline_and_diag_01_to_04_alone() -> None:
    model = add_twins(figures(0.5), "bf16", "bf16-sr")
    (row,) = add(Charts(FORMATS, 1), 0, model, {"a": model}, {"own_share": 0.1, "elements": 9.0})
    diagnostics = {"ulp_mean", "ulp_zero_frac"} | {
        f"{metric}/{format}"
        for metric in ("stiffness_mean", "on_grid_frac", "grad_stiff_correlation")
        for format in FORMATS
    }
    headline = {"progress_kept/bf16", "progress_kept/bf16-sr", "kept_update_ratio/e5m2"}
    headline |= {f"frozen_layers/{name}" for name in ("bf16", "bf16-sr", "e5m2")}
    assert {*row.model} == headline | {"lost_now"} | diagnostics
    assert {name: {*keys} for name, keys in row.layers.items()} == {"a": diagnostics}
    assert row.monitor == {"own_share": 0.1}


def test_a_format_without_a_twin_has_what_it_keeps_of_updates_in_the_headline() -> None:
    charts = Charts(FORMATS, 0, recipes=["bf16"])
    (row,) = add(charts, 0, figures(0.5), {"a": figures(0.5)}, {})
    assert row.model["kept_update_ratio/e5m2"] == 0.5
    assert "kept_update_ratio/bf16" not in row.model  # its twin is expected


def test_frozen_layers_are_counted_by_recipe_and_stay_until_they_move() -> None:
    def make(frozen: float, kept: float, never: float) -> Figures:
        made = add_twins(figures(0.5), "bf16")
        values = {"frozen_frac/bf16": frozen, "progress_kept/bf16": kept}
        made.update(values | {"never_moved_frac/e5m2": never})
        return made

    charts = Charts(FORMATS, 0)
    still, moving = make(1.0, 0.0, 1.0), make(0.5, 0.9, 0.5)
    steps = [{"a": still, "b": moving, "c": still}, {"b": moving}, {"a": moving}]
    found = [add(charts, k, still, layers, {})[0].model for k, layers in enumerate(steps)]
    assert [row["frozen_layers/bf16"] for row in found] == [2, 2, 1]
    assert [row["frozen_layers/e5m2"] for row in found] == [2, 2, 1]
    # A share of a layer that never moves is not all: it may have kept its progress.
    (row,) = add(Charts(FORMATS, 0), 0, still, {"a": make(1.0, 0.9, 0.0)}, {})
    assert row.model["frozen_layers/bf16"] == 0


def test_what_is_lost_now_is_0_in_float32_and_the_rest_of_the_progress_otherwise() -> None:
    low = add_twins(figures(0.5), "now")
    (row,) = add(Charts(FORMATS, 0, is_low=True), 0, low, {"a": low}, {})
    assert row.model["lost_now"] == 0.75
    (row,) = add(Charts(FORMATS, 0), 0, figures(0.5), {"a": figures(0.5)}, {})
    assert row.model["lost_now"] == 0
    (row,) = add(Charts(FORMATS, 0, is_low=True), 0, figures(0.5), {"a": figures(0.5)}, {})
    assert math.isnan(row.model["lost_now"])


@pytest.mark.parametrize(("names", "charted"), [(1, 8), (2, 7), (3, 5), (5, 2), (40, 1)])
def test_fewer_layers_are_charted_where_80_numbers_leave_no_room(names: int, charted: int) -> None:
    formats = tuple(f"f{k}" for k in range(names))
    recipes = tuple(f"{name}{end}" for name in formats for end in ("", "-sr"))
    layer = add_twins(figures(0.5, formats), *recipes)
    layers = {f"l{k}": layer for k in range(50)}
    charts = Charts(formats, recipes=recipes)
    (row,) = add(charts, 0, layer, layers, {"own_share": 0.1})
    assert len(row.layers) == charted
    assert len(merge_row(row)) <= 80 or charted == 1
    later = {"later": layer}
    (row,) = add(charts, 1, layer, layers | later, {"own_share": 0.1})
    assert len(merge_row(row)) <= 80 or charted == 1


def test_layers_that_join_later_get_the_room_that_is_left() -> None:
    charts = Charts(FORMATS)
    layers = {"a": figures(0.5), "b": figures(0.2)}
    add(charts, 0, figures(0.5), layers, {})
    later = {f"later{k}": figures(0.5) for k in range(20)}
    (row,) = add(charts, 1, figures(0.5), layers | later, {})
    assert len(row.layers) == 8
    assert [*row.layers][:3] == ["b", "a", "later0"]


@pytest.mark.parametrize("wrong", ["some", None, 1])
def test_charts_is_default_or_all(wrong: object) -> None:
    assert (check_charts("default"), check_charts("all")) == ("default", "all")
    with pytest.raises(ValueError, match=r"charts=.*: expected one of 'default', 'all'"):
        check_charts(wrong)


def test_rows_that_wait_in_a_state_of_an_earlier_version_have_the_keys_of_today() -> None:
    charts = Charts(FORMATS, 1)
    waiting = [(3, {"altgrad/ulp_mean": 0.5}, {"altgrad/monitor/own_share": 0.1}, {"a": {}})]
    charts.load_state_dict({"charted": None, "waiting": waiting})
    (row,) = charts.take_waiting()
    assert merge_row(row) == {"altgrad/ulp_mean": 0.5, "altgrad/monitor/own_share": 0.1}
