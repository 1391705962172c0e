"""Options that may stand without their value."""

import json
from pathlib import Path

import pytest

from altgrad.report.options import fill_values
from tests.command_line import altgrad


@pytest.mark.parametrize(
    ("args", "filled"),
    [
        ("run --json", "run --json -"),
        ("run --json --csv", "run --json - --csv -"),
        ("run --json --layers 3", "run --json - --layers 3"),
        ("--json a run", "--json a run"),
        ("run --json -", "run --json -"),
        ("--json -- run", "--json - -- run"),
        ("-- --json", "-- --json"),
        ("run --html", "run --html"),
        ("", ""),
    ],
)
def test_a_missing_value_is_a_hyphen(args: str, filled: str) -> None:
    assert fill_values(args.split(), {"--json", "--csv"}) == filled.split()


def test_json_and_csv_without_a_file_are_all_that_the_terminal_shows(
    run: Path, tmp_path: Path
) -> None:
    shown = altgrad("report", run, "--json", "--html", tmp_path / "page.html")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["formats"] == ["bf16", "e5m2"]
    assert (tmp_path / "page.html").exists()
    shown = altgrad("report", run, "--csv")
    assert shown.stdout == altgrad("report", run, "--csv", "-").stdout
    assert shown.stdout.startswith("layer,recipe,")
    assert altgrad("report", run, "--html").returncode == 2
