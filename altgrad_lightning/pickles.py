"""Pickle callbacks, and unpickle callbacks of version 0.1.0.

A module may hold a callback as a hyperparameter. Its checkpoints then hold a pickle of the callback
for years.

- `find_own_attributes` leaves the module out of a pickle.
- `convert_attributes` reads the pickle of a `PrecisionMonitor` of version 0.1.0.

Read `callback` and `settings` first, which define today's attributes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from altgrad_lightning.notices import Notices
from altgrad_lightning.result import Result
from altgrad_lightning.settings import Settings


def find_own_attributes(callback: object) -> dict[str, Any]:
    """Find the attributes of a callback that a pickle is to hold.

    Left out are methods of the module, which would bring the whole module into the pickle.
    Lightning sets `log` and `log_dict` of the module as attributes of callbacks:
    lightning/pytorch/trainer/connectors/callback_connector.py.

    Returns:
        The values by name of the attribute.
    """
    return {
        name: value
        for name, value in vars(callback).items()
        if not isinstance(getattr(value, "__self__", None), nn.Module)
    }


def convert_attributes(state: dict[str, Any]) -> dict[str, Any]:
    """Convert the pickled attributes of version 0.1.0 to today's attributes.

    Version 0.1.0 kept each argument and each result in its own attribute, and had an argument
    `compile`, which is dropped.

    Args:
        state: The ``__dict__`` of a pickled `PrecisionMonitor`.

    Returns:
        Today's attributes; `state` itself if it has today's attributes.
    """
    if "_result" in state:
        return state
    arguments = state["_output_settings"]._asdict() | state["_settings"]
    arguments.pop("compile", None)
    monitor, output = state["_state"], state["_output_state"]
    findings = ("latest", "latest_model", "latest_step", "skipped", "path")
    return {
        "_settings": Settings(
            every_n_steps=state["every_n_steps"], sampling=state["_sampling"], **arguments
        ),
        "_notices": Notices(),
        "_result": Result(
            **{name: state[name] for name in findings},
            assessment=state["_assessment"],
            state={} if monitor is None else {"monitor": monitor, "output": output},
        ),
        "_loaded": state["_resumed_from"] or {},
        "_session": None,
        "_metrics": None,
    }
