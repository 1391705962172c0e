"""The bounds of every field of a run file: each bad value is one sentence when it is read.

The file is of schema 2; test_steps.py has the lines of packed numbers.
"""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.report import RunFileError, read
from altgrad.report.records.fields import LAYER_LINE
from altgrad.report.records.kinds import FieldError
from tests.report.records.schema_2 import write_schema_2

HUGE = 10**400


@pytest.fixture(scope="module")
def lines(records, header, tmp_path_factory) -> list[Any]:
    """Return the header, a layer's line and the model's line, as JSON values."""
    path = write_schema_2(tmp_path_factory.mktemp("run"), header, records[:1])
    first, *rest = map(json.loads, path.read_text().splitlines())
    first["loggers"] = [{"logger": "CSVLogger", "name": "a", "id": None, "version": "0"}]
    first["predecessor"] = {"path": "../other/altgrad.jsonl", "before_step": 0}
    first["recipes"] = {
        "mine": {
            "weights": "bf16",
            "rounding": "stochastic",
            "compensation": None,
            "states": {"exp_avg": "e5m2"},
            "dtype": None,
            "optimizer": "my.Lion",
            "fused": False,
            "bytes_per_parameter": 7.5,
        }
    }
    first["now"] = first["recipes"]["mine"] | {"dtype": "bfloat16", "bytes_per_parameter": None}
    rest[0]["moved_elements"] = 3.5
    return [first, rest[0], rest[-1]]


def read_changed(folder: Path, lines: list[Any], place: int, keys: list[Any], value: Any) -> None:
    changed = copy.deepcopy(lines)
    target = changed[place]
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    path = folder / "altgrad.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))
    read(path)


FORMAT, LAYER, RECIPE = ["formats", "bf16"], ["layers", "0.weight"], ["recipes", "mine"]
BAD: list[tuple[int, list[Any], list[Any]]] = [
    (0, ["altgrad"], [True, 0, -1, 1.0, "1", None, []]),
    (0, ["formats"], [None, [], "bf16", {"f": None}, {"f": {}}, {str(k): {} for k in range(200)}]),
    *((0, [*FORMAT, "bits"], [bad]) for bad in (0, -8, 65, 8.0, True, None, "8", HUGE)),
    *(
        (0, [*FORMAT, key], [0, -1.0, math.inf, math.nan, "inf", None, True, HUGE])
        for key in ("max", "smallest", "smallest_normal", "eps")
    ),
    (0, [*FORMAT, "smallest"], [1e39]),  # larger than the largest
    (0, [*FORMAT, "scaled"], [0, 1, None, "true"]),
    (0, ["scaling"], ["x", '"), __import__("os").system("id"), ("",', 0, False, {}, ["block", 0]]),
    (0, ["layers"], [None, [], 3, {"w": None}, {"w": {}}]),
    (0, [*LAYER, "shape"], [None, 3, [-1], [1.5], [True], [2**62, 2**62], [1] * 65, [HUGE]]),
    (0, [*LAYER, "dtype"], [None, 3, ["float32"]]),
    (0, [*LAYER, "elements"], [0, -1, 1.5, True, None, 10**9, HUGE]),
    (0, [*LAYER, "formats"], [None, "bf16", [None], [3]]),
    (0, [*LAYER, "every_n_steps"], [0, -1, 1.5, None, True, HUGE]),
    (0, [*LAYER, "twin_elements"], [-1, 1.5, True, HUGE]),
    (0, ["versions"], [None, [], {"torch": 2.6}, {"torch": None}]),
    (0, ["created"], [None, 3, []]),
    (0, ["loggers"], [None, {}, [{}], [None], [{"logger": 3}], [{"logger": "a", "id": 3}]]),
    (0, ["predecessor"], [False, True, 0, "", [], {}, {"path": "a"}, {"before_step": 3}]),
    (0, ["predecessor", "path"], [None, False, 3, ["a"]]),
    (0, ["predecessor", "before_step"], [None, -1, 1.5, "1", HUGE]),
    (0, ["loggers"], [None, {}, 3, "a", [{}], [None], [{"logger": 3}], [{"name": "a"}]]),
    (0, ["loggers", 0, "id"], [3, True, []]),
    (0, ["recipes"], [None, [], "bf16", {"r": None}, {"r": {}}, {str(k): {} for k in range(2000)}]),
    *((0, [*RECIPE, key], [3, True, [], {}]) for key in ("weights", "dtype", "optimizer")),
    (0, [*RECIPE, "accumulate"], [3, True, [], {}]),
    (0, [*RECIPE, "rounding"], [None, "up", 3, ["stochastic"], True]),
    (0, [*RECIPE, "compensation"], ["sr", 3, [], False]),
    (0, [*RECIPE, "states"], [None, [], "bf16", {"exp_avg": None}, {"exp_avg": 3}]),
    (0, [*RECIPE, "fused"], [0, 1, None, "true"]),
    (0, [*RECIPE, "bytes_per_parameter"], [-1, True, "x", "-inf", HUGE]),
    (0, ["now"], [3, True, [], {}, "bf16", {"dtype": "bfloat16"}]),
    (0, ["now", "dtype"], [3, True, []]),
    (0, ["now", "fused"], [0, None]),
    *((place, ["step"], [None, True, 1.5, -1, "1", HUGE, math.nan]) for place in (1, 2)),
    *((place, ["layer"], [0, True, [], {}]) for place in (1, 2)),
    *((place, ["figures"], [None, [], 3, "x"]) for place in (1, 2)),
    (1, ["figures", "stall_frac/bf16"], [-0.1, 1.1, "inf", "nan", True, [], math.inf, HUGE]),
    (1, ["figures", "update_rms"], [True, "1", [], HUGE]),
    (1, ["errors"], [None, [], {"stall_frac/bf16": -0.1}, {"stall_frac/bf16": True}]),
    *((place, ["moved_elements"], [-1, True, "x", "inf", 1e300, HUGE]) for place in (1, 2)),
    (2, ["elements"], [None, -1, 1.5, True, HUGE]),
    *(
        (2, [key], ["inf", "x", True, 1e300, HUGE, -math.inf])
        for key in ("own_seconds", "training_seconds")
    ),
    (2, ["skipped"], [None, [], {"inf": -1}, {"inf": 1.5}, {"inf": None}, {"inf": HUGE}]),
    (2, ["histograms"], [None, [], {"ulps": None}, {"ulps": {}}, {"ulps": [1, 2]}]),
    (2, ["histograms", "ulps", "first"], [None, 1.5, True, 10**6, -(10**6), HUGE]),
    (
        2,
        ["histograms", "ulps", "counts"],
        [None, [], [None], [-1], [math.inf], ["inf"], [math.nan], 3, [1.0] * 10**5, [HUGE]],
    ),
]


