"""Tests follow the rooms: a module with behaviour has a test file of its name."""

import ast
import re
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 500

ELSEWHERE = {
    "altgrad/__main__.py": "tests/test_cli.py",
    "altgrad/_lazy.py": "tests/test_imports.py",
    "altgrad/_version.py": "a name",
    "altgrad/measurement/histogram.py": "a tuple",
    "altgrad/measurement/numbers.py": "a type",
    "altgrad/measurement/twin_parts.py": "tuples",
    "altgrad/twins/twin_source.py": "a protocol",
    "altgrad_lightning/output.py": "tests/lightning/test_pickles.py",
}
"""Modules without a test file of their name, and the file that tests them or the reason."""


def find_tests(module: Path) -> list[Path]:
    """Return the test files of a module, such as test_scaling.py and test_scaling_channels.py."""
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


def test_no_test_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_no_test_module_is_imported_by_another() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not (line.startswith("from tests.") and ".test_" in line.split(" import ")[0])


NO_ATTRIBUTES = {"_replace", "_asdict", "_fields", "_exit"}
"""Public names with an underscore: methods of named tuples, and functions of the module os."""


def private_reads(path: Path) -> list[str]:
    """Return private attributes of other objects that a file uses without a comment why.

    The comment stands in the line itself or above it. For a private name of torch, one comment at
    its first use is enough.
    """
    source = path.read_text()
    lines = source.splitlines()
    explained: set[str] = set()
    found = []
    for node in sorted(ast.walk(ast.parse(source)), key=lambda each: getattr(each, "lineno", 0)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names = [each.name for each in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "object")):
            names = [each.value for each in node.args if isinstance(each, ast.Constant)]
        else:
            continue
        for name in map(str, names):
            if not re.fullmatch(r"_(?!_)\w+", name) or name in {*NO_ATTRIBUTES, *explained}:
                continue
            here = lines[node.lineno - 1], lines[node.lineno - 2].strip()
            if "# " in here[0] or here[1].startswith("# "):
                explained.add(name)
            else:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    return found


def test_tests_read_no_private_attribute_without_a_reason() -> None:
    found = [
        each for path in sorted((ROOT / "tests").rglob("*.py")) for each in private_reads(path)
    ]
    assert not found, "\n".join(found)


def test_a_private_attribute_without_a_reason_is_found(tmp_path: Path) -> None:
    lines = ("thing._state", "thing._why  # torch has no public name", "thing._why", "self._own")
    path = ROOT / "tests" / "test_layout.py"
    other = tmp_path / "test_it.py"
    other.write_text("\n".join((*lines, 'patch.object(Thing, "_take")', "row._replace(a=1)")))
    with mock.patch.object(Path, "relative_to", lambda self, _: self.name):
        assert private_reads(other) == ["test_it.py:1: _state", "test_it.py:5: _take"]
    assert private_reads(path) == []
