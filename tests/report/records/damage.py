"""A small run file, ways to damage it, and every way to show what is read of it."""

import ast
import copy
import csv
import io
import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st
from rich.console import Console

from altgrad import cli
from altgrad.monitor.header import describe_format
from altgrad.quantization import get_formats
from altgrad.report import (
    Comparison,
    Run,
    RunFileError,
    RunReport,
    list_next_lines,
    page,
    print_comparison,
    print_report,
    read,
)
from altgrad.report.exports import as_csv

FORMATS = ("bf16", "e4m3fn")
KEPT_IN_BF16 = {"a.weight": 1.0, "b.0.weight": 0.25}  # one is stored fine, one is not
PER_FORMAT = {
    "kept_update_ratio": 0.75,
    "stall_frac": 0.5,
    "never_moved_frac": 0.25,
    "underflow_frac": 0.0,
    "saturated_frac": 0.0,
}


def make_lines() -> list[Any]:
    """Return the JSON values of a run that was resumed: 3 steps, 2 layers and formats."""
    shapes = {"shape": [30, 4], "dtype": "float32", "elements": 60, "formats": FORMATS}
    lines: list[Any] = [
        {
            "altgrad": 1,
            "formats": {
                each.name: describe_format(each, ("block", 32)) for each in get_formats(FORMATS)
            },
            "scaling": ["block", 32],
            "layers": {name: shapes | {"every_n_steps": 1} for name in KEPT_IN_BF16},
            "versions": {"altgrad": "0.2.0"},
            "created": "2026-01-02T03:04:05+00:00",
            "loggers": [{"logger": "CSVLogger", "name": "a", "id": None, "version": "3"}],
            "predecessor": {"path": "../earlier/altgrad.jsonl", "before_step": 0},
        }
    ]
    for step in (0, 5, 5):
        if len(lines) > 7:
            lines.append({"resumed": {"before_step": 5}})
        by_key = {f"{key}/{f}": value for f in FORMATS for key, value in PER_FORMAT.items()}
        figures = {"update_weight_ratio": 1e-3, "ulp_zero_frac": 0.125, **by_key}
        errors = {key: 0.001 for key in by_key if "kept" in key or "_frac" in key[:16]}
        for layer, kept in KEPT_IN_BF16.items():
            own = figures | {"kept_update_ratio/bf16": kept}
            lines.append({"step": step, "layer": layer, "figures": own, "errors": errors})
        octaves = {"first": -3, "counts": [1.0, 2.5, 7.0]}
        model = {
            "elements": 120,
            "own_seconds": 0.01,
            "training_seconds": None if step == 0 else 0.25,
            "skipped": {"inf": 1},
            "histograms": {"steps/bf16": octaves, "steps/e4m3fn": octaves, "weights": octaves},
        }
        lines.append({"step": step, "layer": None, "figures": figures, **model})
        if step == 0:
            lines.append(
                {"step": step, "verdicts": {"now": make_verdict(), "bf16": make_verdict()}}
            )
    made: list[Any] = json.loads(json.dumps(lines))  # no value is shared between lines
    return made


def make_verdict() -> dict[str, Any]:
    """Return a verdict on a run, as a run file has it."""
    return {
        "verdict": "FROZEN",
        "sentence": "now: frozen now.",
        "progress_kept": 0.01,
        "interval": [None, 0.1],
        "weight_error": 0.5,
        "frozen_frac": 1.0,
        "frozen_layers": ["a.weight"],
        "frozen_share": 0.5,
        "layers": 2,
        "evidence": "8 of 9 such runs lost over 10 %",
        "behind_share": 0.25,
        "tested_runs": 9,
        "lost_runs": 8,
        "to_do": "Use bf16-sr.",
        "has_twin": True,
    }


