"""Output of loggers, read back from TensorBoard's files, its server, and wandb's files."""

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import lightning.pytorch.loggers
import numpy as np
import pytest
import pytorch_lightning.loggers
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from altgrad import Histogram
from altgrad.measurement.catalogue import FORMAT_METRICS
from altgrad.measurement.layer_columns import LayerRow, gather_columns
from altgrad.output import loggers
from altgrad.output.charts import Row
from altgrad.output.history import History
from altgrad.report import Verdict, kept_map
from altgrad.report.cells import MEANINGS
from altgrad.report.colours import find_share_colour
from tests.chromium import chromium, needs_chromium
from tests.lightning.assessments import (
    FORMATS,
    LAYERS,
    RECIPES,
    assessment,
)
from tests.lightning.rendered import as_text, cells, render

# Octaves −32 … 31 of log2(abs(dw)/S): 3 elements in −2, 1.5 in −1, 4 in 3.
COUNTS = [0.0] * 30 + [3.0, 1.5] + [0.0] * 3 + [4.0] + [0.0] * 28
STEPS = Histogram(-32, COUNTS)


def log_everything(logger: Any) -> None:
    """Log figures, pictures and verdicts as a run does, at steps 9 and 19."""
    history = History()
    for step in (9, 19):
        keys = [f"{metric}/{format}" for metric in FORMAT_METRICS for format in FORMATS]
        layers = {name: dict.fromkeys(keys, 0.5) for name in LAYERS}
        row = Row(step, dict.fromkeys(keys, 0.5), {"own_share": 0.1}, layers)
        for runs in loggers.wrap_loggers([logger]):
            loggers.log_row(runs, row)
            loggers.close_runs(runs)
        stalled = {f"stall_frac/{format}": step / 20 for format in FORMATS}
        history.add(step, gather_columns(LayerRow(name, stalled, {}) for name in LAYERS))
        shown = ("steps/bf16", f"steps/bf16/{LAYERS[0]}")
        loggers.log_histograms([logger], step, dict.fromkeys(shown, STEPS))
        loggers.log_pictures([logger], step, history.draw_heat_maps())
    loggers.log_layout([logger], row)
    loggers.log_verdict([logger], 19, assessment())
    logger.save()


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def folder(request: Any, tmp_path_factory: Any) -> str:
    package = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
    logger = package[request.param].loggers.TensorBoardLogger(tmp_path_factory.mktemp("logs"))
    log_everything(logger)
    logger.finalize("success")
    return logger.log_dir


@pytest.fixture(scope="module")
def events(folder: str) -> EventAccumulator:
    return EventAccumulator(folder, size_guidance={"images": 0, "histograms": 0}).Reload()


# --- TensorBoard


def test_histograms_have_a_bucket_per_octave(events: EventAccumulator) -> None:
    group = "6-AltGrad-steps/steps"
    assert events.Tags()["histograms"] == [f"{group}/bf16", f"{group}/bf16/{LAYERS[0]}"]
    for tag in events.Tags()["histograms"]:
        assert [event.step for event in events.Histograms(tag)] == [9, 19]
        for event in events.Histograms(tag):
            value = event.histogram_value
            assert value.bucket == COUNTS
            assert value.bucket_limit == [*range(-31, 33)]
            # TensorBoard draws from `min` to the end of the first bucket that is not empty.
            assert (value.min, value.max) == (-2, 4)
            assert value.num == 8.5
            assert value.sum == 3 * -1.5 + 1.5 * -0.5 + 4 * 3.5
            assert value.sum_squares == 3 * 1.5**2 + 1.5 * 0.5**2 + 4 * 3.5**2


def test_heat_maps_are_images_with_a_readable_size(events: EventAccumulator) -> None:
    tags = [f"4-AltGrad-maps/stall_frac_map/{format}" for format in FORMATS]
    assert events.Tags()["images"] == tags
    for tag in tags:
        assert [event.step for event in events.Images(tag)] == [9, 19]
        for event in events.Images(tag):
            image = Image.open(io.BytesIO(event.encoded_image_string))
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert (event.width, event.height) == image.size
            assert 600 < image.width < 1300
            assert 150 < image.height < 1500
            assert len(image.getcolors(100_000) or ()) > 20  # it is not blank


