"""The fields of a run file, a file of JSON lines: the type and the bounds of each field.

`HEADER` is the first line. `COLUMNS_LINE` names the numbers of an observed step, and `STEP_LINE` is
the text before them. `LAYER_LINE` and `MODEL_LINE`, of schemas 1 and 2, hold the figures of a
layer, or of the whole model, in one step. `LAYERS_LINE` describes layers that appear in mid-run.
`VERDICTS_LINE` has the verdicts on the run after a step. `UNOBSERVED_LINE` says how many steps a
run made of which none was observed. `RESUMED_LINE` says from which step on the lines above it are
replaced, because a run was resumed there. `reading` checks every line once, by these kinds, so that
reports need no further checks.

The module `schema` comes next and holds the header.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from altgrad.measurement.catalogue import get_metric
from altgrad.report.records.floats import FloatsByKey, FloatTable
from altgrad.report.records.kinds import (
    Checked,
    Choice,
    FieldError,
    Fields,
    Figure,
    Flag,
    GridScaling,
    Items,
    Kind,
    Nullable,
    Real,
    Table,
    Text,
    Whole,
    parse_below,
)

SCHEMA = 3
"""Version of the run file's schema: the value of ``"altgrad"`` in the header.

Schema 2 adds the figures of twins, samples of the layers that are trained as a recipe for storing
weights says, and describes the recipes. Files of schema 1 lack both. Schema 3 has a line of packed
numbers for each observed step, where earlier ones have a line for each layer, and one for the
model.
"""

LARGEST = 2**63 - 1
"""Largest whole number in a run file: that of int64, which pandas and other readers use."""

MOST_NUMBERS = 2**27
"""Largest number of figures and errors in an observed step: a gigabyte of memory."""

_MOST_DIMENSIONS = 64  # of a tensor, as in torch and NumPy
_MOST_FORMATS = 128  # a page has a picture for each
_MOST_RECIPES = 1024  # a run steps a few
_MOST_KEYS = 1024  # of objects that have a few
_MOST_LAYERS = 2**32
_OCTAVES = 2200  # float64 numbers and their quotients have binary exponents within ± 2,200
_MOST_BINS = 128  # a run writes up to 96
_MOST_COUNT = 1e30  # estimated number of elements
_MOST_ROWS, _MOST_COLUMNS = 2**24, 2**16  # of a step
_MOST_SECONDS = 1e12  # 30,000 years
_SMALLEST_FLOAT, _LARGEST_FLOAT = 5e-324, 1.7976931348623157e308  # of float64

_RENAMED_METRICS = {"zero_update_frac": "ulp_zero_frac"}
"""Today's metric names, by the names in older run files.

Where a file has a figure under both names, the two are equal.
"""


def find_kind(key: str) -> Figure:
    """Return the field type that checks the number under a key, such as ``stall_frac/bf16``.

    The type allows 0 to 1 if the metric before the ``/`` is a share, and otherwise any number.
    """
    name = key.partition("/")[0]
    try:
        metric = get_metric(_RENAMED_METRICS.get(name, name))
    except ValueError:  # of a newer version, which readers keep as it is
        return Figure()
    return Figure(0, 1) if metric.unit == "share" else Figure()


def _check_range(format: Mapping[str, float]) -> None:
    """Raise FieldError if a number format's ``smallest`` positive value exceeds its ``max``."""
    parse_below("smallest", Real(0, format["max"]), format["smallest"])


def _check_elements(layer: Mapping[str, Any]) -> None:
    """Raise FieldError unless a layer's number of measured ``elements`` fits its ``shape``.

    The number is from 1 to the number of elements in the shape, and 0 for a shape without elements.
    """
    population = math.prod(layer["shape"])
    parse_below("shape", Whole(0, LARGEST), population)
    parse_below("elements", Whole(min(1, population), population), layer["elements"])


def _check_columns(columns: Mapping[str, Any]) -> None:
    """Raise FieldError unless a step's columns are distinct, and a step fits into memory."""
    for key in ("layers", "figures", "errors"):
        if len({*columns[key]}) < len(columns[key]):
            raise FieldError("no item twice", columns[key], (key,))
    width = len(columns["figures"]) + len(columns["errors"]) + columns["moved_elements"]
    parse_below("layers", Whole(0, MOST_NUMBERS), len(columns["layers"]) * width)


_STEP = Whole(0, LARGEST)
_POSITIVE = Real(_SMALLEST_FLOAT, _LARGEST_FLOAT)
_SENTENCE = Text(200_000)  # with the names of a few layers or recipes, each up to 10,000
_SECONDS = Figure(-_MOST_SECONDS, _MOST_SECONDS)  # the noise of a clock can be negative

VERSION = Whole(1, SCHEMA)

FORMAT = Checked(
    Fields(
        {
            "bits": Whole(1, 64),
            "max": _POSITIVE,
            "smallest": _POSITIVE,
            "smallest_normal": _POSITIVE,
            "eps": _POSITIVE,
            "scaled": Flag(),
        }
    ),
    _check_range,
)

STATE = Fields({"elements": Whole(0, LARGEST), "bytes": Whole(0, LARGEST)})

LAYER = Checked(
    Fields(
        {
            "shape": Items(Whole(0, LARGEST), 0, _MOST_DIMENSIONS),
            "dtype": Text(),
            "elements": Whole(0, LARGEST),
            "formats": Items(Text(), 0, _MOST_KEYS),
            "every_n_steps": Whole(1, LARGEST),
        },
        {
            "states": (Nullable(Table(STATE, _MOST_KEYS)), None),
            "twin_elements": (Nullable(Whole(0, LARGEST)), None),
        },
    ),
    _check_elements,
)

FORMAT_SIZE = Fields({"bits": Whole(1, 64), "scaling": GridScaling()})

