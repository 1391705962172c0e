"""Decode packed lines by the standard library alone, as docs/run-file.md describes them."""

import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLAIN = {0: 0.0, 1: 1.0, 2: math.nan, 4: None}  # None: the layer has no such figure


def list_texts(path: Path) -> list[Any]:
    """Return the JSON value of each line but the first."""
    lines = path.read_bytes().split(b"\n")[1:-1]
    return [json.loads(line.partition(b"\0")[0]) for line in lines]


def list_figures(path: Path) -> Iterator[tuple[int, dict[str | None, dict[str, float]]]]:
    """Yield the number of each observed step, and its figures by layer."""
    declared: dict[int, Any] = {}
    for line in path.read_bytes().split(b"\n")[1:-1]:
        text, mark, packed = line.partition(b"\0")
        value = json.loads(text)
        if not mark:
            if "columns" in value:
                declared[value["columns"]["number"]] = value["columns"]
            continue
        names = declared[value["columns"]]
        numbers, layers = decode_numbers(packed, names), names["layers"]
        yield (
            value["step"],
            {
                layer: {
                    key: number
                    for column, key in enumerate(names["figures"])
                    if (number := numbers[column * len(layers) + row]) is not None
                }
                for row, layer in enumerate(layers)
            },
        )


def decode_numbers(packed: bytes, names: Any) -> list[Any]:
    """Return all numbers of a step, None where a layer has none."""
    content = zlib.decompress(packed.replace(b"\x1b\x02", b"\n").replace(b"\x1b\x01", b"\x1b"))
    width = len(names["figures"]) + len(names["errors"]) + names["moved_elements"]
    bins = sum(each["bins"] for each in names["histograms"].values())
    places = width * len(names["layers"]) + bins
    codes, planes = content[:places], content[places:]
    count = codes.count(3)
    others = (struct.unpack(">d", planes[k::count] + bytes(3))[0] for k in range(count))
    return [next(others) if code == 3 else PLAIN[code] for code in codes]