def as_bytes(lines: list[Any]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


# --- what is shown


def show(run: Run) -> None:
    """Show a run in every way but the page, and check what can be checked of any run."""
    report = RunReport.from_run(run)
    for width in (40, 200):
        for print_it in (
            lambda console: print_report(report, console),
            lambda console: print_comparison(Comparison((report, report)), console),
        ):
            file = io.StringIO()
            print_it(Console(file=file, width=width))
            assert all(line.isprintable() for line in file.getvalue().split("\n"))
    assert len([*csv.reader(io.StringIO(as_csv(report)))]) == 1 + len(report.assessment.advice)
    check_code(report.to_apply)
    for line in list_next_lines(report):
        check_code(line.code, NEXT)


def show_page(run: Run) -> None:
    assert page(RunReport.from_run(run)).encode().endswith(b"</html>")


APPLY = ("SamplingRule", "WeightStorage", "storage", "optimizer", "model")
NEXT = {
    *("AdamW", "_AdamW", "AdamW8bit", "AdamWFp8", "SGD", "Optimizer", "optimizer", "arguments"),
    *("Recipe", "SamplingRule", "StoreAs", "Trainer", "recipe", "store_as", "trainer", "model"),
    *("MixedPrecisionPolicy", "fully_shard", "policy", "torch"),
    *("any", "each", "fnmatchcase", "kept", "is_kept", "name", "weight"),
}
"""The names that the lines to train with next may have."""


def check_code(source: str, names: Collection[str] = APPLY) -> None:
    """Check that code uses nothing but these names, and calls only them and their attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            assert node.id in names, node.id
        elif isinstance(node, ast.Call):
            assert isinstance(node.func, (ast.Name, ast.Attribute))


def read_or_sentence(path: Path) -> Run | str:
    """Return the run, or the message of the error, which must be one printable sentence."""
    try:
        return read(path)
    except RunFileError as error:
        message = str(error)
        assert message.startswith(f"{path}: ")
        assert message.isprintable()
        assert len(message) < 1000
        return message


def run_command(*arguments: object) -> tuple[int, str, str]:
    """Run `altgrad` in this process, and return its exit code, stdout and stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    argv = ["altgrad", *map(str, arguments)]
    code: Any = 0
    with mock.patch.multiple(sys, argv=argv, stdout=out, stderr=err):
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
    written = (stream.detach().getvalue().decode() for stream in (out, err))
    return (code, *written)


# --- mutations

HOSTILE = (
    *("", "\0", "\n", "\x1b[31m", "[bold]", "[/x]", "\ud800", "\u202e", "*", "a*[b]?", '"', "'"),
    *("</script>", "{{ 7 * 7 }}", '"), __import__("os").system("id"), ("', "=cmd|' /C calc'!A0"),
    *("%s", "{0}", "..", "/", "/dev/zero", "x" * 3000, "inf", "-inf", "NaN", "$x$", "名前"),
)
HUGE = (10**400, -(10**400), 2**63, 2**63 - 1, 10**6, -(10**6), 10**5, -1, 0, 1)
FLOATS = (0.0, -0.0, 1.0, 0.5, -0.5, 1.5, 5e-324, 1e308, -1e308, 1e300, 1e30)

names = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8))
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(HUGE),
    st.integers(),
    st.sampled_from(FLOATS),
    st.floats(),  # with NaN and inf, which Python writes as words that JSON lacks
    names,
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(names, inner, max_size=5)),
    max_leaves=8,
)


shares = st.one_of(st.none(), st.sampled_from([0.0, 5e-324, 0.5, 0.99, 1.0]), st.floats(0, 1))
figures = st.one_of(
    st.sampled_from([None, "inf", "-inf", *FLOATS]),
    st.floats(allow_nan=False, allow_infinity=False),
)
counts = st.lists(
    st.one_of(st.sampled_from([0.0, 1e30, 5e-324]), st.floats(0, 1e30)), min_size=1, max_size=128
)