PACKED = Fields(
    {name: Whole(1, LARGEST) for name in ("block", "least", "states")}
    | {"only_whole": Flag(), "table_bytes": Whole(0, LARGEST)}
)

SIZES = Fields(
    {
        "weights": Nullable(FORMAT_SIZE),
        "states": Table(FORMAT_SIZE, _MOST_KEYS),
        "optimizer": Nullable(
            Fields(
                {
                    "state_bytes": Figure(0, _MOST_COUNT),
                    "compensation_bytes": Real(0, _MOST_COUNT),
                    "packed": Nullable(PACKED),
                }
            )
        ),
    }
)

RECIPE = Fields(
    {
        "weights": Nullable(Text()),
        "rounding": Choice(("nearest_even", "stochastic")),
        "compensation": Nullable(Choice(("kahan",))),
        "states": Table(Text(), _MOST_KEYS),
        "dtype": Nullable(Text()),
        "optimizer": Nullable(Text()),
        "fused": Flag(),
        "bytes_per_parameter": Figure(0),
    },
    {"accumulate": (Nullable(Text()), None), "sizes": (Nullable(SIZES), None)},
)

LOGGER = Fields(
    {"logger": Text()},
    {key: (Nullable(Text()), None) for key in ("name", "id", "version")},
)

HEADER = Fields(
    {
        "formats": Table(FORMAT, _MOST_FORMATS),
        "scaling": GridScaling(),
        "layers": Table(LAYER, _MOST_LAYERS),
    },
    {
        "versions": (Table(Text(), _MOST_KEYS), {}),
        "created": (Text(), ""),
        "predecessor": (Nullable(Fields({"path": Text(), "before_step": _STEP})), None),
        "loggers": (Items(LOGGER, 0, _MOST_KEYS), ()),
        "recipes": (Table(RECIPE, _MOST_RECIPES), {}),
        "now": (Nullable(RECIPE), None),
        "optimizers": (Table(Whole(1, LARGEST), _MOST_KEYS), {}),
        "kernel": (Nullable(Text()), None),
        "altgrad": (VERSION, SCHEMA),
    },
)

ERROR = Figure(least=0)
MOVED_ELEMENTS = Figure(0, _MOST_COUNT)

_LINE: dict[str, Kind[Any]] = {
    "step": _STEP,
    "layer": Nullable(Text()),
    "figures": FloatTable(find_kind, _RENAMED_METRICS),
}
_OPTIONAL: dict[str, tuple[Kind[Any], Any]] = {
    "errors": (FloatTable(lambda _: ERROR), FloatsByKey({}, ())),
    "moved_elements": (MOVED_ELEMENTS, math.nan),
}

LAYER_LINE = Fields(_LINE, _OPTIONAL)

COUNT = Real(0, _MOST_COUNT)
_FIRST = Whole(-_OCTAVES, _OCTAVES)

HISTOGRAM = Fields({"first": _FIRST, "counts": Items(COUNT, 1, _MOST_BINS)})

_MODEL: dict[str, Kind[Any]] = {
    "elements": Whole(0, LARGEST),
    "own_seconds": _SECONDS,
    "training_seconds": _SECONDS,
    "skipped": Table(Whole(0, LARGEST), _MOST_KEYS),
}

MODEL_LINE = Fields({**_LINE, **_MODEL, "histograms": Table(HISTOGRAM, _MOST_KEYS)}, _OPTIONAL)

BINS = Fields({"first": _FIRST, "bins": Whole(1, _MOST_BINS)})

_COLUMN_KEYS = Items(Text(), 0, _MOST_COLUMNS)

COLUMNS_LINE = Fields(
    {
        "columns": Checked(
            Fields(
                {
                    "number": Whole(0, LARGEST),
                    "layers": Items(Nullable(Text()), 0, _MOST_ROWS),
                    "figures": _COLUMN_KEYS,
                    "errors": _COLUMN_KEYS,
                    "moved_elements": Flag(),
                    "histograms": Table(BINS, _MOST_KEYS),
                }
            ),
            _check_columns,
        )
    }
)

STEP_LINE = Fields(
    {
        "step": _STEP,
        **_MODEL,
        "columns": Whole(0, LARGEST),
        "crc32": Whole(0, 2**32 - 1),
    }
)

LAYERS_LINE = Fields({"layers": Table(LAYER, _MOST_LAYERS)})

VERDICT = Fields(
    {
        "verdict": Text(),
        "sentence": _SENTENCE,
        "progress_kept": Figure(),
        "interval": Items(Figure(), 2, 2),
        "weight_error": Figure(0),
        "frozen_frac": Figure(0, 1),
        "frozen_layers": Items(Text(), 0, _MOST_LAYERS),
        "frozen_share": Figure(0, 1),
        "layers": Whole(0, _MOST_LAYERS),
        "evidence": _SENTENCE,
        "to_do": _SENTENCE,
        "has_twin": Flag(),
    },
    {
        "behind_share": (Figure(0, 1), math.nan),
        "tested_runs": (Whole(0, LARGEST), 0),
        "lost_runs": (Whole(0, LARGEST), 0),
        "observed_steps": (Whole(0, LARGEST), 0),
        "saved_share": (Figure(), math.nan),
    },
)

VERDICTS_LINE = Fields({"step": _STEP, "verdicts": Table(VERDICT, _MOST_RECIPES + _MOST_FORMATS)})

UNOBSERVED_LINE = Fields(
    {
        "unobserved": Fields(
            {"steps": _STEP, "skipped": Table(Whole(0, LARGEST), _MOST_KEYS)},
            {"every_n_steps": (Nullable(Whole(0, LARGEST)), None)},
        )
    }
)

RESUMED_LINE = Fields({"resumed": Fields({"before_step": _STEP})})
