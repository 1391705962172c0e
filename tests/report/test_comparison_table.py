"""The text that a terminal shows for the comparison of two runs."""

import re
from pathlib import Path

from tests.command_line import altgrad
from tests.report.runs import FORMATS, MARKUP, SCRIPT, write_run


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
