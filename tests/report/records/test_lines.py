"""The figures that are read are those that were written, for any numbers and names."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from altgrad import FloatFormat, Histogram, StepRecord
from altgrad.measurement import LAYER_METRICS
from altgrad.measurement.catalogue import STATED_ERRORS, STATED_TWIN_ERRORS
from altgrad.report import Header, Row, RunFile, read
from altgrad.report.records import writing
from tests.report.records.recording import (
    FORMATS,
    assert_same,
    header_from,
    make_records,
    read_strict_lines,
    record_run,
    written,
)
from tests.report.records.schema_2 import write_schema_2

ODD_NAMES = (
    "<script>alert(1)</script>",
    'line\nbreak "quoted"',
    "größe/重み",
    "100 %s %",
    "\ud800",
)


def test_only_sampled_layers_have_standard_errors(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records))
    keys = {f"{metric}/{format}" for metric in STATED_ERRORS for format in FORMATS}
    sampled = {"0.weight", None}
    for row in run.rows:
        assert set(row.errors) == (keys if row.layer in sampled else set())
        figures = records[row.step].layers.get(row.layer, records[row.step].model)
        for key, error in row.errors.items():
            assert_same(error, figures.standard_error(key))
    assert any(row.errors["stall_frac/bf16"] > 0 for row in run.rows if row.layer in sampled)


def test_the_row_of_the_model_has_counts_times_and_histograms(tmp_path, records, header) -> None:
    weights = Histogram(-20, (1.0, 0.5, 1e9))
    with RunFile.create(tmp_path, header) as file:
        for step, record in enumerate(records):
            given = weights if step == 1 else None
            file.append(step, record, skipped={"inf": 2, "zero_lr": 1}, weights=given)
    rows = [row for row in read(file.path).rows if row.layer is None]
    for row, record in zip(rows, records, strict=True):
        assert row.elements == record.model.elements == 1000 + 50 + 50 + 50 + 150 + 3
        assert row.skipped == {"inf": 2, "zero_lr": 1}
        assert_same(row.own_seconds, record.own_seconds)
        assert_same(row.training_seconds, record.training_seconds)
        for key in ("ulps", "steps/bf16", "steps/e4m3fn"):
            first, counts = row.histograms[key]
            assert (first, len(counts)) == (0 if key == "ulps" else -32, 64)
            assert counts == pytest.approx(record.model.histogram(key).counts, rel=1e-7)
    assert math.isnan(rows[0].own_seconds)
    assert rows[2].own_seconds > 0
    assert [row.histograms.get("weights") for row in rows] == [None, weights, None]
    layer = read(file.path).rows[0]
    assert (layer.elements, layer.skipped, layer.histograms) == (None, {}, {})


def test_nan_and_inf_are_written_and_read(tmp_path) -> None:
    parameters = {
        "still": torch.zeros(40),
        "exact": torch.ones(40),
        "nan": torch.full((4,), math.nan),
    }
    records = make_records(parameters, steps=1)
    path = written(tmp_path, header_from(records[0]), records)
    assert records[0].layers["exact"]["sqnr_db/bf16"] == math.inf
    read_strict_lines(path)
    rows = {row.layer: row for row in read(path).rows}
    assert math.isnan(rows["nan"].figures["stall_frac/bf16"])
    assert rows["exact"].figures["sqnr_db/bf16"] == math.inf


def test_times_have_8_significant_digits(tmp_path, records, header) -> None:
    record = replace(records[0], own_seconds=1 / 3, training_seconds=math.inf)
    line = read_strict_lines(written(tmp_path, header, [record]))[-1]
    assert (line["own_seconds"], line["training_seconds"]) == (0.33333333, "inf")


def test_layers_may_have_any_name(tmp_path) -> None:
    records = make_records({name: torch.ones(5) for name in ODD_NAMES})
    path = written(tmp_path, header_from(records[0]), records)
    assert len(read_strict_lines(path)) == 1 + 1 + 3
    run = read(path)
    assert [*run.layers] == [row.layer for row in run.rows[:5]] == [*ODD_NAMES]
    assert run.notes == []


def test_a_format_may_have_any_name(tmp_path) -> None:
    name = '%s"nan"inf<b>'
    formats = [FloatFormat(name, exponent_bits=3, mantissa_bits=2, bias=3)]
    records = make_records({"w": torch.ones(3000)}, formats=formats, max_elements=100)
    run = read(written(tmp_path, header_from(records[0], formats), records))
    assert [*run.formats] == [name]
    for row in run.rows:
        assert_same(
            row.figures[f"stall_frac/{name}"], records[row.step].model[f"stall_frac/{name}"]
        )
        assert f"stall_frac/{name}" in row.errors


def test_a_record_without_formats_is_written_and_read(tmp_path) -> None:
    records = make_records({"w": torch.ones(3000)}, formats=[], max_elements=100)
    run = read(written(tmp_path, header_from(records[0], []), records))
    assert {*run.rows[0].figures} == {*LAYER_METRICS}
    assert [*run.rows[1].histograms] == ["ulps"]


@pytest.fixture(scope="module")
def twinned() -> tuple[Header, list[StepRecord]]:
    """A run with twins of 64 elements: `0.weight` is sampled twice, others by its twins alone."""
    options = {"formats": FORMATS, "recipes": ["bf16", "e4m3fn-sr"], "twin_elements": 64}
    return record_run(optimizer=torch.optim.AdamW, max_elements=1000, **options)


def test_figures_of_twins_are_read_as_they_were_written(tmp_path, twinned) -> None:
    header, records = twinned
    run = read(written(tmp_path, header, records))
    assert [*run.recipes] == ["bf16", "e4m3fn-sr"]
    assert not run.notes
    for row in run.rows:
        figures = records[row.step].layers.get(row.layer, records[row.step].model)
        assert [*row.figures] == [*figures]
        assert {key for key in row.figures if "progress_kept" in key} == {
            f"{metric}/{recipe}"
            for metric in ("progress_kept", "window_progress_kept")
            for recipe in ("bf16", "e4m3fn-sr")
        }
        assert "exp_avg_sq_ratio/bf16" in row.figures
        for key, figure in row.figures.items():
            assert_same(figure, figures[key])
        assert_same(row.moved_elements, figures.moved_elements)
    assert {row.layer: row.moved_elements for row in run.rows}["0.weight"] == 64


def test_twins_have_errors_also_where_the_layer_is_measured_whole(tmp_path, twinned) -> None:
    header, records = twinned
    whole = {f"{m}/{r}" for m in STATED_TWIN_ERRORS for r in header.recipes}
    sampled = whole | {f"{m}/{f}" for m in STATED_ERRORS for f in FORMATS}
    for row in read(written(tmp_path, header, records)).rows:
        assert {*row.errors} == (sampled if row.layer in ("0.weight", None) else whole)
        figures = records[row.step].layers.get(row.layer, records[row.step].model)
        for key, error in row.errors.items():
            assert_same(error, figures.standard_error(key))


def test_a_record_without_twins_has_no_field_of_twins(tmp_path, records, header) -> None:
    first, columns, *_ = read_strict_lines(written(tmp_path, header, records))
    assert first["recipes"] == {}
    assert columns["columns"]["moved_elements"] is False
    assert all(math.isnan(row.moved_elements) for row in read(tmp_path).rows)


def list_numbers(row: Row) -> list[float]:
    """Return all numbers of a row, those of its intervals and histograms included."""
    return [
        *(row.own_seconds, row.training_seconds, row.moved_elements),
        *row.figures.values(),
        *row.errors.values(),
        *(end for key in row.figures for end in row.interval(key)),
        *(count for each in row.histograms.values() for count in each.counts),
    ]


def describe(row: Row) -> list[Any]:
    """Return all that a row says but numbers."""
    histograms = {key: (each.first, len(each.counts)) for key, each in row.histograms.items()}
    about = [row.step, row.layer, row.elements, row.skipped, histograms]
    return [*about, [*row.figures], [*row.errors]]


def test_a_file_says_the_same_as_one_of_schema_2(tmp_path, records, header, twinned) -> None:
    for name, (own_header, own) in {"plain": (header, records), "twins": twinned}.items():
        weights = {1: Histogram(-20, (1.0, 0.5, 1e9))}
        before = read(write_schema_2(tmp_path / name, own_header, own, weights))
        with RunFile.create(tmp_path / name / "new", own_header) as file:
            for step, record in enumerate(own):
                file.append(step, record, skipped={"inf": step}, weights=weights.get(step))
        after = read(file.path)
        for one, other in zip(after.rows, before.rows, strict=True):
            assert describe(one) == describe(other)
            # 5e-8 of the 8 digits of schema 2, and 4e-9 of the 28 bits of schema 3
            assert list_numbers(one) == pytest.approx(list_numbers(other), rel=5.4e-8, nan_ok=True)
        assert (after.steps, [*after.figure_keys]) == (before.steps, [*before.figure_keys])
        assert (after.layers, after.formats, after.recipes) == (
            *(before.layers, before.formats),
            before.recipes,
        )
        for key in after.figure_keys:
            for layer in (None, *own_header.layers):
                one, other = after.series(key, layer), before.series(key, layer)
                assert one == pytest.approx(other, rel=5.4e-8, nan_ok=True)


def test_columns_are_declared_once_and_again_if_they_change(tmp_path) -> None:
    """Layers that are observed in turn have two declarations, however many steps there are."""
    a, b = (make_records({name: torch.ones(40)}, steps=1)[0] for name in "ab")
    header = replace(header_from(a), layers=header_from(a).layers | header_from(b).layers)
    with RunFile.create(tmp_path, header) as file:
        for step in range(6):
            file.append(step, (a, b)[step % 2], skipped={})
    lines = read_strict_lines(file.path)
    assert [line["columns"]["layers"] for line in lines[1:] if "step" not in line] == [
        ["a", None],
        ["b", None],
    ]
    assert [line["columns"] for line in lines if "step" in line] == [0, 1, 0, 1, 0, 1]
    with RunFile.resume(file.path, 4, header) as file:
        file.append(4, b, skipped={})  # declared again, under the number 0
    assert [row.layer for row in read(file.path).rows] == [*("a", None, "b", None) * 2, "b", None]


def test_numbers_of_columns_begin_anew_after_many(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writing, "_MOST_DECLARED", 2)  # a real run declares a few
    records = {name: make_records({name: torch.ones(40)}, steps=1)[0] for name in "abc"}
    with RunFile.create(tmp_path, header_from(records["a"])) as file:
        for step, name in enumerate("abcab"):
            file.append(step, records[name], skipped={})
    assert [row.layer for row in read(file.path).rows if row.layer] == [*"abcab"]
    numbers = [line["columns"] for line in read_strict_lines(file.path) if "step" in line]
    assert numbers == [0, 1, 0, 1, 0]


def test_a_step_takes_few_bytes(tmp_path, twinned) -> None:
    """By count: 2.2 bytes a number; the lines of schema 2 take 33."""
    header, records = twinned
    sizes = []
    for steps in (1, 2):
        with RunFile.create(tmp_path / str(steps), header) as file:
            for step in range(steps):
                file.append(step, records[-1], skipped={})
        sizes.append(file.path.stat().st_size)
    rows = (*records[-1].layers.values(), records[-1].model)
    count = sum(len(figures) for figures in rows)
    assert sizes[1] - sizes[0] < 5 * count
