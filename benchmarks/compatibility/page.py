"""The page: tables of all rows, and what they were run with."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from importlib import metadata

from benchmarks.compatibility import optimizers, parameters, strategies, trainers, unusual
from benchmarks.compatibility.trial import (
    EXACT,
    LEFT_OUT,
    NOT_RUN,
    NOT_SEEN,
    REFUSED,
    WRONG,
    Finding,
    Row,
)

RESULTS = (EXACT, LEFT_OUT, REFUSED, NOT_SEEN, NOT_RUN, WRONG)
DISTRIBUTIONS = (
    *("torch", "lightning", "transformers", "accelerate", "torchao", "torch-optimi"),
    *("bitsandbytes", "schedulefree", "heavyball", "pytorch-optimizer", "peft"),
)
BETWEEN = " · "
HEADER = "| result | ways | notice or reason |\n| --- | --- | --- |\n"

MEANINGS = {
    EXACT: "weights before and after each step, and gradients, equal clones around the real step, "
    "bit for bit; training equals that without AltGrad, bit for bit",
    LEFT_OUT: "a warning names what is not observed; what is observed is exact, and so is training",
    REFUSED: "an error at `attach` says what to do instead; nothing is observed",
    NOT_SEEN: "steps or layers are not observed, and no warning says so; what is observed is exact",
    NOT_RUN: "it fails without AltGrad, too: a library is missing, or it needs another device or "
    "other arguments",
}

INTRODUCTION = """# Compatibility

What AltGrad sees of each way to train. `python -m benchmarks.compatibility --write` in the
repository runs all rows and writes this page; CI runs a part of them.

| result | meaning |
| --- | --- |
{meanings}

Records of an `UpdateMonitor` are also compared with `update_rms` and `unmoved_frac` of these
clones. Figures of sharded parameters are compared with those of one process that replays the whole
tensors. Each way takes a few steps of a small model on a CPU, without twins. Steps that libraries
compile run uncompiled. Optimizers of the Trainer with `layerwise` in their names step inside the
backward pass; they are tested [elsewhere](adapters.md#trainer-of-hugging-face).
[Limits](limits.md#what-it-observes) says more about what is not observed.

Made with Python {python}, {versions}.

Of {total} ways: {counts}.
"""


def list_rows() -> list[Row]:
    rooms = (strategies, trainers, unusual, optimizers, parameters)
    return [row for room in rooms for row in room.list_rows()]


def write_page(found: Iterable[tuple[Row, Finding]]) -> str:
    """Return the page.

    Args:
        found: Each row, and what came out.

    Returns:
        Markdown.
    """
    groups: dict[str, list[tuple[str, Finding]]] = {}
    for row, finding in found:
        groups.setdefault(row.group, []).append((row.name, finding))
    results = [finding.result for rows in groups.values() for _, finding in rows]
    introduction = INTRODUCTION.format(
        meanings="\n".join(f"| {result} | {text} |" for result, text in MEANINGS.items()),
        python=platform.python_version(),
        versions=", ".join(map(describe_version, DISTRIBUTIONS)),
        total=len(results),
        counts=", ".join(f"{results.count(each)} {each}" for each in RESULTS if each in results),
    )
    tables = [f"## {group}\n\n{HEADER}{write_table(rows)}" for group, rows in groups.items()]
    return "\n".join([introduction, *tables])


def describe_version(distribution: str) -> str:
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return f"no {distribution}"


def write_table(rows: list[tuple[str, Finding]]) -> str:
    """Return lines of a table, one for the ways with the same result and note."""
    lines: dict[Finding, list[str]] = {}
    for name, finding in rows:
        lines.setdefault(finding, []).append(name)
    ordered = sorted(lines, key=lambda each: RESULTS.index(each.result))
    return "".join(
        f"| {each.result} | {BETWEEN.join(lines[each])} | {escape(each.note)} |\n"
        for each in ordered
    )


def escape(note: str) -> str:
    """Return a note that fits in a cell."""
    plain = re.sub(r"(?<![\w:/.])(/[\w.+-]+){2,}(:\d+)?", "…", " ".join(note.split()))  # paths
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", plain)


def read_page(text: str) -> dict[tuple[str, str], str]:
    """Return the result of each way on a page, by group and name.

    Args:
        text: Markdown that `write_page` returned.

    Returns:
        The results.
    """
    results = {}
    for table in text.split("\n## ")[1:]:
        group, _, body = table.partition("\n\n")
        for line in body.removeprefix(HEADER).splitlines():
            if line.startswith("| "):
                result, names = line.removeprefix("| ").split(" | ")[:2]
                results |= {(group, name): result for name in names.split(BETWEEN)}
    return results