def read_layout(events: EventAccumulator) -> dict[str, dict[str, list[str]]]:
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: [*chart.multiline.tag] for chart in category.chart}
        for category in layout.category
    }


def test_the_layout_has_the_charts_of_the_cards(events: EventAccumulator) -> None:
    layout = read_layout(events)
    assert [*layout] == ["1-AltGrad", "2-AltGrad-model", "3-AltGrad-layers"]
    assert {*layout["2-AltGrad-model"]} == {*layout["3-AltGrad-layers"]} == {*FORMAT_METRICS}
    tags = [f"{group}/stall_frac{end}" for group in layout for end in ("", "_x", "/a", "/a/b")]
    (of_model,) = layout["2-AltGrad-model"]["stall_frac"]
    assert [tag for tag in tags if re.match(of_model, tag)] == ["2-AltGrad-model/stall_frac"]
    (of_layers,) = layout["3-AltGrad-layers"]["stall_frac"]
    found = [tag for tag in tags if re.match(of_layers, tag)]
    assert found == ["3-AltGrad-layers/stall_frac/a", "3-AltGrad-layers/stall_frac/a/b"]


def test_the_verdict_is_a_table_in_which_names_are_escaped(events: EventAccumulator) -> None:
    (event,) = events.Tensors("altgrad/verdict/text_summary")
    assert event.step == 19
    markdown = event.tensor_proto.string_val[0].decode()
    html = render(markdown)
    assert html.index("This run loses 0.75 of its progress now") < html.index("<table>")
    runs, layers = (part.partition("</table>")[0] for part in html.split("<table>")[1:])
    assert cells(runs)[:3] == ["recipe", "verdict", "progress kept (80 % of real runs)"]
    assert "In brackets: what 80 % of those real runs kept" in as_text(html)
    assert f"frozen: {MEANINGS[Verdict.FROZEN]}" in as_text(html)
    assert cells(runs)[7:10] == ["now", "loses 0.75 now", "0.25 (0.00 to 0.50)"]
    assert cells(runs)[10:14] == ["1 (50 %)", "&#8211;", "1 of 2", "75 %"]
    # First what each recipe comes to, then what to do, then layers, and legends last.
    what_to_do, table = html.index("stands still"), html.index("smallest fine")
    assert what_to_do < table < html.index("In brackets: what 80")
    assert f"now: {LAYERS[0]} stands still. Use *Kahan*." in as_text(html)
    assert cells(layers)[:5] == ["layer", *RECIPES, "smallest fine"]
    assert cells(layers)[5:10] == [LAYERS[0], *["frozen 0.00"] * 3, "bf16"]
    last = layers.rpartition("<tr>")[2]
    assert "<b>" not in last
    assert as_text(cells(last)[0]) == LAYERS[2]
    assert cells(last)[1:] == [*["frozen 0.67"] * 3, "none"]


