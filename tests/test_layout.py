"""Tests follow the rooms: a module with behaviour of its own has a test file of its name."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 500

ELSEWHERE = {
    "altgrad/__main__.py": "tests/test_cli.py",
    "altgrad/_lazy.py": "tests/test_imports.py",
    "altgrad/_version.py": "a name",
    "altgrad/measurement/histogram.py": "a tuple",
    "altgrad/monitor/agreement.py": "tests/distributed/test_ranks_alike.py",
}
"""Modules without a file of their name, and where they are tested, or what they are."""


def find_tests(module: Path) -> list[Path]:
    """Those of a module's name, such as test_scaling.py and test_scaling_channels.py."""
    package, *rooms = module.relative_to(ROOT).parent.parts
    room = ROOT.joinpath("tests", *(rooms if package == "altgrad" else ["lightning"]))
    stem = module.stem.lstrip("_")
    exact = [*room.glob(f"test_{stem}.py")]
    return exact or [*room.glob(f"test_{stem}_*.py")]


MODULES = [
    path
    for package in ("altgrad", "altgrad_lightning")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__init__.py"
]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_has_a_test_file_of_its_name(module: Path) -> None:
    name = str(module.relative_to(ROOT))
    assert bool(find_tests(module)) is not (name in ELSEWHERE), name
    if (where := ELSEWHERE.get(name, "")).startswith("tests/"):
        assert (ROOT / where).exists()


def test_no_test_file_is_longer_than_can_be_read() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_no_test_module_is_imported_by_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not (line.startswith("from tests.") and ".test_" in line.split(" import ")[0])