@st.composite
def extreme_lines(draw: st.DrawFn) -> list[Any]:
    """Draw a file that is valid, with any names and with values up to their bounds."""
    lines = make_lines()
    *new_formats, a, b = draw(st.lists(names, min_size=4, max_size=4, unique=True))
    formats, layers = dict(zip(FORMATS, new_formats, strict=True)), {"a.weight": a, "b.0.weight": b}
    steps = sorted(draw(st.sets(st.integers(0, 2**63 - 1), min_size=2, max_size=2)))
    step_by_step = dict(zip((0, 5), steps, strict=True))
    header = lines[0]
    header["formats"] = {formats[name]: each for name, each in header["formats"].items()}
    header["layers"] = {
        layers[name]: each | {"formats": new_formats} for name, each in header["layers"].items()
    }
    for each in header["formats"].values():
        low, high = sorted(draw(st.tuples(*[st.floats(5e-324, 1.79e308)] * 2)))
        each |= {"smallest": low, "smallest_normal": high, "max": high, "eps": low}
    for line in lines[1:]:
        if "resumed" in line:
            line["resumed"]["before_step"] = steps[1]
            continue
        line["step"] = step_by_step[line["step"]]
        if "verdicts" in line:
            line["verdicts"] = {draw(names): each for each in line["verdicts"].values()}
            continue
        line["layer"] = layers.get(line["layer"])
        for kind in ("figures", "errors"):
            line[kind] = {
                _rename(key, formats): draw(_find_values(key, kind)) for key in line.get(kind, ())
            }
        if "histograms" in line:
            line["histograms"] = {
                _rename(key, formats): {"first": draw(st.integers(-2200, 2200)), "counts": found}
                for key in line["histograms"]
                for found in [draw(counts)]
            }
            line["own_seconds"] = line["training_seconds"] = draw(st.floats(-1e12, 1e12))
    return lines


def _rename(key: str, formats: dict[str, str]) -> str:
    metric, slash, format = key.partition("/")
    return f"{metric}{slash}{formats.get(format, format)}"


def _find_values(key: str, kind: str) -> st.SearchStrategy[Any]:
    if kind == "errors":
        return st.one_of(st.sampled_from([None, "inf", 0.0, 1e300]), st.floats(0, 1))
    return shares if key.partition("/")[0].endswith("_frac") else figures


def list_places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a value: of all fields, keys and items."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, each in value.items() if isinstance(value, dict) else ():
        yield (*place, key)
        yield from list_places(each, (*place, key))


PLACES = sorted(list_places(make_lines()), key=repr)


def replace_value(container: Any, key: Any, value: Any, _: str) -> None:
    container[key] = value


def remove_value(container: Any, key: Any, _: Any, __: str) -> None:
    del container[key]


def add_value(container: Any, key: Any, value: Any, name: str) -> None:
    if isinstance(container, dict):
        container[name] = value
    else:
        container.insert(key, value)


def rename_key(container: Any, key: Any, _: Any, name: str) -> None:
    """Rename a key, or repeat an item of a list."""
    if isinstance(container, dict):
        container[name] = container.pop(key)
    else:
        container.insert(key, copy.deepcopy(container[key]))


def multiply_items(container: Any, key: Any, value: Any, _: str) -> None:
    """Put thousands of values in place of one."""
    container[key] = (
        {f"{k}": value for k in range(2000)} if isinstance(container[key], dict) else [value] * 2000
    )


MUTATIONS: tuple[Callable[[Any, Any, Any, str], None], ...] = (
    *(replace_value, remove_value, add_value, rename_key, multiply_items),
)


def mutate(lines: list[Any], place: tuple[Any, ...], change: Any, value: Any, name: str) -> None:
    """Change one value; a place that an earlier change removed is left alone."""
    container: Any = lines
    try:
        for key in place[:-1]:
            container = container[key]
        if isinstance(container, (dict, list)):
            change(container, place[-1], copy.deepcopy(value), name)
    except (KeyError, IndexError, TypeError):
        return
