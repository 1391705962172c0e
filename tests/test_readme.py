"""The README's commands and code, and what must agree with them."""

import doctest
import re
from pathlib import Path

import torch

from altgrad.measurement.catalogue import as_markdown
from tests.step_truth.lightning_modes import LIGHTNING_MODES
from tests.step_truth.plain_modes import PLAIN_MODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def command_lines() -> list[str]:
    return re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)


def test_two_lines_each_with_its_own_environment_and_the_constraints() -> None:
    demo, test = command_lines()
    assert demo.endswith("/altgrad demo")
    assert test.endswith("-m pytest")
    environments = [re.match(r"python3 -m venv (\S+) &&", line).group(1) for line in (demo, test)]
    assert len(set(environments)) == 2
    for line, environment in zip((demo, test), environments, strict=True):
        assert line.count(environment) == 3
        assert " -c constraints.txt " in line


def test_ci_runs_exactly_the_readmes_test_line() -> None:
    after_mark = README.split("<!-- test line -->")[1]
    assert (
        re.search(r"^python3 -m venv .*$", after_mark, flags=re.MULTILINE).group()
        == (command_lines()[1])
    )
    assert "<!-- test line -->" in (ROOT / ".ci" / "run").read_text()


def test_the_readmes_code_gives_what_it_shows() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 9
    assert result.failed == 0


def test_the_readme_counts_the_rows_of_the_table() -> None:
    text = " ".join(README.split())
    plain, lightning = len(PLAIN_MODES), len(LIGHTNING_MODES)
    assert f"in {plain} ways of plain PyTorch and {lightning} of Lightning's Trainer" in text


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    """Made anew by writing what `as_markdown` returns."""
    assert (ROOT / "docs" / "metrics.md").read_text() == as_markdown()


def test_the_readmes_files_exist() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert "docs/demo.png" in targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_tested_torch_is_the_pinned_one() -> None:
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    bound = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    assert pinned is not None
    assert f"| torch | {bound} |" in (ROOT / "CONTRIBUTING.md").read_text()
    # Under the lower bound, by hand, this one test is the one that may differ.
    running = torch.__version__.split("+")[0]
    assert running == pinned.group(1) or running.startswith(bound)
