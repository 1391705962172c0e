"""Figures are shown as tables of HTML in a notebook, and in a line elsewhere."""

import xml.etree.ElementTree as ET

import torch

from altgrad import StepRecord, UpdateMonitor
from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.measurement.notebook import write_table


def record_step() -> StepRecord:
    net = torch.nn.Linear(8, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = UpdateMonitor(net, formats=["bf16", "e5m2"], recipes=["bf16"], strict=True)
    with monitor.attach(optimizer):
        net(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert monitor.latest is not None
    return monitor.latest


def read_table(html: str) -> list[list[str]]:
    """Return the texts of a table's cells, line by line."""
    return [[cell.text or "" for cell in row] for row in ET.fromstring(html).iter("tr")]


def test_each_metric_has_a_line_and_each_format_a_column() -> None:
    table = read_table(write_table({"a/x": 0.25, "b/x": float("nan"), "a/y": 1e-7}))
    assert table == [["metric", "x", "y"], ["a", "0.25", "1e-07"], ["b", "nan", ""]]
    assert write_table({}) == ""


def test_names_are_escaped() -> None:
    html = write_table({"a/<script>": 1.0})
    assert "<script>" not in html
    assert read_table(html)[0] == ["metric", "<script>"]


def test_a_step_and_its_figures_are_shown_in_a_line_and_in_tables() -> None:
    record = record_step()
    assert repr(record) == "StepRecord(index=0, 2 layers)"
    assert repr(record.model) == "Figures(36 of 36 elements; formats: bf16, e5m2; recipes: bf16)"
    html = record.model._repr_html_()  # the protocol of notebooks
    own, formats, twins = map(read_table, (f"<table>{each}" for each in html.split("<table>")[1:]))
    assert [row[0] for row in own[1:]] == [*LAYER_METRICS]
    assert formats[0] == ["metric", "bf16", "e5m2"]
    assert [row[0] for row in formats[1:]] == [*FORMAT_METRICS]
    assert twins[0] == ["metric", "bf16"]
    assert "progress_kept" in [row[0] for row in twins]
    assert html in record._repr_html_()  # the protocol of notebooks
