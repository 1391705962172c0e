"""What a training came to is said at its end, and in the progress bar."""

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from altgrad.output import show_summary, write_state, write_summary
from altgrad.report import Verdict
from tests.report.twin_runs import make_run_advice

FINE = make_run_advice("bf16-sr", Verdict.STORES_FINE, 1.0, to_do="Nothing is lost that matters.")
WATCH = make_run_advice("bf16", Verdict.WATCH, 0.9375)


def test_the_summary_is_the_answer_what_to_do_and_the_command() -> None:
    runs = {"bf16-sr": FINE, "bf16": WATCH}
    assert write_summary(runs, Path("runs", "1", "altgrad.jsonl")).splitlines() == [
        "[AltGrad] Fine: bf16-sr. Watch: bf16.",
        "bf16: Use bf16-sr, which keeps 1.",
        "altgrad report runs/1/altgrad.jsonl",
    ]
    assert write_summary({}, None, has_observed=False) == (
        "[AltGrad] No step was observed, so there are no verdicts."
    )


@pytest.mark.parametrize("has_rich", [True, False])
def test_a_long_path_is_printed_literally_in_one_line(
    has_rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = builtins.__import__

    def refuse(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return load(name, *arguments, **more)

    if not has_rich:
        monkeypatch.setattr(builtins, "__import__", refuse)
    text = f"[AltGrad] Fine.\naltgrad report {'folder/' * 40}[red]x"
    show_summary(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_the_state_is_the_share_kept_by_the_run_itself_or_by_the_first_recipes() -> None:
    kept = {"bf16": 0.9796, "bf16-sr": 1.0, "none": float("nan"), "e5m2": 0.25, "more": 0.5}

    def make_figures(*recipes: str) -> Any:
        twins = {f"progress_kept/{name}": kept[name] for name in recipes}
        return SimpleNamespace(recipes=recipes, twins=twins)

    assert write_state(make_figures(*kept)) == "bf16 0.97, bf16-sr 1.00, e5m2 0.25"
    kept["now"] = 0.125
    assert write_state(make_figures("now", "bf16")) == "now 0.12"
    assert write_state(make_figures()) == ""
