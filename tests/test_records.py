"""The run file: what is written is read, whatever becomes of the process, the disk or the file."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from altgrad import Histogram, StepRecord, UpdateMonitor, __version__
from altgrad.measurement import LAYER_METRICS
from altgrad.quantization import get_formats
from altgrad.report import (
    FormatInfo,
    Header,
    LayerInfo,
    Row,
    RunFile,
    RunFileError,
    read,
)
from altgrad.report.records.lines import WITH_ERRORS, written_numbers
from altgrad.report.records.schema import number_as_json, number_from_json

FORMATS = ("bf16", "e4m3fn")
ODD_NAMES = (
    "<script>alert(1)</script>",
    'line\nbreak "quoted"',
    "größe/重み",
    "100 %s %",
    "\ud800",
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 50), nn.LayerNorm(50), nn.Linear(50, 3))


def records_of(
    named: Any = None, steps: int = 3, formats: Any = FORMATS, **options: Any
) -> list[StepRecord]:
    parameters = dict(net().named_parameters() if named is None else named)
    records: list[StepRecord] = []
    optimizer = torch.optim.SGD(parameters.values(), lr=0.01)
    monitor = UpdateMonitor([*parameters.items()], records.append, formats=formats, **options)
    with monitor.attach(optimizer):
        for seed in range(steps):
            generator = torch.Generator().manual_seed(seed)
            for each in parameters.values():
                each.grad = torch.randn(each.shape, generator=generator)
            optimizer.step()
    return records


def header_of(record: StepRecord, formats: Any = FORMATS) -> Header:
    return Header(
        {each.name: FormatInfo.of(each, "tensor") for each in get_formats(formats)},
        {
            name: LayerInfo((figures.population,), "float32", figures.elements, figures.formats)
            for name, figures in record.layers.items()
        },
        versions={"torch": "2.0"},
    )


@pytest.fixture(scope="module")
def records() -> list[StepRecord]:
    return records_of(max_elements=1000)


@pytest.fixture(scope="module")
def header(records: list[StepRecord]) -> Header:
    return header_of(records[0])


def written(
    folder: Path, header: Header, records: list[StepRecord], steps: Any = None, **options: Any
) -> Path:
    with RunFile.create(folder, header, **options) as file:
        for step, record in zip(steps or range(len(records)), records, strict=False):
            file.append(step, record, skipped={"inf": step})
    return file.path


def assert_same(actual: float, expected: float) -> None:
    assert actual == pytest.approx(expected, rel=1e-7, abs=0, nan_ok=True)


def strict_lines(path: Path) -> list[Any]:
    """JSON as the standard has it: no NaN, no Infinity."""

    def fail(constant: str) -> None:
        raise AssertionError(constant)

    text = path.read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=fail) for line in text[:-1].split("\n")]


# --- round trip


def test_everything_that_was_observed_is_read(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records))
    assert run.path == tmp_path / "altgrad.jsonl"
    assert (run.formats, run.layers, run.scaling) == (header.formats, header.layers, "tensor")
    assert run.versions == {"altgrad": __version__, "torch": "2.0"}
    assert run.created.startswith("20")
    assert (run.steps, run.notes, run.predecessors) == ((0, 1, 2), [], [])
    assert [(row.step, row.layer) for row in run.rows] == [
        (step, name) for step in range(3) for name in (*records[0].layers, None)
    ]
    for row in run.rows:
        record = records[row.step]
        figures = record.model if row.layer is None else record.layers[row.layer]
        assert list(row.figures) == list(figures)
        for key, value in figures.items():
            assert_same(row.figures[key], value)


def test_sampled_layers_have_standard_errors_and_no_others(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records))
    keys = {f"{metric}/{format}" for metric in WITH_ERRORS for format in FORMATS}
    sampled = {"0.weight", None}
    for row in run.rows:
        assert set(row.errors) == (keys if row.layer in sampled else set())
        figures = records[row.step].layers.get(row.layer, records[row.step].model)
        for key, error in row.errors.items():
            assert_same(error, figures.standard_error(key))
    assert any(row.errors["stall_frac/bf16"] > 0 for row in run.rows if row.layer in sampled)


def test_the_row_of_the_model_says_more(tmp_path, records, header) -> None:
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


def test_numbers_without_a_value_and_without_an_end(tmp_path) -> None:
    parameters = {
        "still": torch.zeros(40),
        "exact": torch.ones(40),
        "nan": torch.full((4,), math.nan),
    }
    records = records_of(parameters, steps=1)
    path = written(tmp_path, header_of(records[0]), records)
    lines = {line["layer"]: line for line in strict_lines(path)[1:]}
    assert lines["nan"]["figures"]["stall_frac/bf16"] is None
    assert records[0].layers["exact"]["sqnr_db/bf16"] == math.inf
    assert lines["exact"]["figures"]["sqnr_db/bf16"] == "inf"
    rows = {row.layer: row for row in read(path).rows}
    assert math.isnan(rows["nan"].figures["stall_frac/bf16"])
    assert rows["exact"].figures["sqnr_db/bf16"] == math.inf


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0.0, "0"), (-0.0, "-0"), (1.0, "1"), (0.5, "0.5"), (1 / 3, "0.33333333")),
        *((1e-300, "1e-300"), (-123456789.0, "-1.2345679e+08"), (5e-324, "4.9406565e-324")),
        *((math.nan, "null"), (math.inf, '"inf"'), (-math.inf, '"-inf"')),
    ],
)
def test_how_a_number_is_written(number: float, text: str) -> None:
    assert written_numbers([1.5, number, 2.5]) == ["1.5", text, "2.5"]
    assert number_from_json(json.loads(text)) == pytest.approx(number, rel=5e-8, nan_ok=True)
    assert number_from_json(json.loads(json.dumps(number_as_json(number)))) == pytest.approx(
        number, rel=0, nan_ok=True
    )


def test_layers_of_any_name(tmp_path) -> None:
    records = records_of({name: torch.ones(5) for name in ODD_NAMES})
    path = written(tmp_path, header_of(records[0]), records)
    assert len(strict_lines(path)) == 1 + 3 * 6
    run = read(path)
    assert [*run.layers] == [row.layer for row in run.rows[:5]] == [*ODD_NAMES]
    assert run.notes == []


def test_a_format_of_any_name(tmp_path) -> None:
    from altgrad import FloatFormat

    name = '%s"nan"inf<b>'
    formats = [FloatFormat(name, exponent_bits=3, mantissa_bits=2, bias=3)]
    records = records_of({"w": torch.ones(3000)}, formats=formats, max_elements=100)
    run = read(written(tmp_path, header_of(records[0], formats), records))
    assert [*run.formats] == [name]
    for row in run.rows:
        assert_same(
            row.figures[f"stall_frac/{name}"], records[row.step].model[f"stall_frac/{name}"]
        )
        assert f"stall_frac/{name}" in row.errors


def test_without_formats(tmp_path) -> None:
    records = records_of({"w": torch.ones(3000)}, formats=[], max_elements=100)
    run = read(written(tmp_path, header_of(records[0], []), records))
    assert {*run.rows[0].figures} == {*LAYER_METRICS}
    assert [*run.rows[1].histograms] == ["ulps"]


def test_what_the_header_says_of_formats_and_scalings(tmp_path, records) -> None:
    formats = get_formats(["bf16", "e4m3fn", "e0m7", "nvfp4"])
    for scaling in (None, "channel", ("block", 32)):
        infos = {each.name: FormatInfo.of(each, scaling) for each in formats}
        path = written(tmp_path, Header(infos, {}, scaling), [])
        assert (read(path).formats, read(path).scaling) == (infos, scaling)
    assert infos["e4m3fn"] == FormatInfo("e4m3fn", 8, 448.0, 2.0**-9, 2.0**-6, 0.125, scaled=True)
    assert infos["bf16"].scaled is False
    assert (infos["nvfp4"].bits, infos["nvfp4"].max, infos["nvfp4"].scaled) == (4, 6.0, True)
    line = json.loads((tmp_path / "altgrad.jsonl").read_text())
    assert line["altgrad"] == 1
    assert line["predecessor"] is None


# --- series and tables


def test_a_series_of_one_figure(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records, steps=[9, 19, 29]))
    of_model = run.series("stall_frac/bf16")
    assert list(of_model) == [9, 19, 29]
    assert_same(of_model[19], records[1].model["stall_frac/bf16"])
    assert_same(run.series("update_rms", "1.bias")[29], records[2].layers["1.bias"]["update_rms"])
    assert run.series("stall_frac/e5m2") == {}
    with pytest.raises(KeyError, match=r"'head': expected a layer of the run, such as .*0\.weight"):
        run.series("update_rms", "head")


def test_to_pandas(tmp_path, records, header) -> None:
    frame = read(written(tmp_path, header, records)).to_pandas()
    assert len(frame) == 3 * 7
    of_model = frame[frame.layer.isna()].set_index("step")
    assert_same(of_model["stall_frac/bf16"][2], records[2].model["stall_frac/bf16"])
    error = frame[frame.layer == "0.weight"]["stall_frac_error/bf16"].iloc[0]
    assert_same(error, records[0].layers["0.weight"].standard_error("stall_frac/bf16"))
    assert frame[frame.layer == "0.bias"]["stall_frac_error/bf16"].isna().all()


def test_without_pandas_the_remedy_is_named(tmp_path, records, header) -> None:
    run = read(written(tmp_path, header, records))
    with (
        mock.patch.dict(sys.modules, {"pandas": None}),
        pytest.raises(ImportError, match="pip install pandas"),
    ):
        run.to_pandas()


# --- what becomes of files


def test_two_runs_in_one_folder_do_not_meet(tmp_path, records, header) -> None:
    first = written(tmp_path, header, records[:1])
    content = first.read_bytes()
    for number in range(2, 12):
        assert written(tmp_path, header, records[:2]).name == f"altgrad-{number}.jsonl"
    assert first.read_bytes() == content
    run = read(tmp_path)
    assert run.path.name == "altgrad-11.jsonl"
    (note,) = run.notes
    assert "altgrad-11.jsonl is read, of several runs in its folder (altgrad.jsonl, altg" in note
    assert read(first).steps == (0,)


def test_a_killed_process_loses_at_most_the_last_line(tmp_path, records) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.test_records import *
records = records_of(max_elements=1000)
file = RunFile.create({str(tmp_path)!r}, header_of(records[0]))
step = 0
while True:
    file.append(step, records[step % 3], skipped={{}})
    if step == 50:
        print("fifty", flush=True)
    step += 1
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"fifty\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    run = read(tmp_path)
    assert set(range(51)) <= set(run.steps)
    rows = len(run.rows)
    assert rows >= 51 * 7
    assert len((tmp_path / "altgrad.jsonl").read_bytes().splitlines()) - 1 - rows <= 1


@pytest.mark.parametrize("left", [1, 10, 300])
def test_a_torn_last_line_is_skipped_with_a_note(tmp_path, records, header, left: int) -> None:
    path = written(tmp_path, header, records)
    content = path.read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    path.write_bytes(content[: last + left])
    run = read(path)
    assert run.notes == ["altgrad.jsonl: line 22, the last, is torn and skipped"]
    assert len(run.rows) == 20
    RunFile.resume(path, 2, header).close()
    assert read(path).steps == (0, 1)
    assert len(read(path).notes) == 1  # that there is something superseded
    strict_lines(path)


def test_a_disk_that_is_full_leaves_whole_lines(tmp_path, records, header) -> None:
    file = RunFile.create(tmp_path, header)
    file.append(0, records[0], skipped={})
    size = file.path.stat().st_size
    real = file._file

    class Full:
        def write(self, data: memoryview) -> int:
            if real.tell() - size > 5000:
                raise OSError(28, "No space left on device")
            return real.write(data[:3000])

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    file._file = Full()
    with pytest.raises(OSError, match="No space left"):
        file.append(1, records[1], skipped={})
    assert file.path.stat().st_size == size
    file._file = real
    file.append(2, records[2], skipped={})
    file.close()
    assert (read(file.path).steps, read(file.path).notes) == ((0, 2), [])


def test_a_disk_that_is_full_from_the_start_leaves_no_empty_file(tmp_path, header) -> None:
    with (
        mock.patch(
            "altgrad.report.records.writing.RunFile._write", side_effect=OSError(28, "full")
        ),
        pytest.raises(OSError, match="full"),
    ):
        RunFile.create(tmp_path, header)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_file_takes_nothing_more(tmp_path, records, header) -> None:
    file = RunFile.create(tmp_path, header)
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.append(0, records[0], skipped={})


# --- resumed


def test_a_resumed_run_has_no_gap_and_nothing_twice(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    with RunFile.resume(path, 2, header) as file:
        assert file.path == path
        file.append(2, records[0], skipped={})
        file.append(3, records[1], skipped={})
    run = read(path)
    assert run.steps == (0, 1, 2, 3)
    assert len(run.rows) == 4 * 7
    assert_same(run.series("update_rms")[2], records[0].model["update_rms"])
    assert run.notes == ["altgrad.jsonl: resumed before step 2, 7 lines are superseded"]
    RunFile.resume(path, 1, header).close()  # once more, from earlier on
    assert read(path).steps == (0,)


def test_a_run_that_is_another_one_is_not_written_below(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    content = path.read_bytes()
    other = header_of(records[0], ("bf16", "e5m2"))
    with RunFile.resume(path, 1, other) as file:
        file.append(1, records[1], skipped={})
    assert path.read_bytes() == content
    assert file.path.name == "altgrad-2.jsonl"
    run = read(file.path)
    assert (run.steps, run.predecessors) == ((0, 1), [path])
    assert [*run.formats] == ["bf16", "e5m2", "e4m3fn"]


def test_a_run_resumed_elsewhere_names_its_predecessor(tmp_path, records, header) -> None:
    first = written(tmp_path / "version_0", header, records)  # 0, 1, 2
    second = written(tmp_path / "version_1", header, records, [2, 3, 4], predecessor=(first, 2))
    third = written(tmp_path / "version_2", header, records, [1, 5], predecessor=(second, 4))
    run = read(third)
    assert run.steps == (0, 1, 2, 3, 5)
    assert [(row.step, row.layer) for row in run.rows if row.layer is None] == [
        *((step, None) for step in (0, 1, 2, 3, 1, 5))
    ]
    assert [path.resolve() for path in run.predecessors] == [second, first]
    assert run.notes == []
    fourth = written(tmp_path / "version_3", header, records, [1, 2], predecessor=(third, 1))
    assert read(fourth).steps == (0, 1, 2)  # of the first, no more than the step before
    (tmp_path / "version_0").parent.rename(tmp_path.parent / (tmp_path.name + "moved"))
    moved = tmp_path.parent / (tmp_path.name + "moved") / "version_3"
    assert read(moved).steps == (0, 1, 2)


@pytest.mark.parametrize("fate", ["missing", "damaged", "foreign"])
def test_without_its_predecessor_a_run_is_read_with_a_note(
    tmp_path, records, header, fate: str
) -> None:
    first = written(tmp_path / "one", header, records)
    second = written(tmp_path / "two", header, records, [2, 3], predecessor=(first, 2))
    if fate == "missing":
        first.unlink()
    else:
        first.write_text("{}\n" if fate == "foreign" else first.read_text().replace("step", "stop"))
    run = read(second)
    assert (run.steps, run.predecessors) == ((2, 3), [])
    (note,) = run.notes
    assert note.startswith("steps before 2 are missing: ")
    assert "one/altgrad.jsonl" in note


def test_predecessors_in_a_circle(tmp_path, records, header) -> None:
    path = tmp_path / "altgrad.jsonl"
    written(tmp_path, header, records, predecessor=(path, 2))
    other = written(tmp_path / "other", header, records, [3], predecessor=(path, 3))
    for start, steps, before in ((path, (0, 1, 2), []), (other, (0, 1, 2, 3), [path])):
        run = read(start)
        assert run.steps == steps
        assert [each.resolve() for each in run.predecessors] == before
        assert "as its predecessor, in a circle" in run.notes[0]


# --- what is no run file


def test_what_cannot_be_read_says_why_in_one_sentence(tmp_path, records, header) -> None:
    good = written(tmp_path / "good", header, records).read_bytes()
    first, second, rest = good.split(b"\n", 2)
    (tmp_path / "folder").mkdir()
    cases = {
        "missing": (None, "there is no such file or folder"),
        "empty": (b"", "it is empty"),
        "foreign": (b'{"loss": 1}\n', "it is no run file of AltGrad"),
        "list": (b"[1]\n", "it is no run file of AltGrad"),
        "text": (b"epoch,loss\n1,2\n", "it is no run file of AltGrad"),
        "binary": (b"\x89PNG\r\n\x1a\n\xff\x00", "it is no run file of AltGrad"),
        "torn at once": (first[:200], "it is damaged, its first line is torn"),
        "bare": (b'{"altgrad": 1}\n', "it is damaged, its first line lacks"),
        "number": (b'{"altgrad": 1, "scaling": null, "formats": 5}\n', "it is damaged, its first"),
        "hole": (first + b"\n" + second[:99] + b"\n" + rest, "it is damaged, line 2 is none that"),
        "binary hole": (first + b"\n\xff\xfe\n" + rest, "it is damaged, line 2 is none that"),
        "other line": (first + b'\n{"step": 3}\n' + rest, "it is damaged, line 2 is none that"),
        "number line": (first + b"\n3\n" + rest, "it is damaged, line 2 is none that"),
        "word": (good.replace(b"null", b'"none"', 1), "it is damaged, "),
        "newer": (good.replace(b'"altgrad": 1', b'"altgrad": 2'), "a newer AltGrad wrote it"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RunFileError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: {reason}"), message
        assert "\n" not in message
    with pytest.raises(RunFileError, match=r"schema 2, this one reads up to 1.*--upgrade"):
        read(tmp_path / "newer")
    with pytest.raises(RunFileError, match=r"no altgrad\.jsonl in this folder$"):
        read(tmp_path / "folder")
    with pytest.raises(RunFileError, match=r"no altgrad\.jsonl in this folder; .*good has one"):
        read(tmp_path)
    assert isinstance(caught.value, ValueError)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    path.chmod(0)
    with pytest.raises(RunFileError, match="cannot be read"):
        read(path)


def test_what_is_no_run_file_is_not_resumed(tmp_path, header) -> None:
    path = tmp_path / "altgrad.jsonl"
    path.write_text("mine\n")
    with pytest.raises(RunFileError, match="no run file of AltGrad"):
        RunFile.resume(path, 3, header)
    assert path.read_text() == "mine\n"


def test_keys_that_a_later_version_adds_are_no_damage(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    path.write_text(path.read_text().replace('{"step":', '{"mood":"good","step":'))
    assert read(path).steps == (0, 1, 2)


def test_a_row_is_a_mapping_of_its_own(tmp_path, records, header) -> None:
    row: Row = read(written(tmp_path, header, records)).rows[0]
    assert dict(row.figures).keys() == records[0].layers["0.weight"].keys()
    assert "update_rms" in row.figures
    assert row.figures.get("nothing") is None
    assert repr(row.errors).startswith("{'kept_update_ratio/bf16': ")
