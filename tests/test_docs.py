"""The pages under docs/: their code runs, and their constants match the code."""

import ast
import doctest
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from torch import nn

import altgrad
from altgrad import SamplingRule, UpdateMonitor
from altgrad.measurement.columns import max_count, sum_count
from altgrad.report import Confirmation, RunFile, Verdict, read
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.families import find_family
from altgrad_lightning import PrecisionMonitor
from altgrad_lightning.settings import PRESETS
from benchmarks import docs_pictures
from tests.command_line import altgrad as altgrad_command

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.default_twins

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


class Model(nn.Module):
    """A model whose layers have the names on the pages."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"ln": nn.LayerNorm(4)})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[0]["ln"](self.norm(self.decoder(x))))


def setting() -> dict[str, Any]:
    """Return the names that the code on a page expects."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train() -> None:
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()

    def write(record: altgrad.StepRecord) -> None:
        for file in files:
            file.append(record.index, record, skipped={})

    formats = ["bf16", "e4m3fn"]
    watched = UpdateMonitor(model, write, formats=formats, every_n_steps=10)
    folders = ("lightning_logs/version_0", "runs/a", "runs/b")
    files = [RunFile.create(folder, watched.run_header()) for folder in folders]
    with watched.attach(optimizer):
        train()
    for file in files:
        file.close()
    before = torch.ones(4)
    trainer = SimpleNamespace(
        train=lambda: None, fit=lambda *_: None, callback_handler=SimpleNamespace(callbacks=[])
    )
    return {
        "model": model,
        "optimizer": optimizer,
        "train": train,
        "before": before,
        "after": before - 1e-3,
        "gradient": torch.ones(4),
        "Trainer": lambda *_, **__: trainer,
        "EarlyStopping": lambda *_, **__: None,
        "ModelParallelStrategy": lambda: None,
        "fully_shard": lambda model: model,
        "distributed": SimpleNamespace(get_rank=lambda: 0),
        "accelerator": Mock(
            prepare=lambda *both: both,
            unwrap_model=lambda model: model,
            trackers=[],
            scaler=None,
            is_fsdp2=False,
        ),
        "fabric": SimpleNamespace(
            setup=lambda *both: both,
            loggers=[],
            strategy=SimpleNamespace(precision=None),
            save=lambda *_: None,
        ),
        "arguments": None,
        "data": [],
    }


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_on_a_page_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = [block for block in blocks(page, "python") if ">>>" not in block]
    monkeypatch.chdir(tmp_path)
    names = setting()
    if page.name == "report.md":
        advice = SimpleNamespace(verdict=Verdict.FROZEN, layer="a")
        names["monitor"] = SimpleNamespace(assessment=SimpleNamespace(advice=[advice]))
        (tmp_path / "verdicts.csv").write_text("layer\n'=a\n''b\nNA\n")
    if page.name == "run-file.md":
        shutil.copy("lightning_logs/version_0/altgrad.jsonl", "altgrad.jsonl")
    for block in code:
        exec(compile(block, page.name, "exec"), names)
    if page.name == "run-file.md":
        printed = capsys.readouterr().out.splitlines()
        series = read("altgrad.jsonl").series("update_rms")
        assert printed
        assert len(printed) == len(series)
        for line, (step, figure) in zip(printed, series.items(), strict=True):
            number, _, by_layer = line.partition(" ")
            assert int(number) == step
            assert ast.literal_eval(by_layer)[None] == pytest.approx(figure, rel=1e-7)
    if page.name == "compare.md":
        _assert_shows(page, names["found"])
        _assert_shows_report(ROOT / "docs" / "low-precision-runs.md")
    if page.name == "report.md":
        assert names["frozen"] == ["a"]
        assert [*names["table"]["layer"]] == ["=a", "'b", "NA"]
        assert (tmp_path / "report.html").stat().st_size > 10_000


def _assert_shows(page: Path, found: Confirmation) -> None:
    """Assert that a page has what `altgrad compare` shows of the runs in this folder.

    Lines without figures are equal. Other processors round other sums, so that figures differ.
    """
    shown = altgrad_command("compare", "runs/fp32", "runs/bf16", "--layers", 8).stdout.splitlines()
    words = {line.rstrip() for line in shown if not re.search(r"\d", line)}
    assert len(words) >= 6
    assert words <= {*blocks(page, "text")[0].splitlines()}
    layers = {layer.name: layer for layer in found.layers} | {"model": found.model}
    lines = [line.split() for line in blocks(page, "text")[0].splitlines() if "0." in line[12:17]]
    assert len(lines) == 9
    for words in lines:
        pairs, cells = layers[words[-10]].pairs.values(), words[-9:]
        for pair, start in zip(pairs, (0, 3, 6), strict=True):
            assert pair[:2] == pytest.approx([*map(float, cells[start : start + 2])], abs=0.1)
    assert found.frozen == (3, 3, 3, 18)


