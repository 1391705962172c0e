"""The header of a run file."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from altgrad.quantization import get_formats
from altgrad.report import (
    SCHEMA,
    FormatInfo,
    Header,
    LayerInfo,
    Predecessor,
    RecipeInfo,
    read,
)
from altgrad.report.records.schema import (
    FormatSize,
    OptimizerSize,
    PackedSize,
    RecipeSizes,
    StateSize,
)
from tests.report.records.recording import written


def test_a_header_has_the_formats_under_each_scaling(tmp_path, records) -> None:
    formats = get_formats(["bf16", "e4m3fn", "e0m7", "nvfp4"])
    for scaling in (None, "channel", ("block", 32)):
        infos = {each.name: FormatInfo.from_format(each, scaling) for each in formats}
        path = written(tmp_path, Header(infos, {}, scaling), [])
        assert (read(path).formats, read(path).scaling) == (infos, scaling)
    assert infos["e4m3fn"] == FormatInfo("e4m3fn", 8, 448.0, 2.0**-9, 2.0**-6, 0.125, scaled=True)
    assert infos["bf16"].scaled is False
    assert (infos["nvfp4"].bits, infos["nvfp4"].max, infos["nvfp4"].scaled) == (4, 6.0, True)
    line = json.loads((tmp_path / "altgrad.jsonl").read_text())
    assert line["altgrad"] == 3
    assert line["predecessor"] is None


HEADER = Header(
    {"mine": FormatInfo("mine", 6, 60.0, 2.0**-4, 0.25, 0.25, scaled=True)},
    {
        "once": LayerInfo((3, 4), "float32", 12, ("mine",)),
        "seldom": LayerInfo(
            *((), "bfloat16", 1, (), 7), {"step": StateSize(0, 4), "exp_avg": StateSize(1, 2)}
        ),
    },
    ("block", 32),
    {"torch": "2.6"},
    "2026-01-02",
    Predecessor("../version_0/altgrad.jsonl", 30),
    ({"logger": "WandbLogger", "name": "wise-sun-3", "id": "a1b2", "version": None},),
    {
        "bf16-sr": RecipeInfo("bf16-sr", "bf16", "stochastic", None, {}, None, None, False, 10.0),
        "mine": RecipeInfo(
            *("mine", None, "nearest_even", "kahan", {"*": "e5m2"}, "bfloat16", "my.Lion", True),
            bytes_per_parameter=4.125,
            sizes=RecipeSizes(
                FormatSize(8, ("block", 32)),
                {"*": FormatSize(8, "tensor"), "v": FormatSize(16, None)},
                OptimizerSize(2.03, 0.5, PackedSize(256, 4096, 2, only_whole=True, table_bytes=9)),
            ),
        ),
    },
    RecipeInfo(
        *("now", "bf16", "stochastic", None, {"*": "e5m2"}, "float32", "my.Lion", True),
        bytes_per_parameter=4.125,
    ),
)


def test_a_header_survives_json() -> None:
    line = json.dumps(HEADER.as_json(), allow_nan=False)
    assert Header.from_json(json.loads(line)) == HEADER
    assert json.loads(line)["altgrad"] == SCHEMA
    bare = {"formats": {}, "scaling": None, "layers": {}}  # as the first versions wrote it
    assert Header.from_json(bare) == Header({}, {}, None)
    assert Header.from_json(bare).now is None


def test_an_unknown_number_of_bytes_is_null() -> None:
    unknown = replace(HEADER.recipes["mine"], bytes_per_parameter=math.nan)
    line = json.dumps(replace(HEADER, recipes={"mine": unknown}).as_json(), allow_nan=False)
    assert json.loads(line)["recipes"]["mine"]["bytes_per_parameter"] is None
    restored = Header.from_json(json.loads(line)).recipes["mine"]
    assert math.isnan(restored.bytes_per_parameter)
    assert replace(restored, bytes_per_parameter=4.125) == HEADER.recipes["mine"]


@pytest.mark.parametrize(
    ("change", "is_like"),
    [
        ({"formats": {}}, False),
        ({"scaling": ("block", 16)}, False),
        ({"scaling": None}, False),
        ({"layers": {"once": HEADER.layers["once"]}}, False),
        ({"layers": HEADER.layers | {"once": replace(HEADER.layers["once"], elements=4)}}, False),
        # Sizes of optimizer states are known only after a step.
        (
            {
                "layers": HEADER.layers | {"seldom": replace(HEADER.layers["seldom"], states=None)},
            },
            True,
        ),
        ({"recipes": {}}, False),
        ({"recipes": {"mine": replace(HEADER.recipes["mine"], fused=False)}}, False),
        ({"now": None}, True),  # as in files that do not say it
        ({"now": replace(HEADER.now, dtype="bfloat16")}, False),
        ({"versions": {}, "created": "", "predecessor": None, "loggers": ()}, True),
    ],
)
def test_headers_are_alike_only_if_settings_and_the_storage_of_the_run_are_equal(
    change: Any, is_like: bool
) -> None:
    assert HEADER.is_like(replace(HEADER, **change)) is is_like
