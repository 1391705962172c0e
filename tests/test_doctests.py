"""Examples in docstrings give the output that they show."""

import doctest
import importlib
import pkgutil

import pytest

import altgrad
import altgrad_lightning

MODULES = [
    module.name
    for package in (altgrad, altgrad_lightning)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_give_the_output_they_show(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_docstrings_contain_examples() -> None:
    found = (doctest.DocTestFinder().find(importlib.import_module(name)) for name in MODULES)
    assert sum(len(test.examples) for tests in found for test in tests) >= 5