def _assert_shows_report(page: Path) -> None:
    """Assert that a page has the lines that `altgrad report` shows of the run in bf16."""
    shown = {_mask(line) for line in altgrad_command("report", "runs/bf16").stdout.splitlines()}
    (text,) = blocks(page, "text")
    lines = {_mask(line) for line in text.splitlines()}
    assert len(lines) >= 10
    assert lines <= shown


def _mask(line: str) -> str:
    """Return a line with one space for several, and with 0 for each number."""
    return re.sub(r"<?\b\d+(\.\d+)?", "0", " ".join(line.split()))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_table_of_a_run_in_bf16_has_the_figures_of_its_code() -> None:
    page = ROOT / "docs" / "low-precision-runs.md"
    names: dict[str, Any] = {}
    (code,) = blocks(page, "python")
    exec(compile(code, page.name, "exec"), names)
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.read_text().splitlines()
        if line.startswith("|")
    ]
    keys = [cell.strip("`") for cell in table[0][1:]]
    rows = [row for row in table if re.match(r"`\d\.\w+`", row[0])]
    assert len(rows) == 6
    for layer, *cells in rows:
        figures = names["monitor"].latest.layers[layer.split("`")[1]]
        for key, cell in zip(keys, cells, strict=True):
            # Other processors round other sums, so that the runs differ a little.
            assert figures[key] == pytest.approx(float(cell), abs=0.1), (layer, key)


def test_the_pages_contain_code() -> None:
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 25


def test_code_on_the_pages_gives_the_output_it_shows() -> None:
    result = doctest.testfile(str(ROOT / "docs" / "how-it-works.md"), module_relative=False)
    assert result.attempted >= 5
    assert result.failed == 0


@pytest.mark.parametrize("page", ["docs/sampling.md", "README.md"])
def test_the_yaml_creates_the_callback(page: str) -> None:
    (text,) = blocks(ROOT / page, "yaml")
    (callback,) = yaml.safe_load(text)["trainer"]["callbacks"]
    assert callback["class_path"] == "altgrad_lightning.PrecisionMonitor"
    arguments = callback["init_args"]
    rules = [SamplingRule(**rule) for rule in arguments.pop("sampling")]
    if isinstance(arguments.get("scaling"), list):
        arguments["scaling"] = tuple(arguments["scaling"])
    PrecisionMonitor(**arguments, sampling=rules)


def test_the_reference_lists_all_public_names() -> None:
    reference = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    named = {name.rpartition(".")[2] for name in reference}
    assert {*altgrad.__all__} - named == {"DEFAULT_FORMATS", "__version__"}


def test_the_navigation_lists_all_pages() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in navigation


