"""The verdicts on a run are a line of the run file: written, read, torn, replaced and missing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from altgrad.report import RunAdvice, RunFile, RunFileError, Verdict, read
from altgrad.report.judging.calibration import Outcome
from altgrad.report.records.verdict_lines import runs_as_json
from tests.report.records.recording import read_strict_lines, written

KEYS = [
    *("verdict", "sentence", "progress_kept", "interval", "weight_error", "frozen_frac"),
    *("frozen_layers", "frozen_share", "layers", "evidence", "to_do"),
    *("has_twin", "behind_share", "tested_runs", "lost_runs", "observed_steps", "saved_share"),
]


def make_runs(kept: float = 0.25, name: str = "now", **fields: Any) -> dict[str, RunAdvice]:
    about = {
        "verdict": Verdict.FROZEN,
        "interval": (0.125, math.nan),
        "weight_error": math.inf,
        "frozen_frac": 1.0,
        "frozen": ("a.<b>", "名前"),
        "frozen_share": math.nan,
        "behind_share": 0.5,
        "layers": 2,
        "outcome": Outcome(66, 8),
        "to_do": "Keep those in float32.",
        "has_twin": True,
    } | fields
    return {name: RunAdvice(recipe=name, kept=kept, **about)}


def add(path: Path, step: int, runs: dict[str, RunAdvice], before: int, header: Any) -> None:
    with RunFile.resume(path, before, header) as file:
        file.add_verdicts(step, runs)


def read_kept(path: Path) -> dict[str, float]:
    return {name: each["progress_kept"] for name, each in read(path).verdicts.items()}


def test_the_keys_are_stable_and_numbers_without_a_value_are_null() -> None:
    (found,) = runs_as_json(make_runs(math.nan)).values()
    assert [*found] == KEYS
    assert found["verdict"] == "FROZEN"
    assert (found["progress_kept"], found["interval"]) == (None, [0.125, None])
    assert (found["weight_error"], found["frozen_share"]) == ("inf", None)
    assert (found["tested_runs"], found["lost_runs"]) == (66, 8)
    (untested,) = runs_as_json(make_runs(outcome=None)).values()
    assert (untested["tested_runs"], untested["evidence"]) == (0, "no such run was tested")
    assert found["frozen_layers"] == ["a.<b>", "名前"]
    json.dumps(found, allow_nan=False)


def test_the_last_verdicts_of_a_file_are_read(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)  # steps 0, 1, 2
    assert read(path).verdicts == {}
    add(path, 1, make_runs(0.5), 3, header)
    add(path, 2, make_runs(0.25) | make_runs(0.75, "bf16"), 3, header)
    assert read_kept(path) == {"now": 0.25, "bf16": 0.75}
    found = read(path).verdicts["now"]
    assert [*found] == KEYS
    assert found["frozen_layers"] == ("a.<b>", "名前")
    assert math.isnan(found["frozen_share"])
    read_strict_lines(path)


def test_a_resumed_run_drops_the_verdicts_of_replaced_steps(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    add(path, 0, make_runs(0.5), 3, header)
    add(path, 2, make_runs(0.25), 3, header)
    with RunFile.resume(path, 2, header):
        pass
    assert read_kept(path) == {"now": 0.5}
    with RunFile.resume(path, 0, header):
        pass
    assert read_kept(path) == {}
    assert len(read(path).notes) == 2  # on superseded figures alone


def test_a_run_that_goes_on_elsewhere_has_the_verdicts_of_steps_before(
    tmp_path, records, header
) -> None:
    first = written(tmp_path / "one", header, records)
    add(first, 1, make_runs(0.5), 3, header)
    add(first, 2, make_runs(0.25), 3, header)
    second = written(tmp_path / "two", header, records, [2], predecessor=(first, 2))
    assert read_kept(second) == {"now": 0.5}
    add(second, 2, make_runs(0.125), 3, header)
    assert read_kept(second) == {"now": 0.125}


@pytest.mark.parametrize("left", [1, 30, 200])
def test_a_torn_line_of_verdicts_is_skipped(tmp_path, records, header, left: int) -> None:
    path = written(tmp_path, header, records)
    add(path, 1, make_runs(0.5), 3, header)
    add(path, 2, make_runs(0.25), 3, header)
    content = path.read_bytes()
    path.write_bytes(content[: content[:-1].rfind(b"\n") + 1 + left])
    assert read_kept(path) == {"now": 0.5}
    assert "incomplete and was skipped" in read(path).notes[-1]
    assert read(path).steps == (0, 1, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [("verdict", 3), ("interval", [1]), ("frozen_share", 1.5), ("layers", -1), ("has_twin", None)],
)
def test_an_invalid_verdict_is_damage(tmp_path, records, header, key: str, value: Any) -> None:
    path = written(tmp_path, header, records)
    line = {"step": 2, "verdicts": runs_as_json(make_runs())}
    line["verdicts"]["now"][key] = value
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(
        RunFileError, match=rf"line \d+ is invalid \(\['verdicts'\]\['now'\].*{key}"
    ):
        read(path)


def test_a_verdict_of_a_newer_version_is_read(tmp_path, records, header) -> None:
    path = written(tmp_path, header, records)
    line = {"step": 2, "verdicts": runs_as_json(make_runs())}
    line["verdicts"]["now"] |= {"verdict": "MELTS", "temperature": 3}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert read(path).verdicts["now"]["verdict"] == "MELTS"
    assert [*read(path).verdicts["now"]] == KEYS


def test_names_as_long_as_a_header_allows_are_read_back(tmp_path, records, header) -> None:
    long = "x" * 10_000
    path = written(tmp_path, header, records)
    add(path, 2, make_runs(name=long, frozen=(long,) * 4, to_do=long), 3, header)
    assert [*read(path).verdicts] == [long]


def test_the_step_must_be_a_whole_number(tmp_path, records, header) -> None:
    with RunFile.create(tmp_path, header) as file:
        with pytest.raises(TypeError, match=r"step=1\.5: expected a whole number"):
            file.add_verdicts(1.5, make_runs())
        assert read(file.path).verdicts == {}
