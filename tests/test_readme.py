"""The README's commands and code agree with CI, the docs and the code."""

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


def test_both_command_lines_create_an_environment_with_the_constraints() -> None:
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


def test_code_in_the_readme_gives_the_output_it_shows() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted >= 9
    assert result.failed == 0


def test_the_readme_gives_the_number_of_ways_to_train() -> None:
    text = " ".join(README.split())
    plain, lightning = len(PLAIN_MODES), len(LIGHTNING_MODES)
    assert f"in {plain} ways of plain PyTorch and {lightning} of Lightning's Trainer" in text


def test_the_page_of_metrics_matches_the_code() -> None:
    """Compare the page with `as_markdown`, whose text renews it."""
    assert (ROOT / "docs" / "metrics.md").read_text() == as_markdown()


def test_files_that_the_readme_links_to_exist() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert "docs/demo.png" in targets
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_tested_torch_is_the_pinned_one() -> None:
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    bound = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    assert pinned is not None
    assert f"| torch | {bound} |" in (ROOT / "CONTRIBUTING.md").read_text()
    # A run by hand under the lower bound of torch passes, too.
    running = torch.__version__.split("+")[0]
    assert running == pinned.group(1) or running.startswith(bound)