@pytest.mark.parametrize(("place", "keys", "values"), BAD)
def test_a_bad_value_of_a_field_is_one_sentence_that_names_it(
    tmp_path: Path, lines: list[Any], place: int, keys: list[Any], values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(RunFileError) as caught:
            read_changed(tmp_path, lines, place, keys, value)
        message = str(caught.value)
        assert f": file is damaged, line {place + 1} is invalid (" in message, value
        assert message.isprintable()
        assert re.search(rf"\['?{keys[-1]}'?\]", message), message


GOOD: list[tuple[int, list[Any], list[Any]]] = [
    (0, [*FORMAT, "bits"], [1, 64]),
    (0, [*FORMAT, "max"], [1e308, 448]),
    (0, ["scaling"], [None, "tensor", "channel", ["block", 1], ["block", 2**40]]),
    (0, [*LAYER, "shape"], [[3000], [2**31, 2**31], [1] * 60 + [3000]]),
    (0, ["predecessor"], [None]),
    (0, ["loggers"], [[], [{"logger": "CSVLogger"}]]),
    (0, ["recipes"], [{}]),
    (0, [*RECIPE, "rounding"], ["nearest_even", "stochastic"]),
    (0, [*RECIPE, "compensation"], [None, "kahan"]),
    (0, [*RECIPE, "accumulate"], [None, "bf16"]),
    (0, ["now"], [None]),
    (0, [*RECIPE, "bytes_per_parameter"], [0, 4.125, None]),
    (1, ["moved_elements"], [0, 12.25, None]),
    (1, ["step"], [0, 2**63 - 1]),
    (1, ["figures", "stall_frac/bf16"], [0, 1, None, 0.5]),
    (1, ["figures", "kept_update_ratio/bf16"], [-3.5, 1e9, None, "inf", "-inf"]),
    (1, ["errors", "stall_frac/bf16"], [0, None, "inf"]),
    (2, ["own_seconds"], [None, -1e-6, 3600]),
    (2, ["skipped"], [{}, {"inf": 0}]),
    (2, ["histograms", "weights"], [{"first": -64, "counts": [0.0] * 96}]),
]


@pytest.mark.parametrize(("place", "keys", "values"), GOOD)
def test_values_at_the_bounds_of_a_field_are_read(
    tmp_path: Path, lines: list[Any], place: int, keys: list[Any], values: list[Any]
) -> None:
    for value in values:
        read_changed(tmp_path, lines, place, keys, value)


def test_a_layer_without_elements_measures_none(tmp_path: Path, lines: list[Any]) -> None:
    empty = dict(lines[0]["layers"]["0.weight"], shape=[0, 3], elements=0)
    read_changed(tmp_path, lines, 0, LAYER, empty)


def test_every_share_of_the_catalogue_is_within_0_and_1() -> None:
    shares = [name for name in (*LAYER_METRICS, *FORMAT_METRICS) if name.endswith("_frac")]
    assert len(shares) > 10
    for name in (*shares, "zero_update_frac"):  # a name of older files
        key = f"{name}/bf16" if name in FORMAT_METRICS else name
        line = {"step": 0, "layer": None, "figures": {key: 1.0}}
        LAYER_LINE.parse(line)
        with pytest.raises(FieldError, match=name):
            LAYER_LINE.parse(line | {"figures": {key: 1.01}})
