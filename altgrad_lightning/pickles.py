"""`convert_attributes`: what a pickled `PrecisionMonitor` of an earlier version has today."""

from __future__ import annotations

from typing import Any

from altgrad_lightning.notices import Notices
from altgrad_lightning.result import Result
from altgrad_lightning.settings import Settings


def convert_attributes(state: dict[str, Any]) -> dict[str, Any]:
    """Convert the attributes that version 0.1.0 pickled; return others as they are.

    0.1.0 had an attribute for each thing, and an argument `compile`, which is gone.
    """
    if "_result" in state:
        return state
    arguments = state["_output_settings"]._asdict() | state["_settings"]
    arguments.pop("compile", None)
    monitor, output = state["_state"], state["_output_state"]
    shown = ("latest", "latest_model", "latest_step", "skipped", "path")
    return {
        "_settings": Settings(
            every_n_steps=state["every_n_steps"], sampling=state["_sampling"], **arguments
        ),
        "_notices": Notices(),
        "_result": Result(
            **{name: state[name] for name in shown},
            assessment=state["_assessment"],
            state={} if monitor is None else {"monitor": monitor, "output": output},
        ),
        "_loaded": state["_resumed_from"] or {},
        "_session": None,
    }
