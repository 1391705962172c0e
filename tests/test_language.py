"""The language of the code: the rules of CONTRIBUTING, as far as a program can check them."""

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = PACKAGE_ROOT = Path(__file__).parents[1]
PACKAGES = ("altgrad", "altgrad_lightning")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Named = tuple[str, Definition, bool]

UNCLEAR = frozenset(
    [
        *(
            "of",
            "those",
            "that",
            "what",
            "which",
            "as",
            "likewise",
            "whether",
            "where",
            "when",
            "how",
        ),
        *("with", "without", "in", "for", "from", "by", "at", "on", "to", "it", "they", "this"),
        *(
            "these",
            "such",
            "none",
            "one",
            "like",
            "all",
            "each",
            "both",
            "every",
            "no",
            "not",
            "if",
        ),
        *("same", "also", "its", "their", "so", "and", "or", "but"),
    ]
)
"""First words of a docstring that say nothing by themselves, or need a sentence before them."""
ARTICLES = {"a", "an", "the"}
MOST_WORDS, MEAN_WORDS = 35, 20


class Docstring(NamedTuple):
    """A docstring, and the function or class that has it."""

    where: str
    node: ast.AST
    text: str
    is_value: bool  # a property or an attribute: a noun phrase


def definitions(path: Path) -> Iterator[Named]:
    """Yield every function and class of a file: its name, itself, and whether it is public."""

    def inside(
        node: ast.AST, prefix: str, *, public: bool
    ) -> Iterator[tuple[str, Definition, bool]]:
        for each in ast.iter_child_nodes(node):
            if isinstance(each, Definition):
                is_public = public and not each.name.startswith("_")
                yield f"{prefix}{each.name}", each, is_public
                inner = isinstance(each, ast.ClassDef)
                yield from inside(each, f"{prefix}{each.name}.", public=is_public and inner)
            elif not isinstance(each, ast.expr):
                yield from inside(each, prefix, public=public)

    yield from inside(ast.parse(path.read_text()), "", public=True)


def is_property(node: Definition) -> bool:
    return any("property" in ast.unparse(each) for each in node.decorator_list)


def docstrings(path: Path) -> Iterator[Docstring]:
    for name, node, _ in definitions(path):
        text = ast.get_docstring(node)
        if text:
            where = f"{path.relative_to(ROOT)}: {name}"
            yield Docstring(where, node, text, is_property(node))


ALL = [each for path in FILES for each in docstrings(path)]


def first_word(text: str) -> str:
    match = re.match(r"\W*([A-Za-z'’]+)", text)
    return match[1] if match else ""


def begins_badly(doc: Docstring) -> bool:
    """Return whether a class lacks its article, or a function its verb."""
    word = first_word(doc.text)
    if word.lower() in UNCLEAR:
        return True
    if isinstance(doc.node, ast.ClassDef):
        return word.lower() not in ARTICLES and not word[:1].isupper()
    if doc.is_value:
        return False
    return word.lower() in ARTICLES or not word[:1].isupper() or word.endswith("ing")


def test_docstrings_begin_with_a_verb_or_an_article() -> None:
    found = [f"{doc.where}: {doc.text.splitlines()[0]}" for doc in ALL if begins_badly(doc)]
    assert not found, f"{len(found)} of {len(ALL)}:\n" + "\n".join(found)


# Names

TERMS = {"power_of_two"}
"""Terms of the field that have `of` in them."""


def test_no_name_contains_of() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, Definition):
                names = [node.name]
            elif isinstance(node, ast.arg):
                names = [node.arg]
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names = [node.id]
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names = [node.attr]
            for name in names:
                plain = name.lower()
                for term in TERMS:
                    plain = plain.replace(term, "")
                if re.search(r"(^|_)of(_|$)", plain):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not found, f"{len(found)}:\n" + "\n".join(found)


# Sentences


