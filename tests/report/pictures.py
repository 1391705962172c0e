"""Draw one picture of each kind, and read the texts and read_pixels of a picture."""

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from altgrad import Histogram
from altgrad.quantization import get_formats
from altgrad.report import FormatInfo, heat_map, kept_map, png, ranges, steps_histogram

STEPS = {"bf16": Histogram(-3, [1, 3, 2, 2]), "e4m3fn": Histogram(-3, [0, 8, 0, 0])}

FORMATS = [
    FormatInfo.from_format(f, "tensor") for f in get_formats(["bf16", "e4m3fn", "e0m7", "mxfp4"])
]


def draw_all(names: list[str]) -> dict[str, Figure]:
    title = f"title {names[0]}"
    return {
        "heat": heat_map({n: {0: 0.25, 10: 0.5} for n in names}, title=title),
        "kept": kept_map({n: {"bf16": 0.25} for n in names}, {}, title=title),
        "steps": steps_histogram(dict.fromkeys(names[:5], STEPS["bf16"])),
        "ranges": ranges(Histogram(-6, [1, 2, 1]), FORMATS),
    }


def read_texts(figure: Figure) -> list[str]:
    png(figure)  # texts of ticks are set when the figure is drawn
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def read_pixels(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB")).astype(int)
