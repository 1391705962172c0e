"""Another default device of torch changes no figure: every tensor is made on a device by name."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from altgrad import StepRecord, UpdateMonitor, get_format, measure
from tests.monitor.watching import net

ROOT = Path(__file__).parents[1]
# Those of torch/utils/_device.py, _device_constructors, that this project may need.
FACTORIES = {"arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace"}
FACTORIES |= {"logspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor"}
FACTORIES |= {"tensor", "zeros"}
MODULES = sorted((ROOT / "altgrad").rglob("*.py"))


def observe(device: str, **options: Any) -> tuple[list[StepRecord], UpdateMonitor]:
    """Train two steps on the CPU, while tensors without a device are made on another one."""
    model, records, x = net(), [], torch.randn(4, 3, 8, 8, generator=torch.Generator("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = {"formats": ("bf16", "e4m3fn"), "max_elements": 300, "strict": True} | options
    with torch.device(device):
        monitor = UpdateMonitor(model, records.append, **settings)
        with monitor.attach(optimizer):
            for _ in range(2):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
    return records, monitor


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_tensor_is_made_on_a_device_by_name(module: Path) -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr in FACTORIES) == ("torch", True)
    ]
    named = [{keyword.arg for keyword in call.keywords} & {"device", "out"} for call in calls]
    assert all(named), [call.lineno for call, has in zip(calls, named, strict=True) if not has]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"formats": ("nvfp4", "mxfp8_e4m3")},
        {"scaling": "channel"},
        {"scaling": ("block", 32), "max_elements": None},
        {"scaling": None},
    ],
    ids=str,
)
def test_figures_do_not_depend_on_the_default_device(options: dict[str, Any]) -> None:
    expected, _ = observe("cpu", **options)
    records, monitor = observe("meta", **options)
    assert len(records) == len(expected) == 2
    for record, other in zip(records, expected, strict=True):
        for name, figures in record.layers.items():
            assert dict(figures) == pytest.approx(dict(other.layers[name]), rel=0, nan_ok=True)
        assert record.model.histogram("weights") == other.model.histogram("weights")
    with torch.device("meta"):
        state = monitor.state_dict()
        monitor.load_state_dict(state)
    assert all(bits.device.type == "cpu" for _, bits in state["ever_moved"].values())


def test_a_single_step_and_the_values_of_a_format_do_not_depend_on_it() -> None:
    before = torch.linspace(-1, 1, 300)
    after = before + 1e-3
    for scaling in ("tensor", ("block", 32)):
        expected = measure(before, after, formats=("bf16", "e4m3fn"), scaling=scaling)
        with torch.device("meta"):
            found = measure(before, after, formats=("bf16", "e4m3fn"), scaling=scaling)
        assert dict(found) == pytest.approx(dict(expected), rel=0, nan_ok=True)
    with torch.device("meta"):
        assert get_format("e4m3fn").values().device.type == "cpu"
