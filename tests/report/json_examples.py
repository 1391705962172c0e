"""Examples of the JSON of reports; `python -m tests.report.json_examples` writes them anew."""

import json
from pathlib import Path
from typing import Any

from altgrad.report import Comparison, Confirmation, Row, RunReport, Verdict
from altgrad.report.exports import as_json, comparison_as_json, confirmation_as_json
from altgrad.report.plan_table import plan_as_json
from altgrad.report.planning import Option, Plan, Planned
from tests.report.confirming import make_twin_run, share
from tests.report.runs import figures as format_figures, make_run
from tests.report.twin_runs import figures, make_recipe

FOLDER = Path(__file__).parent / "examples"


def make_report(frozen: float = 1.0) -> RunReport:
    """Make the report of a run in float32 that tried e5m2, and whose gain would freeze there."""
    values = {
        "gain": figures("e5m2", progress_kept=1 - frozen, frozen_frac=frozen, still_frac=frozen),
        "head": figures("e5m2"),
        None: figures("e5m2", progress_kept=0.5),
    }
    errors = {f"{each}/e5m2": 0.0 for each in ("progress_kept", "frozen_frac", "still_frac")}
    rows = [
        Row(step, layer, each | format_figures("bf16"), errors, skipped={"inf": 1})
        for step in (0, 10)
        for layer, each in values.items()
    ]
    about = {"recipes": {"e5m2": make_recipe("e5m2")}, "versions": {"altgrad": "0.1.0"}}
    return RunReport.from_run(make_run(rows, ["bf16"], **about))


def make_confirmation() -> Confirmation:
    predicted = {None: share(0.5, 0.25), "gain": share(1.0, 0.0)}
    real = {None: share(0.25, 0.25), "gain": share(0.75, 0.25)}
    runs = make_twin_run(predicted, "bf16-true", letter="a"), make_twin_run(real, letter="b")
    return Confirmation(*runs, "bf16-true")


def make_plan_value() -> dict[str, Any]:
    run = make_report(frozen=0.0).run
    layers = [
        Planned("gain", Option("fp32", 1.0, 12.0), 12.0, 0.5),
        Planned("head", Option("e5m2", 0.75, 9.0, Verdict.WATCH), 12.0, 0.5),
    ]
    plan = Plan(0.9, layers, run.recipes, {}, by_movement=True)
    return plan_as_json(run, plan)


def make_values() -> dict[str, dict[str, Any]]:
    """Return the JSON of each kind."""
    return {
        "report": as_json(make_report()),
        "comparison": comparison_as_json(Comparison((make_report(), make_report(frozen=0.0)))),
        "confirmation": confirmation_as_json(make_confirmation()),
        "plan": make_plan_value(),
    }


if __name__ == "__main__":
    for kind, value in make_values().items():
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        (FOLDER / f"{kind}.json").write_text(text, encoding="utf-8")
