"""The files of some rooms name the file to read before and after: one chain without gaps."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "altgrad"
ENDS = {
    "recipes": ("altgrad.quantization.ops", "altgrad.twins.layout"),
    "twins": ("altgrad.recipes.names", "altgrad.monitor.monitor"),
}
"""By room, the last file before its chain and the first one after it."""


def read_headings(room: str) -> dict[str, str]:
    return {
        path.stem: " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
        for path in (ROOT / room).glob("*.py")
    }


def list_chain(room: str) -> list[str]:
    """Return the files in the order of the numbered list in the overview of a room."""
    overview = read_headings(room)["__init__"]
    return re.findall(r"`(\w+)`", " ".join(re.findall(r"\d\. .*?:(.*?)\.(?= |$)", overview)))


@pytest.mark.parametrize("room", ENDS)
def test_the_overview_has_every_file_once(room: str) -> None:
    assert sorted([*list_chain(room), "__init__"]) == sorted(read_headings(room))


@pytest.mark.parametrize("room", ENDS)
def test_each_heading_names_the_file_before_and_after(room: str) -> None:
    headings, (first, last) = read_headings(room), ENDS[room]
    chain = [first, *list_chain(room), last]
    for before, name, after in zip(chain, chain[1:], chain[2:], strict=False):
        assert re.search(rf"Read `{before}` first\b", headings[name]), name
        assert f"`{after}` comes next" in headings[name], name


@pytest.mark.parametrize("room", ENDS)
def test_each_file_imports_only_files_that_are_read_before(room: str) -> None:
    chain = list_chain(room)
    for number, name in enumerate(chain):
        source = (ROOT / room / f"{name}.py").read_text()
        imported = set(re.findall(rf"^from altgrad\.{room}\.(\w+) import", source, re.MULTILINE))
        assert imported <= set(chain[:number]), name