def test_an_empty_histogram_is_left_out(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    loggers.log_histograms([logger], 0, {"steps/bf16": Histogram(-32, [0.0] * 64)})
    loggers.log_histograms([logger], 0, {})
    loggers.log_pictures([logger], 0, {})
    logger.finalize("success")
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["histograms"] == []


# --- other loggers


def test_other_loggers_get_no_pictures(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    each = (logger, object())
    assert not loggers.can_show(each)
    assert loggers.can_show([logger, TensorBoardLogger(tmp_path)])
    loggers.log_layout(each, Row(0, {}, {}, {}))
    loggers.log_histograms(each, 0, {"steps/bf16": STEPS})
    loggers.log_pictures(each, 0, {"a": None})  # type: ignore[dict-item]  # None is never drawn
    loggers.log_verdict(each, 0, assessment())
    assert [*tmp_path.iterdir()] == []


class Broken(TensorBoardLogger):
    @property
    def experiment(self) -> Any:
        raise OSError("no space left")


def test_an_error_of_a_logger_is_raised(tmp_path: Path) -> None:
    broken = [Broken(tmp_path)]
    for call in (
        lambda: loggers.log_layout(broken, Row(0, {}, {}, {})),
        lambda: loggers.log_histograms(broken, 0, {"steps/bf16": STEPS}),
        lambda: loggers.log_pictures(broken, 0, {"a": kept_map({}, {}, title="")}),
        lambda: loggers.log_verdict(broken, 0, assessment()),
    ):
        with pytest.raises(OSError, match="no space left"):
            call()


# --- a real TensorBoard


@contextmanager
def tensorboard(folder: str) -> Iterator[str]:
    """Run TensorBoard, and yield its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", "0"]
    command += ["--host", "127.0.0.1", "--samples_per_plugin", "images=100"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines: list[str] = []
            for line in server.stderr:
                lines.append(line)
                if address := re.search(r"http://127\.0\.0\.1:\d+/", line):
                    yield address[0]
                    break
            else:
                pytest.fail(f"TensorBoard ended: {lines}")
        finally:
            server.terminate()


def fetch(address: str, path: str, **query: str) -> Any:
    with urlopen(f"{address}data/plugin/{path}?{urlencode(query)}", timeout=30) as answer:
        body = answer.read()
    return json.loads(body) if "json" in answer.headers["Content-Type"] else body


def wait_for(found: Any) -> Any:
    """Wait for a true result, as TensorBoard loads event files in the background."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if value := found():
            return value
        time.sleep(0.2)
    return pytest.fail("TensorBoard loaded nothing in a minute")


def test_a_running_tensorboard_serves_everything_logged(folder: str) -> None:
    with tensorboard(folder) as address:
        # The verdict is logged last.
        texts = wait_for(lambda: fetch(address, "text/tags").get("."))
        assert [*texts] == ["altgrad/verdict/text_summary"]
        (text,) = fetch(address, "text/text", run=".", tag="altgrad/verdict/text_summary")
        assert text["step"] == 19
        assert "<b>" not in text["text"]
        assert as_text(LAYERS[2]) in as_text(text["text"])

        layout = fetch(address, "custom_scalars/layout")
        charts = {c["title"]: c for category in layout["category"] for c in category["chart"]}
        # A run for each format, and thus a colour; and no run of the user's has these tags.
        (of_layers,) = charts["stall_frac"]["multiline"]["tag"]  # the last group is of layers
        for format in FORMATS:
            query = {"run": f"altgrad/{format}", "tag": of_layers}
            lines = fetch(address, "custom_scalars/scalars", **query)
            assert lines["regex_valid"]
            tags = {f"3-AltGrad-layers/stall_frac/{layer}" for layer in LAYERS}
            assert set(lines["tag_to_events"]) == tags
        runs = fetch(address, "scalars/tags")
        assert {*runs} == {".", *(f"altgrad/{format}" for format in FORMATS)}
        assert {*runs["."]} == {"1-AltGrad/monitor/own_share"}

        tag = "4-AltGrad-maps/stall_frac_map/bf16"
        assert tag in fetch(address, "images/tags")["."]
        images = fetch(address, "images/images", run=".", tag=tag, sample="0")
        assert [image["step"] for image in images] == [9, 19]
        with urlopen(f"{address}data/plugin/images/individualImage?{images[-1]['query']}") as png:
            assert Image.open(io.BytesIO(png.read())).width > 600

        histograms = fetch(
            address, "histograms/histograms", run=".", tag="6-AltGrad-steps/steps/bf16"
        )
        assert [step for _, step, _ in histograms] == [9, 19]
        # TensorBoard rebins for its page, but keeps the range of filled buckets.
        buckets = [bucket for bucket in histograms[-1][2] if bucket[2]]
        assert sum(count for _, _, count in buckets) == pytest.approx(8.5)
        assert buckets[0][0] == -2
        assert buckets[-1][1] == 4


@needs_chromium
def test_the_image_page_of_tensorboard_shows_the_heat_maps(folder: str, tmp_path: Path) -> None:
    with tensorboard(folder) as address:
        wait_for(lambda: fetch(address, "text/tags").get("."))
        picture = f"--screenshot={tmp_path / 'page.png'}"
        _, errors = chromium(tmp_path, f"{address}#images", picture, milliseconds=20_000)
    assert not errors
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    colour = np.array([*bytes.fromhex(find_share_colour(1 - 9 / 20)[1:])])  # at the first step
    assert (abs(pixels - colour).max(-1) <= 8).sum() > 3000


# --- wandb


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that an offline run logged, from the file for syncing."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for record in finished_wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                key, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if inner:
                    row.setdefault(key, {})[inner[0]] = value
                else:
                    row[key] = value
            rows.append(row)
    return rows


def finished_wandb_records(file: Path) -> list[Any]:
    """Return all records, once wandb's process has written the last one.

    That process may still write after `wandb.finish` has returned.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    for _ in range(100):
        with suppress(DecodeError):
            parse = wandb_internal_pb2.Record.FromString
            records = [parse(data) for data in wandb_records(file.read_bytes())]
            if "exit" in (record.WhichOneof("record_type") for record in records):
                return records
        time.sleep(0.2)
    raise AssertionError(f"{file} has no end")


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a wandb file: a header of 7 bytes, and then a log of LevelDB.

    A record is split into parts at blocks of 32 KiB:
    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # FULL or LAST: the record is complete
            yield parts
            parts = b""


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


def test_wandb_gets_histograms_images_and_a_table(wandb_folder: Path) -> None:
    import wandb

    logger = WandbLogger(save_dir=wandb_folder, offline=True)
    log_everything(logger)
    files, summary = Path(logger.experiment.dir), dict(logger.experiment.summary)
    wandb.finish()

    rows = [row for row in wandb_rows(wandb_folder) if "altgrad/steps/bf16" in row]
    assert [row["trainer/global_step"] for row in rows] == [9, 19]
    for row in rows:
        histogram = row["altgrad/steps/bf16"]
        assert histogram["_type"] == "histogram"
        assert histogram["values"] == COUNTS
        assert histogram["bins"] == [*range(-32, 33)]
    key = "altgrad/stall_frac_map/bf16"
    rows = [row for row in wandb_rows(wandb_folder) if key in row]
    assert [row["trainer/global_step"] for row in rows] == [9, 19]
    for row in rows:
        assert row[key]["_type"] == "image-file"
        with Image.open(files / row[key]["path"]) as image:
            assert image.size == (row[key]["width"], row[key]["height"])
    assert summary["altgrad/answer"].startswith("This run loses 0.75 of its progress now")
    assert "stands still. Use *Kahan*." in summary["altgrad/to_do"]
    assert summary["altgrad/verdict_word/now"] == "loses 0.75 now"
    assert summary["altgrad/frozen_share/bf16"] == 0.5
    (row,) = [row for row in wandb_rows(wandb_folder) if "altgrad/verdict" in row]
    assert row["altgrad/verdict"]["_type"] == "table-file"
    table = json.loads((files / row["altgrad/verdict"]["path"]).read_text())
    assert table["columns"][:3] == ["layer", "recipe", "verdict"]
    assert [row[:2] for row in table["data"][:4]] == [
        *(["(whole run)", recipe] for recipe in RECIPES),
        [LAYERS[0], "now"],
    ]
    assert table["data"][0][3:5] == [0.25, 0.75]
    assert table["data"][0][5].startswith("now: ")
    assert table["data"][-1] == [
        *(LAYERS[2], "e4m3fn", "frozen", pytest.approx(2 / 3), 1.0, "as the figures say")
    ]
