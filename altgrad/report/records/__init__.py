"""The run file: every figure of every observed step, a line of JSON each; written and read.

docs/run-file.md describes it. Nothing in here needs more than plain numbers.
"""

from altgrad.report.records.reading import read
from altgrad.report.records.run import Row, Run
from altgrad.report.records.schema import (
    SCHEMA,
    FormatInfo,
    Header,
    LayerInfo,
    Predecessor,
    RunFileError,
)
from altgrad.report.records.watching import header_of
from altgrad.report.records.writing import RunFile

__all__ = [
    "SCHEMA",
    "FormatInfo",
    "Header",
    "LayerInfo",
    "Predecessor",
    "Row",
    "Run",
    "RunFile",
    "RunFileError",
    "header_of",
    "read",
]