def test_ci_builds_the_site_strictly_and_with_warnings_shown() -> None:
    """Check the command of CI: with -q, mkdocs succeeds in spite of broken links."""
    (line,) = re.findall(r"^.*mkdocs build.*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert "--strict" in line
    assert not re.search(r" (-q|--quiet)\b", line)


def test_pictures_are_small_and_each_is_shown() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.name in text
        assert picture.stat().st_size < 300_000


def test_one_command_makes_all_pictures() -> None:
    made = {*docs_pictures.OF_THE_DEMO, *docs_pictures.OTHERS}
    assert made == {picture.stem for picture in (ROOT / "docs").glob("*.png")}


def test_the_presets_on_the_pages_match_the_code() -> None:
    economy = {"max_elements": 256, "layer_charts": 4, "overhead_budget": 0.01, "recipes": ()}
    assert {
        "economy": economy,
        "standard": {},
        "full": {"max_elements": None, "layer_charts": 16, "charts": "all", "histograms": True},
    } == PRESETS  # the presets in docs/sampling.md
    text = (ROOT / "docs" / "sampling.md").read_text()
    assert "| 256 elements of a layer, 4 charted layers, no twins, at most 1 % of the time" in text
    assert "| all elements, all charts of 16 layers, histograms |" in text


@pytest.mark.parametrize(
    ("layers", "kilobytes"), [(10, (48, 1.7)), (100, (479, 16)), (1000, (4800, 160))]
)
def test_the_bytes_of_all_reduces_on_the_pages_match_the_code(layers, kilobytes) -> None:
    sums, maxima = layers * sum_count(4) * 8, (layers * (max_count(4) + 1) + 7) * 8
    assert (sums / 1000, maxima / 1000) == pytest.approx(kilobytes, rel=0.03)
    said = " | ".join(f"{x / 1000} MB" if x > 1000 else f"{x} kB" for x in kilobytes)
    text = (ROOT / "docs" / "several-processes.md").read_text()
    assert f"| {layers:,} | 4 | {said} |" in text


def test_the_thresholds_on_the_pages_match_the_code() -> None:
    limits = calibration().thresholds
    text = " ".join((ROOT / "docs" / "how-it-works.md").read_text().split())
    for words in (
        f"less than {limits.frozen_kept:g} of the progress is kept, and layers with half",
        f"more than {limits.overshoots:g} times the progress",
        f"{limits.stores_fine:g} of the progress is kept, or more",
        f"the weights are off by at most {100 * limits.weight_error:g} % of their size",
        f"| {limits.needs_remedy:g} is kept, or more |",
        f"{100 * limits.frozen:g} % never moved",
        f"more than {100 * limits.moved:g} % of its size",
        f"has fallen by {limits.stuck_loss:g} or more",
        f"layers with over {100 * limits.left_behind:g} % of the weights keep less than half",
    ):
        assert words in text
    assert limits.run_frozen == 0.5
    steps = calibration().step_thresholds
    assert f"{100 * steps.underflow:g} % of the weights are stored as 0" in text
    assert f"{100 * steps.saturated:g} % lie beyond the top" in text
    assert f"Fine is {steps.stores_fine:g} or more of the updates" in text
    for page in ("README.md", "docs/tutorial.md"):
        table = (ROOT / page).read_text()
        assert f"at least {limits.stores_fine:g} of the progress is kept" in table
        assert f"{100 * limits.frozen:g} % " in table


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_report_on_a_page_has_the_outcomes_of_the_calibration(page: str) -> None:
    words = {verdict.short: verdict.name for verdict in Verdict}
    pattern = r"^(\S+) +(\w+)(?: \([\w, ]+\))? +[.\d]+ \(.*?(\d+) of (\d+)\b"
    rows = re.findall(pattern, (ROOT / page).read_text(), re.MULTILINE)
    assert len(rows) >= 3
    for recipe, word, lost, runs in rows:
        family = "stochastic" if recipe.endswith("-sr") else find_family(recipe, None)
        outcome = calibration().count_runs(family, words[word])
        assert outcome == (int(runs), int(lost)), (recipe, word)


def test_the_results_of_real_runs_on_the_pages_match_the_calibration() -> None:
    text = (ROOT / "docs" / "does-it-predict.md").read_text()
    seen, unseen = calibration().runs, calibration().held_out["runs"]
    for family, verdicts in seen.items():
        for verdict, counts in verdicts.items():
            cells = [f"{counts['runs']} | {counts['lost_10_percent']} ("]
            if other := unseen[family].get(verdict):
                cells.append(f"| {other['runs']} | {other['lost_10_percent']} (")
            start = f"| {Verdict[verdict].short} | {cells[0]}"
            lines = [line for line in text.splitlines() if start in line]
            assert any(all(cell in line for cell in cells) for line in lines), (family, verdict)
    own = [family for family in unseen if family != "now"]
    fine = sum(unseen[family].get("STORES_FINE", {}).get("runs", 0) for family in own)
    layers = calibration().held_out["layers"]
    weights = ("nearest-16", "nearest-8", "true", "stochastic", "kahan")
    said = [layers[family].get("FROZEN", {"layers": 0, "frozen": 0}) for family in weights]
    frozen = sum(each["frozen"] for each in said), sum(each["layers"] for each in said)
    assert f"the {fine} " in (ROOT / "docs" / "does-it-predict.md").read_text()
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"*fine*, of {fine} runs" in readme
    assert f"*frozen*, of {frozen[1]:,} such layers | {frozen[0]:,} were" in readme
    assert not any(each.get("STORES_FINE", {}).get("lost_10_percent") for each in unseen.values())
