"""What importing costs, and that imports point one way (design: the house)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each module and what it may import of the project; a new module needs a line here.
Q = "altgrad.quantization"
OBS = "altgrad.observation"
SAMPLING = "altgrad.sampling"
FORMATS = {f"{Q}.float_format", f"{Q}.formats"}
ALLOWED = {
    f"{Q}.float_format": set(),
    f"{Q}.formats": {f"{Q}.float_format"},
    f"{Q}.kernel": {f"{Q}.float_format"},
    f"{Q}.arguments": set(),
    f"{Q}.ops": FORMATS | {f"{Q}.arguments", f"{Q}.kernel"},
    f"{Q}.scaling": FORMATS | {f"{Q}.arguments", f"{Q}.kernel"},
    f"{Q}.block_formats": FORMATS | {f"{Q}.ops", f"{Q}.scaling"},
    f"{Q}.grids": {f"{Q}.float_format", f"{Q}.kernel"},
    f"{Q}.diagnostics": FORMATS | {f"{Q}.arguments", f"{Q}.ops"},
    f"{Q}.advanced_diagnostics": FORMATS | {f"{Q}.arguments", f"{Q}.kernel", f"{Q}.ops"},
    Q: FORMATS
    | {f"{Q}.arguments", f"{Q}.block_formats"}
    | {f"{Q}.kernel", f"{Q}.ops", f"{Q}.scaling", f"{Q}.diagnostics", f"{Q}.advanced_diagnostics"},
    "altgrad.statistics": set(),
    "altgrad.metrics": {"altgrad.statistics"},
    "altgrad.step_table": {"altgrad.metrics", "altgrad.statistics"},
    "altgrad.figures": {"altgrad.metrics", "altgrad.statistics", "altgrad.step_table"},
    "altgrad.step_record": {"altgrad.figures"},
    "altgrad.merging": {"altgrad.figures", "altgrad.statistics", "altgrad.step_record"}
    | {"altgrad.step_table"},
    "altgrad.workspace": set(),
    "altgrad.row_kernel": {f"{Q}.grids", "altgrad.statistics", "altgrad.workspace"},
    "altgrad.totals": {"altgrad.row_kernel", "altgrad.statistics"},
    "altgrad.scales": {f"{Q}.block_formats", f"{Q}.scaling"},
    "altgrad.chunks": {"altgrad.row_kernel"},
    "altgrad.clock": set(),
    "altgrad.budgets": {SAMPLING},
    "altgrad.ever_moved": {"altgrad.row_kernel"},
    "altgrad.scale_state": {f"{Q}.block_formats", f"{Q}.scaling"}
    | {"altgrad.step_record", "altgrad.scales"},
    "altgrad.measuring": {f"{Q}.arguments", f"{Q}.block_formats", f"{Q}.grids", f"{Q}.scaling"}
    | {"altgrad.chunks", "altgrad.figures", "altgrad.metrics", "altgrad.row_kernel"}
    | {"altgrad.scales", "altgrad.statistics", "altgrad.totals", "altgrad.workspace"},
    "altgrad.shards": {f"{OBS}.local"},
    "altgrad.host_group": set(),
    "altgrad.step_message": {"altgrad.statistics"},
    "altgrad.distributed": {f"{OBS}.faults", "altgrad.host_group", "altgrad.statistics"}
    | {"altgrad.step_message"},
    "altgrad.copies": {f"{OBS}.local", "altgrad.distributed", "altgrad.shards"},
    "altgrad.sharded_layers": {
        "altgrad.copies",
        f"{Q}.block_formats",
        f"{Q}.scaling",
        f"{OBS}.local",
        "altgrad.distributed",
    }
    | {"altgrad.ever_moved", "altgrad.scales", "altgrad.shards"},
    "altgrad.arena": {f"{Q}.arguments", f"{OBS}.local", f"{OBS}.snapshots"}
    | {"altgrad.chunks", "altgrad.ever_moved", "altgrad.measuring", "altgrad.row_kernel"}
    | {"altgrad.scale_state", "altgrad.scales"},
    "altgrad.layer_settings": {f"{Q}.arguments", f"{Q}.block_formats", f"{OBS}.snapshots"}
    | {SAMPLING, "altgrad.measuring"},
    "altgrad.step_measuring": {f"{Q}.arguments", OBS, f"{OBS}.snapshots"}
    | {"altgrad.arena", "altgrad.chunks", "altgrad.ever_moved", "altgrad.layer_settings"}
    | {"altgrad.measuring", "altgrad.merging", "altgrad.scale_state"}
    | {"altgrad.sharded_layers", "altgrad.shards"},
    "altgrad.agreement": {OBS, f"{OBS}.faults", "altgrad.distributed", "altgrad.layer_settings"}
    | {"altgrad.measuring", "altgrad.scales", "altgrad.sharded_layers", "altgrad.wording"},
    "altgrad.monitor": {f"{Q}.arguments", f"{Q}.block_formats", f"{Q}.scaling", OBS, SAMPLING}
    | {"altgrad.storage"}
    | {f"{OBS}.{part}" for part in ("local", "observer", "snapshots")}
    | {"altgrad.agreement", "altgrad.host_group", "altgrad.step_message"}
    | {"altgrad.budgets", "altgrad.clock", "altgrad.ever_moved", "altgrad.layer_settings"}
    | {"altgrad.measuring", "altgrad.step_measuring", "altgrad.step_record"}
    | {"altgrad.scale_state", "altgrad.sharded_layers"}
    | {"altgrad.figures", "altgrad.weight_octaves", "altgrad.wording"},
    f"{SAMPLING}.arguments": set(),
    f"{SAMPLING}.layers": {f"{SAMPLING}.arguments"},
    f"{SAMPLING}.dry_run": {f"{SAMPLING}.layers"},
    f"{SAMPLING}.steps": {f"{SAMPLING}.arguments"},
    f"{SAMPLING}.elements": {f"{SAMPLING}.arguments"},
    SAMPLING: {f"{SAMPLING}.{part}" for part in ("dry_run", "elements", "layers", "steps")},
    f"{OBS}.parameter_names": set(),
    f"{OBS}.local": set(),
    f"{OBS}.faults": set(),
    f"{OBS}.fully_shard": set(),
    f"{OBS}.snapshots": {f"{OBS}.local"},
    f"{OBS}.step_hooks": set(),
    f"{OBS}.optimizers": {f"{OBS}.step_hooks", "altgrad.wording"},
    f"{OBS}.skips": {f"{OBS}.optimizers", f"{OBS}.step_hooks"},
    f"{OBS}.optimizer_step": {f"{OBS}.snapshots"},
    f"{OBS}.observer": {f"{OBS}.parameter_names", f"{OBS}.snapshots", f"{OBS}.step_hooks"}
    | {
        f"{OBS}.faults",
        f"{OBS}.fully_shard",
        f"{OBS}.local",
        f"{OBS}.optimizers",
        f"{OBS}.skips",
        f"{OBS}.optimizer_step",
    },
    OBS: {f"{OBS}.observer", f"{OBS}.optimizer_step"},
    "altgrad.report.names": set(),
    "altgrad.report.canvas": {"altgrad.report.names"},
    "altgrad.report.drawings": {"altgrad.figures", "altgrad.records"}
    | {f"altgrad.report.{part}" for part in ("canvas", "cells", "names")}
    | {"altgrad.wording"},
    "altgrad.report.cells": {"altgrad.advice", "altgrad.calibration", "altgrad.wording"},
    "altgrad.report.applying": {f"{Q}.block_formats", "altgrad.advice", "altgrad.records"},
    "altgrad.report.run_report": {"altgrad.advice", "altgrad.figures", "altgrad.records"}
    | {"altgrad.report.applying", "altgrad.report.drawings"},
    "altgrad.report.comparison": {"altgrad.advice", "altgrad.report.run_report"},
    "altgrad.report.terminal": {"altgrad.report.cells", "altgrad.report.names"}
    | {"altgrad.report.comparison", "altgrad.report.run_report"},
    "altgrad.report.exports": {"altgrad.advice", "altgrad.records.schema"}
    | {"altgrad.report.run_report"},
    "altgrad.report.page": {"altgrad", "altgrad.report.canvas", "altgrad.report.cells"}
    | {"altgrad.report.run_report"},
    "altgrad.report.commands": {"altgrad.records"}
    | {f"altgrad.report.{part}" for part in ("comparison", "exports", "page")}
    | {f"altgrad.report.{part}" for part in ("run_report", "terminal")},
    "altgrad.report": {f"altgrad.report.{part}" for part in ("comparison", "drawings", "page")}
    | {f"altgrad.report.{part}" for part in ("run_report", "terminal")},
    "altgrad": {Q, OBS, SAMPLING, "altgrad.figures", "altgrad.measuring"}
    | {"altgrad.monitor", "altgrad.step_record", "altgrad.storage"},
    "altgrad.records.schema": {Q, f"{Q}.block_formats", "altgrad.scales"},
    "altgrad.records.lines": {"altgrad.figures", "altgrad.step_record"},
    "altgrad.records.run": {Q, "altgrad.figures", "altgrad.records.schema"},
    "altgrad.records.reading": {"altgrad.figures", "altgrad.records.run", "altgrad.records.schema"},
    "altgrad.records.writing": {"altgrad", "altgrad.figures", "altgrad.step_record"}
    | {f"altgrad.records.{part}" for part in ("lines", "reading", "schema")},
    "altgrad.records": {f"altgrad.records.{part}" for part in ("reading", "run", "schema")}
    | {"altgrad.records.watching", "altgrad.records.writing"},
    "altgrad.records.watching": {"altgrad.monitor", "altgrad.records.schema"},
    "altgrad.weight_octaves": {"altgrad.figures", SAMPLING, "altgrad.sharded_layers"},
    "altgrad.storage": {Q, f"{Q}.arguments", f"{Q}.block_formats", f"{Q}.scaling", SAMPLING}
    | {f"{Q}.float_format"}
    | {f"{OBS}.{part}" for part in ("local", "optimizers", "parameter_names", "step_hooks")}
    | {"altgrad.scales"},
    "altgrad.wording": set(),
    "altgrad.calibration": set(),
    "altgrad.advice": {"altgrad.calibration", "altgrad.records", "altgrad.wording"},
    "altgrad.cli": {Q},
    "altgrad.__main__": {"altgrad.cli"},
    "altgrad_lightning": {"altgrad_lightning.callback"},
    "altgrad_lightning.packages": set(),
    "altgrad_lightning.loggers": {"altgrad.advice", "altgrad.figures", "altgrad.metrics"}
    | {"altgrad.report"},
    "altgrad_lightning.history": {"altgrad.report"},
    "altgrad_lightning.charts": {"altgrad", "altgrad.metrics"},
    "altgrad_lightning.output": {"altgrad", "altgrad.advice", "altgrad.figures", "altgrad.records"}
    | {"altgrad.report"}
    | {f"altgrad_lightning.{part}" for part in ("charts", "history", "loggers")},
    "altgrad_lightning.strategies": {f"{OBS}.fully_shard"},
    "altgrad_lightning.callback": {
        "altgrad",
        "altgrad.host_group",
        "altgrad.advice",
        "altgrad.figures",
        Q,
    }
    | {f"altgrad_lightning.{part}" for part in ("output", "packages", "strategies")},
    "altgrad_lightning.demo": {"altgrad.records", "altgrad.report"}
    | {"altgrad_lightning.callback", "altgrad_lightning.packages"},
}


def project_modules() -> dict[str, Path]:
    files = [*ROOT.glob("altgrad/**/*.py"), *ROOT.glob("altgrad_lightning/**/*.py")]
    names = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in ("altgrad", "altgrad_lightning")}


def test_every_module_is_listed() -> None:
    assert set(project_modules()) == set(ALLOWED)


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_imports_point_one_way(module: str) -> None:
    assert imports_of(project_modules()[module]) <= ALLOWED[module]


def test_the_allowed_imports_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {name for name, needs in ALLOWED.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {set(ALLOWED) - done}"
        done |= ready


def modules_after(statement: str) -> set[str]:
    script = f"{statement}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_altgrad_imports_torch_and_nothing_more() -> None:
    added = modules_after("import torch, altgrad") - modules_after("import torch")
    foreign = {name for name in added if name.split(".")[0] != "altgrad"}
    # Standard library modules that torch happens not to have imported yet are no cost.
    heavy = {name for name in foreign if name.split(".")[0] not in sys.stdlib_module_names}
    assert heavy == set()


@pytest.mark.parametrize("heavy", ["pytorch_lightning", "lightning", "matplotlib", "tensorboard"])
def test_importing_altgrad_does_not_import(heavy: str) -> None:
    assert heavy not in {name.split(".")[0] for name in modules_after("import altgrad")}
