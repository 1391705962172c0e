"""An observed step computes each figure once, for verdicts, run file and loggers together."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

from altgrad import UpdateMonitor
from altgrad.measurement import step_table, twin_table
from altgrad.measurement.metrics import FORMULAS
from altgrad.output import Output, OutputSettings, WriterLogger
from tests.report.twin_runs import draw_gradients, make_layers


def count(calls: Counter[str], name: str, real: Any) -> Any:
    def call(*arguments: Any) -> Any:
        calls[name] += 1
        return real(*arguments)

    return call


@pytest.mark.parametrize("recipes", [(), ("bf16", "e4m3fn-sr")])
def test_a_step_computes_each_figure_once_and_is_one_event_in_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipes: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    net = make_layers(**{f"layer{k}": torch.randn(40, 50) for k in range(5)})
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    monitor = UpdateMonitor(
        net, formats=["bf16", "e4m3fn"], recipes=recipes, max_elements=500, strict=True
    )
    calls: Counter[str] = Counter()
    counted = {name: count(calls, name, formula) for name, formula in FORMULAS.items()}
    monkeypatch.setattr(step_table, "FORMULAS", counted)
    for module in (step_table, twin_table):
        real = count(calls, f"errors in {module.__name__}", module.standard_errors)
        monkeypatch.setattr(module, "standard_errors", real)
    monkeypatch.setattr(FileWriter, "add_summary", count(calls, "event", FileWriter.add_summary))
    with monitor.attach(optimizer), SummaryWriter(tmp_path) as writer:
        settings = OutputSettings(strict=True)
        loggers = [WriterLogger(writer)]
        output = Output(loggers, tmp_path, monitor.run_header, settings, None, 0, print)
        for step in range(3):
            calls.clear()  # the first step has pictures
            draw_gradients(net, step)
            optimizer.step()
            output.write(step, monitor.latest, {})
    runs = 1 + len({"bf16", "e4m3fn", *recipes})
    tables = 2 if recipes else 1
    errors = {key: value for key, value in calls.items() if key.startswith("errors")}
    assert errors == {f"errors in {each.__name__}": 1 for each in (step_table, twin_table)[:tables]}
    assert calls["event"] == runs
    assert {name: calls[name] for name in FORMULAS} == dict.fromkeys(FORMULAS, 1)
