"""The verdicts as JSON and as CSV."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from altgrad.report import (
    Confirmation,
    LayerInfo,
    NextLine,
    RecipeInfo,
    Row,
    RunReport,
    Verdict,
    list_next_lines,
    read,
)
from altgrad.report.exports import (
    as_csv,
    as_json,
    confirmation_as_csv,
    confirmation_as_json,
)
from tests.command_line import altgrad
from tests.report.confirming import make_twin_run, share
from tests.report.runs import FORMATS, MARKUP, SCRIPT, figures, make_run, write_run
from tests.report.shown_runs import record_bf16, record_fp32

NAN = math.nan
KEYS = [
    *("verdict", "sentence", "progress_kept", "interval", "weight_error", "frozen_frac"),
    *("frozen_layers", "frozen_share", "layers", "evidence", "to_do", "has_twin"),
    *("behind_share", "tested_runs", "lost_runs", "observed_steps", "saved_share"),
]
"""The keys of a verdict on a run, as docs/run-file.md lists them."""


def test_json_is_valid_and_holds_the_verdicts(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert altgrad("report", run, "--json", path).returncode == 0
    value = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert value["formats"] == [*FORMATS]
    assert value["steps"] == [0, 10, 20]
    assert value["layers"][SCRIPT]["smallest_that_stores_fine"] is None
    assert value["layers"][SCRIPT]["recipes"]["bf16"]["verdict"] == "FROZEN"
    assert value["layers"]["matrix"]["smallest_that_stores_fine"] == "e5m2"
    figures = value["layers"]["matrix"]["recipes"]["e5m2"]["figures"]
    assert figures["progress_kept"] == 1
    assert figures["frozen_frac"] == 0


def test_csv_has_a_line_for_each_layer_and_recipe(run: Path) -> None:
    shown = altgrad("report", run, "--csv", "-")
    assert shown.returncode == 0, shown.stderr
    rows = [*csv.DictReader(io.StringIO(shown.stdout))]  # the terminal shows nothing else
    assert [(row["layer"], row["recipe"]) for row in rows] == [
        (layer, format) for layer in ("gain", SCRIPT, "matrix", MARKUP) for format in FORMATS
    ]
    assert [row["verdict"] for row in rows] == ["frozen"] * 4 + ["fine"] * 4
    assert [float(row["progress_kept"]) for row in rows] == [0.0] * 4 + [1.0] * 4
    assert {row["kept_update_ratio"] for row in rows} == {""}  # of formats without a twin


def test_figures_of_samples_have_errors_and_intervals() -> None:
    errors = {"kept_update_ratio/bf16": 0.1, "never_moved_frac/bf16": 0.0002}
    values = figures(kept_update_ratio=0.9, never_moved_frac=1.0)
    report = RunReport.from_run(make_run([Row(0, "w", values, errors)], ["bf16"]))
    advice = as_json(report)["layers"]["w"]["recipes"]["bf16"]
    assert advice["errors"]["kept_update_ratio"] == 0.1
    assert advice["intervals"]["kept_update_ratio"] == pytest.approx([0.704, 1.096], abs=1e-4)
    low, high = advice["intervals"]["never_moved_frac"]
    assert 0.999 < low < high == 1
    (row,) = csv.DictReader(io.StringIO(as_csv(report), newline=""))
    assert float(row["kept_update_ratio_low"]) == advice["intervals"]["kept_update_ratio"][0]
    assert float(row["never_moved_frac_low"]) == low
    assert row["stall_frac_low"] == row["stall_frac_high"] == row["stall_frac"]


def make_odd_report() -> RunReport:
    """Make a report of a layer with an odd name, whose figures are NaN."""
    unknown = figures(kept_update_ratio=NAN, stall_frac=NAN, never_moved_frac=NAN)
    rows = [
        Row(0, 'a,"b"\nc', unknown | {"saturated_frac/bf16": math.inf}, {}),
        Row(0, None, {}, {}, skipped={"inf": 2}),
    ]
    return RunReport.from_run(make_run(rows, ["bf16"], notes=["torn"], versions={"altgrad": "0.1"}))


def test_numbers_without_a_value_are_none_in_json_and_empty_in_csv() -> None:
    value = as_json(make_odd_report())
    json.dumps(value, allow_nan=False)
    assert value["own_share"] is None
    advice = value["layers"]['a,"b"\nc']["recipes"]["bf16"]
    assert advice["figures"] == {
        "kept_update_ratio": None,
        "stall_frac": None,
        "never_moved_frac": None,
        "underflow_frac": 0.0,
        "saturated_frac": None,
    }
    assert advice["intervals"]["kept_update_ratio"] == [None, None]
    (row,) = csv.DictReader(io.StringIO(as_csv(make_odd_report()), newline=""))
    assert row["layer"] == 'a,"b"\nc'
    assert (row["kept_update_ratio"], row["underflow_frac"]) == ("", "0.0")
    assert row["kept_update_ratio_error"] == ""


def test_json_has_the_next_lines(run: Path) -> None:
    report = RunReport.from_run(read(run))
    lines = as_json(report)["next_lines"]
    assert [NextLine(**line) for line in lines] == list_next_lines(report) != []


def test_json_has_steps_skipped_steps_notes_and_versions() -> None:
    value = as_json(make_odd_report())
    about = {key: value[key] for key in ("steps", "skipped", "notes", "versions", "to_apply")}
    assert about == {
        "steps": [0],
        "skipped": {"inf": 2},
        "notes": ["torn"],
        "versions": {"altgrad": "0.1"},
        "to_apply": "",
    }


FORMULAS = ["=cmd|' /C calc'!A0", "+1", "-x", "@SUM(A1)", "\tx", "\rx", "\nx", "＝x", "－x"]
NAMES = [
    *FORMULAS,
    "'q",
    "''q",
    "'=x",
    "a=b",
    "a-b",
    "a\rb",
    "a\r\nb",
    'a"b',
    "a,b",
    "NA",
    "1",
    " x ",
]


def report_layers(names: list[str], format: str = "bf16") -> RunReport:
    return RunReport.from_run(make_run([Row(0, name, figures(), {}) for name in names], [format]))


def test_no_cell_of_csv_begins_as_a_formula(tmp_path: Path) -> None:
    # What a spreadsheet takes for the beginning of a formula:
    # https://owasp.org/www-community/attacks/CSV_Injection
    dangerous = tuple("=+-@\t\r\n＝＋－＠")
    for row in csv.reader(io.StringIO(as_csv(report_layers(NAMES)), newline="")):
        for cell in row:
            assert not cell.startswith(dangerous), row


def test_a_format_is_no_formula_either() -> None:
    run = report_layers(["w"]).run
    formats = {"=f": replace(run.formats["bf16"], name="=f")}
    layers = {"w": LayerInfo((8,), "float32", 8, ("=f",))}
    rows = [Row(0, "w", figures("=f"), {})]
    report = RunReport.from_run(replace(run, formats=formats, layers=layers, rows=rows))
    (row,) = csv.DictReader(io.StringIO(as_csv(report)))
    assert row["recipe"] == "'=f"


def test_pandas_gives_every_name_back(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.csv"
    path.write_text(as_csv(report_layers(NAMES)), encoding="utf-8", newline="")
    table = pd.read_csv(path, dtype={"layer": str}, keep_default_na=False, na_values=[""])
    assert sorted(table["layer"].str.removeprefix("'")) == sorted(NAMES)
    assert table["kept_update_ratio"].tolist() == [1.0] * len(NAMES)


def test_a_name_with_the_end_of_a_line_is_written_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path, [], ["a\r\nb", "c\rd"])
    path = tmp_path / "verdicts.csv"
    assert altgrad("report", run, "--csv", path).returncode == 0
    with path.open(newline="", encoding="utf-8") as file:
        assert {row["layer"] for row in csv.DictReader(file)} == {"a\r\nb", "c\rd"}


def test_json_of_a_run_with_twins_has_their_recipes_and_last_figures() -> None:
    twins = {"progress_kept/bf16": 0.25, "exp_avg_ratio/bf16": NAN, "frozen_frac/fp32": 1.0}
    errors = {"progress_kept/bf16": 0.1, "frozen_frac/fp32": 0.0}
    rows = [
        Row(step, layer, figures() | {key: value * k for key, value in twins.items()}, errors)
        for step, k in ((0, 0.5), (9, 1.0))
        for layer in ("a", None)
    ]
    rows += [Row(19, "b", figures(), {}), Row(19, None, figures(), {})]
    recipe = RecipeInfo("bf16", "bf16", "stochastic", None, {}, None, None, False, NAN)
    value = as_json(RunReport.from_run(make_run(rows, ["bf16"], recipes={"bf16": recipe})))
    json.dumps(value, allow_nan=False)
    assert value["recipes"]["bf16"] == {
        "weights": "bf16",
        "rounding": "stochastic",
        "compensation": None,
        "states": {},
        "dtype": None,
        "optimizer": None,
        "fused": False,
        "accumulate": None,
        "bytes_per_parameter": None,
        "sizes": None,
    }
    assert value["twins"]["model"] == value["twins"]["layers"]["a"]
    found = value["twins"]["layers"]
    assert [*found] == ["a"]
    assert found["a"]["bf16"] == {
        "step": 9,
        "figures": {"progress_kept": 0.25, "exp_avg_ratio": None},
        "intervals": {"progress_kept": pytest.approx([0.25 - 0.196, 0.25 + 0.196], abs=1e-4)},
    }
    assert found["a"]["fp32"]["intervals"] == {"frozen_frac": [1.0, 1.0]}
    assert value["layers"]["a"]["recipes"].keys() == {"bf16"}


def test_exports_of_a_run_without_twins_have_none() -> None:
    value = as_json(make_odd_report())
    assert (value["recipes"], value["twins"]) == ({}, {"model": {}, "layers": {}})


def test_the_verdicts_on_the_run_are_first_in_json_with_now_like_any_recipe(
    tmp_path: Path,
) -> None:
    report = RunReport.from_run(record_bf16(tmp_path))
    value = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert [*value["runs"]] == ["now", "bf16", "bf16-kahan", "e5m2"]
    for each in value["runs"].values():
        assert [*each] == KEYS
        assert Verdict[each["verdict"]]
    now = value["runs"]["now"]
    assert now["frozen_layers"] == ["gain"]
    assert now["frozen_share"] == pytest.approx(64 / 96)
    assert now["progress_kept"] == report.assessment.runs["now"].kept
    assert now["interval"] == [*report.assessment.runs["now"].interval]
    assert value["answer"].startswith("This run ")
    assert value["stored"].startswith("Weights are bfloat16.")
    gain = value["layers"]["gain"]
    assert (gain["unmoved_frac"], gain["nonfinite_frac"]) == (1.0, 0.0)
    assert gain["recipes"]["now"]["verdict"] == "FROZEN"
    assert value["visible_frac"] == {}


def test_csv_has_now_and_the_unmoved_share_of_a_run_in_bf16(tmp_path: Path) -> None:
    text = as_csv(RunReport.from_run(record_bf16(tmp_path)))
    assert "nan" not in text.lower()
    rows = [*csv.DictReader(io.StringIO(text))]
    gain, bias = (next(r for r in rows if r["layer"] == n) for n in ("gain", "bias"))
    assert (gain["recipe"], gain["verdict"]) == ("now", "frozen")
    assert [float(row["unmoved_frac"]) for row in (gain, bias)] == [1.0, 0.0]
    assert float(gain["nonfinite_frac"]) == 0.0


def test_a_run_in_float32_has_visible_shares_and_no_unmoved_ones(tmp_path: Path) -> None:
    report = RunReport.from_run(record_fp32(tmp_path))
    value = as_json(report)
    assert value["visible_frac"].keys() == {"bf16", "e5m2"}
    assert value["layers"]["gain"]["unmoved_frac"] is None
    assert {row["unmoved_frac"] for row in csv.DictReader(io.StringIO(as_csv(report)))} == {""}


# --- what one run predicted


def make_confirmation() -> Confirmation:
    predicted = {
        None: share(0.5, 0.25),
        "=cmd|x": share(1.0, NAN, exp_avg_sq_ratio=1.0),
        "plain": share(0.25, math.inf, exp_avg_sq_ratio=1.0),
    }
    real = {
        None: share(0.25, 0.25),
        "=cmd|x": share(0.75, NAN, exp_avg_sq_ratio=2.0),
        "plain": share(0.25, 1.0, exp_avg_sq_ratio=0.0),
    }
    return Confirmation(
        make_twin_run(predicted, "bf16-true", letter="one"),
        make_twin_run(real, letter="two", notes=["torn"]),
        "bf16-true",
    )


def test_the_json_of_a_confirmation_has_each_figure_and_difference() -> None:
    value = json.loads(json.dumps(confirmation_as_json(make_confirmation()), allow_nan=False))
    assert value["predicting"] == str(Path("one", "altgrad.jsonl"))
    assert value["real"] == str(Path("two", "altgrad.jsonl"))
    assert value["recipe"] == "bf16-true"
    assert value["frozen"] == {"predicted": 1, "real": 0, "both": 0, "layers": 2}
    assert value["mean_differences"]["frozen_frac"] == 0.125
    assert value["notes"] == ["torn"]
    assert value["model"]["figures"]["frozen_frac"] == {
        "predicted": 0.5,
        "real": 0.25,
        "difference": 0.25,
    }
    assert value["layers"]["=cmd|x"] == {
        "step": 0,
        "figures": {
            "frozen_frac": {"predicted": 1.0, "real": 0.75, "difference": 0.25},
            "progress_kept": {"predicted": None, "real": None, "difference": None},
            "exp_avg_sq_ratio": {"predicted": 1.0, "real": 2.0, "difference": 1.0},
        },
    }
    figures = value["layers"]["plain"]["figures"]
    assert figures["progress_kept"] == {"predicted": "inf", "real": 1.0, "difference": "inf"}
    assert figures["exp_avg_sq_ratio"]["difference"] == "inf"


def test_the_csv_of_a_confirmation_has_a_line_for_each_layer() -> None:
    text = confirmation_as_csv(make_confirmation())
    frame = pd.read_csv(io.StringIO(text))
    assert [*frame["layer"]] == ["plain", "'=cmd|x"]
    assert [*frame["frozen_frac_predicted"]] == [0.25, 1.0]
    assert [*frame["frozen_frac_real"]] == [0.25, 0.75]
    assert [*frame["frozen_frac_difference"]] == [0.0, 0.25]
    assert [*frame["progress_kept_real"].isna()] == [False, True]
    assert [*frame["exp_avg_sq_ratio_difference"]] == [math.inf, 1.0]
    assert [*frame["step"]] == [0, 0]
