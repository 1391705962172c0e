"""The text that a terminal shows for a run, and for the comparison of two runs."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from altgrad import UpdateMonitor
from altgrad.quantization import get_formats
from altgrad.report import (
    Comparison,
    FormatInfo,
    Row,
    RunFile,
    RunReport,
    print_comparison,
    print_report,
)
from altgrad.report.judging.calibration import calibration
from tests.command_line import altgrad
from tests.report.runs import (
    FORMATS,
    MARKUP,
    SCRIPT,
    figures,
    make_rows,
    make_run,
    write_empty_run,
    write_run,
)
from tests.report.twin_runs import figures as twin_figures, make_recipe

MORE_FORMATS = ("fp16", "e4m3fn", "e3m4", "e3m2", "e2m3", "e2m1fn")


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_shows_the_verdict_on_each_layer_and_format(run: Path, columns: int) -> None:
    shown = altgrad("report", run, columns=columns)
    assert shown.returncode == 0, shown.stderr
    lines = [line.rstrip() for line in shown.stdout.splitlines()]
    assert max(map(len, lines)) <= columns
    rows = {
        line.rsplit(maxsplit=5)[0].strip(): line.split()[-5:]
        for line in lines
        if line.count(" 0.00 ") == 2
    }
    assert rows == {name: ["frozen", "0.00"] * 2 + ["none"] for name in ("gain", SCRIPT)}
    for name in ("matrix", MARKUP):
        (row,) = (line for line in lines if line.strip().startswith(name))
        assert row.split()[-5:] == ["fine", "1.00", "fine", "1.00", "e5m2"]
    text = " ".join(shown.stdout.split())
    assert "3 steps observed, 0 to 20; all 32 elements in 4 layers" in text
    assert "Skipped steps: 2 inf" in text
    assert "gain, <script>" in text
    assert "\x1b" not in shown.stdout


def test_a_report_of_many_layers_shows_the_worst_40_and_all_on_demand(tmp_path: Path) -> None:
    long = "encoder.blocks.{}.attention.query_key_value.projection.weight"
    fine = [long.format(k) for k in range(2000)]
    path = write_run(tmp_path, ["the.frozen.one"], fine, steps=1)
    lines = altgrad("report", path).stdout.splitlines()
    assert len(lines) < 94  # the last three are about memory
    assert "40 of 2,001 layers, first those frozen, stuck or NaN in a recipe (1 in all):" in lines
    (row,) = (line for line in lines if line.startswith("the.frozen.one"))
    assert row.split()[1:] == ["frozen", "0.00", "frozen", "0.00", "none"]
    assert 'SamplingRule("encoder.blocks.*.attention.query_key_value.projection.weight"),' in (
        line.strip() for line in lines
    )
    table = lines[: lines.index("from altgrad import SamplingRule, WeightStorage")]
    assert max(map(len, table)) <= 80
    lines = altgrad("report", path, "--layers", 0).stdout.splitlines()
    rows = [line.split() for line in lines if "projection.weight " in line]
    assert len(rows) == 2000
    assert all(row[1:] == ["fine", "1.00", "fine", "1.00", "e5m2"] for row in rows)


def test_formats_that_do_not_fit_are_shown_in_another_table(tmp_path: Path) -> None:
    formats = ["bf16", "fp16", "e4m3fn", "e5m2", "e3m4", "mxfp8_e4m3", "mxfp4", "nvfp4"]
    path = write_run(tmp_path, formats=formats, recipes=formats[:-1])  # nvfp4 has no twins
    shown = altgrad("report", path).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"\S…(\s|$)", shown)  # no text is cut at its end
    assert shown.count("Layer by layer, stored as") > 1
    wide = altgrad("report", path, columns=200).stdout
    assert wide.count("Layer by layer, stored as") == 1
    for text in (shown, wide):
        headings = [line.split()[1:-1] for line in text.splitlines() if line.startswith("layer ")]
        assert [word for words in headings for word in words] == formats


def test_code_to_copy_is_shown_completely_or_not_at_all(run: Path, tmp_path: Path) -> None:
    shown = altgrad("report", run, columns=40).stdout
    assert json.loads(altgrad("report", run, "--json", "-").stdout)["to_apply"] + "\n" in shown
    names = [f"layer{k}.gain" for k in range(120)]
    many = altgrad("report", write_run(tmp_path, names[::2], names[1::2])).stdout
    assert "lines that apply the suggestions are in --html and --json." in many
    assert "SamplingRule" not in many


def test_a_run_without_an_observed_step_is_reported_as_such(tmp_path: Path) -> None:
    path = write_empty_run(tmp_path)
    shown = altgrad("report", path, "--html", tmp_path / "page.html")
    assert shown.returncode == 0, shown.stderr
    assert "no step observed" in " ".join(shown.stdout.split())
    assert "No step was observed: there are no verdicts." in shown.stdout
    assert "No step was observed" in (tmp_path / "page.html").read_text()
    assert altgrad("compare", path, path).returncode == 0
    compared = altgrad("compare", write_run(tmp_path / "other"), path).stdout
    assert "No observed step in B: nothing to compare." in compared
    assert "The model" not in compared  # a table without a line


def test_a_comparison_shows_differing_verdicts_first(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, ["matrix", SCRIPT], ["gain", "more"])
    shown = altgrad("compare", run, other)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    table = [
        line.split()
        for line in lines[lines.index(next(x for x in lines if "A" in x and "layer" in x)) :]
    ]
    rows = [row for row in table if len(row) == 6]
    assert rows == [
        *(["gain", format, "frozen", "0.00", "fine", "1.00"] for format in FORMATS),
        *(["matrix", format, "fine", "1.00", "frozen", "0.00"] for format in FORMATS),
        *([SCRIPT, format, "frozen", "0.00", "frozen", "0.00"] for format in FORMATS),
    ]
    text = " ".join(shown.stdout.split())
    assert "Differing verdicts: 4 of 6." in text
    assert f"layers only in A: 1 ({MARKUP})" in text
    assert "layers only in B: 1 (more)" in text
    assert re.search(r"kept_update_ratio/bf16 1\.0000 1\.0000 0 ", text)
    assert "Differing verdicts: 0 of 8." in altgrad("compare", run, run).stdout


def test_the_legend_keeps_its_columns_in_a_narrow_terminal(run: Path) -> None:
    lines = altgrad("report", run, columns=50).stdout.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("  fine "))
    last = next(k for k, line in enumerate(lines) if line.startswith("  The number is"))
    assert all(line.startswith("  ") for line in lines[first:last])
    assert max(map(len, lines[first:last])) <= 50


def test_short_names_leave_room_for_formats(tmp_path: Path) -> None:
    path = write_run(tmp_path, ["a"], ["b"], formats=["bf16", "e4m3fn", "e5m2"])
    lines = altgrad("report", path, columns=60).stdout.splitlines()
    assert len([line for line in lines if line.startswith("layer ")]) == 1
    assert "Layer by layer, stored as …" in lines  # whole, though the table is narrow


HOSTILE = ("f[bold]", "[/x]", ":smile:", "\x1b[31mred", "a\nb", "\u202egnp", "\ud800", "名前")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_names_of_formats_are_shown_literally_and_cannot_control_the_terminal(width: int) -> None:
    formats = dict(zip(HOSTILE, get_formats([*FORMATS, *MORE_FORMATS]), strict=True))
    infos = {
        name: replace(FormatInfo.from_format(each, None), name=name)
        for name, each in formats.items()
    }
    rows = make_rows({name: dict.fromkeys(HOSTILE, 1.0) for name in ("first", *HOSTILE)})
    model = Row(0, None, figures("f[bold]") | figures("\x1b[31mred"), {})
    run = replace(make_run([*rows, model], formats=()), formats=infos)
    report = RunReport.from_run(run)
    for show in (
        lambda console: print_report(report, console),
        lambda console: print_comparison(Comparison((report, report)), console),
    ):
        file = io.StringIO()
        show(Console(file=file, width=width))
        shown = file.getvalue()
        assert "\x1b" not in shown
        assert all(line.isprintable() for line in shown.split("\n"))
        for name in ("f[bold]", "[/x]", ":smile:", "�[31mred", "a�b", "�gnp"):
            assert name in shown, name
    assert "stall_frac/�[31mred" in shown
    if width > 40:  # the figures beside the name take 20 characters
        assert "kept_update_ratio/f[bold]" in shown


@pytest.mark.parametrize(("kept", "mark"), [("kept_update_ratio", "*"), ("progress_kept", "")])
def test_the_legend_has_the_thresholds_by_which_a_layer_was_judged(kept: str, mark: str) -> None:
    twin = "progress_kept" in kept
    own = twin_figures(progress_kept=0.95) if twin else figures("bf16", kept_update_ratio=0.95)
    run = make_run([Row(0, "a", own, {f"{kept}/bf16": 0.0})], ["bf16"])
    if twin:
        run = replace(run, recipes={"bf16": make_recipe()})
    file = io.StringIO()
    print_report(RunReport.from_run(run), Console(file=file, width=100))
    text = file.getvalue()
    limits = calibration().thresholds if twin else calibration().step_thresholds
    (legend,) = (line for line in text.splitlines() if line.startswith("  watch"))
    assert legend.split()[0] == f"watch{mark}"
    assert f"{limits.needs_remedy:g} to {limits.stores_fine:g} " in legend
    assert f" watch 0.95{mark} " in text


def test_a_run_without_formats_has_no_column_of_the_smallest_format() -> None:
    run = make_run([Row(0, "a", twin_figures(), {})], [])
    run = replace(run, recipes={"bf16": make_recipe()})
    file = io.StringIO()
    print_report(RunReport.from_run(run), Console(file=file, width=80))
    assert "smallest" not in file.getvalue()
    assert re.search(r"^a +\w+ 1.00", file.getvalue(), re.MULTILINE)


def test_a_table_that_shows_a_part_of_the_layers_shows_those_that_stand_still() -> None:
    """A layer may be frozen, though another one keeps less, which moves the other way."""
    back = {f"back{k}": twin_figures(progress_kept=-0.5) for k in range(5)}
    frozen = {f"frozen{k}": twin_figures(progress_kept=0.25, frozen_frac=1.0) for k in range(3)}
    errors = {f"{metric}/bf16": 0.0 for metric in ("progress_kept", "frozen_frac", "still_frac")}
    rows = [Row(0, name, each, errors) for name, each in (back | frozen).items()]
    run = replace(make_run(rows, []), recipes={"bf16": make_recipe()})
    file = io.StringIO()
    print_report(RunReport.from_run(run), Console(file=file, width=80), 2)
    lines = file.getvalue().splitlines()
    assert "2 of 8 layers, first those frozen, stuck or NaN in a recipe (3 in all):" in lines
    names = [line.split()[0] for line in lines if re.search(r"^(back|frozen)\d  *\w", line)]
    assert names == ["frozen0", "frozen1"]


def test_layers_that_became_nan_are_marked_and_named(tmp_path: Path) -> None:
    """Adam in fp16 divides by an eps of 0 where a gradient is 0."""
    half = torch.nn.Parameter(torch.ones(20, dtype=torch.float16))
    whole = torch.nn.Parameter(torch.ones(20))
    optimizer = torch.optim.Adam([half, whole], lr=0.1, eps=1e-8)
    layers = [("half", half), ("whole", whole)]
    monitor = UpdateMonitor(layers, formats="e4m3fn", warn=print, strict=True)
    with RunFile.create(tmp_path, monitor.run_header()) as file, monitor.attach(optimizer):
        for step in range(2):
            half.grad = (torch.arange(20) % 2).half()
            whole.grad = torch.ones(20)
            optimizer.step()
            file.append(step, monitor.latest, skipped={})
    assert int(half.isnan().sum()) == 10
    shown = altgrad("report", file.path).stdout
    text = " ".join(shown.split())
    assert "NaN elements were NaN or inf in an observed step: no figure counts these" in text
    assert "NaN or inf in elements (nonfinite_frac), which no figure counts: half (50 %)." in text
    (row,) = (line for line in shown.splitlines() if line.strip().startswith("half "))
    assert " NaN " in row
    (row,) = (line for line in shown.splitlines() if line.strip().startswith("whole "))
    assert "NaN" not in row
