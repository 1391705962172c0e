"""The text that a terminal shows for what one run predicted beside what happened."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from rich.console import Console

from altgrad.report import Confirmation, print_confirmation
from tests.report.confirming import make_twin_run, share
from tests.report.runs import MARKUP

LONG = "encoder.blocks.{}.attention.query_key_value.projection.weight"


def make_confirmation(count: int = 4) -> Confirmation:
    names = [MARKUP, *(LONG.format(k) for k in range(1, count))]
    predicted = {n: share(k / 10, -0.25, exp_avg_sq_ratio=1.125) for k, n in enumerate(names)}
    real = {n: share(0, 0.001, exp_avg_sq_ratio=2.25) for n in names}
    frozen = {"frozen.gain": share(1, 0, exp_avg_sq_ratio=math.nan)}
    model = {None: share(0.5, 0.75, exp_avg_sq_ratio=1.0)}
    return Confirmation(
        make_twin_run({**model, **predicted, **frozen}, "bf16-true", letter="one"),
        make_twin_run({**model, **real, **frozen}, letter="two", notes=["[red]torn"]),
        "bf16-true",
    )


def show(width: int, *, count: int = 4, most: int | None = None, **options: Any) -> str:
    file = io.StringIO()
    print_confirmation(make_confirmation(count), Console(file=file, width=width, **options), most)
    return file.getvalue()


def find_cells(text: str, end: str) -> list[list[str]]:
    """Return the cells of each row whose name of a layer ends so."""
    rows = [line.split() for line in text.splitlines()]
    names = [(row, row[0] if row else "") for row in rows]
    return [row[1:] for row, name in names if name.endswith(end) and len(row) % 3 == 1]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_each_layer_is_shown_at_any_width_with_predicted_real_and_difference(width: int) -> None:
    text = show(width)
    assert max(map(len, text.splitlines())) <= width
    expected = [
        *("0.30", "0.00", "0.30"),
        *("-0.25", "0.01", "0.25"),
        *("1.12", "2.25", "1.00"),  # an octave
    ]
    cells = [cell for row in find_cells(text, ".weight") for cell in row]
    per_layer = [cells[k : k + 3] for k in range(0, len(cells), 3)]
    for triple in (expected[:3], expected[3:6], expected[6:]):
        assert triple in per_layer
    assert len(per_layer) == 12
    assert [*find_cells(text, "frozen.gain")[-1][-3:]] == ["–", "–", "–"]
    flat = " ".join(text.split())
    assert "Mean difference over 5 layers: frozen_frac 0.120, progress_kept 0.201" in flat
    assert "exp_avg_sq_ratio 1.000 octaves." in flat
    assert "Frozen, of 5 layers: 1 as A predicts, 1 in B, 1 in both (at least 99 %" in flat
    assert flat.index("Real: B itself, which is stored so.") < flat.index(" layer pred.")
    assert "Note: [red]torn" in flat


def test_metrics_that_do_not_fit_are_shown_in_another_table() -> None:
    headings = [
        [line.split() for line in show(width).splitlines() if line.startswith("layer ")]
        for width in (60, 120)
    ]
    assert [len(each) for each in headings] == [2, 1]
    assert headings[1] == [["layer", *["pred.", "real", "diff."] * 3]]


def test_the_model_is_first_and_most_limits_the_layers() -> None:
    text = show(120, count=50, most=3)
    rows = [line for line in text.splitlines() if line.rstrip().endswith(("1.00", "0.00"))]
    assert rows[0].split()[:2] == ["the", "model"]
    assert len(rows) == 4
    assert "The 3 of 51 layers that differ most:" in text
    assert "differ most:" not in show(120, count=2)


def test_frozen_layers_are_coloured() -> None:
    text = show(120, force_terminal=True, color_system="standard")
    in_bold_red = re.findall(r"\x1b\[1;31m([^\x1b]*)", text)
    assert [cell.strip() for cell in in_bold_red] == ["1.00", "1.00"]


def test_runs_without_a_common_step_have_no_table() -> None:
    file = io.StringIO()
    runs = (
        make_twin_run({"a": share(0, 1)}, "true", steps=[1]),
        make_twin_run({"a": share(0, 1)}, steps=[2]),
    )
    print_confirmation(Confirmation(*runs, "true"), Console(file=file, width=80))
    assert "nothing to compare" in file.getvalue()
    assert "pred." not in file.getvalue()
