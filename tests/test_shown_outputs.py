"""The outputs of commands that the pages show: their fixed lines are those that commands print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import altgrad
from altgrad.report.judging.verdicts import FEW_STEPS
from tests.command_line import altgrad as altgrad_command

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = [pytest.mark.default_twins, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a run of a small net whose LayerNorm gain freezes in bf16, as in the demo."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    folder = tmp_path_factory.mktemp("run")
    run = altgrad.watch(net, optimizer, folder, every_n_steps=5)
    for _ in range(75):
        optimizer.zero_grad()
        (net(torch.randn(32, 16)) - 1).square().mean().backward()
        optimizer.step()
    run.close()
    return folder


def mask(text: str) -> Iterator[str]:
    """Yield lines with one space for several, and with 0 for each number."""
    for line in text.splitlines():
        yield re.sub(r"<?\b\d+(\.\d+)?", "0", " ".join(line.split()))


@pytest.mark.parametrize(
    ("page", "command", "starts", "count"),
    [
        ("tutorial.md", "report", ("Weights are", "pass in", "progress kept", "recipe "), 4),
        (
            "plan.md",
            "report --all",
            ("recipe weights", "Bytes per", "the layers'", "simulation"),
            4,
        ),
        ("plan.md", "plan --budget 0.9", ("recipe layers", "layer recipe", "Not tested", "of "), 4),
    ],
)
def test_fixed_lines_of_an_output_are_printed(
    run: Path, page: str, command: str, starts: tuple[str, ...], count: int
) -> None:
    name, *options = command.split()
    done = altgrad_command(name, run, *options)
    assert done.returncode == 0, done.stderr
    blocks = re.findall(
        r"^```text\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    )
    shown = {line for line in mask("".join(blocks)) if line.startswith(starts)}
    assert len(shown) >= count
    assert shown <= {*mask(done.stdout)}


def test_the_questions_have_the_number_of_steps_below_which_a_verdict_is_early() -> None:
    for page in ("faq.md", "report.md"):
        assert f"fewer than {FEW_STEPS}" in " ".join((DOCS / page).read_text().split())