def sentences(text: str) -> list[str]:
    """Return the sentences of a docstring, without code, examples and references."""
    text = re.split(r"^(?:Examples|References):$", text, maxsplit=1, flags=re.MULTILINE)[0]
    text = re.sub(r"``[^`]*``|`[^`]*`", "code", text)
    parts: list[str] = []
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*] |\w+(?:, \w+)*: |\w+:$))", text):
        if "|" in block or "::" in block:
            continue
        plain = re.sub(r"^\s*(?:[-*] |[\w*]+(?:, \*{0,2}\w+)*: )", "", block)
        parts += re.split(r"(?<=[.!?])\s+(?=[A-Z`\"(])", " ".join(plain.split()))
    return [each for each in parts if len(each.split()) > 1]


def words(sentence: str) -> int:
    return len([each for each in sentence.split() if re.search(r"\w", each)])


def test_no_sentence_is_too_long() -> None:
    found = [
        f"{doc.where}: {words(each)} words: {each}"
        for doc in ALL
        for each in sentences(doc.text)
        if words(each) > MOST_WORDS
    ]
    assert not found, f"{len(found)}:\n" + "\n".join(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_short_on_average(path: Path) -> None:
    lengths = [words(each) for doc in docstrings(path) for each in sentences(doc.text)]
    assert not lengths or sum(lengths) / len(lengths) <= MEAN_WORDS


# Sections


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the names of the arguments, without self and without those that are not used."""
    given = node.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [each for each in names if each not in ("self", "cls") and not each.startswith("_")]


def missing_sections(node: Definition, text: str) -> list[str]:
    if isinstance(node, ast.ClassDef) or is_property(node):
        return []
    missing = []
    if len(arguments(node)) >= 2 and "Args:" not in text:
        missing.append("Args")
    returns = "" if node.returns is None else ast.unparse(node.returns)
    is_one_line = "\n" not in text  # one line already says what is returned
    has_section = "Returns:" in text or "Yields:" in text
    if re.search(r"\b(?:Tensor|tuple|dict)\b", returns) and not has_section and not is_one_line:
        missing.append("Returns")
    return missing


def inherited_docstring(path: Path, name: str) -> str:
    """Return what `help` shows for a method without a docstring: that of its base class."""
    if "." not in name or not path.is_relative_to(PACKAGE_ROOT):
        return ""
    module = import_module(".".join(path.relative_to(PACKAGE_ROOT).with_suffix("").parts))
    return inspect.getdoc(functools.reduce(getattr, name.split("."), module)) or ""


def test_public_callables_document_arguments_and_results() -> None:
    found = []
    for path in FILES:
        for name, node, is_public in definitions(path):
            if not is_public:
                continue
            text = ast.get_docstring(node) or inherited_docstring(path, name)
            is_hook = name.split(".")[-1].startswith("on_") or "overload" in map(
                ast.unparse, getattr(node, "decorator_list", [])
            )
            if not is_hook and (missing := missing_sections(node, text)):
                found.append(f"{path.relative_to(ROOT)}: {name}: {', '.join(missing)}")
    assert not found, f"{len(found)}:\n" + "\n".join(found)


# Controls

BAD = """
class Thing:
    '''Those of a layer.'''

    @property
    def size(self) -> int:
        '''Whether it is.'''

    def sum_of(self, one: int, two: int) -> tuple[int, int]:
        '''The sum.

        More.
        '''


def long() -> None:
    '''Return {words}.'''
"""


def test_each_rule_finds_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(BAD.format(words="word " * 40))
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "FILES", [bad])
    monkeypatch.setitem(globals(), "ALL", [*docstrings(bad)])
    for rule, expected in (
        (test_docstrings_begin_with_a_verb_or_an_article, ["Thing:", "Thing.size:", "sum_of:"]),
        (test_no_name_contains_of, ["sum_of"]),
        (test_no_sentence_is_too_long, ["long: 41 words"]),
        (test_public_callables_document_arguments_and_results, ["sum_of: Args, Returns"]),
    ):
        with pytest.raises(AssertionError) as raised:
            rule()
        assert all(each in str(raised.value) for each in expected), raised.value
    bad.write_text(f"def long() -> None:\n    '''Return {'word ' * 20}.'''\n")
    with pytest.raises(AssertionError):
        test_sentences_are_short_on_average(bad)
