"""The files of `altgrad.recipes` name the file to read before and after: one chain without gaps."""

import ast
import re
from pathlib import Path

import altgrad.recipes

ROOM = Path(altgrad.recipes.__file__).parent
HEADINGS = {
    path.stem: " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    for path in ROOM.glob("*.py")
}
OVERVIEW = HEADINGS.pop("__init__")


def list_chain() -> list[str]:
    """Return the files in the order of the numbered list in the overview of the room."""
    return re.findall(r"`(\w+)`", " ".join(re.findall(r"\d\. .*?:(.*?)\.(?= |$)", OVERVIEW)))


def test_the_overview_has_every_file_once() -> None:
    assert sorted(list_chain()) == sorted(HEADINGS)


def test_each_heading_names_the_file_before_and_after() -> None:
    chain = ["altgrad.quantization.ops", *list_chain(), "altgrad.monitor.monitor"]
    for before, name, after in zip(chain, chain[1:], chain[2:], strict=False):
        assert re.search(rf"Read `{before}` first\b", HEADINGS[name]), name
        assert f"`{after}` comes next" in HEADINGS[name], name


def test_each_file_imports_only_files_that_are_read_before() -> None:
    chain = list_chain()
    for number, name in enumerate(chain):
        source = (ROOM / f"{name}.py").read_text()
        imported = set(re.findall(r"^from altgrad\.recipes\.(\w+) import", source, re.MULTILINE))
        assert imported <= set(chain[:number]), name
