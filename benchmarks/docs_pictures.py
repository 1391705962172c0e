"""Make the pictures of the documentation again: run this after a change that shows in one.

    python -m benchmarks.docs_pictures                    # all, in three minutes
    python -m benchmarks.docs_pictures report agreement   # some of them

Pictures of pages need Chromium; those of TensorBoard are taken of a real one. Look at each picture
before you commit it.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from PIL import Image

from altgrad.report import RunReport, png, read

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DEMO, RUN = "altgrad-demo", "altgrad-demo/version_0"


def run_python(*command: str, folder: Path) -> None:
    subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def shrink(picture: bytes) -> bytes:
    """Return a PNG with 256 colours at most, which is a third as large."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def crop(picture: bytes, width: int) -> bytes:
    """Return the left part of a PNG, `width` pixels wide."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as whole:
        whole.crop((0, 0, width, whole.height)).save(file, "PNG")
    return file.getvalue()


# --- pictures of the demo, which has run in `folder`


def draw_demo(folder: Path) -> bytes:
    return (folder / RUN / "recipes.png").read_bytes()


def draw_from_report(folder: Path, name: str) -> bytes:
    """Draw one of `RunReport.pictures` of the demo."""
    return png(RunReport.from_run(read(folder / RUN)).pictures()[name], dpi=120)


def photograph_report(folder: Path) -> bytes:
    return photograph(folder, (folder / RUN / "report.html").as_uri(), width=1200, height=1180)


def photograph_narrow_report(folder: Path) -> bytes:
    """Photograph the page as wide as a phone: headless Chromium has no narrower window than 500."""
    frame = folder / "narrow.html"
    source = (folder / RUN / "report.html").as_uri()
    frame.write_text(
        f'<body style="margin:0"><iframe src="{source}" width="390" height="1180" frameborder="0">'
    )
    return crop(photograph(folder, frame.as_uri(), 500, 1180), width=390)


def photograph_notebook(folder: Path) -> bytes:
    """Photograph what a notebook shows of the run at the end of a cell."""
    code = f"""
from altgrad.report import read
with open("cell.html", "w", encoding="utf-8") as cell:
    cell.write('<meta charset="utf-8"><body style="font: 14px sans-serif">')
    cell.write(read("{RUN}")._repr_html_())
"""
    run_python("-c", code, folder=folder)  # there, the path of the run is a short one
    return photograph(folder, (folder / "cell.html").as_uri(), width=900, height=610)


def photograph_scalars(folder: Path) -> bytes:
    with serve_tensorboard(folder) as address:
        page = photograph(folder, f"{address}?smoothing=0#timeseries", width=1500, height=1180)
    return crop(page, width=1249)  # to the right are settings


def photograph_text(folder: Path) -> bytes:
    with serve_tensorboard(folder) as address:
        return photograph(folder, f"{address}#text", width=1650, height=780)


def photograph(folder: Path, address: str, width: int, height: int) -> bytes:
    """Return a PNG of a page in Chromium.

    Args:
        folder: Folder for the browser's own files.
        address: Address of the page.
        width: Width of the window, in pixels.
        height: Height of the window, in pixels.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no chromium: expected one on the PATH; do apt-get install chromium")
    file = folder / "page.png"
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    # Without WebGL, TensorBoard draws lines as SVG, and thus before the picture is taken.
    window = ("--disable-3d-apis", "--hide-scrollbars", f"--window-size={width},{height}")
    # The page's own clock runs ahead while the page is idle.
    files = (f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000")
    command = [chromium, *options, *window, *files, f"--screenshot={file}", address]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    return file.read_bytes()


@contextmanager
def serve_tensorboard(folder: Path) -> Iterator[str]:
    """Run TensorBoard on the demo, and yield its address once it has read the logs."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", DEMO, "--port", "0"]
    command += ["--host", "127.0.0.1", "--load_fast", "false", "--reload_interval", "0"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines = iter(server.stderr.readline, "")
            found = (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in lines)
            yield next(match[0] for match in found if match)
        finally:
            server.terminate()


# --- pictures of other runs


def draw_agreement(folder: Path) -> bytes:
    """Run the code on the page that compares runs, and return the picture that it writes."""
    page = (DOCS / "compare.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    run_python("-c", "".join(blocks[:2]), folder=folder)  # the last one reads other runs
    return (folder / "agreement.png").read_bytes()


def draw_predicted(folder: Path) -> bytes:
    run_python(str(ROOT / "examples" / "predict_and_confirm.py"), folder=folder)
    return next(folder.rglob("predicted.png")).read_bytes()


OF_THE_DEMO: Mapping[str, Callable[[Path], bytes]] = {
    "demo": draw_demo,
    "report": photograph_report,
    "report-narrow": photograph_narrow_report,
    "notebook": photograph_notebook,
    "ranges": partial(draw_from_report, name="ranges"),
    "stall-map": partial(draw_from_report, name="stalls-0"),
    "steps": partial(draw_from_report, name="steps"),
    "tensorboard-scalars": photograph_scalars,
    "tensorboard-text": photograph_text,
}
OTHERS: Mapping[str, Callable[[Path], bytes]] = {
    "agreement": draw_agreement,
    "predicted": draw_predicted,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    known = {**OF_THE_DEMO, **OTHERS}
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(known)}; all without any")
    names = parser.parse_args().names or [*known]
    if unknown := {*names} - {*known}:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {*names} & {*OF_THE_DEMO}:
            run_python("-m", "altgrad", "demo", "--folder", DEMO, folder=folder)
        for picture in names:
            path = DOCS / f"{picture}.png"
            path.write_bytes(shrink(known[picture](folder)))
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
