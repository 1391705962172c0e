"""The tables of layers by recipes fit the width of a console, and show the worst layers first."""

import re
from dataclasses import replace
from pathlib import Path

from altgrad.report import Row, RunReport
from altgrad.report.layer_table import print_layers
from tests.command_line import altgrad
from tests.report.runs import make_run, write_run
from tests.report.shown_runs import print_to_text
from tests.report.twin_runs import figures as twin_figures, make_recipe


def test_formats_that_do_not_fit_are_shown_in_another_table(tmp_path: Path) -> None:
    formats = ["bf16", "fp16", "e4m3fn", "e5m2", "e3m4", "mxfp8_e4m3", "mxfp4", "nvfp4"]
    path = write_run(tmp_path, formats=formats, recipes=formats[:-1])  # nvfp4 has no twins
    shown = altgrad("report", path, "--all", columns=60).stdout
    assert max(map(len, shown.splitlines()[:40])) <= 60
    assert not re.search(r"\S…(\s|$)", shown)  # no text is cut at its end
    wide = altgrad("report", path, "--all", columns=200).stdout
    for text, is_one in ((shown, False), (wide, True)):
        headings = [line.split()[1:] for line in text.splitlines() if line.startswith("layer ")]
        assert (len(headings) == 1) is is_one
        assert [word for words in headings for word in words] == formats
    first = altgrad("report", path, columns=60).stdout
    assert re.search(r"^\d more columns?: --all$", first, re.MULTILINE)
    assert first.count("\nlayer ") == 1


def test_short_names_leave_room_for_formats(tmp_path: Path) -> None:
    path = write_run(tmp_path, ["a"], ["b"], formats=["bf16", "e4m3fn", "e5m2"])
    lines = altgrad("report", path, columns=60).stdout.splitlines()
    assert len([line for line in lines if line.startswith("layer ")]) == 1


def test_a_table_that_shows_a_part_of_the_layers_shows_those_that_stand_still() -> None:
    """A layer may be frozen, though another one keeps less, which moves the other way."""
    back = {f"back{k}": twin_figures(progress_kept=-0.5) for k in range(5)}
    frozen = {f"frozen{k}": twin_figures(progress_kept=0.25, frozen_frac=1.0) for k in range(3)}
    errors = {f"{metric}/bf16": 0.0 for metric in ("progress_kept", "frozen_frac", "still_frac")}
    rows = [Row(0, name, each, errors) for name, each in (back | frozen).items()]
    run = replace(make_run(rows, []), recipes={"bf16": make_recipe()})
    found = RunReport.from_run(run)
    lines = print_to_text(lambda console: print_layers(found, console, 2), 80).splitlines()
    assert "Share kept by a sample, least of 8 layers:" in lines
    names = [line.split()[0] for line in lines if re.search(r"^(back|frozen)\d  *\w", line)]
    assert names == ["frozen0", "frozen1"]


def test_nothing_is_printed_without_layers() -> None:
    found = RunReport.from_run(make_run([], []))
    assert print_to_text(lambda console: print_layers(found, console), 80) == ""
