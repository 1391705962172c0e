"""One picture of each kind, and what can be seen in a picture."""

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from altgrad import Histogram
from altgrad.quantization import get_formats
from altgrad.report import FormatInfo, heat_map, kept_map, png, ranges, steps_histogram

STEPS = {"bf16": Histogram(-3, [1, 3, 2, 2]), "e4m3fn": Histogram(-3, [0, 8, 0, 0])}

FORMATS = [FormatInfo.of(f, "tensor") for f in get_formats(["bf16", "e4m3fn", "e0m7", "mxfp4"])]


def every_picture(names: list[str]) -> dict[str, Figure]:
    title = f"of {names[0]}"
    return {
        "heat": heat_map({n: {0: 0.25, 10: 0.5} for n in names}, title=title),
        "kept": kept_map({n: {"bf16": 0.25} for n in names}, {}, title=title),
        "steps": steps_histogram(dict.fromkeys(names[:5], STEPS["bf16"])),
        "ranges": ranges(Histogram(-6, [1, 2, 1]), FORMATS),
    }


def texts(figure: Figure) -> list[str]:
    png(figure)  # which draws it
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def pixels(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB")).astype(int)
