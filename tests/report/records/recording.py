"""Record a small model, write run files with the records, and read the lines of a file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from altgrad import StepRecord, UpdateMonitor
from altgrad.quantization import get_formats
from altgrad.report import FormatInfo, Header, LayerInfo, RunFile

FORMATS = ("bf16", "e4m3fn")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 50), nn.LayerNorm(50), nn.Linear(50, 3))


def make_records(
    named: Any = None, steps: int = 3, formats: Any = FORMATS, **options: Any
) -> list[StepRecord]:
    return record_run(named, steps, **{"formats": formats, "recipes": ()} | options)[1]


def record_run(
    named: Any = None, steps: int = 3, optimizer: Any = torch.optim.SGD, **options: Any
) -> tuple[Header, list[StepRecord]]:
    parameters = dict(net().named_parameters() if named is None else named)
    records: list[StepRecord] = []
    optimizer = optimizer(parameters.values(), lr=0.01)
    monitor = UpdateMonitor([*parameters.items()], records.append, **options)
    with monitor.attach(optimizer):
        for seed in range(steps):
            generator = torch.Generator().manual_seed(seed)
            for each in parameters.values():
                each.grad = torch.randn(each.shape, generator=generator)
            optimizer.step()
    return Header.from_json(monitor.run_header()), records


def header_from(record: StepRecord, formats: Any = FORMATS) -> Header:
    return Header(
        {each.name: FormatInfo.from_format(each, "tensor") for each in get_formats(formats)},
        {
            name: LayerInfo((figures.population,), "float32", figures.elements, figures.formats)
            for name, figures in record.layers.items()
        },
        versions={"torch": "2.0"},
    )


def written(
    folder: Path, header: Header, records: list[StepRecord], steps: Any = None, **options: Any
) -> Path:
    with RunFile.create(folder, header, **options) as file:
        for step, record in zip(steps or range(len(records)), records, strict=False):
            file.append(step, record, skipped={"inf": step})
    return file.path


def assert_same(actual: float, expected: float) -> None:
    assert actual == pytest.approx(expected, rel=1e-7, abs=0, nan_ok=True)


def read_strict_lines(path: Path) -> list[Any]:
    """Read the text of each line of a file as standard JSON, without NaN and Infinity."""

    def fail(constant: str) -> None:
        raise AssertionError(constant)

    content = path.read_bytes()
    assert content.endswith(b"\n")
    texts = [line.partition(b"\0")[0].decode("utf-8") for line in content[:-1].split(b"\n")]
    return [json.loads(text, parse_constant=fail) for text in texts]
