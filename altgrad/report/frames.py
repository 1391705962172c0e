"""`make_frame`: columns as a DataFrame, if pandas is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any


def make_frame(columns: Mapping[str, Sequence[Any]], method: str) -> Any:
    """Return a DataFrame of pandas, which is imported at the first call.

    Args:
        columns: The values of each column, by name.
        method: Name of the calling method, for the error.

    Raises:
        ImportError: pandas is missing.
    """
    try:
        pandas = import_module("pandas")
    except ImportError as error:
        raise ImportError(f"{method}(): expected pandas; run pip install pandas") from error
    return pandas.DataFrame(dict(columns))
