"""`altgrad demo`: the table, the picture and the event file of a short run."""

import re
from pathlib import Path

import pytest

from altgrad_lightning import demo as demo_module
from altgrad_lightning.demo import demo
from altgrad_lightning.packages import lightning
from tests.lightning.runs import logged

pytestmark = pytest.mark.pictures
FORMATS = ("bf16", "e4m3fn", "e5m2")


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        patch.setattr(demo_module, "BATCH_SIZE", 2)
        demo(steps=20, folder=folder, seed=0)
    return folder


def test_the_event_files_have_the_headline_and_the_diagnostics(demo_folder: Path) -> None:
    tags = logged(str(demo_folder / "version_0"))
    assert len([tag for tag in tags if tag.startswith("altgrad/")]) <= 80
    # DIAG-01, 02 and 04, of the model and of charted layers.
    for metric in ("stiffness_mean", "on_grid_frac", "grad_stiff_correlation"):
        for format in FORMATS:
            assert f"altgrad/{metric}/{format}" in tags
            assert any(tag.startswith(f"altgrad/{metric}/{format}/") for tag in tags), metric
    for metric in ("ulp_mean", "ulp_zero_frac"):  # DIAG-03
        assert any(tag.startswith(f"altgrad/{metric}/") for tag in tags)
    assert [step for step, _ in tags["loss"]] == [9, 19]
    assert tags["altgrad/frozen_layers/bf16"] == [(9, 7.0), (19, 7.0)]


def test_the_demo_writes_a_picture_and_a_report(demo_folder: Path) -> None:
    (picture,) = demo_folder.glob("version_0/recipes.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (page,) = demo_folder.glob("version_0/report.html")
    text = page.read_text()
    assert text.count('<td class="FROZEN"') >= 2 * 3 * 7  # gains, in both tables
    assert "norm.weight" in text


def test_the_terminal_shows_the_worst_layers_and_the_next_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(demo_module, "BATCH_SIZE", 2)
    demo(steps=10, folder=tmp_path, seed=1)
    shown = capsys.readouterr().out
    rows = re.findall(r"^blocks\.\S+norm\.weight +(.*)", shown, flags=re.MULTILINE)
    assert rows
    assert all(row.split()[0] == "frozen" for row in rows)
    assert f"altgrad report {tmp_path}/version_0/altgrad.jsonl --all" in shown
    assert f"tensorboard --logdir {tmp_path}" in shown
    assert f"{tmp_path}/version_0/report.html" in shown
    assert re.search(r"^bf16 +\w+ .* 7 \(", shown, flags=re.MULTILINE)  # layers that would freeze


@pytest.mark.slow
def test_two_runs_in_one_folder_have_their_own_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "BATCH_SIZE", 2)
    logger = lightning.loggers.TensorBoardLogger
    # What two demos find that begin at the same time; the logger has no public name for it.
    monkeypatch.setattr(logger, "_get_next_version", lambda _: 0)
    for seed in range(2):
        demo(steps=10, folder=tmp_path, seed=seed)
    kinds = {"altgrad": "jsonl", "report": "html", "recipes": "png"}
    expected = {f"{name}{n}.{kind}" for name, kind in kinds.items() for n in ("", "-2")}
    assert expected <= {path.name for path in tmp_path.glob("version_0/*")}


def test_an_invalid_folder_or_seed_exits_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"cannot write to folder .*file"):
        demo(steps=10, folder=tmp_path / "file" / "sub", seed=0)
    with pytest.raises(SystemExit, match=r"--seed -1: expected a number from 0"):
        demo(steps=10, folder=tmp_path, seed=-1)
