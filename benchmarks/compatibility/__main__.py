"""Run all ways to train, and print the compatibility page or write it to docs/."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch

from benchmarks.compatibility.page import list_rows, write_page

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name}")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = []
    for row in list_rows():
        start = time.perf_counter()
        found.append((row, row.attempt()))
        seconds = time.perf_counter() - start
        print(f"{seconds:5.1f} s  {row.group}: {row.name}: {found[-1][1].result}", file=sys.stderr)
    text = write_page(found)
    if arguments.write:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
