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
    LayerInfo,
    Row,
    RunFile,
    RunReport,
    print_comparison,
    print_first_screen,
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
from tests.report.shown_runs import print_to_text
from tests.report.twin_runs import figures as twin_figures, make_recipe

MORE_FORMATS = ("fp16", "e4m3fn", "e3m4", "e3m2", "e2m3", "e2m1fn")


DEFAULT_RECIPES = ["bf16", "bf16-sr", "bf16-true", "e4m3fn", "e4m3fn-sr", "e5m2", "e5m2-sr"]


def make_default_run(layers: int) -> RunReport:
    """Make a run with the recipes of the default formats, whose gains are frozen in bf16."""
    own: dict[str, float] = {"nonfinite_frac": 0.0, "weight_rms": 1.0}
    for recipe in DEFAULT_RECIPES:
        own |= twin_figures(recipe, progress_kept=0.97)
    frozen = own | twin_figures("bf16", progress_kept=0.0, frozen_frac=1.0)
    errors = dict.fromkeys(own, 0.0)
    names = [f"blocks.{k}.attention.query_key_value.weight" for k in range(layers)]
    gains = [f"blocks.{k}.attention_norm.weight" for k in range(3)]
    rows = [Row(0, name, own, errors) for name in names]
    rows += [Row(0, name, frozen, errors) for name in gains]
    rows += [Row(0, None, dict(own), {})]
    infos = {name: LayerInfo((512, 512), "float32", 256, ()) for name in names}
    infos |= {name: LayerInfo((512,), "float32", 256, ()) for name in gains}
    recipes = {name: make_recipe(name, weights=name.split("-")[0]) for name in DEFAULT_RECIPES}
    return RunReport.from_run(replace(make_run(rows, [], layers=infos), recipes=recipes))


@pytest.mark.parametrize("layers", [1, 40, 2000])
def test_the_first_screen_says_all_in_24_lines_of_80_columns(layers: int) -> None:
    found = make_default_run(layers)
    lines = print_to_text(lambda console: print_first_screen(found, console), 80).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines[:-1])) <= 80
    text = " ".join(" ".join(lines).split())
    assert "nothing is lost now" in text
    for recipe in DEFAULT_RECIPES:
        (row,) = (line.split() for line in lines if line.startswith(f"{recipe} "))
        assert row[1] in ("watch", "fine", "remedy", "unsure")
        assert row[2] in ("0.97", "0.96")
    assert "bf16: blocks.*.attention_norm.weight (3 layers) would freeze." in text
    heading = next(line for line in lines if line.startswith("layer "))
    assert heading.split()[1:] == DEFAULT_RECIPES
    assert lines[lines.index(heading) + 2].split()[1] == "frozen"
    assert lines[-1].endswith("--all")


def test_notes_take_their_room_from_the_layers_of_the_first_screen() -> None:
    found = make_default_run(40)
    note = "altgrad.jsonl: resumed before step 5, which supersedes 21 lines"
    found = RunReport(replace(found.run, notes=[note, note]), found.assessment)
    text = print_to_text(lambda console: print_first_screen(found, console), 120)
    assert text.count(note) == 2
    assert len(text.splitlines()) == 24


def test_without_room_for_a_layer_the_first_screen_has_no_table_of_layers() -> None:
    found = make_default_run(40)
    note = "altgrad.jsonl: resumed before step 5, which supersedes 21 lines"
    found = RunReport(replace(found.run, notes=[note, note]), found.assessment)
    text = print_to_text(lambda console: print_first_screen(found, console), 80)
    assert len(text.splitlines()) <= 24
    assert "\nlayer " not in text
    assert "Next: " in text


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_shows_the_verdict_on_each_layer_and_format(run: Path, columns: int) -> None:
    shown = altgrad("report", run, columns=columns)
    assert shown.returncode == 0, shown.stderr
    lines = [line.rstrip() for line in shown.stdout.splitlines()]
    assert max(map(len, lines[:-1])) <= columns  # the last one is a command, to be copied
    rows = {
        line.rsplit(maxsplit=2)[0].strip(): line.split()[-2:]
        for line in lines
        if line.count(" frozen") == 2
    }
    assert rows == {name: ["frozen"] * 2 for name in ("gain", SCRIPT)}
    for name in ("matrix", MARKUP):
        (row,) = (line for line in lines if line.strip().startswith(name))
        assert row.split()[-2:] == ["1.00", "1.00"]
    text = " ".join(shown.stdout.split())
    assert "3 steps observed, 0 to 20; all 32 elements in 4 layers" in text
    assert "skipped steps: 2 inf" in text
    assert SCRIPT in text
    assert "\x1b" not in shown.stdout


def test_a_report_of_many_layers_fits_one_screen_and_shows_all_on_demand(tmp_path: Path) -> None:
    long = "encoder.blocks.{}.attention.query_key_value.projection.weight"
    fine = [long.format(k) for k in range(2000)]
    path = write_run(tmp_path, ["the.frozen.one"], fine, steps=1)
    lines = altgrad("report", path).stdout.splitlines()
    assert len(lines) <= 24
    assert "Share kept by a sample, least of 2,001 layers:" in lines
    (row,) = (line for line in lines if line.startswith("the.frozen.one"))
    assert row.split()[1:] == ["frozen", "frozen"]
    assert lines[-1] == f"All layers, and code: altgrad report {path} --all"
    assert max(map(len, lines[:-1])) <= 80
    few = altgrad("report", path, "--layers", 2).stdout.splitlines()
    assert len([line for line in few if "projection.weight " in line]) == 1
    lines = altgrad("report", path, "--all").stdout.splitlines()
    rows = [line.split() for line in lines if "projection.weight " in line]
    assert len(rows) == 2000
    assert all(row[1:] == ["1.00", "1.00"] for row in rows)


def test_the_next_lines_stand_at_the_end(run: Path) -> None:
    shown = altgrad("report", run, "--all").stdout.splitlines()
    first = json.loads(altgrad("report", run, "--json", "-").stdout)["next_lines"][0]
    begin = next(k for k, line in enumerate(shown) if line.startswith("Next: "))
    assert [*filter(None, first["code"].splitlines())] == [
        line for line in shown[begin:] if line in first["code"].splitlines()
    ][: len([*filter(None, first["code"].splitlines())])]


def test_a_run_without_an_observed_step_is_reported_as_such(tmp_path: Path) -> None:
    path = write_empty_run(tmp_path)
    shown = altgrad("report", path, "--html", tmp_path / "page.html")
    assert shown.returncode == 1, shown.stderr
    assert "no step observed" in " ".join(shown.stdout.split())
    assert "No step was observed: there are no verdicts." in shown.stdout
    assert "No step was observed" in (tmp_path / "page.html").read_text()
    assert altgrad("compare", path, path).returncode == 0
    compared = altgrad("compare", write_run(tmp_path / "other"), path).stdout
    assert "No observed step in B: nothing to compare." in compared
    assert "The model" not in compared  # a table without a line


def test_the_legend_keeps_its_columns_in_a_narrow_terminal(run: Path) -> None:
    lines = altgrad("report", run, "--all", columns=50).stdout.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("  fine "))
    last = next(k for k, line in enumerate(lines) if line.startswith("  The number is"))
    assert all(line.startswith("  ") for line in lines[first:last])
    assert max(map(len, lines[first:last])) <= 50


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
    assert re.search(rf"^a +0\.95{re.escape(mark)}", text, re.MULTILINE)


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
    shown = altgrad("report", file.path, "--all").stdout
    text = " ".join(shown.split())
    assert "NaN elements were NaN or inf in an observed step: no figure counts these" in text
    assert "NaN or inf in elements (nonfinite_frac), which no figure counts: half (50 %)." in text
    (row,) = (line for line in shown.splitlines() if line.strip().startswith("half "))
    assert "!" in row
    (row,) = (line for line in shown.splitlines() if line.strip().startswith("whole "))
    assert "!" not in row
